"""The stream of training batches: fills a buffer from the language model and serves from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch

from saelens_sparse.activations.epoch import Sequences
from saelens_sparse.activations.mixing import MixingBuffer


class ModelBatch(NamedTuple):
    """
    Activations of one batch of the language model.

    Attributes:
        parts: `[n, width]` for each hook.
        sequences: The tokens that they are of; None if activations come from a cache.
        rows_read: What `Epoch.rows_read` was before these tokens.
    """

    parts: list[torch.Tensor]
    sequences: Sequences | None = None
    rows_read: int = 0


class Source(Protocol):
    """
    Where activations come from.

    Attributes:
        reads_ahead: Whether activations for the next shuffle are computed as places become free.
    """

    reads_ahead: bool

    def model_batch(self) -> ModelBatch:
        """The next ones, of another epoch if this one has ended."""
        ...

    def model_batch_of_epoch(self) -> ModelBatch | None:
        """The next ones; None if there are not as many as usual left of this epoch."""
        ...

    def put_back(self, batch: ModelBatch) -> None:
        """Take back the tokens of what was given last."""
        ...


class Batches(Iterator[Any]):
    """
    Batches of activations in SAELens's order.

    Reading ahead changes neither their order nor what others get who take tokens from the same
    source: `give_back` undoes what was read too early.

    Args:
        buffer: New.
        source: Where activations come from.
        form: What a batch looks like, given its parts.
        lock: Held while the buffer or the source changes. A batch may be asked for by one thread
            while another one saves the state.
    """

    def __init__(
        self,
        buffer: MixingBuffer,
        source: Source,
        form: Callable[[list[torch.Tensor]], Any],
        lock: threading.RLock,  # pyright: ignore[reportInvalidTypeForm]
    ) -> None:
        self._buffer, self._source, self._form, self._lock = buffer, source, form, lock
        self._early: list[ModelBatch] = []  # in the buffer already, for the next shuffle

    def __next__(self) -> Any:
        with self._lock:
            if self._buffer.n_to_serve == 0:
                self._fill()
            batch = self._buffer.next_batch()
            if self._source.reads_ahead:
                self._read_ahead()
            return self._form(batch)

    def give_back(self) -> None:
        """Undo what was read ahead, so that the source stands where SAELens's would."""
        while self._early:
            self._buffer.drop_last()
            self._source.put_back(self._early.pop())

    def state(self) -> dict[str, torch.Tensor]:
        """What makes other batches of the same source go on where these stand."""
        self.give_back()
        return self._buffer.state()

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where batches with that state stood."""
        self._early.clear()
        self._buffer.load(state)

    def _fill(self) -> None:
        is_first = not self._early
        self._early.clear()
        while is_first or not self._buffer.is_full:
            self._buffer.add(self._source.model_batch().parts)
            is_first = False
        self._buffer.shuffle()

    def _read_ahead(self) -> None:
        """Compute one batch of the language model early, if there is room and it will be needed."""
        if self._early and self._buffer.is_full:
            return
        if not self._buffer.has_room:
            return
        batch = self._source.model_batch_of_epoch()
        if batch is not None:
            self._buffer.add(batch.parts)
            self._early.append(batch)
