"""The active (row, latent) pairs of a batch, grouped by latent."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LatentOrder:
    """Active pairs sorted by latent, so that each latent's rows form one segment.

    A pair is an element of the flattened `[n_rows, k]` selection. Within a segment pairs
    keep their row order, so that a sum over a segment has one fixed order of additions.
    """

    pairs: torch.Tensor  # [n_rows * k] int64, positions in the flattened selection
    offsets: torch.Tensor  # [d_sae + 1] int64; inactive pairs lie beyond offsets[-1]
    k: int

    @property
    def d_sae(self) -> int:
        return self.offsets.numel() - 1

    def counts(self) -> torch.Tensor:
        """Number of rows on which each latent is active, `[d_sae]` int64."""
        return self.offsets.diff()

    @classmethod
    def of(cls, latents: torch.Tensor, active: torch.Tensor, d_sae: int) -> "LatentOrder":
        """Sort a selection by latent.

        Args:
            latents: `[n_rows, k]` integer, the selected latents.
            active: `[n_rows, k]` bool; pairs where it is False are left out.
            d_sae: number of latents.
        """
        keys = latents.to(torch.int32).masked_fill(~active, d_sae).flatten()
        sorted_keys, pairs = torch.sort(keys, stable=True)
        boundaries = torch.arange(d_sae + 1, dtype=torch.int32, device=latents.device)
        return cls(pairs, torch.searchsorted(sorted_keys, boundaries), latents.shape[1])
