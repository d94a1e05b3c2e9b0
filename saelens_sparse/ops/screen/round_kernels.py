"""Rows in the precision of a screen: scaled by a power of two each, rounded, and how far off."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device, warps


@dataclass(frozen=True)
class RoundLaunch:
    """Columns of a row that one warp rounds: one pass over a weight of 2304 -> 65,536 in float32,
    which an H200's memory bounds whatever they are. And rows that one program settles.
    """

    PER_WARP: int = 512
    SETTLED_ROWS: int = 64


LAUNCH = RoundLaunch()


@triton.jit
def round_to(x, low: tl.constexpr):
    """A float32 rounded to nearest in a type of lower precision, and the same as a float32.

    In float8 (e4m3) up to its largest number, 448. Triton's cast back from float8 is not used: with
    four elements a thread, ptxas 12.8 then reads a register that nothing has set. What is cast to
    float8 needs no rounding: Triton's interpreter halves what is rounded up to a power of two.
    """
    if low == tl.float8e4nv:
        # A sum with 1.5 * 2^23 times the distance of neighbours keeps whole multiples of that.
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, 0.015625) * 1572864.0
        again = (x + shift) - shift
        rounded = again.to(low)
    else:
        rounded = x.to(low)
        again = rounded.to(tl.float32)
    return rounded, again


@triton.jit
def _round_row(rounded_ptr, errors_ptr, rows_ptr, r, R, D, BLOCK_D: tl.constexpr):
    """Round row r, and write how far off it is."""
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(rows_ptr + r * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    # Squares of tiny or huge rows leave float32's range, so scale by the largest element first.
    exponent = tl.floor(tl.log2(tl.max(tl.abs(x), axis=0)))
    exponent = tl.minimum(tl.maximum(exponent, -100.0), 100.0)
    x = x * tl.exp2(-exponent)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    shrink = tl.exp2(6.0 - tl.floor(tl.log2(tl.maximum(norm, 1.0))))
    x = x * shrink
    rounded, again = round_to(x, rounded_ptr.dtype.element_ty)
    error = x - again
    tl.store(rounded_ptr + r * D + cols, rounded, mask=cols < D)
    inverse = tl.exp2(exponent) / shrink
    tl.store(errors_ptr + r, inverse)
    tl.store(errors_ptr + R + r, norm * tl.exp2(exponent))
    tl.store(errors_ptr + 2 * R + r, tl.sqrt(tl.sum(error * error, axis=0)) * inverse)


@kernel
def _round_rows_kernel(
    rounded_ptr,  # [R, D] float16 or float8
    errors_ptr,  # [3, R]: what undoes the scale, |row|, |row - rounded / 2^e|
    rows_ptr,  # [R, D]
    R,
    D,
    BLOCK_D: tl.constexpr,
):
    """rounded = low(row * 2^e), of norm 64 to 128

    Grid: a program a row, [R].
    """
    r = tl.program_id(0).to(tl.int64)
    _round_row(rounded_ptr, errors_ptr, rows_ptr, r, R, D, BLOCK_D)


@triton.jit
def reciprocal_power(power):
    """1 / power, for a float32 that is a power of two; exact."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def _keeps_scale(squares):
    """Whether rows of these squared norms, as they are scaled, would be scaled so anew."""
    norm = tl.sqrt(squares)
    return (norm >= 64.0) & (norm < 128.0)


@kernel
def _settle_rows_kernel(
    rounded_ptr,  # [R, D] float8
    errors_ptr,  # [3, R]; the first is what rows were scaled by
    squares_ptr,  # [R, T], of scaled rows
    residual_squares_ptr,  # [R, T]
    rows_ptr,  # [R, D]
    R,
    D,
    T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """errors of rows whose scale still is what it would be made anew; other rows made anew

    Grid: a program for BLOCK_R rows, [R / BLOCK_R].
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    rows = first + tl.arange(0, BLOCK_R)
    live = rows < R
    squares = tl.zeros((BLOCK_R,), tl.float32)
    residuals = tl.zeros((BLOCK_R,), tl.float32)
    for t in tl.static_range(T):
        squares += tl.load(squares_ptr + rows * T + t, mask=live, other=0.0)
        residuals += tl.load(residual_squares_ptr + rows * T + t, mask=live, other=0.0)
    keeps = live & _keeps_scale(squares)
    inverse = tl.load(errors_ptr + rows, mask=keeps, other=0.0)
    tl.store(errors_ptr + R + rows, tl.sqrt(squares) * inverse, mask=keeps)
    tl.store(errors_ptr + 2 * R + rows, tl.sqrt(residuals) * inverse, mask=keeps)
    if tl.sum((live & (keeps == 0)).to(tl.int32), axis=0) > 0:
        for r in range(first, tl.minimum(first + BLOCK_R, R)):
            square = 0.0
            for t in tl.static_range(T):
                square += tl.load(squares_ptr + r * T + t)
            if _keeps_scale(square) == 0:
                _round_row(rounded_ptr, errors_ptr, rows_ptr, r, R, D, BLOCK_D)


def round_rows(rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows scaled by a power of two each and rounded, and how far off they are.

    Args:
        rows: `[n_rows, d]`, contiguous.
        dtype: float16 or float8 (e4m3).

    Returns:
        The rows in `dtype`, of norms from 64 on and below 128; and `[3, n_rows]` float32: what
        undoes the scale, the norm of the row, and the norm of what rounding took away.
    """
    n_rows, d = rows.shape
    rounded = torch.empty(n_rows, d, dtype=dtype, device=rows.device)
    errors = torch.empty(3, n_rows, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(d)
    _round_rows_kernel[(n_rows,)](
        rounded_ptr=rounded,
        errors_ptr=errors,
        rows_ptr=rows,
        R=n_rows,
        D=d,
        BLOCK_D=block,
        num_warps=warps(block, LAUNCH.PER_WARP, rows.device),
    )
    return rounded, errors


def settle_rows(
    rows: torch.Tensor,
    rounded: torch.Tensor,
    errors: torch.Tensor,
    squares: torch.Tensor,
    residual_squares: torch.Tensor,
) -> None:
    """
    Give rows that were rounded with the scale of a step before what `round_rows` gives them.

    A row that has left the norms that its scale is for is rounded anew. The others get their
    errors alone.

    Args:
        rows: `[n_rows, d]`, contiguous.
        rounded: `[n_rows, d]`, the same scaled and rounded; changed in place.
        errors: `[3, n_rows]`, of which the first undoes the scale; changed in place.
        squares: `[n_rows, n_tiles]` float32, sums of squares of the scaled rows by tile of columns.
        residual_squares: `[n_rows, n_tiles]`, of what rounding took away.
    """
    n_rows, d = rows.shape
    n_tiles, block = squares.shape[1], triton.next_power_of_2(d)
    with on_device(rows.device):
        _settle_rows_kernel[(triton.cdiv(n_rows, LAUNCH.SETTLED_ROWS),)](
            rounded_ptr=rounded,
            errors_ptr=errors,
            squares_ptr=squares,
            residual_squares_ptr=residual_squares,
            rows_ptr=rows,
            R=n_rows,
            D=d,
            T=n_tiles,
            BLOCK_R=LAUNCH.SETTLED_ROWS,
            BLOCK_D=block,
            num_warps=warps(block, LAUNCH.PER_WARP, rows.device),
        )
