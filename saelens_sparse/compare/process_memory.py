"""The memory that a process's training steps take."""

from __future__ import annotations

from pathlib import Path

import torch

_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


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
        self._held_before: int | None = None

    @property
    def added_bytes(self) -> int | None:
        """Most that a step held above what was held before the first of them."""
        if self.peak_bytes is None or self._held_before is None:
            return None
        return self.peak_bytes - self._held_before

    def begin_step(self) -> None:
        """Forget the peaks of whatever came before, such as loading activations."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_PEAK.exists():
            _CLEAR_PEAK.write_text("5")
        if self._held_before is None:
            self._held_before = self._peak_since_reset()

    def end_step(self) -> None:
        """Take the step's peak into account."""
        peak = self._peak_since_reset()
        if peak is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak)

    def _peak_since_reset(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or not _CLEAR_PEAK.exists():
            return None
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
