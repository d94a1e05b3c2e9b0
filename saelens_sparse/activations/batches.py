"""The stream of training batches: fills a buffer from the language model and serves from it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from saelens_sparse.activations.epoch import Sequences
from saelens_sparse.activations.mixing import MixingBuffer

# Names in a state, and the beginning of some.
GENERATOR, BUFFER = "random", "buffer."


class ModelBatch(NamedTuple):
    """
    Activations of one batch of the language model.

    Attributes:
        parts: `[n, width]` for each hook.
        sequences: The tokens that they are of; None if activations come from a cache.
        rows_read: What `Epoch.rows_read` was before these tokens; where a cache stood before.
    """

    parts: list[torch.Tensor]
    sequences: Sequences | None = None
    rows_read: int = 0


class Source(Protocol):
    """
    Where activations come from.

    Attributes:
        reads_early: Whether activations for the next shuffle are taken as places become free.
    """

    @property
    def reads_early(self) -> bool: ...

    def model_batch(self) -> ModelBatch:
        """The next ones, of another epoch if this one has ended."""
        ...

    def model_batch_of_epoch(self) -> ModelBatch | None:
        """The next ones; None if there are not as many as usual left of this epoch."""
        ...

    def put_back(self, batch: ModelBatch) -> None:
        """Take back the tokens of what was given last."""
        ...

    def position(self) -> dict[str, torch.Tensor]:
        """Where it stands, in a form that can be saved."""
        ...

    def go_to(self, position: Mapping[str, torch.Tensor]) -> None:
        """Stand where it stood."""
        ...


@dataclass
class _Fill:
    """
    How things were when filling for the next shuffle began.

    Attributes:
        position: Of the source.
        early: What was read ahead since; without its activations.
        is_whole: Whether `early` is all that was read since.
    """

    position: dict[str, torch.Tensor]
    early: list[ModelBatch] = field(default_factory=list)
    is_whole: bool = True


class Batches(Iterator[Any]):
    """
    Batches of activations in SAELens's order.

    Their state is whole at any moment. If an exception ends a call, a signal's for instance, the
    next one begins to fill anew.

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
        self._fill: _Fill | None = None
        self._generator: torch.Tensor | None = None  # its state, while a shuffle draws from it

    def __next__(self) -> Any:
        with self._lock:
            if self._fill is not None and not self._fill.is_whole:  # a call was interrupted
                self.give_back()
            if self._buffer.n_to_serve == 0:
                self._fill_and_shuffle()
            elif self._source.reads_early:
                self._read_ahead()
            return self._form(self._buffer.next_batch())

    def give_back(self) -> None:
        """Undo what was read ahead, so that the source stands where SAELens's would."""
        fill = self._fill
        if fill is None:
            return
        self._buffer.drop(0)
        if self._generator is not None:
            torch.set_rng_state(self._generator)
        if fill.is_whole:
            fill.is_whole = False  # until all is back
            while fill.early:
                self._source.put_back(fill.early.pop())
        else:
            self._source.go_to(fill.position)
        self._fill = self._generator = None

    def state(self, *, with_buffer: bool) -> dict[str, torch.Tensor]:
        """
        What makes other batches of the same source go on where these stand.

        Returns:
            The source's position, the state of PyTorch's generator of the host and, if it is
            wanted, the buffer's state under names that begin with `BUFFER`.
        """
        fill = self._fill
        position = self._source.position() if fill is None else fill.position
        generator = torch.get_rng_state() if self._generator is None else self._generator
        state = position | {GENERATOR: generator}
        if with_buffer:
            buffer = self._buffer.state(n_added=self._buffer.n_added if fill is None else 0)
            state |= {BUFFER + name: part for name, part in buffer.items()}
        return state

    def load(self, buffer: dict[str, torch.Tensor]) -> None:
        """Go on with the buffer of such a state, without the names' beginning."""
        self._fill = None
        self._buffer.load(buffer)

    def _fill_and_shuffle(self) -> None:
        self._fill = self._fill or _Fill(self._source.position())
        self._fill.is_whole = False
        has_more = bool(self._fill.early)
        while not has_more or not self._buffer.is_full:
            self._buffer.add(self._source.model_batch().parts)
            has_more = True
        self._generator = torch.get_rng_state()
        self._buffer.shuffle()
        self._fill = self._generator = None  # no signal comes between this and the shuffle's end
        self._buffer.prepare_shuffle()

    def _read_ahead(self) -> None:
        """Compute one batch of the language model early, if there is room and it will be needed."""
        is_enough = self._fill is not None and self._buffer.is_full
        if is_enough or not self._buffer.has_room:
            return
        fill = self._fill = self._fill or _Fill(self._source.position())
        fill.is_whole = False
        batch = self._source.model_batch_of_epoch()
        if batch is not None:
            self._buffer.add(batch.parts)
            fill.early.append(batch._replace(parts=[]))
        fill.is_whole = True
