"""Where CUDA graphs are recorded, so that those of several SAEs share memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakSet

import torch

from saelens_sparse.ops.common.cuda_graph import record

_T = TypeVar("_T")


class GraphMemory:
    """A stream and a pool of memory on each device, for graphs that are replayed in turn.

    What a graph needs only while it runs, the others overwrite. What can still be read after it,
    as recorded outputs and gradients, keeps its memory.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._graphs: dict[torch.device, WeakSet[torch.cuda.CUDAGraph]] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream to record on: memory that is freed on one goes to no other."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def record(
        self, call: Callable[[], _T], device: torch.device
    ) -> tuple[torch.cuda.CUDAGraph, _T]:
        """
        Record what a call queues, without its being done.

        Raises:
            RuntimeError: it cannot be recorded. What is recorded next goes to another pool.
        """
        graphs = self._graphs.pop(device, WeakSet[torch.cuda.CUDAGraph]())
        # A pool lives as long as one of its graphs, and cannot be revived.
        alive = next(iter(graphs), None)
        pool = None if alive is None else alive.pool()
        graph, result = record(call, self.stream(device), pool)
        graphs.add(graph)
        self._graphs[device] = graphs
        return graph, result
