"""Launching kernels: on the device of their tensors, within its limits, alike in every Triton."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial, wraps
from inspect import signature
from typing import Any, ParamSpec, Self, TypeVar

import torch
import triton

from saelens_sparse.ops.common.ranges import Work, with_work

_P = ParamSpec("_P")
_R = TypeVar("_R")

# Programs that a launch may have in each dimension of its grid.
MAX_GRID = (2**31 - 1, 65_535, 65_535)
# Threads that a program may have.
_MAX_THREADS = 1024


class kernel:
    """
    `triton.jit` for what is launched, as `function[grid](...)`, rather than called by a kernel.

    Every launch says that a multiplication and an addition are fused into one operation, which
    rounds once. Published results rely on it bit by bit, and Triton's default changes in 3.10. The
    bounds of screening hold either way: Triton's interpreter does not fuse.

    Args:
        function: in Triton's language.
        work: what a launch asks for, for profiles; by default each tensor argument once.
    """

    def __init__(self, function: Callable[..., None], work: Work | None = None) -> None:
        self.name = function.__name__
        self.jitted = triton.jit(function)
        self.work = work
        self._arguments = tuple(signature(function).parameters)

    @classmethod
    def asking(cls, work: Work) -> Callable[[Callable[..., None]], Self]:
        """A kernel that asks for more or less than its arguments, such as rows that it gathers."""
        return partial(cls, work=work)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """
        What launches the kernel on a grid of programs.

        Raises:
            ValueError: no GPU launches so many programs at once.
        """
        if any(n > most for n, most in zip(grid, MAX_GRID, strict=False)):
            raise ValueError(
                f"{self.name} needs a grid of {' x '.join(map(str, grid))} programs; "
                f"at most {' x '.join(map(str, MAX_GRID))} can be launched"
            )
        launch = partial(self.jitted[grid], enable_fp_fusion=True)
        return with_work(launch, self._arguments, self.work)


@cache
def max_warps(device: torch.device) -> int:
    """Warps that a program may have on a device: 32, or 16 where a warp has 64 threads."""
    if device.type != "cuda":
        return _MAX_THREADS // 32
    return _MAX_THREADS // torch.cuda.get_device_properties(device).warp_size


def warps(elements: int, per_warp: int, device: torch.device) -> int:
    """Warps for a program that holds so many elements."""
    wanted = triton.next_power_of_2(triton.cdiv(elements, per_warp))
    return min(max_warps(device), max(1, wanted))


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
