"""A JumpReLU encoder and a decoder by dense products, with all between them in one pass each way.

Where thousands of latents are active on a row, dense products are faster than sums over pairs.
`activation/pairs.py` has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saelens_sparse.ops.activation.dense import dense_jumprelu, dense_jumprelu_gradients
from saelens_sparse.ops.activation.pairs import JumpReLU
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.common.precision import matmul, matmul_dtype
from saelens_sparse.ops.rows.block import RowBlock, add_block


@dataclass(frozen=True)
class FiringCounts:
    """What fired, counted on the device.

    Attributes:
        rows: `[n_rows]` int32, number of active latents.
        latents: `[d_sae]` int32, number of rows on which each latent is active.
        totals: `[2]` int64, number of pairs that a search would find, and of active ones.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    totals: torch.Tensor


def encode_densely(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    input_bias: torch.Tensor | None,
    activation: JumpReLU,
    block: RowBlock | None,
    backend: Backend,
    acts_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, FiringCounts]:
    """As `encode_pairs`, with dense products and everything between them in one pass.

    Args:
        x: `[n_rows, d_in]`, already centred.
        weight: `[d_in, d_sae]`, as for `encode_pairs`.
        bias: `[d_sae]`.
        input_bias: `[d_in]` or None, as for `encode_pairs`.
        activation: the activation function.
        block: rows of `weight.T` to return too, or None.
        backend: `"triton"` or `"torch"`.
        acts_dtype: dtype of the activations; by default that of the products, which under
            autocast is what a decoder would round them to.

    Returns:
        Activations `[n_rows, d_sae]`, L0 `[n_rows]`, the block or None, and the counts.
    """
    compute_dtype = matmul_dtype(x)
    acts, l0, rows, *counts = _EncodeDensely.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, weight, bias, input_bias, activation.threshold, activation, block, backend,
        compute_dtype, acts_dtype or compute_dtype,
    )  # fmt: skip
    return acts, l0, rows, FiringCounts(*counts)


def decode_densely(
    acts: torch.Tensor, weight: torch.Tensor, block: RowBlock | None, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`acts @ weight` in the autocast dtype if there is one, and a block of rows.

    Args:
        acts: `[n_rows, d_sae]`.
        weight: `[d_sae, d_in]`.
        block: rows of `weight` to return too, or None.
        backend: `"triton"` or `"torch"`.

    Returns:
        The product, `[n_rows, d_in]` in the dtype of `weight`, and the block or None.
    """
    return _DecodeDensely.apply(  # pyright: ignore[reportReturnType]
        acts, weight, block, backend, matmul_dtype(weight)
    )


class _EncodeDensely(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        input_bias: torch.Tensor | None,  # noqa: ARG004
        threshold: torch.Tensor,
        activation: JumpReLU,
        block: RowBlock | None,
        backend: Backend,
        compute_dtype: torch.dtype,
        acts_dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, ...]:
        low_x = x.to(compute_dtype)
        products = matmul(low_x, weight.to(compute_dtype), compute_dtype)
        acts, *counts = dense_jumprelu(
            products, bias, threshold, activation.bandwidth, acts_dtype, backend
        )
        ctx.save_for_backward(low_x, weight, bias, threshold, products)
        ctx.activation, ctx.block, ctx.backend, ctx.x_dtype = activation, block, backend, x.dtype
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*counts)
        l0 = counts[0].to(torch.promote_types(compute_dtype, bias.dtype))
        return acts, l0, None if block is None else block.of(weight.T), *counts

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        low_x, weight, bias, threshold, products = ctx.saved_tensors
        need_x, need_weight, _, need_input_bias = ctx.needs_input_grad[:4]
        activation = ctx.activation
        grad_pre_acts, grad_bias, grad_threshold = dense_jumprelu_gradients(
            products, bias, threshold, activation.bandwidth, activation.ste_to_input,
            grads[0], grads[1], ctx.backend,
        )  # fmt: skip
        grad_x = grad_weight = grad_input_bias = None
        with torch.autocast(weight.device.type, enabled=False):
            if need_weight:
                grad_rows = matmul(grad_pre_acts.T, low_x, weight.dtype)
                add_block(grad_rows, ctx.block, grads[2], ctx.backend)
                grad_weight = grad_rows.T
            if need_input_bias:
                grad_input_bias = -(grad_bias.to(weight.dtype) @ weight.T)
            if need_x:
                grad_x = matmul(grad_pre_acts, weight.T.to(grad_pre_acts.dtype), ctx.x_dtype)
        return (
            grad_x, grad_weight, grad_bias.to(bias.dtype), grad_input_bias, grad_threshold,
            None, None, None, None, None,
        )  # fmt: skip


class _DecodeDensely(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,
        weight: torch.Tensor,
        block: RowBlock | None,
        backend: Backend,
        compute_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        low_acts, low_weight = acts.to(compute_dtype), weight.to(compute_dtype)
        ctx.save_for_backward(low_acts, low_weight)
        ctx.block, ctx.backend = block, backend
        ctx.acts_dtype, ctx.weight_dtype = acts.dtype, weight.dtype
        ctx.set_materialize_grads(False)
        recons = matmul(low_acts, low_weight, weight.dtype)
        return recons, None if block is None else block.of(weight)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        acts, weight = ctx.saved_tensors
        grad_acts = grad_weight = None
        if grads[0] is not None:
            grad_output = grads[0].to(acts.dtype)
            with torch.autocast(weight.device.type, enabled=False):
                if ctx.needs_input_grad[0]:
                    grad_acts = matmul(grad_output, weight.T, acts.dtype).to(ctx.acts_dtype)
                if ctx.needs_input_grad[1]:
                    grad_weight = matmul(acts.T, grad_output, ctx.weight_dtype)
        elif ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=ctx.weight_dtype)
        if grad_weight is not None:
            add_block(grad_weight, ctx.block, grads[1], ctx.backend)
        return grad_acts, grad_weight, None, None, None
