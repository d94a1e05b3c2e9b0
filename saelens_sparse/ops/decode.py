"""Differentiable decoder at pairs."""

from __future__ import annotations

from typing import Any

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.common.precision import summed_dtype
from saelens_sparse.ops.pairs import ActivePairs, LatentOrder
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import gather_dot, gather_sum
from saelens_sparse.ops.update.row_gradient import RowGradient


def decode_pairs(
    acts: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: ActivePairs,
    order: LatentOrder,
    block: RowBlock | None,
    backend: Backend,
    row_gradients: list[RowGradient] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`acts @ weight + bias` for activations at pairs, `[n_rows, d_in]`, and a block of rows.

    Args:
        acts: `[n_pairs]`, zero for a pair that takes part in no sum.
        weight: `[d_sae, d_in]`.
        bias: `[d_in]` or None.
        pairs: the pairs.
        order: the same pairs by latent.
        block: rows of `weight` to return too, or None.
        backend: `"triton"` or `"torch"`.
        row_gradients: gets the weight's gradient in the backward pass, and autograd none; None for
            the other way round.

    Returns:
        The sum, and the block (`[block.width, d_in]`) or None.
    """
    return _DecodePairs.apply(  # pyright: ignore[reportReturnType]
        acts, weight, bias, pairs, order, block, backend, row_gradients
    )


class _DecodePairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pairs: ActivePairs,
        order: LatentOrder,
        block: RowBlock | None,
        backend: Backend,
        row_gradients: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(acts, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.pairs, ctx.order, ctx.block = pairs, order, block
        ctx.backend, ctx.row_gradients = backend, row_gradients
        ctx.summed_dtype = summed_dtype(weight, backend)
        ctx.set_materialize_grads(False)
        recons = gather_sum(acts, pairs.latents, pairs.rows, weight, backend, bias)
        return recons, None if block is None else block.of(weight)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        acts, weight = ctx.saved_tensors
        pairs, backend = ctx.pairs, ctx.backend
        if grads[0] is None:
            grad_output = weight.new_zeros(pairs.rows.n_rows, weight.shape[1])
        else:
            grad_output = grads[0].to(weight.dtype).contiguous()
        grad_acts = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_acts = gather_dot(grad_output, pairs.latents, pairs.rows, weight, backend)
            grad_acts = grad_acts.to(acts.dtype)
        if ctx.needs_input_grad[1]:
            summed = grad_output.to(ctx.summed_dtype)
            gradient = RowGradient(ctx.order, acts, summed, ctx.block, grads[1], False)
            if ctx.row_gradients is None:
                grad_weight, _ = gradient.dense(weight.dtype, backend)
            else:
                ctx.row_gradients.append(gradient)
        if ctx.needs_input_grad[2] and grads[0] is not None:
            grad_bias = grads[0].sum(0).to(ctx.bias_dtype)
        return grad_acts, grad_weight, grad_bias, None, None, None, None, None
