"""The memory that a process's training steps take."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class ProcessMemory:
    """
    The most memory that training steps held, leaving out what happens between them.

    On CUDA this is PyTorch's own count, on Linux the kernel's count of the process's resident
    set; elsewhere both numbers stay None.

    Args:
        device: Where the SAE is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None
        """Most that a step held."""
        self.added_bytes: int | None = None
        """Most that a step held above what was held before the first of them."""
        self._held_before: int | None = None

    @contextmanager
    def of_step(self) -> Generator[None]:
        """Take the peak of what happens inside into account."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif CLEAR_PEAK.exists():
            CLEAR_PEAK.write_text("5")
        if self._held_before is None:
            self._held_before = self._peak_since_reset()
        yield
        if (peak := self._peak_since_reset()) is not None and self._held_before is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak)
            self.added_bytes = self.peak_bytes - self._held_before

    def _peak_since_reset(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or not CLEAR_PEAK.exists():
            return None
        found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())
        return 1024 * int(found[1]) if found else None
