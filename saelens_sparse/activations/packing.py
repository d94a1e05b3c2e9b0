"""From the tokens of rows of a dataset to sequences of one length, as SAELens makes them.

A packer is fed one row at a time, and gives sequences until it needs another row. Unlike SAELens's
`concat_and_batch_sequences`, whose rules these are, what it holds in between can be saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch

_NO_TOKENS = torch.empty(0, dtype=torch.long, device="cpu")


class Packer(ABC):
    """
    Makes sequences of `context_size` tokens from rows.

    Args:
        context_size: tokens of a sequence.

    Attributes:
        row: tokens of the last row that are in no sequence yet, `[n]`, int64, on the host.
    """

    def __init__(self, context_size: int) -> None:
        self.context_size = context_size
        self.row = _NO_TOKENS

    def feed(self, row: torch.Tensor) -> None:
        """Take the next row, `[n]`. The one before it must have been used up."""
        self.row = row

    @abstractmethod
    def next(self) -> torch.Tensor | None:
        """The next sequence, `[context_size]`; None where another row is needed."""

    def state(self) -> dict[str, torch.Tensor]:
        """What makes another packer go on where this one stands."""
        return {"row": self.row}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where a packer with that state stood."""
        self.row = state["row"]


class ConcatenatedRows(Packer):
    """
    Rows one after the other, cut into sequences.

    Args:
        context_size: tokens of a sequence.
        bos: token that each sequence begins with; None for no such token.
        separator: token between two rows of a sequence; None for no such token.
    """

    def __init__(self, context_size: int, bos: int | None, separator: int | None) -> None:
        super().__init__(context_size)
        self._bos, self._separator = bos, separator
        self._begun = _NO_TOKENS  # a sequence that ended with a row

    def next(self) -> torch.Tensor | None:
        if len(self.row) == 0:
            return None
        before = self._separator if len(self._begun) else self._bos
        begun = self._begun
        if before is not None and self.row[0] != before:
            begun = torch.cat([begun, self.row.new_tensor([before])])
        n_missing = self.context_size - len(begun)
        sequence = torch.cat([begun, self.row[:n_missing]])
        self.row = self.row[n_missing:]
        is_whole = len(sequence) == self.context_size
        self._begun = _NO_TOKENS if is_whole else sequence
        return sequence if is_whole else None

    def state(self) -> dict[str, torch.Tensor]:
        return {**super().state(), "begun": self._begun}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load(state)
        self._begun = state["begun"]


class SeparateRows(Packer):
    """
    The beginning of each row; rows that are too short are left out.

    Args:
        context_size: tokens of a sequence.
        bos: token that each sequence begins with; None for no such token.
    """

    def __init__(self, context_size: int, bos: int | None) -> None:
        super().__init__(context_size)
        self._bos = bos

    def next(self) -> torch.Tensor | None:
        row, self.row = self.row, _NO_TOKENS
        is_long = len(row) >= max(1, self.context_size - 1)
        if self._bos is not None and is_long and row[0] != self._bos:
            row = torch.cat([row.new_tensor([self._bos]), row[: self.context_size - 1]])
        return row[: self.context_size] if len(row) >= self.context_size else None


class TokenizedRows(Packer):
    """Rows that are sequences already, perhaps with more tokens than are wanted."""

    def next(self) -> torch.Tensor | None:
        row, self.row = self.row, _NO_TOKENS
        return row[: self.context_size] if len(row) else None
