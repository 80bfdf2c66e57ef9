"""Measures how long work takes on the device, without waiting for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


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
