"""Triton kernels of a JumpReLU at pairs; `pairs.py` says what they compute."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import ActivePairs

_BLOCK = 1024


@kernel
def _jumprelu_kernel(
    acts_ptr,  # [P]
    pre_acts_ptr,  # [P]
    latents_ptr,  # [P]
    thresholds_ptr,  # [L]
    P,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = p < P
    pre_act = tl.load(pre_acts_ptr + p, mask=live, other=0.0).to(tl.float32)
    threshold = tl.load(
        thresholds_ptr + tl.load(latents_ptr + p, mask=live, other=0), mask=live, other=0.0
    )
    # As SAELens: a product, so that a NaN stays one.
    act = pre_act * (pre_act > threshold).to(tl.float32)
    tl.store(acts_ptr + p, act.to(acts_ptr.dtype.element_ty), mask=live)


@kernel
def _jumprelu_gradients_kernel(
    grad_pre_acts_ptr,  # [P]
    grad_thresholds_ptr,  # [P]
    pre_acts_ptr,  # [P]
    latents_ptr,  # [P]
    rows_ptr,  # [P]
    thresholds_ptr,  # [L]
    grad_acts_ptr,  # [P] or None
    grad_l0_ptr,  # [N] or None
    bandwidth,
    P,
    STE_TO_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = p < P
    pre_act = tl.load(pre_acts_ptr + p, mask=live, other=0.0)
    threshold = tl.load(
        thresholds_ptr + tl.load(latents_ptr + p, mask=live, other=0), mask=live, other=0.0
    )
    difference = (pre_act.to(tl.float32) - threshold).to(pre_act.dtype).to(tl.float32)
    distance = tl.div_rn(difference, bandwidth + tl.zeros_like(difference))
    grad_act = tl.zeros((BLOCK,), dtype=tl.float32)
    if grad_acts_ptr is not None:
        grad_act = tl.load(grad_acts_ptr + p, mask=live, other=0.0).to(tl.float32)
    straight_through = threshold * grad_act
    if grad_l0_ptr is not None:
        row = tl.load(rows_ptr + p, mask=live, other=0)
        straight_through += tl.load(grad_l0_ptr + row, mask=live, other=0.0).to(tl.float32)
    inside = (distance > -0.5) & (distance < 0.5)
    straight_through = tl.where(inside, straight_through / bandwidth, 0.0)
    grad = (distance > 0).to(tl.float32) * grad_act
    if STE_TO_INPUT:
        grad += straight_through
    tl.store(grad_pre_acts_ptr + p, grad, mask=live)
    tl.store(grad_thresholds_ptr + p, -straight_through, mask=live)


@on_device_of_arguments
def jumprelu(threshold: torch.Tensor, pairs: ActivePairs) -> torch.Tensor:
    """As `JumpReLU.values`."""
    acts = torch.empty_like(pairs.pre_acts)
    n_pairs = acts.numel()
    if n_pairs > 0:
        _jumprelu_kernel[(triton.cdiv(n_pairs, _BLOCK),)](
            acts,
            pre_acts_ptr=pairs.pre_acts,
            latents_ptr=pairs.latents,
            thresholds_ptr=_compared(threshold, pairs),
            P=n_pairs,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return acts


@on_device_of_arguments
def jumprelu_gradients(
    threshold: torch.Tensor,
    pairs: ActivePairs,
    bandwidth: float,
    ste_to_input: bool,
    grad_acts: torch.Tensor | None,
    grad_l0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `JumpReLU.gradients`."""
    grad_pre_acts = torch.empty_like(pairs.pre_acts, dtype=torch.float32)
    grad_thresholds = torch.empty_like(grad_pre_acts)
    n_pairs = grad_thresholds.numel()
    if n_pairs > 0:
        _jumprelu_gradients_kernel[(triton.cdiv(n_pairs, _BLOCK),)](
            grad_pre_acts,
            grad_thresholds_ptr=grad_thresholds,
            pre_acts_ptr=pairs.pre_acts,
            latents_ptr=pairs.latents,
            rows_ptr=pairs.rows.of_pairs,
            thresholds_ptr=_compared(threshold, pairs),
            grad_acts_ptr=None if grad_acts is None else grad_acts.contiguous(),
            grad_l0_ptr=None if grad_l0 is None else grad_l0.contiguous(),
            bandwidth=bandwidth,
            P=n_pairs,
            STE_TO_INPUT=ste_to_input,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return grad_pre_acts, grad_thresholds


def _compared(threshold: torch.Tensor, pairs: ActivePairs) -> torch.Tensor:
    """Thresholds as compared with the pre-activations."""
    return threshold.to(pairs.pre_acts.dtype).float().contiguous()
