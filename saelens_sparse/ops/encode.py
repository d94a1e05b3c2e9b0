"""Differentiable encode and decode at selected latents, and dense use of a few weight rows."""

from typing import Any

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.pairs.order import LatentOrder
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import (
    gather_dot,
    gather_sum,
    row_combination,
    segment_totals,
)
from saelens_sparse.ops.search.topk import Selection, topk_values
from saelens_sparse.ops.update.row_gradient import RowGradient


def encode_selected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    selection: Selection,
    order: LatentOrder,
    block: RowBlock | None,
    backend: Backend,
    sink: list[RowGradient] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`relu(x @ weight + bias)` at the selected latents, `[n_rows, k]`, and a block of rows.

    The values are those of `selection`; this attaches them to the graph.

    Args:
        x: `[n_rows, d_in]`, already centred. It gets a gradient only if it requires one.
        weight: `[d_in, d_sae]`, a transposed view of contiguous `[d_sae, d_in]` rows (SAELens's
            `W_enc` in latent-major layout); its gradient has the same strides.
        bias: `[d_sae]`.
        input_bias: `[d_in]`, a bias that was subtracted from a constant input to give `x`, or
            None. Its gradient is `-weight @ sum_n dpre[n]`, one matrix-vector product.
        selection: the selected latents and their pre-activations.
        order: the same pairs by latent, without those clipped by the ReLU.
        block: rows of `weight.T` to return too, or None.
        backend: `"triton"` or `"torch"`.
        sink: gets the weight's gradient in the backward pass, and autograd none; None for the
            other way round.

    Returns:
        The activations, and the block (`[block.width, d_in]`) or None.
    """
    return _EncodeSelected.apply(  # pyright: ignore[reportReturnType]
        x, weight, bias, input_bias, selection, order, block, backend, sink
    )


def decode_selected(
    acts: torch.Tensor,
    weight: torch.Tensor,
    latents: torch.Tensor,
    order: LatentOrder,
    block: RowBlock | None,
    backend: Backend,
    sink: list[RowGradient] | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`acts @ weight + bias` for activations at selected latents, `[n_rows, d_in]`, and a block of
    rows.

    Args:
        acts: `[n_rows, k]`, or `[n_pairs]` if the rows of `order` are ragged; zero wherever
            `order` leaves a pair out.
        weight: `[d_sae, d_in]`.
        latents: int64, of the shape of `acts`.
        order: the active pairs by latent.
        block: rows of `weight` to return too, or None.
        backend: `"triton"` or `"torch"`.
        sink: gets the weight's gradient in the backward pass, and autograd none; None for the
            other way round.
        bias: `[d_in]` or None.

    Returns:
        The sum, and the block (`[block.width, d_in]`) or None.
    """
    return _DecodeSelected.apply(  # pyright: ignore[reportReturnType]
        acts, weight, bias, latents, order, block, backend, sink
    )


def keep_topk(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    backend: Backend,
) -> torch.Tensor:
    """The values of `topk_values`, differentiable with respect to `products` and `bias`."""
    return _KeepTopK.apply(products, bias, norms, k, backend)  # pyright: ignore[reportReturnType]


class _EncodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,  # noqa: ARG004
        input_bias: torch.Tensor | None,  # noqa: ARG004
        selection: Selection,
        order: LatentOrder,
        block: RowBlock | None,
        backend: Backend,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        acts = selection.pre_acts.relu()
        ctx.save_for_backward(x, weight, acts, selection.latents)
        ctx.order, ctx.block, ctx.backend, ctx.sink = order, block, backend, sink
        ctx.set_materialize_grads(False)
        return acts, None if block is None else block.of(weight.T)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, acts, latents = ctx.saved_tensors
        need_x, need_weight, need_bias, need_input_bias = ctx.needs_input_grad[:4]
        # Clipped pairs are not in ctx.order, so their gradient need not be zeroed for it.
        grad_acts = torch.zeros_like(acts) if grads[0] is None else grads[0]
        grad_x = grad_weight = grad_bias = grad_input_bias = None
        rows = weight.T
        if need_weight or need_bias or need_input_bias:
            gradient = RowGradient(ctx.order, grad_acts, x, ctx.block, grads[1], True)
            grad_weight, grad_bias = deliver(
                gradient, weight.dtype, need_weight, ctx.backend, ctx.sink
            )
            if need_input_bias:
                grad_input_bias = -row_combination(grad_bias, rows, ctx.backend)
        if need_x:
            # A NaN activation passes its gradient on, as a ReLU does.
            grad_pre_acts = grad_acts.masked_fill(acts <= 0, 0)
            grad_x = gather_sum(grad_pre_acts, latents, rows, ctx.backend).to(x.dtype)
        return grad_x, grad_weight, grad_bias, grad_input_bias, None, None, None, None, None


class _DecodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        latents: torch.Tensor,
        order: LatentOrder,
        block: RowBlock | None,
        backend: Backend,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(acts, weight, latents)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.order, ctx.block, ctx.backend, ctx.sink = order, block, backend, sink
        ctx.set_materialize_grads(False)
        recons = gather_sum(acts, latents, weight, backend, order.ragged, bias)
        return recons, None if block is None else block.of(weight)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        acts, weight, latents = ctx.saved_tensors
        order, backend = ctx.order, ctx.backend
        if grads[0] is None:
            n_rows = acts.shape[0] if order.ragged is None else order.ragged.n_rows
            grad_output = weight.new_zeros(n_rows, weight.shape[1])
        else:
            grad_output = grads[0].to(weight.dtype).contiguous()
        grad_acts = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_acts = gather_dot(grad_output, latents, weight, backend, order.ragged)
            grad_acts = grad_acts.to(acts.dtype)
        if ctx.needs_input_grad[1]:
            gradient = RowGradient(order, acts, grad_output, ctx.block, grads[1], False)
            if ctx.sink is None:
                grad_weight, _ = gradient.dense(weight.dtype, backend)
            else:
                ctx.sink.append(gradient)
        if ctx.needs_input_grad[2] and grads[0] is not None:
            grad_bias = grads[0].sum(0).to(ctx.bias_dtype)
        return grad_acts, grad_weight, grad_bias, None, None, None, None, None


def deliver(
    gradient: RowGradient,
    dtype: torch.dtype,
    need_weight: bool,
    backend: Backend,
    sink: list[RowGradient] | None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Put an encoder's gradient into the sink, or make it if there is none; if it is needed.

    Returns:
        The gradient if it was made, and each latent's sum of coefficients, `[d_sae]`.
    """
    if need_weight and sink is None:
        return gradient.dense(dtype, backend)
    if need_weight and sink is not None:
        sink.append(gradient)
    return None, segment_totals(gradient.order, gradient.coefficients, backend).to(dtype)


class _KeepTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: torch.Tensor,
        bias: torch.Tensor,
        norms: torch.Tensor | None,
        k: int,
        backend: Backend,
    ) -> torch.Tensor:
        values, kept = topk_values(products, bias, norms, k, backend)
        ctx.save_for_backward(kept)
        ctx.n, ctx.bias_dtype = bias.numel(), bias.dtype
        return values

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        grad_products = torch.where(kept, grads[0], 0.0)
        sum_dtype = torch.promote_types(ctx.bias_dtype, torch.float32)
        grad_bias = grad_products.sum(0, dtype=sum_dtype)[: ctx.n].to(ctx.bias_dtype)
        return grad_products, grad_bias, None, None, None
