"""A batch's pass through the model as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saelens_sparse.language_model.decoder import Point
from saelens_sparse.warn import warn_caller

Run = Callable[[Tensor], dict[Point, Tensor]]
"""From tokens `[n_prompts, n_positions]` to values at points of the model."""

N_WARMUPS = 2


class GraphedRun:
    """
    Replays a pass for batches of the shape that came first; any other shape runs as it is.

    The pass must not wait for the device, and must read its weights where they stay. A graph holds
    the memory of one pass's intermediate values until this object is freed.

    Args:
        run: the pass.
        device: where it runs; nothing is recorded unless that is a CUDA device.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._records = device.type == "cuda"
        self._tokens: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: dict[Point, Tensor] = {}

    def __call__(self, tokens: Tensor) -> dict[Point, Tensor]:
        """The activations of a batch, in memory of their own."""
        if self._records and self._tokens is None:
            self._record(tokens)
        if self._graph is None or self._tokens is None or tokens.shape != self._tokens.shape:
            return self._run(tokens)
        self._tokens.copy_(tokens)
        self._graph.replay()
        return {point: output.clone() for point, output in self._outputs.items()}

    def _record(self, tokens: Tensor) -> None:
        self._tokens = tokens.clone()
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(N_WARMUPS):
                    self._run(self._tokens)
            torch.cuda.current_stream(tokens.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._outputs = self._run(self._tokens)
            self._graph = graph
        except RuntimeError as error:
            self._records = False
            cause = (str(error).strip() or "no message").splitlines()[0]
            warn_caller(f"The language model runs without a CUDA graph: {cause}")
