"""Differentiable encoder at pairs."""

from __future__ import annotations

from typing import Any

import torch

from saelens_sparse.ops.activation.pairs import PairActivation
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.common.precision import summed_dtype
from saelens_sparse.ops.pairs import ActivePairs, LatentOrder
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import gather_sum, row_combination, segment_totals
from saelens_sparse.ops.update.row_gradient import RowGradient


def encode_pairs(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    pairs: ActivePairs,
    order: LatentOrder,
    activation: PairActivation,
    block: RowBlock | None,
    backend: Backend,
    row_gradients: list[RowGradient] | None = None,
    rounded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`activation(x @ weight + bias)` at pairs, L0 of each row, and a block of rows.

    The values are those of `pairs`; this attaches them to the graph.

    Args:
        x: `[n_rows, d_in]`, already centred. It gets a gradient only if it requires one.
        weight: `[d_in, d_sae]`, a transposed view of contiguous `[d_sae, d_in]` rows (SAELens's
            `W_enc` in latent-major layout); its gradient has the same strides.
        bias: `[d_sae]`.
        input_bias: `[d_in]`, a bias that was subtracted from a constant input to give `x`, or
            None. Its gradient is `-weight @ sum_n dpre[n]`, one matrix-vector product.
        pairs: the pairs and their pre-activations.
        order: the same pairs by latent.
        activation: the activation function.
        block: rows of `weight.T` to return too, or None.
        backend: `"triton"` or `"torch"`.
        row_gradients: gets the weight's gradient in the backward pass, and autograd none; None for
            the other way round.
        rounded: `[d_sae, d_in]`, `weight.T` in lower precision, or None. It spares reading the
            weight where a gradient is computed in that precision.

    Returns:
        The activations `[n_pairs]`; L0 `[n_rows]` in their dtype, or None if `pairs` does not count
        rows; the block (`[block.width, d_in]`) or None.
    """
    return _EncodePairs.apply(  # pyright: ignore[reportReturnType]
        x, weight, bias, input_bias, activation.threshold, pairs, order, activation, block,
        backend, row_gradients, rounded,
    )  # fmt: skip


class _EncodePairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,  # noqa: ARG004
        input_bias: torch.Tensor | None,  # noqa: ARG004
        threshold: torch.Tensor | None,
        pairs: ActivePairs,
        order: LatentOrder,
        activation: PairActivation,
        block: RowBlock | None,
        backend: Backend,
        row_gradients: list[RowGradient] | None,
        rounded: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        acts = activation.values(pairs, backend)
        ctx.save_for_backward(x, weight, threshold, rounded)
        ctx.pairs, ctx.order, ctx.activation = pairs, order, activation
        ctx.block, ctx.backend, ctx.row_gradients = block, backend, row_gradients
        ctx.summed_dtype, ctx.rows_dtype = summed_dtype(x, backend), summed_dtype(weight, backend)
        ctx.set_materialize_grads(False)
        l0 = None if pairs.row_counts is None else pairs.row_counts.to(acts.dtype)
        return acts, l0, None if block is None else block.of(weight.T)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, _, rounded = ctx.saved_tensors
        pairs, order, backend = ctx.pairs, ctx.order, ctx.backend
        need_x, need_weight, need_bias, need_input_bias, need_threshold = ctx.needs_input_grad[:5]
        grad_pre_acts, grad_thresholds = ctx.activation.gradients(pairs, *grads[:2], backend)
        grad_x = grad_weight = grad_bias = grad_input_bias = grad_threshold = None
        rows = weight.T
        if need_weight:
            summed = x.to(ctx.summed_dtype)
            gradient = RowGradient(order, grad_pre_acts, summed, ctx.block, grads[2], True)
            if ctx.row_gradients is None:
                grad_weight, grad_bias = gradient.dense(weight.dtype, backend)
            else:
                ctx.row_gradients.append(gradient)
        if need_bias or need_input_bias:
            if grad_bias is None:
                grad_bias = segment_totals(order, grad_pre_acts, backend).to(weight.dtype)
            if need_input_bias:
                dtype = ctx.rows_dtype
                combined = rows if rounded is None or rounded.dtype != dtype else rounded
                grad_input_bias = -row_combination(grad_bias, combined, backend, dtype)
        if need_threshold:
            grad_threshold = segment_totals(order, grad_thresholds, backend)
        if need_x:
            in_no_sum = pairs.keys == order.d_sae
            coefficients = grad_pre_acts.masked_fill(in_no_sum, 0)
            grad_x = gather_sum(coefficients, pairs.latents, pairs.rows, rows, backend).to(x.dtype)
        return (
            grad_x, grad_weight, grad_bias, grad_input_bias, grad_threshold,
            None, None, None, None, None, None, None,
        )  # fmt: skip
