"""How long work takes on the device, measured without waiting for it; and how long a training will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

import torch

from advmed.progress import duration


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Clock:
    """Adds up the time spent inside ``with clock(device):`` blocks.

    On CUDA, pairs of events are recorded and read in :meth:`drain`, which waits for the device; so drain once an epoch.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._device = torch.device("cpu")
        self._start = 0.0

    def __call__(self, device: torch.device) -> Clock:
        """Names the device of the work that follows."""
        self._device = device
        return self

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            events = _event(), _event()
            events[0].record(torch.cuda.current_stream(self._device))
            self._events.append(events)
        else:
            self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
        else:
            self._seconds += time.perf_counter() - self._start

    def drain(self) -> float:
        """The seconds since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


class Pace:
    """How long a training will take, from the time of its first steps and then of its epochs.

    Args:
        epochs: length of the training.
        warmup: epochs of standard training at the beginning.
        steps: batches of an epoch; None: not known, and nothing is said before the first epoch is over.
        cost: of a step after the warm-up, in standard steps.
        every_epoch: whether each epoch begins with a line, not only every tenth of a training.
        clock: seconds; another one for tests.

    Example:
        >>> from advmed.clock import Pace
        >>> seconds = iter(range(100))
        >>> pace = Pace(epochs=4, warmup=0, steps=30, cost=3.3, clock=lambda: next(seconds))
        >>> pace.begin_epoch(0)
        >>> [line for line in (pace.step() for _ in range(12)) if line]
        ['About 2 min to the end (4 epochs of 30 steps; validation comes on top)']
    """

    def __init__(
        self,
        epochs: int,
        warmup: int,
        steps: int | None,
        cost: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        every_epoch: bool = False,
    ) -> None:
        self.epochs, self.warmup, self.steps, self.cost, self._clock = epochs, warmup, steps, cost, clock
        self._every_epoch = every_epoch
        self._epoch = self._made = 0
        self._first = self._begun = math.nan
        self._told, self._known, self._tenth = False, 0, -1
        self._last: dict[bool, float] = {}  # seconds of the last epoch, of the warm-up and after it

    def begin_epoch(self, epoch: int) -> str | None:
        """To be called when an epoch, counted from 0, begins; a line for the log after a first one, and at every tenth
        of a training, or every epoch."""
        now = self._clock()
        if epoch == self._epoch + 1 and self._made:
            self._last[self._epoch < self.warmup] = now - self._begun
        self._epoch, self._begun, self._made = epoch, now, 0
        if not self._last:
            return None
        tenth = 10 * epoch // self.epochs
        if not self._every_epoch and self._told and len(self._last) == self._known and tenth == self._tenth:
            return None
        self._told, self._known, self._tenth = True, len(self._last), tenth
        return f"About {duration(self._left(self._of_epochs(), epoch))} to the end ({self.epochs - epoch} epochs)"

    def step(self) -> str | None:
        """To be called when a step begins; a line for the log once, after the first of them."""
        self._made += 1
        if self._told or self.steps is None:
            return None
        if self._made == 2:  # the first one warms up
            self._first = self._clock()
        enough = min(_ENOUGH, self.steps)
        if self._made < max(3, enough):
            return None
        self._told = True
        seconds = (self._clock() - self._first) / (self._made - 2) * self.steps
        each = self._both(self._epoch < self.warmup, seconds)
        return (
            f"About {duration(self._left(each, self._epoch))} to the end ({self.epochs - self._epoch} epochs of "
            f"{self.steps} steps; validation comes on top)"
        )

    def _both(self, warm: bool, seconds: float) -> dict[bool, float]:
        return {warm: seconds, not warm: seconds * self.cost if warm else seconds / self.cost}

    def _of_epochs(self) -> dict[bool, float]:
        if len(self._last) == 2:
            return self._last
        ((warm, seconds),) = self._last.items()
        return self._both(warm, seconds)

    def _left(self, each: dict[bool, float], epoch: int) -> float:
        warm = max(0, self.warmup - epoch)
        return warm * each[True] + (self.epochs - epoch - warm) * each[False]


_ENOUGH = 12
"""Steps after which an estimate is made."""
