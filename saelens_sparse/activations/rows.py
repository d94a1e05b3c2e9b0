"""The rows of a dataset from a position on, and that position in a form that can be saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from saelens_sparse.private_names import EXAMPLES

# Rows of a slice: enough that their number costs more than their slice does.
_ROWS_OF_SLICE = 1024
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class Rows(Iterator[Any]):
    """
    Iterates over a column of a dataset.

    Args:
        dataset: A `Dataset`, an `IterableDataset`, or anything else that can be iterated over.
        column: Name of the column.
        start: Number of rows to leave out.
        stream: What `stream_state` gave where these rows had been read, if it is known.

    Attributes:
        n_read: Rows read or left out so far.
    """

    def __init__(
        self, dataset: Iterable[Any], column: str, start: int = 0, stream: str | None = None
    ) -> None:
        self.n_read = start
        self._column = column
        self._dataset = _copied(dataset) if isinstance(dataset, IterableDataset) else dataset
        if start == 0:
            self._iterator = iter(self._dataset)
        elif isinstance(self._dataset, Dataset):
            left = range(start, len(self._dataset))
            self._iterator = iter(self._dataset.select(left if left else []))
        elif isinstance(self._dataset, IterableDataset) and stream is not None:
            self._dataset.load_state_dict(json.loads(stream))
            self._iterator = iter(self._dataset)
        else:
            self._iterator = iter(self._dataset)
            passed = islice(self._iterator, start)
            for _ in tqdm(passed, "Fast-forwarding through dataset", total=start, leave=False):
                pass

    def __next__(self) -> Any:
        row = next(self._iterator)[self._column]
        self.n_read += 1
        return row

    def stream_state(self) -> str | None:
        """
        The position in a streaming dataset, as JSON; None where it must be found by reading.

        It must be where rows are shuffled in a buffer, whose content `datasets` does not save.
        """
        dataset = self._dataset
        examples = getattr(dataset, EXAMPLES, None)
        if examples is None or not isinstance(dataset, IterableDataset) or _shuffles(examples):
            return None
        try:
            return json.dumps(dataset.state_dict())
        except (TypeError, ValueError, NotImplementedError):
            return None


def _shuffles(examples: Any) -> bool:
    """Whether a stream, or one that it is made of, shuffles rows in a buffer."""
    if type(examples).__name__ == "BufferShuffledExamplesIterable":
        return True
    below = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return any(_shuffles(other) for other in below if other is not None)


def _copied(dataset: IterableDataset) -> IterableDataset:
    """A dataset with a position of its own; what `copy.copy` gives shares all attributes."""
    copy = type(dataset).__new__(type(dataset))
    vars(copy).update(vars(dataset))
    return copy


class TokenSlices:
    """
    Slices of a column of token lists, read from Arrow's memory.

    Args:
        dataset: With such a column: see `can_slice`.
        column: Its name.
        context_size: How many tokens to take from the beginning of each row.
    """

    def __init__(self, dataset: Dataset, column: str, context_size: int) -> None:
        self._dataset = dataset.with_format("arrow", columns=[column])
        self._column = column
        self._context_size = context_size
        self._start, self._slice = 0, torch.empty(0, context_size, dtype=torch.long, device="cpu")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, start: int, n: int) -> torch.Tensor:
        """
        Tokens of up to `n` rows from `start` on, `[<= n, context_size]`, int64, on the host.

        Raises:
            ValueError: a row has fewer than `context_size` tokens.
        """
        stop = min(start + n, len(self))
        if start < self._start or stop > self._start + len(self._slice):
            self._slice = self._tokens(start, min(start + max(n, _ROWS_OF_SLICE), len(self)))
            self._start = start
        return self._slice[start - self._start : stop - self._start]

    def _tokens(self, start: int, stop: int) -> torch.Tensor:
        context_size = self._context_size
        if start >= stop:
            return torch.empty(0, context_size, dtype=torch.long, device="cpu")
        rows: pa.Array = pa.concat_arrays(self._dataset[start:stop][self._column].chunks)
        lengths = torch.from_dlpack(pc.call_function("list_value_length", [rows])).long()
        short = (lengths < context_size).nonzero()
        if len(short):
            raise ValueError(
                f"the dataset's row {start + int(short[0])} has {int(lengths[short[0]])} tokens, "
                f"fewer than context_size, {context_size}"
            )
        tokens = rows.flatten().to_numpy(zero_copy_only=False)
        length = int(lengths[0])
        if (lengths == length).all():
            tokens = tokens.reshape(-1, length)[:, :context_size]
        else:
            begins = (lengths.cumsum(0) - lengths)[:, None].numpy()
            tokens = tokens[begins + np.arange(context_size)]
        return torch.from_numpy(tokens.astype("int64"))


def can_slice(dataset: object, column: str) -> bool:
    """Whether `TokenSlices` can read a column of a dataset."""
    if not isinstance(dataset, Dataset) or column not in dataset.column_names:
        return False
    of_column = dataset.data.schema.field(column).type
    return any(test(of_column) for test in _LISTS) and pa.types.is_integer(of_column.value_type)
