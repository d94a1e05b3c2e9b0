"""Values of a weight's rows at pairs, differentiable."""

from __future__ import annotations

from typing import Any

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.pairs import LatentOrder
from saelens_sparse.ops.rows.operations import segment_totals


def at_latents(
    values: torch.Tensor, latents: torch.Tensor, order: LatentOrder, backend: Backend
) -> torch.Tensor:
    """`values[latents]` for `[d_sae]` values, with a gradient summed in a fixed order.

    Args:
        values: `[d_sae]`.
        latents: int64, in any shape.
        order: the active ones of them by latent; others pass no gradient on.
        backend: `"triton"` or `"torch"`.
    """
    return _AtLatents.apply(values, latents, order, backend)  # pyright: ignore[reportReturnType]


class _AtLatents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        latents: torch.Tensor,
        order: LatentOrder,
        backend: Backend,
    ) -> torch.Tensor:
        ctx.order, ctx.backend, ctx.dtype = order, backend, values.dtype
        return values[latents]

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        totals = segment_totals(ctx.order, grads[0], ctx.backend)
        return totals.to(ctx.dtype), None, None, None
