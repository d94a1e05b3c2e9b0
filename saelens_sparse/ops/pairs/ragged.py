"""Rows of pairs of unequal length."""

from dataclasses import dataclass
from typing import Self

import torch


@dataclass(frozen=True)
class RaggedRows:
    """Which pairs of a flat list `[n_pairs]` belong to which row; a row's pairs are neighbours.

    The list may be longer than the rows together: what lies beyond the last row belongs to none.
    """

    offsets: torch.Tensor  # [n_rows + 1] int64, where each row begins
    rows: torch.Tensor  # [n_pairs] int32, the row of each pair; 0 beyond the last row

    @property
    def n_rows(self) -> int:
        return self.offsets.numel() - 1

    @classmethod
    def of_lengths(cls, lengths: torch.Tensor) -> Self:
        """Rows of these lengths (`[n_rows]` integer), with no pairs beyond the last."""
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(lengths.numel(), device=lengths.device, dtype=torch.int32)
        return cls(offsets, rows.repeat_interleave(lengths))

    @classmethod
    def of_rows(cls, rows: torch.Tensor, n_rows: int) -> Self:
        """The row of each pair (`[n_pairs]` int64, ascending), with no pairs beyond the last."""
        lengths = torch.bincount(rows, minlength=n_rows)
        return cls(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)), rows.to(torch.int32))
