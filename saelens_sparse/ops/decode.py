"""Differentiable decoder at pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.common.precision import summed_dtype
from saelens_sparse.ops.common.versions import version_of
from saelens_sparse.ops.pairs import ActivePairs, LatentOrder
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import gather_dot, gather_sum
from saelens_sparse.ops.update.row_gradient import RowGradient


class Decoded(NamedTuple):
    """What decoding gives, on the graph.

    Attributes:
        recons: `[n_rows, d_in]`, the reconstructions.
        block: `[width, d_in]`, rows of the decoder; None if none were asked for.
        comparison: of the reconstructions with a target; None if there is none.
    """

    recons: torch.Tensor
    block: torch.Tensor | None
    comparison: Comparison | None


class ErrorGradient:
    """The gradient of squared errors, on its way from them to the decoder in a backward pass.

    Autograd's nodes hold it as long as an output lives, so it holds nothing of the forward pass.
    """

    def __init__(self) -> None:
        self._sent: tuple[torch.Tensor, torch.Tensor] | None = None
        self._versions: tuple[int, int] | None = None

    def send(self, gradient: torch.Tensor, grad_squares: torch.Tensor) -> None:
        """Say to the decoder of which gradient of squared errors a gradient comes."""
        self._sent = gradient, grad_squares
        self._versions = version_of(gradient), version_of(grad_squares)

    def receive(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """The gradient of squared errors from which all of `gradient` comes, if there is one."""
        sent, self._sent = self._sent, None
        if sent is None:
            return None
        of_errors, grad_squares = sent
        is_unchanged = self._versions == (version_of(gradient), version_of(grad_squares))
        return grad_squares if is_unchanged and _is_same(gradient, of_errors) else None


class Comparison:
    """Squared errors of reconstructions that were compared with a target as they were decoded.

    Their gradient reaches the reconstructions as any other. If it is all that does, the decoder
    goes on with what it knows of the errors, instead of that.

    Args:
        target: `[n_rows, d_in]` float32, contiguous.

    Attributes:
        gradient: of the squared errors.
    """

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target
        self.gradient = ErrorGradient()

    def note(self, recons: torch.Tensor, shares: torch.Tensor) -> None:
        """Take reconstructions `[n_rows, d_in]`, without their graph, and shares of the squared
        errors of rows, `[n_shares, n_rows]`.
        """
        self._recons, self._shares = recons, shares
        self._versions = version_of(recons), version_of(self.target)

    def is_of(self, recons: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether these are the reconstructions and the target as they were, with any leading
        shape, and the target is a constant.
        """
        return (
            recons.shape == target.shape
            and not target.requires_grad
            and _is_same(recons, self._recons)
            and _is_same(target, self.target)
            and self._versions == (version_of(recons), version_of(target))
        )

    def squared_errors(self, recons: torch.Tensor) -> torch.Tensor:
        """Squared errors of rows, `[n_rows]` float32, on the graph of the reconstructions."""
        return _SquaredErrors.apply(recons, self.target, self)  # pyright: ignore[reportReturnType]

    def total(self) -> torch.Tensor:
        """Squared errors of rows, without a graph."""
        return self._shares.sum(0)


def _is_same(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same rows in memory, all of them, with any leading shape."""
    return (
        tensor.data_ptr() == other.data_ptr()
        and tensor.shape[-1:] == other.shape[-1:]
        and tensor.numel() == other.numel()
        and tensor.dtype == other.dtype
        and tensor.is_contiguous()
    )


def can_compare(weight: torch.Tensor, target: torch.Tensor, backend: Backend) -> bool:
    """Whether `decode_pairs` compares: kernels do, in float32."""
    return (
        backend == "triton"
        and weight.dtype == target.dtype == torch.float32
        and not target.requires_grad
    )


def decode_pairs(
    acts: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: ActivePairs,
    order: LatentOrder,
    block: RowBlock | None,
    backend: Backend,
    row_gradients: list[RowGradient] | None = None,
    target: torch.Tensor | None = None,
) -> Decoded:
    """`acts @ weight + bias` for activations at pairs, and a block of rows.

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
        target: `[n_rows, d_in]`, contiguous, what to compare with if `can_compare`; or None.
    """
    comparison = None if target is None else Comparison(target)
    recons, rows = _DecodePairs.apply(  # pyright: ignore[reportGeneralTypeIssues]
        acts, weight, bias, pairs, order, block, backend, row_gradients, comparison
    )
    return Decoded(recons, rows, comparison)


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
        comparison: Comparison | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.pairs, ctx.order, ctx.block = pairs, order, block
        ctx.backend, ctx.row_gradients = backend, row_gradients
        ctx.error_gradient = None if comparison is None else comparison.gradient
        ctx.summed_dtype = summed_dtype(weight, backend)
        ctx.set_materialize_grads(False)
        residual = dots = None
        if comparison is None:
            recons = gather_sum(acts, pairs.latents, pairs.rows, weight, backend, bias)
        else:
            from saelens_sparse.ops.rows.error_kernels import decode_errors

            recons, shares, residual, dots = decode_errors(
                acts, pairs, weight, bias, comparison.target, ctx.summed_dtype
            )
            comparison.note(recons.detach(), shares)
        ctx.save_for_backward(acts, weight, residual, dots)
        return recons, None if block is None else block.of(weight)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        acts, weight, residual, dots = ctx.saved_tensors
        pairs, backend, coefficients = ctx.pairs, ctx.backend, acts
        need_acts, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_acts = grad_weight = grad_bias = grad_squares = None
        if grads[0] is None:
            grad_output = weight.new_zeros(pairs.rows.n_rows, weight.shape[1])
        else:
            if ctx.error_gradient is not None:
                grad_squares = ctx.error_gradient.receive(grads[0])
            grad_output = grads[0].to(weight.dtype).contiguous()
            grad_bias = grads[0].sum(0).to(ctx.bias_dtype) if need_bias else None
        if grad_squares is not None:
            from saelens_sparse.ops.rows.error_kernels import pair_gradients

            grad_output = residual
            grad_acts, coefficients = pair_gradients(
                acts, pairs, weight, residual, dots, grad_squares
            )
        elif need_acts:
            grad_acts = gather_dot(grad_output, pairs.latents, pairs.rows, weight, backend)
            grad_acts = grad_acts.to(acts.dtype)
        if need_weight:
            summed = grad_output.to(ctx.summed_dtype)
            gradient = RowGradient(ctx.order, coefficients, summed, ctx.block, grads[1], False)
            if ctx.row_gradients is None:
                grad_weight, _ = gradient.dense(weight.dtype, backend)
            else:
                ctx.row_gradients.append(gradient)
        return grad_acts, grad_weight, grad_bias, None, None, None, None, None, None


class _SquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recons: torch.Tensor, target: torch.Tensor, comparison: Comparison
    ) -> torch.Tensor:
        ctx.save_for_backward(recons, target)
        ctx.error_gradient = comparison.gradient
        return comparison.total()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_squares: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        from saelens_sparse.ops.rows.error_kernels import error_gradient

        recons, target = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody wants a graph of the gradient, as SAELens's loss has
            error = recons - target.view_as(recons)
            return 2 * grad_squares.view(*recons.shape[:-1], 1) * error, None, None
        gradient = error_gradient(recons.view_as(target), target, grad_squares)
        ctx.error_gradient.send(gradient, grad_squares)
        return gradient.view_as(recons), None, None
