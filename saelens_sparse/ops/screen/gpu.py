"""Low-precision screening of the encoder's products, with a proven bound on each one's error.

A GEMM in low precision fills a `[rows, d_sae]` buffer, a chunk of rows at a time. For float32 the
buffer is float16, of operands scaled by powers of two to norms of 64 to 128, so that no product
overflows. float16 has an eighth of bfloat16's rounding error: at 2304 -> 65,536, k 64 a row has
100 candidates on average, with bfloat16 153, without a bound 94. Where the caller computes in
bfloat16, the screen is the computation, and bounds are zero.

The bound, for latent j of row n, with rounding residuals dx and dw, Cauchy-Schwarz twice:

    |x.w - x'.w'| <= |dx| |w| + |x'| |dw| + accumulation + rounding of the result to float16

Accumulation is in float32: `float16_product.py` sees to that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import MAX_GRID, kernel, max_warps
from saelens_sparse.ops.common.precision import matmul_dtype
from saelens_sparse.ops.screen.float16_product import multiply_float16
from saelens_sparse.ops.update.weight_cache import WeightCopy

# Rows up to this width are held in one program's registers.
MAX_D_IN = 32768


@kernel
def _round_rows_kernel(
    rounded_ptr,  # [R, D] float16
    errors_ptr,  # [3, R]: what undoes the scale, |row|, |row - rounded / 2^e|
    rows_ptr,  # [R, D] float32
    R,
    D,
    BLOCK_D: tl.constexpr,
):
    """rounded = fp16(row * 2^e), of norm 64 to 128"""
    r = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(rows_ptr + r * D + cols, mask=cols < D, other=0.0)
    # Squares of tiny or huge rows leave float32's range, so scale by the largest element first.
    exponent = tl.floor(tl.log2(tl.max(tl.abs(x), axis=0)))
    exponent = tl.minimum(tl.maximum(exponent, -100.0), 100.0)
    x = x * tl.exp2(-exponent)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    shrink = tl.exp2(6.0 - tl.floor(tl.log2(tl.maximum(norm, 1.0))))
    x = x * shrink
    rounded = x.to(tl.float16)
    error = x - rounded.to(tl.float32)
    tl.store(rounded_ptr + r * D + cols, rounded, mask=cols < D)
    inverse = tl.exp2(exponent) / shrink
    tl.store(errors_ptr + r, inverse)
    tl.store(errors_ptr + R + r, norm * tl.exp2(exponent))
    tl.store(errors_ptr + 2 * R + r, tl.sqrt(tl.sum(error * error, axis=0)) * inverse)


@kernel
def _latent_terms_kernel(
    terms_ptr,  # [5, L]: inverse scale, bias, norm, residual, rest; each times the decoder norm
    errors_ptr,  # [3, L]
    bias_ptr,  # [L]
    norms_ptr,  # [L] or unused
    L,
    HAS_NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What of the score and its bound depends on the latent alone."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = latent < L
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if HAS_NORMS:
        factor = tl.load(norms_ptr + latent, mask=live, other=0.0)
    bias = tl.load(bias_ptr + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + L + latent, bias, mask=live)
    inverse = tl.load(errors_ptr + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + latent, inverse, mask=live)
    norm = tl.load(errors_ptr + L + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + 2 * L + latent, norm, mask=live)
    residual = tl.load(errors_ptr + 2 * L + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + 3 * L + latent, residual, mask=live)
    # Additions of the bias in float32, here and in the recomputation.
    tl.store(terms_ptr + 4 * L + latent, 4.0e-7 * tl.abs(bias), mask=live)


@triton.jit
def row_terms(
    errors_ptr,  # [3, *], unused if EXACT
    stride,
    rows,
    mask,
    accumulation,
    EXACT: tl.constexpr,
):
    """What of a score and its bound depends on the row alone: three factors for `screened`."""
    inverse, weight_norm, weight_residual = 0.0, 0.0, 0.0
    if not EXACT:
        inverse = tl.load(errors_ptr + rows, mask=mask, other=0.0)
        norm = tl.load(errors_ptr + stride + rows, mask=mask, other=0.0)
        residual = tl.load(errors_ptr + 2 * stride + rows, mask=mask, other=0.0)
        weight_norm = 1.001 * residual + accumulation * norm
        weight_residual = 1.001 * (norm + residual)
    return inverse, weight_norm, weight_residual


@triton.jit
def score_of(
    s,
    latent,
    mask,
    row_inverse,
    terms_ptr,  # [5, L]; if EXACT: bias and norm, [2, L]
    L,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Pre-activation (if EXACT) and score of screened products s.

    Where `mask` is False the score is minus infinity if s and the row are finite.
    """
    if EXACT:
        pre_act = s + tl.load(terms_ptr + latent, mask=mask, other=float("-inf"))
        score = pre_act
        if HAS_NORMS:
            score = pre_act * tl.load(terms_ptr + L + latent, mask=mask, other=1.0)
    else:
        scale = row_inverse * tl.load(terms_ptr + latent, mask=mask, other=0.0)
        score = s * scale + tl.load(terms_ptr + L + latent, mask=mask, other=float("-inf"))
        pre_act = score
    return pre_act, score


# 2^-11 of a product for its rounding to float16, and 2^-25 of its scale for subnormals; and more,
# for float32.
ROUNDING = tl.constexpr(4.887e-4)
SUBNORMAL = tl.constexpr(2.9803e-8)


@triton.jit
def screened(
    s,
    latent,
    mask,
    row_inverse,
    row_weight_norm,
    row_weight_residual,
    terms_ptr,  # as for score_of
    L,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """As `score_of`, and a bound on the score's error, of which the module's docstring has the
    formula. Where `mask` is False it is zero if s and the row are finite.
    """
    pre_act, score = score_of(s, latent, mask, row_inverse, terms_ptr, L, EXACT, HAS_NORMS)
    bound = tl.zeros_like(s)
    if not EXACT:
        scale = row_inverse * tl.load(terms_ptr + latent, mask=mask, other=0.0)
        bound = tl.load(terms_ptr + 4 * L + latent, mask=mask, other=0.0)
        bound += row_weight_norm * tl.load(terms_ptr + 2 * L + latent, mask=mask, other=0.0)
        bound += row_weight_residual * tl.load(terms_ptr + 3 * L + latent, mask=mask, other=0.0)
        bound += ROUNDING * tl.abs(s * scale) + SUBNORMAL * scale
    return pre_act, score, bound


@dataclass(frozen=True)
class Screen:
    """`x @ weight.T` in low precision, and what bounds the error of its elements.

    Attributes:
        x: `[n_rows, d_in]` in the dtype of the screen.
        weight: `[d_sae, d_in]`, likewise.
        x_error: scales to undo, norms and residuals of the rows of x, `[3, n_rows]` float32;
            anything if `exact`.
        terms: what `screened` takes of the latents, `[5, d_sae]` float32; if `exact`, bias and
            norms, `[2, d_sae]`, or the bias alone.
        bias: `[d_sae]` float32.
        norms: `[d_sae]` float32, or None.
        exact: whether the screen is the computation that the caller asks for.
        pre_acts_dtype: dtype that the dense encoder would give.
    """

    x: torch.Tensor
    weight: torch.Tensor
    x_error: torch.Tensor
    terms: torch.Tensor
    bias: torch.Tensor
    norms: torch.Tensor | None
    exact: bool
    pre_acts_dtype: torch.dtype

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        norms: torch.Tensor | None = None,
        rounded: WeightCopy | None = None,
    ) -> Screen:
        """The screen of an encoder's operands, which are contiguous; obeys autocast.

        `rounded` may be a copy of the weight in the dtype of the screen.
        """
        compute_dtype = matmul_dtype(x)
        exact = compute_dtype != torch.float32
        bias32 = bias.float().contiguous()
        norms32 = None if norms is None else norms.float().contiguous()
        if exact:
            screen_x = x.to(compute_dtype)
            is_copy = rounded is not None and rounded.values.dtype == compute_dtype
            screen_weight = rounded.values if is_copy else weight.to(compute_dtype)
            x_error = terms = bias32 if norms32 is None else torch.stack([bias32, norms32])
        else:
            screen_x, x_error = _round_rows(x)
            screen_weight, w_error = _round_rows(weight)
            terms = _latent_terms(w_error, bias32, norms32)
        return cls(
            screen_x,
            screen_weight,
            x_error,
            terms,
            bias32,
            norms32,
            exact,
            torch.promote_types(compute_dtype, bias.dtype),
        )

    def chunks(
        self, buffer_bytes: int, rows_per_program: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Row ranges and their products `[rows, d_sae]`, in a buffer that the next one reuses.

        Kernels with `rows_per_program` can be launched on the rows of any.
        """
        n_rows, d_sae = self.x.shape[0], self.weight.shape[0]
        step = buffer_bytes // (d_sae * self.x.element_size())
        step = max(1, min(n_rows, step, MAX_GRID[1] * rows_per_program))
        buffer = torch.empty(step, d_sae, dtype=self.x.dtype, device=self.x.device)
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            chunk = buffer[: rows.stop - rows.start]
            if self.exact:  # autocast leaves a product into a buffer alone
                torch.mm(self.x[rows], self.weight.T, out=chunk)
            else:
                multiply_float16(self.x[rows], self.weight, chunk)
            yield rows, chunk

    def arguments(self, rows: slice) -> tuple[Any, ...]:
        """What kernels over a chunk take for `row_terms` and `screened`: rows' errors and their
        stride, terms of the latents, and the relative error of accumulation.
        """
        x_error = self.x_error if self.exact else self.x_error[:, rows.start :]
        # Tensor cores add sums of at least 8 products one after the other, each time off by at
        # most 2^-22 of the partial sum. The recomputation adds a tile of 256 or more at a time,
        # each time off by 2^-24.
        d_in = self.x.shape[1]
        accumulation = (d_in / 8 + d_in / 1024 + 16) * 2.0**-22
        return x_error, self.x_error.shape[-1], self.terms, accumulation

    @property
    def modes(self) -> dict[str, bool]:
        """Compile-time arguments of kernels that call `screened`."""
        return {"EXACT": self.exact, "HAS_NORMS": self.norms is not None}


def _round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float16 rows, each scaled by a power of two, and their errors (`Screen.x_error`)."""
    n_rows, d = rows.shape
    rounded = torch.empty(n_rows, d, dtype=torch.float16, device=rows.device)
    errors = torch.empty(3, n_rows, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(d)
    _round_rows_kernel[(n_rows,)](
        rounded, errors, rows, n_rows, d, BLOCK_D=block, num_warps=warps(block, 512, rows.device)
    )
    return rounded, errors


def _latent_terms(
    errors: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None
) -> torch.Tensor:
    d_sae = bias.numel()
    terms = torch.empty(5, d_sae, dtype=torch.float32, device=bias.device)
    _latent_terms_kernel[(triton.cdiv(d_sae, 1024),)](
        terms, errors, bias, bias if norms is None else norms, d_sae,
        HAS_NORMS=norms is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return terms


def warps(elements: int, per_warp: int, device: torch.device) -> int:
    """Warps for a program that holds so many elements."""
    wanted = triton.next_power_of_2(triton.cdiv(elements, per_warp))
    return min(max_warps(device), max(1, wanted))
