"""Tensors that travel between host and device while both go on working."""

from __future__ import annotations

import torch


class HostCopy:
    """A small tensor, copied to the host in the background.

    On a GPU the copy is queued at once, and `values` blocks only until the device has reached that
    point of its queue, not until it has finished what was queued since. While a CUDA graph is
    recorded there is nothing to copy yet.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._on_device = self._values = values
        self._event: torch.cuda.Event | None = None
        if values.is_cuda and not torch.cuda.is_current_stream_capturing():
            on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = on_host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def values(self) -> torch.Tensor:
        """The tensor, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._values

    def renewed(self) -> HostCopy:
        """A copy of what the replay of a CUDA graph has written into the same memory."""
        return HostCopy(self._on_device)


class HostCount:
    """Number of True elements of a mask, counted on the device.

    Attributes:
        mask: the mask.
    """

    def __init__(self, mask: torch.Tensor, count: HostCopy | None = None) -> None:
        self.mask = mask
        self._count = HostCopy(mask.sum()) if count is None else count

    def wait(self) -> int:
        """The number."""
        return int(self._count.values())

    def renewed(self) -> HostCount:
        """The count that the replay of a CUDA graph has written anew."""
        return HostCount(self.mask, self._count.renewed())


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device. From the host to a GPU, nothing waits for the copy."""
    is_async = device.type == "cuda"
    if is_async and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=is_async)
