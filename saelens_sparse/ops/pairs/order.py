"""The active (row, latent) pairs of a batch, grouped by latent."""

from dataclasses import dataclass
from functools import cached_property

import torch

from saelens_sparse.ops.pairs.ragged import RaggedRows


@dataclass(frozen=True)
class LatentOrder:
    """Active pairs sorted by latent, so that each latent's rows form one segment.

    A pair is an element of the flattened `[n_rows, k]` selection, or of a flat one with ragged
    rows. Within a segment pairs keep their row order, so that a sum over a segment has one fixed
    order of additions.
    """

    pairs: torch.Tensor  # [n_pairs] int64, positions in the flattened selection
    keys: torch.Tensor  # [n_pairs] int32, the latent of each; d_sae for inactive pairs
    offsets: torch.Tensor  # [d_sae + 1] int64, where each latent's segment begins
    k: int  # pairs of each row; 0 if they differ
    ragged: RaggedRows | None = None

    @property
    def d_sae(self) -> int:
        return self.offsets.numel() - 1

    @cached_property
    def counts(self) -> torch.Tensor:
        """Number of rows on which each latent is active, `[d_sae]` int64."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def of(cls, latents: torch.Tensor, active: torch.Tensor, d_sae: int) -> "LatentOrder":
        """Sort a selection by latent.

        Args:
            latents: `[n_rows, k]` integer, the selected latents.
            active: `[n_rows, k]` bool; pairs where it is False are left out.
            d_sae: number of latents.
        """
        keys = torch.where(active, latents, d_sae).to(torch.int32)
        return cls.of_keys(keys, d_sae)

    @classmethod
    def of_keys(
        cls, keys: torch.Tensor, d_sae: int, ragged: RaggedRows | None = None
    ) -> "LatentOrder":
        """As `of`, from int32 keys: the latent, or d_sae for an inactive pair.

        Args:
            keys: `[n_rows, k]`, or `[n_pairs]` with ragged rows.
            d_sae: number of latents.
            ragged: the rows of flat keys.
        """
        sorted_keys, pairs = torch.sort(keys.flatten(), stable=True)
        boundaries = torch.arange(d_sae + 1, dtype=torch.int32, device=keys.device)
        offsets = torch.searchsorted(sorted_keys, boundaries)
        return cls(pairs, sorted_keys, offsets, keys.shape[1] if ragged is None else 0, ragged)

    def rows_of(self, pairs: torch.Tensor) -> torch.Tensor:
        """The row that each of these pairs is on."""
        return pairs // self.k if self.ragged is None else self.ragged.rows[pairs].long()
