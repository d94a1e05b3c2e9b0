"""A few rows of a weight as one dense block."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.rows.operations import add_rows


@dataclass(frozen=True)
class RowBlock:
    """Latents whose weight rows are wanted as one dense block, padded with zero rows.

    A weight that is used both sparsely and through `weight[latents]` would get two dense
    `[d_sae, d_in]` gradients, added by autograd. So encoders and decoders hand out the block
    themselves, and their backward adds its few rows to the gradient that it builds.

    Attributes:
        latents: `[n]` int64, distinct.
        width: rows of the block, at least n.
    """

    latents: torch.Tensor
    width: int

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The block of a weight given as `[d_sae, d]` rows, `[width, d]`."""
        n = self.latents.numel()
        block = rows.new_empty(self.width, rows.shape[1])
        torch.index_select(rows, 0, self.latents, out=block[:n])
        block[n:].zero_()
        return block


def add_block(
    gradient: torch.Tensor,
    block: RowBlock | None,
    block_gradient: torch.Tensor | None,
    backend: Backend,
) -> None:
    """Add the gradient of a block to `gradient`, `[d_sae, d]`, in place."""
    if block is not None and block_gradient is not None:
        n = block.latents.numel()
        add_rows(gradient, block.latents, block_gradient[:n], backend)
