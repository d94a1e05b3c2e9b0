"""Counts that travel from the device to the host while both go on working."""

import torch


class HostCount:
    """Number of True elements of a mask, copied to the host in the background.

    On a GPU the count is queued at once, and `wait` blocks only until the device has reached
    that point of its queue, not until it has finished what was queued since.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        self._count = mask.sum()
        self._event: torch.cuda.Event | None = None
        if mask.is_cuda:
            on_host = torch.empty((), dtype=self._count.dtype, pin_memory=True)
            self._count = on_host.copy_(self._count, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(mask.device))

    def wait(self) -> int:
        if self._event is not None:
            self._event.synchronize()
        return int(self._count)
