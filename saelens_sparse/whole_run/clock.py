"""Clocks of host and device that make neither wait for the other while they run."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch

PER_TOKENS = 4096
"""Times are given for so many tokens, a batch of SAELens's default size."""

Mark = Any


def now(device: str) -> float:
    """
    Seconds of the host's clock, once the device has done what it was given.

    On CUDA that is every device that this process uses: the language model may have its own.
    """
    if torch.device(device).type == "cuda":
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(index):
                torch.cuda.synchronize(index)
    return time.perf_counter()


class Stopwatch:
    """Marks points in a device's work, and tells the milliseconds between them."""

    def __init__(self, device: str):
        self._device = torch.device(device)
        self.on_cuda = self._device.type == "cuda"

    def mark(self) -> Mark:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def milliseconds(self, start: Mark, end: Mark) -> float:
        if not self.on_cuda:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


class PartClock:
    """
    Divides the time of a thread and of the device that it drives among named parts.

    Each moment belongs to the innermost part. A change of parts leaves a mark in the device's
    stream, and nothing waits: on a GPU a part lasts from the end of the work before it to the end
    of its own. Work of other threads and other devices is not seen.

    Args:
        device: Of the training, such as "cuda:0".
        rest: The part of all that belongs to no other.
    """

    def __init__(self, device: str, rest: str):
        self._watch = Stopwatch(device)
        self._thread = threading.get_ident()
        self._inside = [rest]
        self._marks: list[tuple[str, Mark]] | None = None  # a part, and where it begins

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Within, time is that part's."""
        if threading.get_ident() != self._thread:
            yield
            return
        self._inside.append(name)
        self._mark()
        try:
            yield
        finally:
            self._inside.pop()
            self._mark()

    def rest_is(self, name: str) -> None:
        """From now on, what belongs to no part belongs to this one."""
        if threading.get_ident() == self._thread and self._inside[0] != name:
            self._inside[0] = name
            if len(self._inside) == 1:
                self._mark()

    def start(self) -> None:
        """Forget what was, and begin."""
        self._marks = []
        self._mark()

    def stop(self) -> dict[str, float]:
        """Milliseconds of each part since `start`, once the device has done its work."""
        self._mark()
        marks, self._marks = self._marks or [], None
        found: dict[str, float] = {}
        for (name, begin), (_, end) in itertools.pairwise(marks):
            found[name] = found.get(name, 0.0) + self._watch.milliseconds(begin, end)
        return found

    def _mark(self) -> None:
        if self._marks is not None:
            self._marks.append((self._inside[-1], self._watch.mark()))


def device_profile() -> Any:
    """A profile of what runs on the GPU."""
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def busy_ms(profile: Any, index: int | None = None) -> float:
    """
    Milliseconds in which a kernel, a copy or a fill runs, in a profile.

    Args:
        profile: Of `device_profile`.
        index: Of the device; by default that of any.
    """
    spans = (
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type.name == "CUDA"
        and not event.is_user_annotation
        and index in (None, event.device_index)
    )
    return covered(spans) / 1e3


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line its spans cover, where some overlap."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
