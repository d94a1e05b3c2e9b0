"""A batch's pass through the model as a CUDA graph."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from saelens_sparse.language_model.decoder import Padding, Point
from saelens_sparse.ops.common.cuda_graph import record
from saelens_sparse.warn import warn_caller

N_WARMUPS = 2


class Run(Protocol):
    """From tokens `[n_prompts, n_positions]` and their padding to values at points of the model."""

    def __call__(self, tokens: Tensor, padding: Padding | None = None) -> dict[Point, Tensor]: ...


class Recording:
    """
    A recorded pass, and the memory that its input is written to.

    Args:
        run: the pass.
        tokens, padding: a batch of the shape to record.
        pool: memory for intermediate values, which passes that never overlap may share.
    """

    def __init__(self, run: Run, tokens: Tensor, padding: Padding | None, pool: Any) -> None:
        self._tokens = tokens.clone()
        self._padding = None if padding is None else Padding(*(part.clone() for part in padding))
        stream, current = torch.cuda.Stream(tokens.device), torch.cuda.current_stream(tokens.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(N_WARMUPS):
                run(self._tokens, self._padding)
        current.wait_stream(stream)
        self._graph, self._outputs = record(lambda: run(self._tokens, self._padding), stream, pool)

    def replay(self, tokens: Tensor, padding: Padding | None) -> dict[Point, Tensor] | None:
        """The values for a batch, in memory of their own; None if its shape is another."""
        if tokens.shape != self._tokens.shape:
            return None
        self._tokens.copy_(tokens)
        if padding is not None and self._padding is not None:
            for recorded, part in zip(self._padding, padding, strict=True):
                recorded.copy_(part)
        with torch.cuda.device(tokens.device):
            self._graph.replay()
        return {point: output.clone() for point, output in self._outputs.items()}


class GraphedRun:
    """
    Replays a pass for batches of the shape that came first; any other shape runs as it is.

    Batches with and without leading pads have a recording each. The pass must not wait for the
    device, and must read its weights where they stay. Recordings hold the memory of one pass's
    intermediate values until this object is freed.

    Args:
        run: the pass.
        device: where it runs; nothing is recorded unless that is a CUDA device.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run = run
        self._records = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._records else None
        self._recordings: dict[bool, Recording] = {}

    def __call__(self, tokens: Tensor, padding: Padding | None = None) -> dict[Point, Tensor]:
        """The values for a batch, which no later call changes."""
        is_padded = padding is not None
        if self._records and is_padded not in self._recordings:
            try:
                recording = Recording(self._run, tokens, padding, self._pool)
                self._recordings[is_padded] = recording
            except RuntimeError as error:
                self._records = False
                cause = (str(error).strip() or "no message").splitlines()[0]
                warn_caller(f"The language model runs without a CUDA graph: {cause}")
        found = None
        if is_padded in self._recordings:
            found = self._recordings[is_padded].replay(tokens, padding)
        return self._run(tokens, padding) if found is None else found
