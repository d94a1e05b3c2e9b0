"""Low-precision screening of the encoder's products, with a bound on each one's error.

A GEMM in low precision fills a `[rows, d_sae]` buffer, a chunk of rows at a time. For float32 the
buffer is float16, of operands scaled by powers of two to norms of 64 to 128, so that no product
overflows. float16 has an eighth of bfloat16's rounding error, which keeps candidates few. Where the
caller computes in bfloat16, the screen is the computation, and bounds are zero.

The bound, for latent j of row n, with rounding residuals dx and dw, Cauchy-Schwarz twice:

    |x.w - x'.w'| <= |dx| |w| + |x'| |dw| + accumulation + rounding of the result to float16

`BOUND.md` proves it, with every constant. Accumulation is in float32: `float16_product.py` sees to
that.

A float8 screen is an approximation that the caller asks for. The proven bound would be more than a
hundred times as wide as float16's, and most latents would be candidates. Instead, the rounding
errors of columns are taken for independent. Then the first two terms divided by sqrt(d_in) are at
least the standard deviation of the error, where no column stands out in both operands. The bound is
`float8_deviations` of that, and twice as many for a search whose threshold is no bound itself. A
latent whose score is further off may be missed. What is found is right: all candidates are computed
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import MAX_GRID, kernel
from saelens_sparse.ops.common.precision import FLOAT8, ScreenDtype, matmul_dtype
from saelens_sparse.ops.screen import bound
from saelens_sparse.ops.screen.bound import MAX_D_IN
from saelens_sparse.ops.screen.float8_product import multiply_float8
from saelens_sparse.ops.screen.float16_product import multiply_float16
from saelens_sparse.ops.screen.round_kernels import round_rows
from saelens_sparse.ops.update.weight_cache import WeightCopy

__all__ = ["MAX_D_IN", "Chunk", "Screen", "row_terms", "score_of", "screened"]

NORM_SLACK = tl.constexpr(bound.NORM_SLACK)
ROUNDING = tl.constexpr(bound.ROUNDING)
UNDERFLOW = tl.constexpr(bound.UNDERFLOW)
BIAS_ROUNDING = tl.constexpr(bound.BIAS_ROUNDING)


def float8_deviations(compute_dtype: torch.dtype) -> float:
    """What the bound of a float8 product allows for where products are asked for in a dtype.

    A latent of the top k is missed where two errors differ by twice that. On activations of
    SmolLM2-135M 1.25 deviations missed one of 32,768 of the top 32, 1.5 none, and a row had 37 to
    52 candidates. A product in bfloat16 misses 125 of them, so autocast can do with fewer. Where
    three columns stood out in both operands, 2% were missed (benchmarks/float8_recall.py).
    """
    return 1.5 if compute_dtype == torch.float32 else 1.25


@dataclass(frozen=True)
class ScreenLaunch:
    """Tile of the kernel that prepares what scores take of the latents."""

    TERMS: int = 1024
    TERMS_WARPS: int = 4


LAUNCH = ScreenLaunch()


class Chunk(NamedTuple):
    """Products of a chunk of rows, and what their scores and bounds are made of.

    `row_errors` and `terms` are None where the screen is the computation that the caller asks for.
    """

    products: Any  # [N, L]
    row_errors: Any  # [3, *] float32: what undoes the scale, |row|, |row - rounded / 2^e|
    row_stride: Any  # of `row_errors`
    accumulation: Any  # relative error of sums
    terms: Any  # [5, L] float32: inverse scale, bias, norm, residual, what underflows
    bias: Any  # [L] float32
    norms: Any  # [L] float32 or None
    N: Any
    L: Any


@kernel
def _latent_terms_kernel(
    terms_ptr,  # [5, L], see Chunk; each but the last times the decoder norm
    errors_ptr,  # [3, L]
    bias_ptr,  # [L]
    norms_ptr,  # [L] or None
    residual_share,  # or None for all of it
    L,
    BLOCK: tl.constexpr,
):
    """What of the score and its bound depends on the latent alone, with a share of the residual.

    Grid: a program for BLOCK latents, [L / BLOCK].
    """
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = latent < L
    factor = tl.full((BLOCK,), 1.0, tl.float32)
    if norms_ptr is not None:
        factor = tl.load(norms_ptr + latent, mask=live, other=0.0)
    bias = tl.load(bias_ptr + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + L + latent, bias, mask=live)
    inverse = tl.load(errors_ptr + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + latent, inverse, mask=live)
    norm = tl.load(errors_ptr + L + latent, mask=live, other=0.0) * factor
    tl.store(terms_ptr + 2 * L + latent, norm, mask=live)
    residual = tl.load(errors_ptr + 2 * L + latent, mask=live, other=0.0) * factor
    if residual_share is not None:
        residual *= residual_share
    tl.store(terms_ptr + 3 * L + latent, residual + UNDERFLOW, mask=live)
    tl.store(terms_ptr + 4 * L + latent, (1.0 + factor) * UNDERFLOW, mask=live)


@triton.jit
def row_terms(chunk, rows, mask):
    """What of a score and its bound depends on the row alone: three factors for `screened`."""
    inverse, weight_norm, weight_residual = 0.0, 0.0, 0.0
    if chunk.row_errors is not None:
        errors = chunk.row_errors + rows
        inverse = tl.load(errors, mask=mask, other=0.0)
        norm = tl.load(errors + chunk.row_stride, mask=mask, other=0.0)
        residual = tl.load(errors + 2 * chunk.row_stride, mask=mask, other=0.0)
        weight_norm = residual * NORM_SLACK + norm * chunk.accumulation + UNDERFLOW
        weight_residual = (norm + residual) * NORM_SLACK
    return inverse, weight_norm, weight_residual


@triton.jit
def score_of(s, chunk, latent, mask, row_inverse):
    """Pre-activation (if the screen has no errors) and score of products s.

    Where `mask` is False the score is minus infinity if s and the row are finite.
    """
    if chunk.terms is None:
        pre_act = s + tl.load(chunk.bias + latent, mask=mask, other=float("-inf"))
        score = pre_act
        if chunk.norms is not None:
            score = pre_act * tl.load(chunk.norms + latent, mask=mask, other=1.0)
    else:
        scale = row_inverse * tl.load(chunk.terms + latent, mask=mask, other=0.0)
        bias = tl.load(chunk.terms + chunk.L + latent, mask=mask, other=float("-inf"))
        score = s * scale + bias
        pre_act = score
    return pre_act, score


@triton.jit
def screened(s, chunk, latent, mask, row_inverse, row_weight_norm, row_weight_residual):
    """As `score_of`, and a bound on the score's error, of which the module's docstring has the
    formula. Where `mask` is False it is zero if s and the row are finite.
    """
    pre_act, score = score_of(s, chunk, latent, mask, row_inverse)
    bound = tl.zeros_like(s)
    if chunk.terms is not None:
        L = chunk.L
        terms = chunk.terms + latent
        scale = row_inverse * tl.load(terms, mask=mask, other=0.0)
        bias = tl.load(terms + L, mask=mask, other=0.0)
        bound = tl.abs(bias) * BIAS_ROUNDING + tl.load(terms + 4 * L, mask=mask, other=0.0)
        bound += row_weight_norm * tl.load(terms + 2 * L, mask=mask, other=0.0)
        bound += row_weight_residual * tl.load(terms + 3 * L, mask=mask, other=0.0)
        bound += tl.abs(s * scale) * ROUNDING
    return pre_act, score, bound


@dataclass(frozen=True)
class Screen:
    """`x @ weight.T` in low precision, and what bounds the error of its elements.

    Attributes:
        x: `[n_rows, d_in]` in the dtype of the screen.
        weight: `[d_sae, d_in]`, likewise.
        x_errors: scales to undo, norms and residuals of the rows of x, `[3, n_rows]` float32; None
            if the screen is the computation that the caller asks for.
        terms: what scores and bounds take of the latents, `[5, d_sae]` float32; None likewise.
        bias: `[d_sae]` float32.
        norms: `[d_sae]` float32, or None.
        pre_acts_dtype: dtype that the dense encoder would give.
        accumulation: error of sums, relative to norms; zero where it is not bounded.
        products_dtype: dtype of the products.
        is_proven: whether no score is further off than its bound.
    """

    x: torch.Tensor
    weight: torch.Tensor
    x_errors: torch.Tensor | None
    terms: torch.Tensor | None
    bias: torch.Tensor
    norms: torch.Tensor | None
    pre_acts_dtype: torch.dtype
    accumulation: float
    products_dtype: torch.dtype
    is_proven: bool

    @property
    def exact(self) -> bool:
        """Whether the screen is the computation that the caller asks for."""
        return self.terms is None

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        *,
        tile: int,
        norms: torch.Tensor | None = None,
        rounded: WeightCopy | None = None,
        screen_dtype: ScreenDtype = "auto",
        float8_margins: int = 1,
    ) -> Screen:
        """The screen of an encoder's operands, which are contiguous; obeys autocast.

        Args:
            x: `[n_rows, d_in]`.
            weight: `[d_sae, d_in]`.
            bias: `[d_sae]`.
            tile: columns that the float32 recomputation of candidates adds at a time.
            norms: `[d_sae]` or None.
            rounded: a copy of the weight, used if it has the dtype of the screen; or None.
            screen_dtype: "float8" for a screen in float8; "auto" for one that misses nothing.
            float8_margins: how many margins bound an error in float8: one where scores are compared
                with what is lowered by as much, two where they are not.
        """
        assert x.is_contiguous() and weight.is_contiguous()
        compute_dtype, d_in = matmul_dtype(x), x.shape[1]
        is_float8 = screen_dtype == "float8"
        bias32 = bias.float().contiguous()
        norms32 = None if norms is None else norms.float().contiguous()
        dtype = FLOAT8 if is_float8 else compute_dtype
        if dtype == torch.float32:
            dtype = torch.float16
        if rounded is not None and rounded.values.dtype != dtype:
            rounded = None
        accumulation = 0.0
        if compute_dtype != torch.float32 and not is_float8:
            screen_x = x.to(dtype)
            screen_weight = weight.to(dtype) if rounded is None else rounded.values
            x_errors = terms = None
        else:
            share = None
            screen_x, x_errors = round_rows(x, dtype)
            if is_float8:
                share = float8_margins * float8_deviations(compute_dtype) / d_in**0.5
                x_errors[2] *= share
            if rounded is not None and rounded.errors is not None:
                screen_weight, w_errors = rounded.values, rounded.errors
            else:
                screen_weight, w_errors = round_rows(weight, dtype)
            terms = _latent_terms(w_errors, bias32, norms32, share)
        if not is_float8:
            accumulation = bound.accumulation(d_in, tile, _capability(x.device))
        return cls(
            screen_x,
            screen_weight,
            x_errors,
            terms,
            bias32,
            norms32,
            torch.promote_types(compute_dtype, bias.dtype),
            accumulation,
            products_dtype=torch.float16 if is_float8 else dtype,
            is_proven=not is_float8,
        )

    def rows_at_once(self, buffer_bytes: int, rows_per_program: int) -> int:
        """Rows of each of the `chunks` but the last."""
        step = buffer_bytes // (self.weight.shape[0] * self.products_dtype.itemsize)
        return max(1, min(self.x.shape[0], step, MAX_GRID[1] * rows_per_program))

    def chunks(self, buffer_bytes: int, rows_per_program: int) -> Iterator[tuple[slice, Chunk]]:
        """Row ranges and their products, in a buffer that the next one reuses.

        Kernels with `rows_per_program` can be launched on the rows of any.
        """
        n_rows, d_sae = self.x.shape[0], self.weight.shape[0]
        step = self.rows_at_once(buffer_bytes, rows_per_program)
        buffer = torch.empty(step, d_sae, dtype=self.products_dtype, device=self.x.device)
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            products = buffer[: rows.stop - rows.start]
            if self.exact:  # autocast leaves a product into a buffer alone
                torch.mm(self.x[rows], self.weight.T, out=products)
            elif self.x.dtype == FLOAT8:
                multiply_float8(self.x[rows], self.weight, products)
            else:
                multiply_float16(self.x[rows], self.weight, products)
            yield rows, self._chunk(rows, products)

    def _chunk(self, rows: slice, products: torch.Tensor) -> Chunk:
        return Chunk(
            products=products,
            row_errors=None if self.x_errors is None else self.x_errors[:, rows.start :],
            row_stride=self.x.shape[0],
            accumulation=self.accumulation,
            terms=self.terms,
            bias=self.bias,
            norms=self.norms,
            N=products.shape[0],
            L=products.shape[1],
        )


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's compute capability; None for what is no card of NVIDIA's."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device) if is_nvidia else None


def _latent_terms(
    errors: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    residual_share: float | None,
) -> torch.Tensor:
    d_sae = bias.numel()
    terms = torch.empty(5, d_sae, dtype=torch.float32, device=bias.device)
    _latent_terms_kernel[(triton.cdiv(d_sae, LAUNCH.TERMS),)](
        terms_ptr=terms,
        errors_ptr=errors,
        bias_ptr=bias,
        norms_ptr=norms,
        residual_share=residual_share,
        L=d_sae,
        BLOCK=LAUNCH.TERMS,
        num_warps=LAUNCH.TERMS_WARPS,
    )
    return terms
