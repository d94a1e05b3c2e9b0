"""Triton kernels of a decoder whose reconstruction is compared with a target at once.

What is known of the error when the reconstruction is made spares passes over it. Where a row's
weight rows fit into registers, they are read once for the reconstruction and for the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.rows.kernels import GATHER_SUM, RowErrors, gather_dot, gather_sum


@dataclass(frozen=True)
class DecodeLaunch:
    """Tile of the kernel that holds up to MAX_K pairs of a row: BLOCK_D columns at a time. SHARES
    programs divide the columns of a row. Of 16 to 64 columns, one or two warps and 1 to 72 shares
    this is the fastest at 2304 -> 65,536 and within 4% of it at 4096 -> 131,072, k 64, and at
    768 -> 24,576, k 32, batch 4096 (H100).
    """

    MAX_K: int = 64
    BLOCK_D: int = 32
    SHARES: int = 8
    num_warps: int = 1


DECODE = DecodeLaunch()
_PAIRS = 512
_COLUMNS = 1024


class DecodedErrors(NamedTuple):
    """A reconstruction and what is known of its error."""

    recons: torch.Tensor  # [N, D] float32
    squares: torch.Tensor  # [T, N] float32, shares of the squared errors of rows
    residual: torch.Tensor  # [N, D], recons - target, in float32 or as gradients sum it
    dots: torch.Tensor | None  # [T, P] float32, shares of <residual[n], weight[latent]> of pairs


def _decoding(arguments: Mapping[str, Any]) -> tuple[float, float]:
    """Work of a kernel that reads a row of the weight for each pair, and multiplies it twice."""
    weight, latents = arguments["weight_ptr"], arguments["latents_ptr"]
    others = sum(
        value.nbytes
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and name != "weight_ptr"
    )
    row_bytes = weight.shape[1] * weight.element_size()
    return float(latents.numel() * row_bytes + others), 4.0 * latents.numel() * weight.shape[1]


@kernel.asking(_decoding)
def _decode_held_kernel(
    out_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    squares_ptr,  # [T, N]
    dots_ptr,  # [T, N * k]
    coefficients_ptr,  # [N * k]
    latents_ptr,  # [N * k]
    weight_ptr,  # [L, D]
    bias_ptr,  # [D] or None
    target_ptr,  # [N, D]
    N,
    k,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[n, :] = sum over the k pairs p of row n of coefficients[p] * weight[latents[p], :] + bias

    and with residual = out - target, its squared norm and its products with these weight rows.

    Grid: rows, shares of their tiles of columns.
    """
    n = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_K)
    live = i < k
    coefficient = tl.load(coefficients_ptr + n * k + i, mask=live, other=0.0).to(tl.float32)
    used = coefficient != 0.0
    latent = tl.load(latents_ptr + n * k + i, mask=live, other=0).to(tl.int64)
    products = tl.zeros((BLOCK_K,), dtype=tl.float32)
    squares = 0.0
    for start in range(tl.program_id(1) * BLOCK_D, D, tl.num_programs(1) * BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < D
        tile = tl.load(
            weight_ptr + latent[:, None] * D + cols[None, :],
            mask=live[:, None] & col_mask[None, :],
            other=0.0,
        )
        # A row with a zero coefficient (clipped by the activation function) may be NaN.
        out = tl.sum(tl.where(used[:, None], tile * coefficient[:, None], 0.0), axis=0)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + cols, mask=col_mask, other=0.0)
        tl.store(out_ptr + n * D + cols, out, mask=col_mask)
        target = tl.load(target_ptr + n * D + cols, mask=col_mask, other=0.0)
        # Beyond the last column an infinite coefficient has made NaN.
        residual = tl.where(col_mask, out - target, 0.0)
        tl.store(residual_ptr + n * D + cols, residual, mask=col_mask)
        squares += tl.sum(residual * residual, axis=0)
        products += tl.sum(tile * residual[None, :], axis=1)
    tl.store(squares_ptr + share * N + n, squares)
    tl.store(dots_ptr + (share * N + n) * k + i, products, mask=live)


@kernel
def _pair_gradients_kernel(
    grad_acts_ptr,  # [P]
    coefficients_ptr,  # [P] float32
    acts_ptr,  # [P]
    dots_ptr,  # [T, P]
    grad_squares_ptr,  # [N]
    row_of_pairs_ptr,  # [P], or None where rows have k pairs
    k,
    P,
    T,
    BLOCK: tl.constexpr,
):
    """grad_acts[p] = scale[n] * sum over t of dots[t, p], coefficients[p] = scale[n] * acts[p]

    with scale = 2 * grad_squares.

    Grid: blocks of pairs.
    """
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = p < P
    if row_of_pairs_ptr is None:
        row = p // k
    else:
        row = tl.load(row_of_pairs_ptr + p, mask=live, other=0).to(tl.int64)
    scale = 2.0 * tl.load(grad_squares_ptr + row, mask=live, other=0.0)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    shares = dots_ptr + p
    for _ in range(T):
        dot += tl.load(shares, mask=live, other=0.0)
        shares += P
    act = tl.load(acts_ptr + p, mask=live, other=0.0).to(tl.float32)
    tl.store(grad_acts_ptr + p, (dot * scale).to(grad_acts_ptr.dtype.element_ty), mask=live)
    tl.store(coefficients_ptr + p, act * scale, mask=live)


@kernel
def _error_gradient_kernel(
    out_ptr,  # [N, D]
    recons_ptr,  # [N, D]
    target_ptr,  # [N, D]
    grad_squares_ptr,  # [N]
    D,
    BLOCK_D: tl.constexpr,
):
    """out[n, :] = 2 * grad_squares[n] * (recons[n, :] - target[n, :])

    Grid: rows, tiles of columns.
    """
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place, mask = n * D + cols, cols < D
    error = tl.load(recons_ptr + place, mask=mask, other=0.0)
    error -= tl.load(target_ptr + place, mask=mask, other=0.0)
    tl.store(out_ptr + place, 2.0 * tl.load(grad_squares_ptr + n) * error, mask=mask)


@on_device_of_arguments
def decode_errors(
    acts: torch.Tensor,
    pairs: ActivePairs,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    summed_dtype: torch.dtype,
) -> DecodedErrors:
    """`gather_sum` and what comes of its error, of float32 operands.

    Args:
        acts: `[n_pairs]`.
        pairs: the pairs.
        weight: `[d_sae, d]`, contiguous.
        bias: `[d]` or None.
        target: `[n_rows, d]`, contiguous.
        summed_dtype: dtype in which gradients sum residuals.
    """
    assert weight.is_contiguous() and target.is_contiguous()
    rows, d, device = pairs.rows, weight.shape[1], weight.device
    is_held = rows.k is not None and 0 < rows.k <= DECODE.MAX_K
    residual = torch.empty_like(target, dtype=summed_dtype if is_held else torch.float32)
    n_tiles = triton.cdiv(d, DECODE.BLOCK_D if is_held else GATHER_SUM.BLOCK_D)
    n_parts = min(DECODE.SHARES, n_tiles) if is_held else n_tiles
    squares = torch.empty(n_parts, rows.n_rows, dtype=torch.float32, device=device)
    if not is_held:
        error = RowErrors(target, residual, squares)
        recons = gather_sum(acts, pairs.latents, rows, weight, bias, error)
        return DecodedErrors(recons, squares, residual, None)
    assert rows.k is not None
    recons = torch.empty_like(target)
    dots = torch.empty(n_parts, acts.numel(), dtype=torch.float32, device=device)
    if recons.numel() > 0:
        _decode_held_kernel[(rows.n_rows, n_parts)](
            recons,
            residual_ptr=residual,
            squares_ptr=squares,
            dots_ptr=dots,
            coefficients_ptr=acts.contiguous(),
            latents_ptr=pairs.latents.contiguous(),
            weight_ptr=weight,
            bias_ptr=None if bias is None else bias.contiguous(),
            target_ptr=target,
            N=rows.n_rows,
            k=rows.k,
            D=d,
            BLOCK_K=triton.next_power_of_2(rows.k),
            BLOCK_D=DECODE.BLOCK_D,
            num_warps=DECODE.num_warps,
        )
    return DecodedErrors(recons, squares, residual, dots)


@on_device_of_arguments
def pair_gradients(
    acts: torch.Tensor,
    pairs: ActivePairs,
    weight: torch.Tensor,
    residual: torch.Tensor,
    dots: torch.Tensor | None,
    grad_squares: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of activations in their dtype, and the coefficients of `residual` in the gradient
    of the weight in float32; both `[n_pairs]`.

    Args:
        acts: `[n_pairs]`.
        pairs: the pairs.
        weight: `[d_sae, d]`.
        residual: of `decode_errors`.
        dots: likewise.
        grad_squares: gradient of the squared errors of rows, `[n_rows]`.
    """
    if dots is None:
        dots = gather_dot(residual, pairs.latents, pairs.rows, weight)[None]
    grad_acts, (n_parts, n_pairs) = torch.empty_like(acts), dots.shape
    coefficients = torch.empty_like(acts, dtype=torch.float32)
    if n_pairs > 0:
        _pair_gradients_kernel[(triton.cdiv(n_pairs, _PAIRS),)](
            grad_acts,
            coefficients_ptr=coefficients,
            acts_ptr=acts.contiguous(),
            dots_ptr=dots,
            grad_squares_ptr=grad_squares.contiguous(),
            row_of_pairs_ptr=pairs.rows.of_pairs,
            k=pairs.rows.k,
            P=n_pairs,
            T=n_parts,
            BLOCK=_PAIRS,
            num_warps=4,
        )
    return grad_acts, coefficients


@on_device_of_arguments
def error_gradient(
    recons: torch.Tensor, target: torch.Tensor, grad_squares: torch.Tensor
) -> torch.Tensor:
    """Gradient of `recons`, `[n_rows, d]` float32, by that of the squared errors of its rows.

    Args:
        recons: contiguous.
        target: likewise.
        grad_squares: `[n_rows]`.
    """
    assert recons.is_contiguous() and target.is_contiguous()
    (n_rows, d), out = recons.shape, torch.empty_like(recons)
    if out.numel() > 0:
        _error_gradient_kernel[(n_rows, triton.cdiv(d, _COLUMNS))](
            out,
            recons_ptr=recons,
            target_ptr=target,
            grad_squares_ptr=grad_squares.contiguous(),
            D=d,
            BLOCK_D=_COLUMNS,
            num_warps=4,
        )
    return out
