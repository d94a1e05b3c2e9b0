"""A JumpReLU at pairs (row, latent): everything pair by pair in one pass each way."""

from __future__ import annotations

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.search.types import GatePattern


def pair_gate(pattern: GatePattern, threshold: torch.Tensor, backend: Backend) -> torch.Tensor:
    """JumpReLU of a pattern's pre-activations, `[n_pairs]` in their dtype.

    Args:
        pattern: the pairs.
        threshold: `[d_sae]`.
        backend: `"triton"` or `"torch"`.
    """
    if backend == "triton":
        from saelens_sparse.ops.activation import pairs_kernels as pair_gate_triton

        return pair_gate_triton.pair_gate(pattern, threshold)
    pre_acts = pattern.pre_acts
    # As SAELens: a product, so that a NaN stays one.
    return pre_acts * (pre_acts > threshold.to(pre_acts.dtype)[pattern.latents])


def pair_gate_gradients(
    pattern: GatePattern,
    threshold: torch.Tensor,
    bandwidth: float,
    ste_to_input: bool,
    grad_acts: torch.Tensor | None,
    grad_l0: torch.Tensor | None,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `pair_gate` and of L0 (see `gate_autograd.py`), pair by pair.

    Pairs that are not of the pattern get values too, but sums over latents skip them.

    Args:
        pattern: the pairs.
        threshold: `[d_sae]`.
        bandwidth: width of the straight-through window.
        ste_to_input: whether the pre-activation gets the straight-through gradient too.
        grad_acts: gradient of the activations, `[n_pairs]`, or None.
        grad_l0: gradient of each row's number of active latents, `[n_rows]`, or None.
        backend: `"triton"` or `"torch"`.

    Returns:
        Gradients of the pre-activations and of the thresholds at the pairs, `[n_pairs]`, in
        float32 or better.
    """
    if backend == "triton":
        from saelens_sparse.ops.activation import pairs_kernels as pair_gate_triton

        return pair_gate_triton.pair_gate_gradients(
            pattern, threshold, bandwidth, ste_to_input, grad_acts, grad_l0
        )
    pre_acts = pattern.pre_acts
    gates = threshold.to(pre_acts.dtype)[pattern.latents]
    sum_dtype = torch.promote_types(pre_acts.dtype, torch.float32)
    grad_act = pre_acts.new_zeros((), dtype=sum_dtype)
    if grad_acts is not None:
        grad_act = grad_acts.to(sum_dtype)
    distance = (pre_acts - gates).to(sum_dtype) / bandwidth
    straight_through = gates * grad_act
    if grad_l0 is not None:
        straight_through = straight_through + grad_l0.to(sum_dtype)[pattern.ragged.rows]
    inside = (distance > -0.5) & (distance < 0.5)
    straight_through = torch.where(inside, straight_through / bandwidth, 0.0)
    grad_pre_acts = (distance > 0) * grad_act
    if ste_to_input:
        grad_pre_acts = grad_pre_acts + straight_through
    return grad_pre_acts, -straight_through
