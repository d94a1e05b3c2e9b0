"""Screening of the encoder's products on a CPU that multiplies bfloat16 faster than float32.

As `gpu.py` does on a GPU: a product of rounded operands, and a proven bound on its error,
say which latents can matter; those are computed in float32. Here the bound is added to the scores,
so that whoever compares them needs no second tensor. For latent j of row n, with rounded operands
x' and w', residuals dx and dw, and Cauchy-Schwarz twice:

    |x.w - x'.w'| <= |dx| |w| + |x'| |dw| + accumulation + rounding of the result to bfloat16
                  <= |x| (|w| (max over rows of |dx| / |x|  +  accumulation  +  2^-8) + |dw|)

that is one factor of the row times one of the latent (taken 1% larger than it need be). `BOUND.md`
proves it, with every constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import torch

from saelens_sparse.measured import CPU_CHUNK_BYTES, MIN_SCREENED_PRODUCT
from saelens_sparse.ops.common.precision import matmul_dtype
from saelens_sparse.ops.screen import bound

# Scores that are compared at a time: few, so that they stay in the cache, and in memory that is
# not fresh.
SCORE_BYTES = 4 * 2**20
# Elements rounded at a time. Fewer stay in a nearer cache, but every operation on a piece is a
# point at which threads wait for each other, which takes long where others use the cores.
_ROUNDED_ELEMENTS = 2**21


def can_screen(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether screening is possible for these operands, and worth it."""
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == matmul_dtype(weight) == torch.float32
        and x.shape[1] <= bound.CPU_MAX_D_IN
        and x.shape[0] * weight.numel() >= MIN_SCREENED_PRODUCT
        and _multiplies_bfloat16()
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def _multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 faster than float32, and PyTorch tells so.

    Intel's AVX-512 BF16 does not without AMX, which virtual machines may hide.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    faster = capabilities.get("amx_bf16") or (
        capabilities.get("avx512_bf16") and "Intel" not in capabilities.get("cpu_name", "")
    )
    return bool(faster) and torch.backends.mkldnn.is_available()


def upper_bounds(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    buffer_bytes: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """What the scores `(x @ weight.T + bias) * norms` are at most, a few rows at a time.

    By at most twice the bound above more than they are. NaN or infinite where a score is not
    finite, and where a norm leaves float32's range. A copy of `weight` in bfloat16 is held
    meanwhile.

    Args:
        x: `[n_rows, d_in]` float32, at least one row.
        weight: `[d_sae, d_in]` float32.
        bias: `[d_sae]`.
        norms: `[d_sae]` or None.
        buffer_bytes: bound on the size of the products of one chunk of rows.

    Yields:
        The index of the first row, and `[rows, d_sae]` float32, which the next overwrites.
    """
    d_sae, d_in = weight.shape
    x_rounded, x_norms, x_residuals = _round_rows(x)
    rounded, weight_norms, residuals = _round_rows(weight)
    x_norms += bound.CPU_TINY_NORM
    weight_norms += bound.CPU_TINY_NORM
    # Of a row that is not finite the norm is not either, which is enough.
    x_relative = (x_residuals / x_norms).nan_to_num_(0.0).max()
    relative = x_relative + bound.BFLOAT16 + bound.cpu_accumulation(d_in)
    error = bound.CPU_SLACK * (relative * weight_norms + residuals)
    if norms is not None:
        bias, error = bias * norms, error * norms
    slack = bound.CPU_BIAS_ROUNDING
    offset = torch.where(bias < 0, bias * (1 - slack), bias * (1 + slack))  # may be -inf

    buffer = x.new_empty(max(1, SCORE_BYTES // (d_sae * x.element_size())), d_sae)
    buffer_bytes = min(buffer_bytes, CPU_CHUNK_BYTES)
    chunk_rows = max(1, buffer_bytes // (d_sae * rounded.element_size()))
    # Little at first, so that whoever sees in it that screening does not help has lost little.
    starts = [0, *range(min(buffer.shape[0], chunk_rows), x.shape[0], chunk_rows)]
    for start, end in pairwise([*starts, x.shape[0]]):
        products = x_rounded[start:end] @ rounded.T
        for part in products.split(buffer.shape[0]):
            bounds = buffer[: part.shape[0]]
            if norms is None:
                bounds.copy_(part)
            else:
                torch.mul(part, norms, out=bounds)
            bounds.add_(offset).addr_(x_norms[start : start + part.shape[0]], error)
            yield start, bounds
            start += part.shape[0]


def _round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in bfloat16, their norms, and the norms of what rounding took away."""
    rounded = torch.empty_like(rows, dtype=torch.bfloat16)
    norms, residuals = rows.new_empty(2, rows.shape[0])
    step = max(1, _ROUNDED_ELEMENTS // rows.shape[1])
    for part, low, norm, residual in zip(
        *(tensor.split(step) for tensor in (rows, rounded, norms, residuals)), strict=True
    ):
        low.copy_(part)
        torch.linalg.vector_norm(part, dim=1, out=norm)
        torch.linalg.vector_norm(part - low, dim=1, out=residual)
    return rounded, norms, residuals
