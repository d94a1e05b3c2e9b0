"""Triton kernels of a JumpReLU between dense products; `dense.py` says what they compute."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments


@dataclass(frozen=True)
class DenseLaunch:
    """A program passes over ROWS rows of COLS latents, STEP rows at a time."""

    COLS: int = 256
    STEP: int = 4
    ROWS: int = 64
    num_warps: int = 4


LAUNCH = DenseLaunch()


@kernel
def _dense_jumprelu_kernel(
    acts_ptr,  # [N, L]
    row_parts_ptr,  # [N, T] int32, active latents by row and tile of columns
    latent_parts_ptr,  # [R, L] int32, active rows by block of rows and latent
    pair_parts_ptr,  # [R, T] int32, pairs of the pattern by block of rows and tile
    products_ptr,  # [N, L]
    bias_ptr,  # [L]
    thresholds_ptr,  # [L]
    half_bandwidth,
    N,
    L,
    T,
    PRE_ACTS: tl.constexpr,  # dtype of the pre-activations
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """acts = h * (h > limit) for h = products + bias, and counts"""
    tile, block = tl.program_id(0) % T, tl.program_id(0) // T
    cols = tile * COLS + tl.arange(0, COLS)
    col_mask = cols < L
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    limit = tl.load(thresholds_ptr + cols, mask=col_mask, other=0.0)[None, :]
    # Summed over rows once, at the end: within the loop that would make all warps wait.
    latent_counts = tl.zeros((STEP, COLS), dtype=tl.int32)
    pairs = tl.zeros((STEP, COLS), dtype=tl.int32)
    for step in range(ROWS // STEP):
        rows = block * ROWS + step * STEP + tl.arange(0, STEP)
        mask = (rows < N)[:, None] & col_mask[None, :]
        place = rows.to(tl.int64)[:, None] * L + cols[None, :]
        product = tl.load(products_ptr + place, mask=mask, other=0.0).to(tl.float32)
        pre_act = (product + bias).to(PRE_ACTS).to(tl.float32)
        active = pre_act > limit
        act = pre_act * active.to(tl.float32)
        tl.store(acts_ptr + place, act.to(acts_ptr.dtype.element_ty), mask=mask)
        counted = (mask & active).to(tl.int32)
        tl.store(
            row_parts_ptr + rows.to(tl.int64) * T + tile, tl.sum(counted, axis=1), mask=rows < N
        )
        latent_counts += counted
        outside = pre_act <= limit - half_bandwidth  # a NaN is not
        pairs += (mask & (outside == 0)).to(tl.int32)
    out = block.to(tl.int64) * L + cols
    tl.store(latent_parts_ptr + out, tl.sum(latent_counts, axis=0), mask=col_mask)
    tl.store(pair_parts_ptr + block * T + tile, tl.sum(tl.sum(pairs, axis=1), axis=0))


@kernel
def _dense_jumprelu_gradients_kernel(
    grad_pre_acts_ptr,  # [N, L]
    bias_parts_ptr,  # [R, L]
    threshold_parts_ptr,  # [R, L]
    products_ptr,  # [N, L]
    bias_ptr,  # [L]
    thresholds_ptr,  # [L]
    grad_acts_ptr,  # [N, L] or None
    grad_l0_ptr,  # [N] or None
    inverse_bandwidth,
    N,
    L,
    T,
    STE_TO_INPUT: tl.constexpr,
    PRE_ACTS: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of the products, and their sums over a block of rows (`pairs.py`)."""
    tile, block = tl.program_id(0) % T, tl.program_id(0) // T
    cols = tile * COLS + tl.arange(0, COLS)
    col_mask = cols < L
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    limit = tl.load(thresholds_ptr + cols, mask=col_mask, other=0.0)[None, :]
    bias_sums = tl.zeros((STEP, COLS), dtype=tl.float32)
    threshold_sums = tl.zeros((STEP, COLS), dtype=tl.float32)
    for step in range(ROWS // STEP):
        rows = block * ROWS + step * STEP + tl.arange(0, STEP)
        row_mask = rows < N
        mask = row_mask[:, None] & col_mask[None, :]
        place = rows.to(tl.int64)[:, None] * L + cols[None, :]
        product = tl.load(products_ptr + place, mask=mask, other=0.0).to(tl.float32)
        pre_act = (product + bias).to(PRE_ACTS).to(tl.float32)
        distance = (pre_act - limit) * inverse_bandwidth
        grad_act = tl.zeros((STEP, COLS), dtype=tl.float32)
        if grad_acts_ptr is not None:
            grad_act = tl.load(grad_acts_ptr + place, mask=mask, other=0.0).to(tl.float32)
        straight_through = limit * grad_act
        if grad_l0_ptr is not None:
            grad_l0 = tl.load(grad_l0_ptr + rows, mask=row_mask, other=0.0).to(tl.float32)
            straight_through += grad_l0[:, None]
        inside = mask & (distance > -0.5) & (distance < 0.5)
        straight_through = tl.where(inside, straight_through * inverse_bandwidth, 0.0)
        grad = tl.where(distance > 0, grad_act, 0.0)
        if STE_TO_INPUT:
            grad += straight_through
        tl.store(grad_pre_acts_ptr + place, grad.to(grad_pre_acts_ptr.dtype.element_ty), mask=mask)
        bias_sums += grad
        threshold_sums -= straight_through
    out = block.to(tl.int64) * L + cols
    tl.store(bias_parts_ptr + out, tl.sum(bias_sums, axis=0), mask=col_mask)
    tl.store(threshold_parts_ptr + out, tl.sum(threshold_sums, axis=0), mask=col_mask)


@on_device_of_arguments
def dense_jumprelu(
    products: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    acts_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pre_acts_dtype, thresholds, n_tiles, n_blocks = _arguments(products, bias, threshold)
    (n_rows, d_sae), device = products.shape, products.device
    acts = torch.empty(n_rows, d_sae, dtype=acts_dtype, device=device)
    row_parts = torch.empty(n_rows, n_tiles, dtype=torch.int32, device=device)
    latent_parts = torch.empty(n_blocks, d_sae, dtype=torch.int32, device=device)
    pair_parts = torch.empty(n_blocks, n_tiles, dtype=torch.int32, device=device)
    if products.numel() > 0:
        _dense_jumprelu_kernel[(n_tiles * n_blocks,)](
            acts,
            row_parts_ptr=row_parts,
            latent_parts_ptr=latent_parts,
            pair_parts_ptr=pair_parts,
            products_ptr=products,
            bias_ptr=bias.contiguous(),
            thresholds_ptr=thresholds,
            half_bandwidth=bandwidth / 2,
            N=n_rows,
            L=d_sae,
            T=n_tiles,
            PRE_ACTS=_TRITON_DTYPE[pre_acts_dtype],
            **vars(LAUNCH),
        )
    row_counts = row_parts.sum(1, dtype=torch.int32)
    latent_counts = latent_parts.sum(0, dtype=torch.int32)
    return acts, row_counts, latent_counts, torch.stack([pair_parts.sum(), row_counts.sum()])


@on_device_of_arguments
def dense_jumprelu_gradients(
    products: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    ste_to_input: bool,
    grad_acts: torch.Tensor | None,
    grad_l0: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pre_acts_dtype, thresholds, n_tiles, n_blocks = _arguments(products, bias, threshold)
    n_rows, d_sae = products.shape
    grad_products = torch.empty_like(products)
    parts = torch.empty(2, n_blocks, d_sae, dtype=torch.float32, device=products.device)
    if products.numel() > 0:
        _dense_jumprelu_gradients_kernel[(n_tiles * n_blocks,)](
            grad_products,
            bias_parts_ptr=parts[0],
            threshold_parts_ptr=parts[1],
            products_ptr=products,
            bias_ptr=bias.contiguous(),
            thresholds_ptr=thresholds,
            grad_acts_ptr=None if grad_acts is None else grad_acts.contiguous(),
            grad_l0_ptr=None if grad_l0 is None else grad_l0.contiguous(),
            inverse_bandwidth=1 / bandwidth,
            N=n_rows,
            L=d_sae,
            T=n_tiles,
            STE_TO_INPUT=ste_to_input,
            PRE_ACTS=_TRITON_DTYPE[pre_acts_dtype],
            **vars(LAUNCH),
        )
    grad_bias, grad_threshold = parts.sum(1)
    return grad_products, grad_bias, grad_threshold


_TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _arguments(
    products: torch.Tensor, bias: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.dtype, torch.Tensor, int, int]:
    """Dtype of the pre-activations, thresholds rounded to it, and how many tiles of columns and
    blocks of rows there are. Each of their pairs is a program, tiles first, in one dimension of the
    grid: of more than 4,194,240 rows there are more blocks than another one may have.
    """
    dtype = torch.promote_types(products.dtype, bias.dtype)
    n_tiles = triton.cdiv(products.shape[1], LAUNCH.COLS)
    return dtype, threshold.to(dtype).float(), n_tiles, triton.cdiv(products.shape[0], LAUNCH.ROWS)
