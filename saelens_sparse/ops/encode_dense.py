"""Differentiable JumpReLU encoders: at the pairs of a pattern, and with dense products.

The gradients are those of SAELens's `JumpReLU` and `Step` (Rajamanoharan et al. 2024,
arXiv:2407.14435, section 4): with H = h - threshold and K the rectangle of width `bandwidth`,

    acts = h * (H > 0)      d acts / d threshold = -threshold * K(H)
    l0 = sum of (H > 0)     d l0   / d threshold = -K(H)

where K(H) is `1 / bandwidth` for |H| < bandwidth / 2, else 0. With `ste_to_input` (the choice of
Conerly et al. 2025, transformer-circuits.pub/2025/january-update) the pre-activation gets the
negative of the threshold's gradient too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saelens_sparse.ops.activation.dense import dense_gate, dense_gate_gradients
from saelens_sparse.ops.activation.pairs import pair_gate, pair_gate_gradients
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.common.precision import matmul, matmul_dtype
from saelens_sparse.ops.encode import deliver
from saelens_sparse.ops.pairs.order import LatentOrder
from saelens_sparse.ops.rows.block import RowBlock, add_block
from saelens_sparse.ops.rows.operations import gather_sum, row_combination, segment_totals
from saelens_sparse.ops.search.types import GatePattern
from saelens_sparse.ops.update.row_gradient import RowGradient


@dataclass(frozen=True)
class Gate:
    """How a JumpReLU passes gradients on."""

    bandwidth: float
    ste_to_input: bool


@dataclass(frozen=True)
class FiringCounts:
    """What a dense gate let through, counted on the device.

    Attributes:
        rows: `[n_rows]` int32, number of active latents.
        latents: `[d_sae]` int32, number of rows on which each latent is active.
        totals: `[2]` int64, number of pairs that a pattern would have, and of active ones.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    totals: torch.Tensor


def encode_gated(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    input_bias: torch.Tensor | None,
    pattern: GatePattern,
    order: LatentOrder,
    gate: Gate,
    block: RowBlock | None,
    backend: Backend,
    sink: list[RowGradient] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """JumpReLU activations at the pairs of a pattern, L0 of each row, and a block of rows.

    The values are those of `pattern`; this attaches them to the graph.

    Args:
        x: `[n_rows, d_in]`, already centred. It gets a gradient only if it requires one.
        weight: `[d_in, d_sae]`, a transposed view of contiguous `[d_sae, d_in]` rows; its
            gradient has the same strides.
        bias: `[d_sae]`.
        threshold: `[d_sae]`.
        input_bias: `[d_in]`, a bias that was subtracted from a constant input to give `x`, or
            None.
        pattern: the pairs.
        order: the same pairs by latent.
        gate: how gradients are passed on.
        block: rows of `weight.T` to return too, or None.
        backend: `"triton"` or `"torch"`.
        sink: as for `encode_selected`.

    Returns:
        Activations `[n_pairs]`, L0 `[n_rows]` in the same dtype, and the block or None.
    """
    return _EncodeGated.apply(  # pyright: ignore[reportReturnType]
        x, weight, bias, threshold, input_bias, pattern, order, gate, block, backend, sink
    )


def encode_gated_densely(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    input_bias: torch.Tensor | None,
    gate: Gate,
    block: RowBlock | None,
    backend: Backend,
    acts_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, FiringCounts]:
    """As `encode_gated`, with dense products and everything between them in one pass.

    Args:
        x: `[n_rows, d_in]`, already centred.
        weight: `[d_in, d_sae]`, as for `encode_gated`.
        bias: `[d_sae]`.
        threshold: `[d_sae]`.
        input_bias: `[d_in]` or None, as for `encode_gated`.
        gate: how gradients are passed on.
        block: rows of `weight.T` to return too, or None.
        backend: `"triton"` or `"torch"`.
        acts_dtype: dtype of the activations; by default that of the products, which under
            autocast is what a decoder would round them to.

    Returns:
        Activations `[n_rows, d_sae]`, L0 `[n_rows]`, the block or None, and the counts.
    """
    compute_dtype = matmul_dtype(x)
    acts, l0, rows, *counts = _EncodeGatedDensely.apply(  # pyright: ignore[reportGeneralTypeIssues]
        x, weight, bias, threshold, input_bias, gate, block, backend, compute_dtype,
        acts_dtype or compute_dtype,
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


class _EncodeGated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,  # noqa: ARG004
        threshold: torch.Tensor,
        input_bias: torch.Tensor | None,  # noqa: ARG004
        pattern: GatePattern,
        order: LatentOrder,
        gate: Gate,
        block: RowBlock | None,
        backend: Backend,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        acts = pair_gate(pattern, threshold, backend)
        ctx.save_for_backward(x, weight, threshold)
        ctx.pattern, ctx.order, ctx.gate = pattern, order, gate
        ctx.block, ctx.backend, ctx.sink = block, backend, sink
        ctx.set_materialize_grads(False)
        l0 = pattern.row_counts.to(acts.dtype)
        return acts, l0, None if block is None else block.of(weight.T)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, weight, threshold = ctx.saved_tensors
        pattern, order, gate, backend = ctx.pattern, ctx.order, ctx.gate, ctx.backend
        need_x, need_weight, need_bias, need_threshold, need_input_bias = ctx.needs_input_grad[:5]
        grad_pre_acts, grad_gates = pair_gate_gradients(
            pattern, threshold, gate.bandwidth, gate.ste_to_input, grads[0], grads[1], backend
        )
        grad_x = grad_weight = grad_bias = grad_threshold = grad_input_bias = None
        rows = weight.T
        if need_weight or need_bias or need_input_bias:
            gradient = RowGradient(order, grad_pre_acts, x, ctx.block, grads[2], True)
            grad_weight, grad_bias = deliver(gradient, weight.dtype, need_weight, backend, ctx.sink)
            if need_input_bias:
                grad_input_bias = -row_combination(grad_bias, rows, backend)
        if need_threshold:
            grad_threshold = segment_totals(order, grad_gates, backend)
        if need_x:
            grad_x = gather_sum(grad_pre_acts, pattern.latents, rows, backend, pattern.ragged).to(
                x.dtype
            )
        return (
            grad_x, grad_weight, grad_bias, grad_threshold, grad_input_bias,
            None, None, None, None, None, None,
        )  # fmt: skip


class _EncodeGatedDensely(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        threshold: torch.Tensor,
        input_bias: torch.Tensor | None,  # noqa: ARG004
        gate: Gate,
        block: RowBlock | None,
        backend: Backend,
        compute_dtype: torch.dtype,
        acts_dtype: torch.dtype,
    ) -> tuple[torch.Tensor | None, ...]:
        low_x = x.to(compute_dtype)
        products = matmul(low_x, weight.to(compute_dtype), compute_dtype)
        acts, *counts = dense_gate(products, bias, threshold, gate.bandwidth, acts_dtype, backend)
        ctx.save_for_backward(low_x, weight, bias, threshold, products)
        ctx.gate, ctx.block, ctx.backend, ctx.x_dtype = gate, block, backend, x.dtype
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
        need_x, need_weight, _, _, need_input_bias = ctx.needs_input_grad[:5]
        grad_pre_acts, grad_bias, grad_threshold = dense_gate_gradients(
            products, bias, threshold, ctx.gate.bandwidth, ctx.gate.ste_to_input,
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
            grad_x, grad_weight, grad_bias.to(bias.dtype), grad_threshold, grad_input_bias,
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
