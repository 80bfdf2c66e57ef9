"""Parts of a benchmark that take turns, and the ratios of their times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

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
