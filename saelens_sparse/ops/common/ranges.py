"""Ranges in a profiler's trace: the phases of a step, and what each kernel is asked for."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.autograd import profiler
from torch.profiler import record_function
from torch.utils._pytree import tree_leaves

PREFIX = "saelens_sparse::"
WORK_PREFIX = f"{PREFIX}work "
_NOTHING = nullcontext()

Work = Callable[[Mapping[str, Any]], tuple[float, float]]
"""From a kernel's arguments by name: bytes that a launch reads and writes, and its flops."""


def profiler_range(name: str) -> AbstractContextManager[object]:
    """
    A range of the trace while a profiler of PyTorch runs, else nothing.

    Args:
        name: `saelens_sparse::` and a phase: step, encode, search, decode, losses, backward,
            statistics (counting which latents fire), clip (the norm of the gradients) or optimizer.
            Ranges nest; what lies in several belongs to the innermost.
    """
    return record_function(name) if _is_profiling() else _NOTHING


def with_work(
    launch: Callable[..., Any], argument_names: tuple[str, ...], work: Work | None
) -> Callable[..., Any]:
    """
    A launch of a kernel that tells a running profiler how many bytes and flops it is asked for.

    Args:
        launch: takes the kernel's arguments.
        argument_names: of the kernel, in order.
        work: from its arguments; None for bytes of every tensor among them, each once.
    """
    if not _is_profiling():
        return launch

    @wraps(launch)
    def launch_in_range(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(argument_names, args, strict=False)), **kwargs}
        bytes_, flops = (_all_arguments if work is None else work)(arguments)
        with record_function(f"{WORK_PREFIX}{bytes_:.0f} {flops:.0f}"):
            return launch(*args, **kwargs)

    return launch_in_range


def _is_profiling() -> bool:
    return profiler._is_profiler_enabled  # pyright: ignore[reportPrivateUsage]


def _all_arguments(arguments: Mapping[str, Any]) -> tuple[float, float]:
    """Bytes of all tensors, those in tuples too; no flops."""
    leaves = tree_leaves(list(arguments.values()))
    return float(sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))), 0.0
