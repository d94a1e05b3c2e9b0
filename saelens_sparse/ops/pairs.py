"""Pairs (row, latent) of a batch: by row, as a search finds them, and by latent.

Pairs lie in flat lists `[n_pairs]` in which those of a row are neighbours. A list may be longer
than its rows together: what lies beyond the last row belongs to none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch


@dataclass(frozen=True)
class Rows:
    """Which pairs of a list are on which row: as many on each, or from offset to offset.

    Attributes:
        n_rows: number of rows.
        k: pairs of each row; None if they differ.
        offsets: `[n_rows + 1]` int64, where each row begins; None if all have k.
        of_pairs: `[n_pairs]` int32, the row of each pair, 0 beyond the last row; likewise.
    """

    n_rows: int
    k: int | None
    offsets: torch.Tensor | None = None
    of_pairs: torch.Tensor | None = None

    @classmethod
    def regular(cls, n_rows: int, k: int) -> Self:
        """Rows of k pairs each."""
        return cls(n_rows, k)

    @classmethod
    def ragged(cls, offsets: torch.Tensor, of_pairs: torch.Tensor) -> Self:
        """Rows from offset to offset."""
        return cls(offsets.numel() - 1, None, offsets, of_pairs)

    @classmethod
    def of_lengths(cls, lengths: torch.Tensor) -> Self:
        """Rows of these lengths (`[n_rows]` integer), with no pairs beyond the last."""
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        rows = torch.arange(lengths.numel(), device=lengths.device, dtype=torch.int32)
        return cls.ragged(offsets, rows.repeat_interleave(lengths))

    @classmethod
    def of_ascending(cls, rows: torch.Tensor, n_rows: int) -> Self:
        """The row of each pair (`[n_pairs]` int64, ascending), with no pairs beyond the last."""
        lengths = torch.bincount(rows, minlength=n_rows)
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return cls.ragged(offsets, rows.to(torch.int32))

    def count(self) -> int:
        """Number of pairs that are on a row. Waits for the device if rows differ."""
        if self.k is not None:
            return self.n_rows * self.k
        assert self.offsets is not None
        return int(self.offsets[-1])

    def starts(self, device: torch.device) -> torch.Tensor:
        """Where each row begins and the last one ends, `[n_rows + 1]` int64."""
        if self.k is not None:
            return torch.arange(self.n_rows + 1, device=device) * self.k
        assert self.offsets is not None
        return self.offsets

    def of(self, pairs: torch.Tensor) -> torch.Tensor:
        """The row of each of these pairs, int64."""
        if self.k is not None:
            return pairs // self.k
        assert self.of_pairs is not None
        return self.of_pairs[pairs].long()


@dataclass(frozen=True)
class ActivePairs:
    """The pairs at which an activation or a gradient can differ from zero.

    Attributes:
        latents: `[n_pairs]` int64.
        keys: `[n_pairs]` int32, the latent, or d_sae for a pair that takes part in no sum.
        pre_acts: `[n_pairs]`, `x @ W_enc + b_enc` in the dtype that the dense encoder would give.
        rows: the row of each pair.
        row_counts: `[n_rows]` int32, number of active latents; None if those are the pairs that
            take part in sums.
        rows_recomputed: number of rows that were computed in full because a screen could not vouch
            for them.
    """

    latents: torch.Tensor
    keys: torch.Tensor
    pre_acts: torch.Tensor
    rows: Rows
    row_counts: torch.Tensor | None = None
    rows_recomputed: int = 0


@dataclass(frozen=True)
class LatentOrder:
    """Pairs sorted by latent, so that each latent's pairs form one segment.

    Within a segment pairs keep their row order, so that a sum over a segment has one fixed order of
    additions.

    Attributes:
        pairs: `[n_pairs]` int64, positions in the list by row.
        keys: `[n_pairs]` int32, the latent of each; d_sae for pairs that take part in no sum.
        offsets: `[d_sae + 1]` int64, where each latent's segment begins.
        rows: the rows of the list.
    """

    pairs: torch.Tensor
    keys: torch.Tensor
    offsets: torch.Tensor
    rows: Rows

    @classmethod
    def of(cls, pairs: ActivePairs, d_sae: int) -> Self:
        """Sort pairs by latent."""
        return cls.of_keys(pairs.keys, pairs.rows, d_sae)

    @classmethod
    def of_keys(cls, keys: torch.Tensor, rows: Rows, d_sae: int) -> Self:
        """As `of`, from the keys of pairs, `[n_pairs]` int32."""
        sorted_keys, pairs = torch.sort(keys, stable=True)
        boundaries = torch.arange(d_sae + 1, dtype=torch.int32, device=keys.device)
        return cls(pairs, sorted_keys, torch.searchsorted(sorted_keys, boundaries), rows)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.offsets.numel() - 1

    @cached_property
    def counts(self) -> torch.Tensor:
        """Number of pairs of each latent, `[d_sae]` int64."""
        return self.offsets[1:] - self.offsets[:-1]
