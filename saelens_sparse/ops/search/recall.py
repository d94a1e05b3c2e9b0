"""How much of what there was to find a search has found, on a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.ops.pairs import ActivePairs


@dataclass(frozen=True)
class RowSample:
    """
    Rows of a batch, and which latents were found on them.

    Attributes:
        rows: `[n]` int64.
        found: `[n, d_sae]` bool, without pairs that take part in no sum.
    """

    rows: torch.Tensor
    found: torch.Tensor

    @classmethod
    def of(cls, pairs: ActivePairs, d_sae: int, size: int) -> RowSample:
        """Rows at equal distances, `size` of them or all."""
        n_rows = pairs.rows.n_rows
        n = min(size, n_rows)
        rows = torch.arange(n, device=pairs.latents.device) * n_rows // max(n, 1)
        return cls(rows, _latents_of(pairs, rows, d_sae))

    def recall(self, exact: ActivePairs) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Compare with a search that misses nothing.

        Args:
            exact: what it found on these rows, numbered from zero.

        Returns:
            The share of its latents that were found, and the share of rows with all of theirs: two
            float32 scalars.
        """
        n, d_sae = self.found.shape
        there = _latents_of(exact, torch.arange(n, device=self.rows.device), d_sae)
        missed = there & ~self.found
        return 1 - missed.sum() / there.sum().clamp(min=1), 1 - missed.any(1).float().mean()


def _latents_of(pairs: ActivePairs, rows: torch.Tensor, d_sae: int) -> torch.Tensor:
    """Where latents are among the pairs of these rows, `[n, d_sae]` bool."""
    device, n, n_rows = rows.device, rows.numel(), pairs.rows.n_rows
    # What is on other rows, or beyond the last, goes to a row of its own; what takes part in no
    # sum, to a column of its own.
    places = torch.full((n_rows,), n, device=device).index_copy_(
        0, rows, torch.arange(n, device=device)
    )
    positions = torch.arange(pairs.keys.numel(), device=device)
    is_on_row = positions < pairs.rows.starts(device)[-1]
    row = places[pairs.rows.of(positions)].where(is_on_row, n)
    there = torch.zeros(n + 1, d_sae + 1, dtype=torch.bool, device=device)
    there[row, pairs.keys.long()] = True
    return there[:-1, :-1]
