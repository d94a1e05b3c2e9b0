"""Wall clock, memory and device time of work that host and device share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

GIB = 2**30
PER_TOKENS = 4096
"""Times are given for so many tokens, a batch of SAELens's default size."""


def now(device: str) -> float:
    """Seconds of the host's clock, once the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """
    Adds up the seconds of the blocks that it is entered for.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begin = now(self.device)

    def __exit__(self, *_exception: object) -> None:
        self.seconds += now(self.device) - self._begin


def start_peak(device: str) -> int:
    """Begin to record the peak of allocated memory; gives the bytes that are allocated now."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_gib(device: str, before: int = 0) -> float | None:
    """GiB allocated at most since `start_peak`, beyond the bytes `before`; None on a CPU."""
    return (torch.cuda.max_memory_allocated() - before) / GIB if device == "cuda" else None


def device_profile() -> Any:
    """A profile of what runs on the GPU."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def busy_ms(profile: Any) -> float:
    """Milliseconds in which a kernel, a copy or a fill runs on the device, in a profile."""
    spans = (
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )
    return covered(spans) / 1e3


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line its spans cover, where some overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def profiled_ms(work: Callable[[], object], device: str) -> float | None:
    """How long the device is busy with the work; None on a CPU."""
    if device != "cuda":
        return None
    with device_profile() as profile:
        work()
        torch.cuda.synchronize()
    return busy_ms(profile)
