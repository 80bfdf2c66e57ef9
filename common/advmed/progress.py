"""How far long work has come: a bar on a terminal, a line now and then in a log file, both with the time that is left.

Every loop of ours that can take more than some seconds is watched by this, on every host. Imports nothing heavy.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Self, TypeVar

from tqdm import tqdm

_DELAY = 1.0
"""Seconds before a bar."""
_FIRST, _LONGEST = 10.0, 600.0
"""Seconds before the first line in a log file, and between two of them at most; each wait is twice the one before."""
_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"

T = TypeVar("T")


class ProgressBar:
    """Work that is counted, shown where a person looks at it.

    On a terminal it is a bar of tqdm on the standard error, after a second. Elsewhere (a log file, a cluster's output,
    a notebook) it is a line after ten seconds, and then after waits that double up to ten minutes. Of work that ends
    sooner nothing is said.

    Args:
        what: is done.
        total: how much there is of it.
        unit: what is counted, in the plural.
        shown: False for nothing at all, as in all processes but the first.
        say: takes the lines of a log; None: the standard error.
        clock: seconds; another one for tests.

    Example:
        >>> from advmed.progress import ProgressBar
        >>> seconds = iter([0, 5, 60, 65, 70])
        >>> with ProgressBar("thresholds", 4, "batches", say=print, clock=lambda: next(seconds)) as progress:
        ...     for _ in range(4):
        ...         progress.update()
        thresholds: 2 of 4 batches, about 60 s left
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        *,
        shown: bool = True,
        say: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done = total, 0
        self._what, self._unit, self._say, self._clock = what, unit, say or _to_standard_error, clock
        terminal = on_terminal()
        self._lines = shown and not terminal
        columns, lines = _size()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            bar_format=_FORMAT,
            delay=_DELAY,
            ncols=columns,
            nrows=lines,
            disable=not (shown and terminal),
        )
        self._begun, self._before = clock(), 0
        self._next, self._wait = self._begun + _FIRST, _FIRST

    def update(self, done: int = 1, now: str = "", *, earlier: bool = False) -> None:
        """So much more is done.

        Args:
            done: how much.
            now: a word on what it was, for the bar.
            earlier: whether an earlier run did it, so that its time says nothing about what is left.
        """
        self.done += done
        if now:
            self._bar.set_postfix_str(now, refresh=False)
        self._bar.update(done)
        time_now = self._clock()
        if earlier:
            self._begun, self._before = time_now, self.done
            return
        if not self._lines or time_now < self._next or self._before == self.done or self.done >= self.total:
            return
        left = (time_now - self._begun) / (self.done - self._before) * (self.total - self.done)
        self._say(f"{self._what}: {self.done} of {self.total} {self._unit}, about {duration(left)} left")
        self._wait = min(2 * self._wait, _LONGEST)
        self._next = time_now + self._wait

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def watched(
    items: Iterable[T],
    what: str,
    unit: str,
    *,
    total: int | None = None,
    shown: bool = True,
    say: Callable[[str], object] | None = None,
) -> Iterator[T]:
    """The items, one after the other, as a :class:`ProgressBar` whose work is what is done with each of them.

    Args:
        items: the work.
        what: is done.
        unit: what is counted, in the plural.
        total: how many items there are; None: they know it themselves.
        shown: False for nothing at all.
        say: takes the lines of a log.

    Raises:
        TypeError: for items that do not know how many they are, without ``total``.

    Example:
        >>> from advmed.progress import watched
        >>> sum(watched([1, 2, 3], "adding", "numbers"))
        6
    """
    if total is None:
        if not isinstance(items, Sized):
            raise TypeError(f"a {type(items).__name__} does not know how many items it has: say it with total")
        total = len(items)
    with ProgressBar(what, total, unit, shown=shown, say=say) as progress:
        for item in items:
            yield item
            progress.update()


def duration(seconds: float) -> str:
    """Seconds in the units that one would say it in."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 60 * 48 else f"{minutes / 1440:.1f} days"


def on_terminal() -> bool:
    """Whether a person looks at the standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def _size() -> tuple[int | None, int | None]:
    """Columns and lines for a terminal that does not know how many it has, as in some containers; None: it does.

    A bar of no columns is none.
    """
    try:
        columns, lines = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # it is none
        return None, None
    return (None, None) if columns and lines else (80, 24)


def write(line: str) -> None:
    """A line on the standard output that does not tear a bar."""
    tqdm.write(line)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
