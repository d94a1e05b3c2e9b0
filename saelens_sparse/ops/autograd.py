"""Differentiable encode and decode at selected latents, and dense use of a few weight rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from saelens_sparse.implementation import Backend
from saelens_sparse.ops.latent_order import LatentOrder
from saelens_sparse.ops.row_ops import add_rows, gather_dot, gather_sum, segment_sum
from saelens_sparse.ops.select import Selection, topk_values


@dataclass(frozen=True)
class RowBlock:
    """Latents whose weight rows are wanted as one dense block, padded with zero rows.

    A weight that is used both sparsely and through `weight[latents]` would get two dense
    `[d_sae, d_in]` gradients, added by autograd. So `encode_selected` and `decode_selected` hand
    out the block themselves, and their backward adds its few rows to the gradient that it builds.
    """

    latents: torch.Tensor  # [n] int64, distinct
    width: int  # rows of the block, at least n

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The block of a weight given as `[d_sae, d]` rows, `[width, d]`."""
        n = self.latents.numel()
        block = rows.new_empty(self.width, rows.shape[1])
        torch.index_select(rows, 0, self.latents, out=block[:n])
        block[n:].zero_()
        return block


def encode_selected(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    selection: Selection,
    order: LatentOrder,
    block: RowBlock | None,
    backend: Backend,
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

    Returns:
        The activations, and the block (`[block.width, d_in]`) or None.
    """
    return _EncodeSelected.apply(  # pyright: ignore[reportReturnType]
        x, weight, bias, input_bias, selection, order, block, backend
    )


def decode_selected(
    acts: torch.Tensor,
    weight: torch.Tensor,
    latents: torch.Tensor,
    order: LatentOrder,
    block: RowBlock | None,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`acts @ weight` for activations at selected latents, `[n_rows, d_in]`, and a block of rows.

    Args:
        acts: `[n_rows, k]`, or `[n_pairs]` if the rows of `order` are ragged; zero wherever
            `order` leaves a pair out.
        weight: `[d_sae, d_in]`.
        latents: int64, of the shape of `acts`.
        order: the active pairs by latent.
        block: rows of `weight` to return too, or None.
        backend: `"triton"` or `"torch"`.

    Returns:
        The product, and the block (`[block.width, d_in]`) or None.
    """
    return _DecodeSelected.apply(  # pyright: ignore[reportReturnType]
        acts, weight, latents, order, block, backend
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        acts = selection.pre_acts.relu()
        ctx.save_for_backward(x, weight, acts, selection.latents)
        ctx.order, ctx.block, ctx.backend = order, block, backend
        ctx.set_materialize_grads(False)
        return acts, None if block is None else block.of(weight.T)

    @staticmethod
    @once_differentiable
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
            grad_rows, grad_bias = segment_sum(ctx.order, grad_acts, x, weight.dtype, ctx.backend)
            if need_input_bias:
                with torch.autocast(rows.device.type, enabled=False):
                    grad_input_bias = -(grad_bias @ rows)
            add_block(grad_rows, ctx.block, grads[1], ctx.backend)
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
        block: RowBlock | None,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(acts, weight, latents)
        ctx.order, ctx.block, ctx.backend = order, block, backend
        ctx.set_materialize_grads(False)
        recons = gather_sum(acts, latents, weight, backend, order.ragged)
        return recons, None if block is None else block.of(weight)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        acts, weight, latents = ctx.saved_tensors
        order, backend = ctx.order, ctx.backend
        if grads[0] is None:
            n_rows = acts.shape[0] if order.ragged is None else order.ragged.n_rows
            grad_output = weight.new_zeros(n_rows, weight.shape[1])
        else:
            grad_output = grads[0].contiguous()
        grad_acts = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_acts = gather_dot(grad_output, latents, weight, backend, order.ragged)
            grad_acts = grad_acts.to(acts.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight, _ = segment_sum(order, acts, grad_output, weight.dtype, backend)
            add_block(grad_weight, ctx.block, grads[1], ctx.backend)
        return grad_acts, grad_weight, None, None, None, None


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
