"""Low-precision screening of the encoder's products, with a proven bound on each one's error.

A GEMM in low precision fills a `[rows, d_sae]` buffer, a chunk of rows at a time. For float32 the
buffer is float16, of operands scaled by powers of two to norms of 64 to 128, so that no product
overflows. float16 has an eighth of bfloat16's rounding error: at 2304 -> 65,536, k 64 a row has
100 candidates on average, with bfloat16 153, without a bound 94. Where the caller computes in
bfloat16, the screen is the computation, and bounds are zero.

The bound, for latent j of row n, with rounding residuals dx and dw, Cauchy-Schwarz twice:

    |x.w - x'.w'| <= |dx| |w| + |x'| |dw| + accumulation + rounding of the result to float16
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.dense_gate import matmul_dtype

# Rows up to this width are held in one program's registers.
MAX_D_IN = 32768
# Beyond this a launch grid would exceed CUDA's limit.
_MAX_CHUNK_ROWS = 2**20


@triton.jit
def _round_rows_kernel(
    rounded_ptr,  # [R, D] float16
    inverse_scales_ptr,  # [R]
    norms_ptr,  # [R]
    residuals_ptr,  # [R]
    rows_ptr,  # [R, D] float32
    D,
    BLOCK_D: tl.constexpr,
):
    """rounded = fp16(row * 2^e), of norm 64 to 128; |row| and |row - rounded / 2^e|"""
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
    tl.store(inverse_scales_ptr + r, inverse)
    tl.store(norms_ptr + r, norm * tl.exp2(exponent))
    tl.store(residuals_ptr + r, tl.sqrt(tl.sum(error * error, axis=0)) * inverse)


@triton.jit
def screened(
    s,
    latent,
    mask,
    x_inverse,
    x_norm,
    x_residual,
    bias_ptr,  # [L]
    norms_ptr,  # [L] or unused
    w_inverse_ptr,  # [L], unused if EXACT, as the next two
    w_norms_ptr,  # [L]
    w_residuals_ptr,  # [L]
    accumulation,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Pre-activation, score and bound on the score's error of screened products s.

    This module's docstring has the formula of the bound.
    """
    bias = tl.load(bias_ptr + latent, mask=mask, other=0.0)
    bound = tl.zeros_like(s)
    if not EXACT:
        inverse = x_inverse * tl.load(w_inverse_ptr + latent, mask=mask, other=0.0)
        w_norm = tl.load(w_norms_ptr + latent, mask=mask, other=0.0)
        w_residual = tl.load(w_residuals_ptr + latent, mask=mask, other=0.0)
        s = s * inverse
        # 2^-11 of s for its rounding to float16, 2^-25 for subnormals, the rest for float32.
        bound = (1.001 * x_residual + accumulation * x_norm) * w_norm
        bound += 1.001 * (x_norm + x_residual) * w_residual
        bound += 4.887e-4 * tl.abs(s) + (2.98e-8 * inverse + 4.0e-7 * tl.abs(bias))
    pre_act = s + bias
    score = pre_act
    if HAS_NORMS:
        norm = tl.load(norms_ptr + latent, mask=mask, other=0.0)
        score = pre_act * norm
        bound = bound * norm
    return pre_act, score, bound


@dataclass(frozen=True)
class Screen:
    """`x @ weight.T` in low precision, and what bounds the error of its elements.

    Attributes:
        x: `[n_rows, d_in]` in the dtype of the screen.
        weight: `[d_sae, d_in]`, likewise.
        x_error: scales to undo, norms and residuals of the rows of x, each `[n_rows]` float32;
            anything if `exact`.
        w_error: the same of the rows of weight, each `[d_sae]`.
        bias: `[d_sae]` float32.
        norms: `[d_sae]` float32, or None.
        exact: whether the screen is the computation that the caller asks for.
        pre_acts_dtype: dtype that the dense encoder would give.
    """

    x: torch.Tensor
    weight: torch.Tensor
    x_error: tuple[torch.Tensor, ...]
    w_error: tuple[torch.Tensor, ...]
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
    ) -> Screen:
        """The screen of an encoder's operands, which are contiguous; obeys autocast."""
        compute_dtype = matmul_dtype(x)
        exact = compute_dtype != torch.float32
        bias32 = bias.float().contiguous()
        if exact:
            screen_x, screen_weight = x.to(compute_dtype), weight.to(compute_dtype)
            x_error = w_error = (bias32,) * 3
        else:
            screen_x, *x_error = _round_rows(x)
            screen_weight, *w_error = _round_rows(weight)
        return cls(
            screen_x,
            screen_weight,
            tuple(x_error),
            tuple(w_error),
            bias32,
            None if norms is None else norms.float().contiguous(),
            exact,
            torch.promote_types(compute_dtype, bias.dtype),
        )

    def chunks(self, buffer_bytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Row ranges and their products `[rows, d_sae]`, in a buffer that the next one reuses."""
        n_rows, d_sae = self.x.shape[0], self.weight.shape[0]
        step = buffer_bytes // (d_sae * self.x.element_size())
        step = max(1, min(n_rows, step, _MAX_CHUNK_ROWS))
        buffer = torch.empty(step, d_sae, dtype=self.x.dtype, device=self.x.device)
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            chunk = buffer[: rows.stop - rows.start]
            device = self.x.device
            with torch.autocast(device.type, enabled=False), _float32_accumulation(device):
                torch.mm(self.x[rows], self.weight.T, out=chunk)
            yield rows, chunk

    def arguments(self, rows: slice) -> tuple[Any, ...]:
        """What `screened` takes of a chunk, from x_inverse to accumulation, as pointers."""
        x_error = self.x_error if self.exact else [part[rows] for part in self.x_error]
        # Tensor cores add sums of at least 8 products one after the other, each time off by at
        # most 2^-22 of the partial sum.
        accumulation = (self.x.shape[1] / 8 + 16) * 2.0**-22
        norms = self.bias if self.norms is None else self.norms
        return (*x_error, self.bias, norms, *self.w_error, accumulation)

    @property
    def modes(self) -> dict[str, bool]:
        """Compile-time arguments of kernels that call `screened`."""
        return {"EXACT": self.exact, "HAS_NORMS": self.norms is not None}


@contextmanager
def _float32_accumulation(device: torch.device) -> Iterator[None]:
    """Keep cuBLAS from adding partial sums in float16, which the bound does not cover."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    settings = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation = settings


def _round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    n_rows, d = rows.shape
    rounded = torch.empty(n_rows, d, dtype=torch.float16, device=rows.device)
    inverse_scales, norms, residuals = torch.empty(
        3, n_rows, dtype=torch.float32, device=rows.device
    )
    block = triton.next_power_of_2(d)
    _round_rows_kernel[(n_rows,)](
        rounded, inverse_scales, norms, residuals, rows, d,
        BLOCK_D=block, num_warps=warps(block, per_warp=512),
    )  # fmt: skip
    return rounded, inverse_scales, norms, residuals


def warps(elements: int, per_warp: int) -> int:
    """Warps for a program that holds so many elements."""
    return min(32, max(1, triton.next_power_of_2(triton.cdiv(elements, per_warp))))
