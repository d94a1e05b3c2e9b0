"""Differentiable encode and decode at selected latents, and dense use of a few weight rows."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from saelens_sparse.implementation import Backend
from saelens_sparse.ops.latent_order import LatentOrder
from saelens_sparse.ops.row_ops import add_rows, gather_dot, gather_sum, segment_sum
from saelens_sparse.ops.select import Selection, topk_values


class RowGradients:
    """Gradients of a few rows of a weight, on their way to the weight's main gradient.

    A weight that is used both sparsely (`encode_selected`, `decode_selected`) and through
    `gather_rows` would get two dense `[d_sae, d_in]` gradients, added by autograd. Instead the
    backward of `gather_rows` leaves its rows here, and the backward of the sparse use adds
    them to the one gradient that it builds. `gather_rows` takes an output of the sparse use
    as an input, so autograd runs the two in that order.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []

    def leave(self, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        self._parts.append((rows, gradient))

    def add_to(self, dense: torch.Tensor, backend: Backend) -> None:
        """Add what was left to `dense`, `[d_sae, d]`."""
        for rows, gradient in self._parts:
            add_rows(dense, rows, gradient, backend)
        self._parts.clear()


def encode_selected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    selection: Selection,
    order: LatentOrder,
    row_gradients: RowGradients,
    backend: Backend,
) -> torch.Tensor:
    """`relu(x @ weight + bias)` at the selected latents, `[n_rows, k]`.

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
        row_gradients: what `gather_rows` on the same weight leaves.
        backend: `"triton"` or `"torch"`.
    """
    return _EncodeSelected.apply(  # pyright: ignore[reportReturnType]
        x, weight, bias, input_bias, selection, order, row_gradients, backend
    )


def decode_selected(
    acts: torch.Tensor,
    weight: torch.Tensor,
    latents: torch.Tensor,
    order: LatentOrder,
    row_gradients: RowGradients,
    backend: Backend,
) -> torch.Tensor:
    """`acts @ weight` for activations at selected latents, `[n_rows, d_in]`.

    Args:
        acts: `[n_rows, k]`; zero wherever `order` leaves a pair out.
        weight: `[d_sae, d_in]`.
        latents: `[n_rows, k]` int64.
        order: the active pairs by latent.
        row_gradients: what `gather_rows` on the same weight leaves.
        backend: `"triton"` or `"torch"`.
    """
    return _DecodeSelected.apply(  # pyright: ignore[reportReturnType]
        acts, weight, latents, order, row_gradients, backend
    )


def gather_rows(
    weight: torch.Tensor,
    rows: torch.Tensor,
    width: int,
    output: torch.Tensor,
    row_gradients: RowGradients,
) -> torch.Tensor:
    """`weight[rows]` with zero rows appended, at a cost in proportion to the number of rows.

    Args:
        weight: `[d_sae, d]`.
        rows: `[n]` int64, distinct.
        width: number of rows of the result, at least n.
        output: what `encode_selected` or `decode_selected` returned for this weight.
        row_gradients: the object that the same call got.

    Returns:
        `[width, d]`, differentiable with respect to `weight`.
    """
    return _GatherRows.apply(weight.detach(), rows, width, output, row_gradients)  # pyright: ignore[reportReturnType]


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
        row_gradients: RowGradients,
        backend: Backend,
    ) -> torch.Tensor:
        acts = selection.pre_acts.relu()
        ctx.save_for_backward(x, weight, acts, selection.latents)
        ctx.order, ctx.row_gradients, ctx.backend = order, row_gradients, backend
        return acts

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, acts, latents = ctx.saved_tensors
        # Clipped pairs are not in ctx.order, so their gradient need not be zeroed for it.
        grad_acts = grads[0]
        need_x, need_weight, need_bias, need_input_bias = ctx.needs_input_grad[:4]
        grad_x = grad_weight = grad_bias = grad_input_bias = None
        rows = weight.detach().T
        if need_weight or need_bias or need_input_bias:
            grad_rows, grad_bias = segment_sum(ctx.order, grad_acts, x, weight.dtype, ctx.backend)
            if need_input_bias:
                grad_input_bias = -(grad_bias @ rows)
            ctx.row_gradients.add_to(grad_rows, ctx.backend)
            grad_weight = grad_rows.T
        if need_x:
            # A NaN activation passes its gradient on, as a ReLU does.
            grad_pre_acts = grad_acts.masked_fill(acts <= 0, 0)
            grad_x = gather_sum(grad_pre_acts, latents, rows, ctx.backend).to(x.dtype)
        return grad_x, grad_weight, grad_bias, grad_input_bias, None, None, None, None


class _DecodeSelected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,
        weight: torch.Tensor,
        latents: torch.Tensor,
        order: LatentOrder,
        row_gradients: RowGradients,
        backend: Backend,
    ) -> torch.Tensor:
        ctx.save_for_backward(acts, weight, latents)
        ctx.order, ctx.row_gradients, ctx.backend = order, row_gradients, backend
        return gather_sum(acts, latents, weight, backend)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        acts, weight, latents = ctx.saved_tensors
        grad_output = grads[0].contiguous()
        grad_acts = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_acts = gather_dot(grad_output, latents, weight, ctx.backend).to(acts.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight, _ = segment_sum(ctx.order, acts, grad_output, weight.dtype, ctx.backend)
            ctx.row_gradients.add_to(grad_weight, ctx.backend)
        return grad_acts, grad_weight, None, None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        rows: torch.Tensor,
        width: int,
        output: torch.Tensor,  # noqa: ARG004
        row_gradients: RowGradients,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.row_gradients = row_gradients
        n = rows.numel()
        gathered = weight.new_empty(width, weight.shape[1])
        torch.index_select(weight, 0, rows, out=gathered[:n])
        gathered[n:].zero_()
        return gathered

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[None, ...]:
        (rows,) = ctx.saved_tensors
        ctx.row_gradients.leave(rows, grads[0][: rows.numel()])
        return None, None, None, None, None


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
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        grad_products = torch.where(kept, grads[0], 0.0)
        sum_dtype = torch.promote_types(ctx.bias_dtype, torch.float32)
        grad_bias = grad_products.sum(0, dtype=sum_dtype)[: ctx.n].to(ctx.bias_dtype)
        return grad_products, grad_bias, None, None, None
