"""Parts of a benchmark that take turns, the ratios of their times, and what they hold in memory."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from types import TracebackType

import torch


def interleaved(parts: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every part in every repeat, the parts taking turns.

    On a CPU the processor's time, so that other programs on the machine do not count; on a GPU the clock's.
    """
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 1):
        for name, part in parts.items():
            start = clock()
            part()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def default_rows(
    standard: Callable[[], object], steps: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """What the steps of the default preset cost, in standard steps; short as they are, with three times the repeats."""
    seconds = interleaved({"standard": standard, **steps}, 3 * repeats, device)
    return {f"{name}: step of the default preset / standard step": ratio(seconds, name, "standard") for name in steps}


def new_samples(number: int) -> Iterator[list[str]]:
    """Ids of batch after batch of samples that were never met before."""
    for batch in itertools.count():
        yield [f"new {batch} {i}" for i in range(number)]


class PeakMemory:
    """The largest number of bytes held at once inside the block, beyond what was held before, by torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
            return
        self._profile.stop()
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            self.bytes = max(self.bytes, held)
