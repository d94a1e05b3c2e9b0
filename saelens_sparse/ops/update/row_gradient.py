"""A weight's gradient as the sums that make it, for an optimizer that never holds it as a whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.pairs import LatentOrder
from saelens_sparse.ops.rows.block import RowBlock, add_block
from saelens_sparse.ops.rows.operations import segment_sum


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a weight with rows `[d_sae, d]`: a sum over each latent's active pairs of
    coefficient times batch row, and a few dense rows.

    Attributes:
        order: the pairs by latent.
        coefficients: `[n_pairs]`.
        batch: `[n_rows, d]`.
        block: which rows `block_gradient` is added to, or None.
        block_gradient: `[block.width, d]` or None.
        is_transposed: whether the weight is the transposed view of its rows, as `W_enc` is.
    """

    order: LatentOrder
    coefficients: torch.Tensor
    batch: torch.Tensor
    block: RowBlock | None
    block_gradient: torch.Tensor | None
    is_transposed: bool

    def rows_of(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight`, or something of its shape and strides, as `[d_sae, d]` rows."""
        return weight.T if self.is_transposed else weight

    def dense(self, dtype: torch.dtype, backend: Backend) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient in the weight's shape and strides, and each latent's sum of coefficients,
        `[d_sae]`.
        """
        rows, totals = segment_sum(self.order, self.coefficients, self.batch, dtype, backend)
        add_block(rows, self.block, self.block_gradient, backend)
        return self.rows_of(rows), totals
