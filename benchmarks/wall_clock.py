"""Wall clock, memory and device time of work that host and device share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saelens_sparse.whole_run.clock import busy_ms, device_profile, now

GIB = 2**30


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


def profiled_ms(work: Callable[[], object], device: str) -> float | None:
    """How long the device is busy with the work; None on a CPU."""
    if device != "cuda":
        return None
    with device_profile() as profile:
        work()
        torch.cuda.synchronize()
    return busy_ms(profile)
