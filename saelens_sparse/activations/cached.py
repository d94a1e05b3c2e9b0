"""Activations that SAELens has cached on disk, read from Arrow's memory."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset

TOKENS = "token_ids"


class CachedActivations:
    """
    Reads rows of a dataset that SAELens's `CacheActivationsRunner` has written.

    Args:
        dataset: With a column of activations, `[context_size, d_in]` a row, and perhaps one of
            tokens, `token_ids`, `[context_size]` a row.
        hook_name: The first column's name.
    """

    def __init__(self, dataset: Dataset, hook_name: str) -> None:
        columns = [name for name in (hook_name, TOKENS) if name in dataset.column_names]
        self._rows = dataset.with_format("arrow", columns=columns)
        self._hook_name = hook_name
        self._has_tokens = TOKENS in columns

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Activations of some rows, and their tokens if they are known.

        Returns:
            `[(stop - start) * context_size * d_in]` and `[(stop - start) * context_size]`, int64,
            on the host. They may be views of the file: read only.
        """
        table: Any = self._rows[start:stop]
        tokens = _values(table[TOKENS]).long() if self._has_tokens else None
        return _values(table[self._hook_name]), tokens


def _values(column: pa.ChunkedArray) -> torch.Tensor:
    """The numbers in a column, `[n]`, however they are nested."""
    parts: list[torch.Tensor] = []
    for array in column.chunks:
        values: Any = array.storage if isinstance(array, pa.ExtensionArray) else array
        while pa.types.is_nested(values.type):
            values = values.flatten()
        parts.append(torch.from_dlpack(values))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
