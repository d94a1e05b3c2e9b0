"""A JumpReLU between dense products: everything element by element in one pass each way."""

from __future__ import annotations

import torch

from saelens_sparse.ops.common.backend import Backend


def dense_jumprelu(
    products: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    acts_dtype: torch.dtype,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """JumpReLU of `products + bias`, and what fired.

    Args:
        products: `[n_rows, d_sae]`.
        bias: `[d_sae]`.
        threshold: `[d_sae]`.
        bandwidth: width of the straight-through window.
        acts_dtype: dtype of the activations.
        backend: `"triton"` or `"torch"`.

    Returns:
        Activations `[n_rows, d_sae]`; number of active latents by row and of rows by latent,
        `[n_rows]` and `[d_sae]` int32; and `[2]` int64, how many pairs are active or inside the
        window, and how many are active.
    """
    if backend == "triton":
        from saelens_sparse.ops.activation import dense_kernels

        return dense_kernels.dense_jumprelu(products, bias, threshold, bandwidth, acts_dtype)
    pre_acts = products + bias
    limit = threshold.to(pre_acts.dtype)
    active = pre_acts > limit
    row_counts = active.sum(1, dtype=torch.int32)
    latent_counts = active.sum(0, dtype=torch.int32)
    n_pairs = (pre_acts <= limit - bandwidth / 2).logical_not_().sum()  # a NaN is a pair
    acts = pre_acts.mul_(active).to(acts_dtype)
    return acts, row_counts, latent_counts, torch.stack([n_pairs, row_counts.sum()])


def dense_jumprelu_gradients(
    products: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    ste_to_input: bool,
    grad_acts: torch.Tensor | None,
    grad_l0: torch.Tensor | None,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `dense_jumprelu` (see `pairs.py`).

    Args:
        products: `[n_rows, d_sae]`.
        bias: `[d_sae]`.
        threshold: `[d_sae]`.
        bandwidth: width of the straight-through window.
        ste_to_input: whether the pre-activation gets the straight-through gradient too.
        grad_acts: gradient of the activations, `[n_rows, d_sae]`, or None.
        grad_l0: gradient of each row's number of active latents, `[n_rows]`, or None.
        backend: `"triton"` or `"torch"`.

    Returns:
        Gradient of the products, in their dtype; of the bias and of the threshold, `[d_sae]`, in
        float32 or better.
    """
    if backend == "triton":
        from saelens_sparse.ops.activation import dense_kernels

        return dense_kernels.dense_jumprelu_gradients(
            products, bias, threshold, bandwidth, ste_to_input, grad_acts, grad_l0
        )
    pre_acts = products + bias
    sum_dtype = torch.promote_types(pre_acts.dtype, torch.float32)
    limit = threshold.to(pre_acts.dtype)
    distance = (pre_acts - limit).to(sum_dtype) / bandwidth
    inside = (distance > -0.5) & (distance < 0.5)
    straight_through = torch.zeros_like(distance)
    grad_pre_acts = torch.zeros_like(distance)
    if grad_acts is not None:
        torch.mul(grad_acts, limit, out=straight_through)
        torch.mul(grad_acts, distance > 0, out=grad_pre_acts)
    if grad_l0 is not None:
        straight_through += grad_l0.unsqueeze(1)
    straight_through = straight_through.mul_(inside).div_(bandwidth)
    if ste_to_input:
        grad_pre_acts += straight_through
    return (
        grad_pre_acts.to(products.dtype),
        grad_pre_acts.sum(0),
        straight_through.sum(0).neg_(),
    )
