"""One pass over a dataset as sequences of tokens, in SAELens's order, from any position in it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from saelens_sparse.activations.packing import Packer
from saelens_sparse.activations.rows import Rows, TokenSlices

POSITION = "position"


class Sequences(NamedTuple):
    """
    Sequences of tokens, on the host.

    Attributes:
        tokens: `[n, context_size]`, int64.
        rows: `[n]`, int64: how many of the epoch's rows had been read for each.
    """

    tokens: torch.Tensor
    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def joined(self, more: Sequences) -> Sequences:
        """These and then `more`."""
        if not len(self) or not len(more):
            return self if len(self) else more
        return Sequences(*(torch.cat(parts) for parts in zip(self, more, strict=True)))


class Epoch(Iterator[torch.Tensor], ABC):
    """
    The sequences of one pass over a dataset.

    Args:
        rows_before: Rows of the epochs before it.

    Attributes:
        n_taken: Sequences taken so far.
        rows_read: Rows of this epoch that were read for them.
        has_ended: Whether more sequences were asked for than there are.
    """

    def __init__(self, rows_before: int) -> None:
        self.rows_before = rows_before
        self.n_taken = self.rows_read = 0
        self.has_ended = False

    @property
    def n_processed(self) -> int:
        """SAELens's `n_dataset_processed`: it counts a row when the next one is asked for."""
        n = self.n_fetched if self.has_ended else max(0, self.rows_read - 1)
        return self.rows_before + n

    @property
    @abstractmethod
    def n_fetched(self) -> int:
        """Rows of this epoch that were read from the dataset."""

    def read(self, n: int) -> Sequences:
        """Take the next `n` sequences, or those that are left."""
        found = self._read(n)
        self.has_ended = len(found) < n
        self.n_taken += len(found)
        if len(found):
            self.rows_read = int(found.rows[-1])
        return found

    def __next__(self) -> torch.Tensor:
        found = self.read(1)
        if not len(found):
            raise StopIteration
        return found.tokens[0]

    def pass_over(self, n_processed: int) -> None:
        """Take sequences until so many rows count as processed, or none is left."""
        while self.n_processed < n_processed and not self.has_ended:
            self.read(1)

    @abstractmethod
    def _read(self, n: int) -> Sequences: ...

    @abstractmethod
    def put_back(self, sequences: Sequences, rows_read: int) -> None:
        """Take back what was read last, before which `rows_read` was as given."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """What makes a new epoch of the same dataset go on where this one stands."""

    @abstractmethod
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where an epoch with that state stood."""


class SlicedEpoch(Epoch):
    """Rows that are sequences, read in slices."""

    def __init__(self, open_slices: Callable[[], TokenSlices], rows_before: int) -> None:
        super().__init__(rows_before)
        self._open = open_slices  # when the first sequence is wanted, as SAELens does
        self._slices: TokenSlices | None = None

    @property
    @override
    def n_fetched(self) -> int:
        return self.rows_read

    @override
    def _read(self, n: int) -> Sequences:
        self._slices = self._slices or self._open()
        tokens = self._slices.read(self.rows_read, n)
        rows = torch.arange(self.rows_read, self.rows_read + len(tokens), device="cpu") + 1
        return Sequences(tokens, rows)

    @override
    def pass_over(self, n_processed: int) -> None:
        self._slices = self._slices or self._open()
        wanted = n_processed - self.rows_before + 1 if n_processed > self.n_processed else 0
        self.rows_read = min(max(wanted, self.rows_read), len(self._slices))
        self.n_taken = self.rows_read
        self.has_ended = self.n_processed < n_processed

    @override
    def put_back(self, sequences: Sequences, rows_read: int) -> None:
        self.rows_read = self.n_taken = rows_read
        self.has_ended = False

    @override
    def state(self) -> dict[str, torch.Tensor]:
        return {POSITION: as_tensor([self.rows_before, self.rows_read])}

    @override
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        self.rows_before, self.rows_read = as_value(state[POSITION])
        self.n_taken = self.rows_read


class PackedEpoch(Epoch):
    """
    Sequences that are made from rows one by one.

    Args:
        open_rows: Gives the rows from a number and a `Rows.stream_state` on.
        tokenize: Makes tokens of a row, `[n]`, int64, on the host.
        packer: Makes sequences of them.
        rows_before: Rows of the epochs before it.
    """

    def __init__(
        self,
        open_rows: Callable[[int, str | None], Rows],
        tokenize: Callable[[Any], torch.Tensor],
        packer: Packer,
        rows_before: int,
    ) -> None:
        super().__init__(rows_before)
        self._open, self._tokenize, self._packer = open_rows, tokenize, packer
        self._rows: Rows | None = None
        self._returned = _none(packer.context_size)

    @property
    @override
    def n_fetched(self) -> int:
        return 0 if self._rows is None else self._rows.n_read

    @override
    def _read(self, n: int) -> Sequences:
        first, self._returned = _split(self._returned, n)
        self._rows = self._rows or self._open(0, None)
        tokens: list[torch.Tensor] = []
        rows: list[int] = []
        while len(first) + len(tokens) < n:
            sequence = self._packer.next()
            if sequence is not None:
                tokens.append(sequence)
                rows.append(self._rows.n_read)
                continue
            try:
                row = next(self._rows)
            except StopIteration:
                break
            self._packer.feed(self._tokenize(row))
        if not tokens:
            return first
        return first.joined(Sequences(torch.stack(tokens), torch.tensor(rows, device="cpu")))

    @override
    def put_back(self, sequences: Sequences, rows_read: int) -> None:
        self._returned = sequences.joined(self._returned)
        self.rows_read, self.has_ended = rows_read, False
        self.n_taken -= len(sequences)

    @override
    def state(self) -> dict[str, torch.Tensor]:
        stream = None if self._rows is None else self._rows.stream_state()
        position = [self.rows_before, self.rows_read, self.n_taken, self.n_fetched, stream]
        held = {f"packer.{name}": held for name, held in self._packer.state().items()}
        returned = {f"returned.{name}": part for name, part in self._returned._asdict().items()}
        return {POSITION: as_tensor(position), **held, **returned}

    @override
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        position = as_value(state[POSITION])
        self.rows_before, self.rows_read, self.n_taken, n_fetched, stream = position
        self._rows = self._open(n_fetched, stream)
        self._packer.load(part_of(state, "packer."))
        self._returned = Sequences(**part_of(state, "returned."))


def as_tensor(value: Any) -> torch.Tensor:
    """A value that JSON knows, as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def as_value(tensor: torch.Tensor) -> Any:
    """What `as_tensor` was given."""
    return json.loads(bytes(tensor.tolist()))


def part_of(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}


def _none(context_size: int) -> Sequences:
    tokens = torch.empty(0, context_size, dtype=torch.long, device="cpu")
    return Sequences(tokens, tokens.new_empty(0))


def _split(sequences: Sequences, n: int) -> tuple[Sequences, Sequences]:
    return Sequences(*(part[:n] for part in sequences)), Sequences(*(p[n:] for p in sequences))
