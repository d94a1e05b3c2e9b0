"""Activations that SAELens has cached on disk, read from Arrow's memory ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from saelens_sparse.activations import checks
from saelens_sparse.activations.read_ahead import Kept, ReadAhead, Reader, n_threads

TOKENS = "token_ids"


class CachedActivations:
    """
    Reads rows of a dataset that SAELens's `CacheActivationsRunner` has written.

    Args:
        dataset: With a column of activations, `[context_size, d_in]` a row, and perhaps one of
            tokens, `token_ids`, `[context_size]` a row.
        hook_name: The first column's name.
        context_size: Tokens of a row.
        d_in: Width of an activation.
        dtype: That activations are wanted in.
        device: Where they are wanted.
        kept: Tells which are wanted, by their token ids; without it, or without token ids, all are.
    """

    def __init__(
        self,
        dataset: Dataset,
        hook_name: str,
        context_size: int,
        d_in: int,
        dtype: torch.dtype,
        device: torch.device,
        kept: Kept | None,
    ) -> None:
        self.has_tokens = TOKENS in dataset.column_names
        columns = [name for name in (hook_name, TOKENS) if name in dataset.column_names]
        self._rows = dataset.with_format("arrow", columns=columns)
        self._hook_name, self._context_size, self._d_in = hook_name, context_size, d_in
        self._dtype, self._device = dtype, device
        self._kept = kept if self.has_tokens else None
        self._ahead: ReadAhead | None = None
        self._n, self._next = 0, 0  # rows of a read, and where the next one is expected

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, n: int) -> torch.Tensor:
        """
        Activations of `n` rows, `[n * context_size, d_in]`, without those of excluded tokens.

        They are on the device, and valid until the next call. What SAELens would ask for next is
        read meanwhile.

        Raises:
            ValueError: rows are not of the shape that they should have.
        """
        if self._ahead is None or (start, n) != (self._next, self._n):
            self.close()
            self._ahead = self._new_read_ahead(start, n)
        self._n, self._next = n, start + n if start + 2 * n <= len(self) else 0
        activations, *kept = self._ahead.next()
        activations = activations.view(-1, self._d_in)
        return activations.index_select(0, kept[0]) if kept else activations

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _new_read_ahead(self, start: int, n: int) -> ReadAhead:
        per_epoch = max(1, len(self) // n)
        until_end = max(1, (len(self) - start) // n)

        def start_of(number: int) -> int:
            if number < until_end:
                return start + number * n
            return (number - until_end) % per_epoch * n

        n_values = n * self._context_size * self._d_in
        readers: list[Reader] = []
        for _ in range(n_threads(n_values * self._dtype.itemsize)):
            pins = self._device.type == "cuda"
            memory = torch.empty(n_values, dtype=self._dtype, device="cpu", pin_memory=pins)
            readers.append(_RowReader(self._rows, self._hook_name, start_of, self._kept, memory, n))
        return ReadAhead(readers, 0, self._device)


class _RowReader(NamedTuple):
    """Reads `n` rows from where `start_of` says into `memory`."""

    rows: Dataset
    hook_name: str
    start_of: Callable[[int], int]
    kept: Kept | None
    memory: torch.Tensor
    n: int

    def __call__(self, number: int) -> list[torch.Tensor]:
        start = self.start_of(number)
        table: Any = self.rows[start : start + self.n]
        values = _values(table[self.hook_name])
        checks.check_cached(sum(map(len, values)), len(self.memory), self.n)
        done = 0
        for part in values:
            place = self.memory[done : done + len(part)]
            if part.dtype == place.dtype:
                np.copyto(place.numpy(), part.numpy())  # in this thread alone
            else:
                place.copy_(part)
            done += len(part)
        if self.kept is None:
            return [self.memory]
        tokens = torch.cat([part.long() for part in _values(table[TOKENS])])
        return [self.memory, self.kept(tokens)]


def _values(column: pa.ChunkedArray) -> list[torch.Tensor]:
    """The numbers in a column, in parts of `[n]`, however they are nested."""
    parts: list[torch.Tensor] = []
    for array in column.chunks:
        values: Any = array.storage if isinstance(array, pa.ExtensionArray) else array
        while pa.types.is_nested(values.type):
            values = values.flatten()
        parts.append(torch.from_dlpack(values))
    return parts
