"""Triton kernels of the row operations; `operations.py` says what they compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import MAX_GRID, kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import Rows


@dataclass(frozen=True)
class GatherSumLaunch:
    """Tile of `gather_sum`: BLOCK_K gathered rows of BLOCK_D columns are in flight at once."""

    BLOCK_K: int = 16
    BLOCK_D: int = 128
    num_warps: int = 1


@dataclass(frozen=True)
class GatherDotLaunch:
    """Tile of `gather_dot`: BLOCK_K dot products, BLOCK_D columns at a time."""

    BLOCK_K: int = 16
    BLOCK_D: int = 64
    num_warps: int = 2


@dataclass(frozen=True)
class AddRowsLaunch:
    """Tile of `add_rows`: BLOCK_D columns of a row."""

    BLOCK_D: int = 1024
    num_warps: int = 4


@dataclass(frozen=True)
class RowCombinationLaunch:
    """Tile of `row_combination`: a program adds up to ROWS rows, BLOCK_L of them at a time."""

    ROWS: int = 64
    BLOCK_L: int = 4
    BLOCK_D: int = 512
    num_warps: int = 2


# Chosen at batch 4096, float32: gathers at 768 -> 24,576, k 32, at 2304 -> 65,536 and
# 4096 -> 131,072, k 64 (H100), the others at 2304 -> 65,536 (H200).
GATHER_SUM = GatherSumLaunch()
GATHER_DOT = GatherDotLaunch()
ADD_ROWS = AddRowsLaunch()
ROW_COMBINATION = RowCombinationLaunch()
# Columns whose squares one warp adds; a norm is made of such sums wherever it is made.
NORM_COLS = 512


class RowPairs(NamedTuple):
    """The rows of pairs, as kernels take them: as many on each, or from offset to offset."""

    offsets: torch.Tensor | None  # [N + 1]
    k: int | None

    @classmethod
    def of(cls, rows: Rows) -> Self:
        return cls(rows.offsets, rows.k)


class RowErrors(NamedTuple):
    """What a sum is compared with, and where what comes of that goes; None if it is not."""

    target: torch.Tensor | None  # [N, D] float32
    residual: torch.Tensor | None  # [N, D] float32
    squares: torch.Tensor | None  # [T, N] float32, by tile of columns


NO_ERRORS = RowErrors(None, None, None)


@triton.jit
def pairs_of_row(rows, n):
    """Where the pairs of row n begin, and how many there are."""
    if rows.offsets is None:
        first = n * rows.k
        n_pairs = rows.k
    else:
        first = tl.load(rows.offsets + n)
        n_pairs = (tl.load(rows.offsets + n + 1) - first).to(tl.int32)
    return first, n_pairs


def _gathers(arguments: Mapping[str, Any]) -> tuple[float, float]:
    """Work of a kernel that reads a row of a weight for each pair: bytes and flops."""
    weight, latents = arguments["weight_ptr"], arguments["latents_ptr"]
    names = ("out_ptr", "batch_ptr", "coefficients_ptr", "latents_ptr")
    others = sum(arguments[name].nbytes for name in names if name in arguments)
    row_bytes = weight.shape[1] * weight.element_size()
    n_pairs = latents.numel()
    return float(n_pairs * row_bytes + others), 2.0 * n_pairs * weight.shape[1]


@kernel.asking(_gathers)
def _gather_sum_kernel(
    out_ptr,  # [N, D]
    coefficients_ptr,  # [P]
    latents_ptr,  # [P]
    weight_ptr,  # [L, D]
    bias_ptr,  # [D] or None
    error,  # RowErrors
    rows,  # RowPairs
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[n, :] = sum over the pairs p of row n of coefficients[p] * weight[latents[p], :] + bias

    and what is wanted of out - target.

    Grid: rows, tiles of columns.
    """
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    first, n_pairs = pairs_of_row(rows, n)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, n_pairs, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        live = i < n_pairs
        coefficient = tl.load(coefficients_ptr + first + i, mask=live, other=0.0).to(tl.float32)
        # Rows with a zero coefficient (clipped by the activation function) are not read.
        used = live & (coefficient != 0.0)
        latent = tl.load(latents_ptr + first + i, mask=used, other=0).to(tl.int64)
        tile = tl.load(
            weight_ptr + latent[:, None] * D + cols[None, :],
            mask=used[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += tl.sum(tile * coefficient[:, None], axis=0)
    out = acc.to(out_ptr.dtype.element_ty)
    if bias_ptr is not None:  # rounded as a sum and an addition are
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) + bias).to(out.dtype)
    tl.store(out_ptr + n * D + cols, out, mask=col_mask)
    if error.target is not None:
        target = tl.load(error.target + n * D + cols, mask=col_mask, other=0.0)
        # Beyond the last column an infinite coefficient has made NaN.
        residual = tl.where(col_mask, out.to(tl.float32) - target, 0.0)
        tl.store(error.residual + n * D + cols, residual, mask=col_mask)
        square = tl.sum(residual * residual, axis=0)
        share = tl.program_id(1).to(tl.int64)
        tl.store(error.squares + share * tl.num_programs(0) + n, square)


@kernel.asking(_gathers)
def _gather_dot_kernel(
    out_ptr,  # [P]
    batch_ptr,  # [N, D]
    latents_ptr,  # [P]
    weight_ptr,  # [L, D]
    rows,  # RowPairs
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[p] = <batch[n, :], weight[latents[p], :]> for the pairs p of row n

    Grid: rows, blocks of pairs.
    """
    n = tl.program_id(0).to(tl.int64)
    first, n_pairs = pairs_of_row(rows, n)
    step = tl.num_programs(1) * BLOCK_K
    for start in range(tl.program_id(1) * BLOCK_K, n_pairs, step):
        i = start + tl.arange(0, BLOCK_K)
        live = i < n_pairs
        latent = tl.load(latents_ptr + first + i, mask=live, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        for start_d in range(0, D, BLOCK_D):
            cols = start_d + tl.arange(0, BLOCK_D)
            col_mask = cols < D
            x = tl.load(batch_ptr + n * D + cols, mask=col_mask, other=0.0).to(tl.float32)
            tile = tl.load(
                weight_ptr + latent[:, None] * D + cols[None, :],
                mask=live[:, None] & col_mask[None, :],
                other=0.0,
            ).to(tl.float32)
            acc += tile * x[None, :]
        tl.store(out_ptr + first + i, tl.sum(acc, axis=1), mask=live)


@kernel
def _add_rows_kernel(
    weight_ptr,  # [L, D]
    rows_ptr,  # [n]
    values_ptr,  # [n, D]
    D,
    BLOCK_D: tl.constexpr,
):
    """weight[rows[i], :] += values[i, :]"""
    i = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    target = weight_ptr + tl.load(rows_ptr + i) * D + cols
    value = tl.load(values_ptr + i * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    old = tl.load(target, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(target, (old + value).to(weight_ptr.dtype.element_ty), mask=cols < D)


@kernel
def _row_combination_kernel(
    parts_ptr,  # [B, D]
    coefficients_ptr,  # [L]
    weight_ptr,  # [L, D]
    L,
    D,
    ROUNDED: tl.constexpr,  # whether rows are rounded to bfloat16
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts[b, :] = sum over the ROWS rows j of block b of coefficients[j] * weight[j, :]

    Grid: blocks of rows, tiles of columns.
    """
    block = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_L):
        j = block * ROWS + start + tl.arange(0, BLOCK_L)
        coefficient = tl.load(coefficients_ptr + j, mask=j < L, other=0.0).to(tl.float32)
        used = (j < L) & (coefficient != 0.0)
        tile = tl.load(
            weight_ptr + j[:, None] * D + cols[None, :],
            mask=used[:, None] & col_mask[None, :],
            other=0.0,
        )
        if ROUNDED:
            tile = tile.to(tl.bfloat16)
        acc += tl.sum(tile.to(tl.float32) * coefficient[:, None], axis=0)
    tl.store(parts_ptr + block * D + cols, acc, mask=col_mask)


@triton.jit
def store_square_sum(place, row):
    """Store the sum of squares of a tile of a row, for `norms_of`."""
    tl.store(place, tl.sum(row * row, axis=0))


@kernel
def _row_squares_kernel(
    squares_ptr,  # [L, T]
    weight_ptr,  # [L, D]
    D,
    BLOCK_D: tl.constexpr,
):
    j = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tl.load(weight_ptr + j * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    store_square_sum(squares_ptr + j * tl.num_programs(1) + tl.program_id(1), row)


@kernel
def _probe_kernel(out_ptr):
    tl.store(out_ptr, 1)


@on_device_of_arguments
def gather_sum(
    coefficients: torch.Tensor,
    latents: torch.Tensor,
    rows: Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    error: RowErrors = NO_ERRORS,
) -> torch.Tensor:
    """As `operations.gather_sum`, where the bias has the weight's dtype."""
    assert weight.is_contiguous()
    d = weight.shape[1]
    out = torch.empty(rows.n_rows, d, dtype=weight.dtype, device=weight.device)
    if out.numel() > 0:
        _gather_sum_kernel[(rows.n_rows, triton.cdiv(d, GATHER_SUM.BLOCK_D))](
            out,
            coefficients_ptr=coefficients.contiguous(),
            latents_ptr=latents.contiguous(),
            weight_ptr=weight,
            bias_ptr=None if bias is None else bias.contiguous(),
            error=error,
            rows=RowPairs.of(rows),
            D=d,
            **vars(GATHER_SUM),
        )
    return out


@on_device_of_arguments
def gather_dot(
    batch: torch.Tensor, latents: torch.Tensor, rows: Rows, weight: torch.Tensor
) -> torch.Tensor:
    """As `operations.gather_dot`."""
    assert weight.is_contiguous()
    make = torch.empty if rows.k is not None else torch.zeros
    out = make(latents.shape, dtype=torch.float32, device=weight.device)
    if out.numel() > 0:
        mean_pairs = triton.cdiv(latents.numel(), rows.n_rows)
        # Fewer programs a row than it has blocks of pairs take several blocks each.
        n_programs = min(triton.cdiv(mean_pairs, GATHER_DOT.BLOCK_K), MAX_GRID[1])
        _gather_dot_kernel[(rows.n_rows, n_programs)](
            out,
            batch_ptr=batch.contiguous(),
            latents_ptr=latents.contiguous(),
            weight_ptr=weight,
            rows=RowPairs.of(rows),
            D=weight.shape[1],
            **vars(GATHER_DOT),
        )
    return out


@on_device_of_arguments
def add_rows(weight: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """As `operations.add_rows`."""
    assert weight.is_contiguous()
    n, d = values.shape
    if n > 0:
        _add_rows_kernel[(n, triton.cdiv(d, ADD_ROWS.BLOCK_D))](
            weight,
            rows_ptr=rows.contiguous(),
            values_ptr=values.contiguous(),
            D=d,
            **vars(ADD_ROWS),
        )


@on_device_of_arguments
def row_combination(
    coefficients: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """As `operations.row_combination`, of rows in their own dtype or in bfloat16."""
    assert dtype in (weight.dtype, torch.bfloat16)
    assert weight.is_contiguous()
    (d_sae, d), launch = weight.shape, ROW_COMBINATION
    n_blocks = triton.cdiv(d_sae, launch.ROWS)
    parts = torch.empty(n_blocks, d, dtype=torch.float32, device=weight.device)
    _row_combination_kernel[(n_blocks, triton.cdiv(d, launch.BLOCK_D))](
        parts,
        coefficients_ptr=coefficients.contiguous(),
        weight_ptr=weight,
        L=d_sae,
        D=d,
        ROUNDED=dtype != weight.dtype,
        **vars(launch),
    )
    return parts.sum(0).to(coefficients.dtype)


@on_device_of_arguments
def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """As `operations.row_norms`."""
    assert weight.is_contiguous()
    squares = empty_square_sums(weight, NORM_COLS)
    _row_squares_kernel[squares.shape](
        squares, weight_ptr=weight, D=weight.shape[1], BLOCK_D=NORM_COLS, num_warps=1
    )
    return norms_of(squares)


def empty_square_sums(weight: torch.Tensor, tile: int) -> torch.Tensor:
    """Room for the sums of squares of each row's tiles of so many columns."""
    d_sae, d = weight.shape
    tiles = triton.cdiv(d, tile)
    return torch.empty(d_sae, tiles, dtype=torch.float32, device=weight.device)


def norms_of(squares: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Norms of rows from the sums of squares of their tiles."""
    return torch.sqrt(squares.sum(1), out=out)


def launch_probe(device: torch.device) -> None:
    """Compile and run a kernel; raises whatever keeps Triton from doing so."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    on_device_of_arguments(_probe_kernel[(1,)])(out)
    if out.item() != 1:
        raise RuntimeError("a test kernel did not write its output")
