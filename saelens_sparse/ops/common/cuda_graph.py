"""Recording what is queued on a GPU as a CUDA graph, and the memory that takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def record(
    call: Callable[[], _T], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, _T]:
    """
    Record what a call queues on a side stream, without its being done.

    Args:
        call: what is recorded.
        stream: of the device that it runs on, which need not be the current one.
        pool: memory for what it allocates; None for memory of its own.

    Returns:
        The graph, and what the call gave.

    Raises:
        RuntimeError: PyTorch cannot record it. All can go on without the graph.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, which may be preparing activations, go on as they like.
        with (
            torch.cuda.device(stream.device),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            return graph, call()
    except RuntimeError:
        # PyTorch's generator believes that the recording goes on.
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise


def kept_by_graphs() -> int:
    """
    Bytes on all GPUs that CUDA graphs write in each replay, and no tensor has.

    PyTorch counts them as allocated only while a graph is recorded.
    """
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )
