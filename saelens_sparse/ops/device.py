"""Launching kernels on the device of their tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU current, as `on_device_of_arguments` does; nothing on other devices."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_device_of_arguments(launcher: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make the GPU of the first tensor argument current: Triton launches on the current one."""

    @wraps(launcher)
    def launch(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launcher(*args, **kwargs)
        with torch.cuda.device(device):
            return launcher(*args, **kwargs)

    return launch
