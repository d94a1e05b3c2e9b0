"""Triton kernels of the row operations; `row_ops.py` says what they compute."""

from dataclasses import dataclass
from typing import Any, Self

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import MAX_GRID, kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import LatentOrder, Rows


@dataclass(frozen=True)
class GatherSumLaunch:
    """Tile of `gather_sum`: BLOCK_K gathered rows of BLOCK_D columns are in flight at once."""

    BLOCK_K: int = 8
    BLOCK_D: int = 512
    num_warps: int = 2


@dataclass(frozen=True)
class GatherDotLaunch:
    """Tile of `gather_dot`: BLOCK_K dot products, BLOCK_D columns at a time."""

    BLOCK_K: int = 16
    BLOCK_D: int = 256
    num_warps: int = 4


@dataclass(frozen=True)
class SegmentSumLaunch:
    """Tile of `segment_sum`, and the length at which a segment is split.

    A latent that fires on every row would be one serial loop; SPLIT pairs at most are summed
    by one program, longer segments through partial sums in a fixed order.
    """

    BLOCK_P: int = 2
    BLOCK_D: int = 512
    SPLIT: int = 64
    num_warps: int = 1


@dataclass(frozen=True)
class SegmentTotalsLaunch:
    """Tile of `segment_totals`: BLOCK_P values of each of BLOCK_L latents at a time."""

    BLOCK_L: int = 8
    BLOCK_P: int = 128
    num_warps: int = 4


GATHER_SUM = GatherSumLaunch()
GATHER_DOT = GatherDotLaunch()
SEGMENT_SUM = SegmentSumLaunch()
SEGMENT_TOTALS = SegmentTotalsLaunch()
# Columns whose squares one warp adds; a norm is made of such sums wherever it is made.
NORM_COLS = 512


@triton.jit
def _row_of_pairs(row_offsets_ptr, n, K, RAGGED: tl.constexpr):
    """Where row n of the selection begins, and how many pairs it has."""
    first = n * K
    n_pairs = K
    if RAGGED:
        first = tl.load(row_offsets_ptr + n)
        n_pairs = (tl.load(row_offsets_ptr + n + 1) - first).to(tl.int32)
    return first, n_pairs


@kernel
def _gather_sum_kernel(
    out_ptr,  # [N, D]
    coefficients_ptr,  # [N, K]
    latents_ptr,  # [N, K]
    weight_ptr,  # [L, D]
    bias_ptr,  # [D], unused unless HAS_BIAS
    row_offsets_ptr,  # [N + 1], unused unless RAGGED
    K,
    D,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[n, :] = sum_i coefficients[n, i] * weight[latents[n, i], :] + bias[:]"""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    first, n_pairs = _row_of_pairs(row_offsets_ptr, n, K, RAGGED)
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
    if HAS_BIAS:  # rounded as a sum and an addition are
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        out = (out.to(tl.float32) + bias).to(out.dtype)
    tl.store(out_ptr + n * D + cols, out, mask=col_mask)


@kernel
def _gather_dot_kernel(
    out_ptr,  # [N, K]
    batch_ptr,  # [N, D]
    latents_ptr,  # [N, K]
    weight_ptr,  # [L, D]
    row_offsets_ptr,  # [N + 1], unused unless RAGGED
    K,
    D,
    RAGGED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[n, i] = <batch[n, :], weight[latents[n, i], :]>"""
    n = tl.program_id(0).to(tl.int64)
    first, n_pairs = _row_of_pairs(row_offsets_ptr, n, K, RAGGED)
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


@triton.jit
def _sum_pairs(
    pairs_ptr,
    coefficients_ptr,
    batch_ptr,
    first,
    n_pairs,
    cols,
    col_mask,
    rows_ptr,
    K,
    D,
    RAGGED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of coefficient * batch row over n_pairs sorted pairs, and of the coefficients."""
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    totals = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for start in range(0, n_pairs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        used = p < n_pairs
        pair = tl.load(pairs_ptr + first + p, mask=used, other=0)
        coefficient = tl.load(coefficients_ptr + pair, mask=used, other=0.0).to(tl.float32)
        used = used & (coefficient != 0.0)
        row = tl.load(rows_ptr + pair, mask=used, other=0).to(tl.int64) if RAGGED else pair // K
        tile = tl.load(
            batch_ptr + row[:, None] * D + cols[None, :],
            mask=used[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += tl.sum(tile * coefficient[:, None], axis=0)
        totals += coefficient
    return acc, tl.sum(totals, axis=0)


@kernel
def _partial_sums_kernel(
    partials_ptr,  # [S, D]
    partial_totals_ptr,  # [S]
    offsets_ptr,  # [L + 1]
    keys_ptr,  # [P]
    pairs_ptr,  # [P]
    coefficients_ptr,  # [P]
    batch_ptr,  # [N, D]
    rows_ptr,  # [P], unused unless RAGGED
    P,
    L,
    K,
    D,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the part of a long segment that lies in one block of SPLIT sorted pairs.

    A segment longer than SPLIT that touches a block covers its first or its last pair, so two
    slots a block suffice: slot 2c for the segment at the first pair, 2c + 1 for that at the last.
    """
    slot = tl.program_id(0).to(tl.int64)
    block_first = (slot // 2) * SPLIT
    block_last = tl.minimum(block_first + SPLIT, P) - 1
    first_latent = tl.load(keys_ptr + block_first)
    latent = first_latent
    if slot % 2 == 1:
        last_latent = tl.load(keys_ptr + block_last)
        latent = tl.where(last_latent == first_latent, L, last_latent)
    if latent < L:
        first = tl.load(offsets_ptr + latent)
        end = tl.load(offsets_ptr + latent + 1)
        if end - first > SPLIT:
            first = tl.maximum(first, block_first)
            n_pairs = (tl.minimum(end, block_last + 1) - first).to(tl.int32)
            cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            col_mask = cols < D
            acc, total = _sum_pairs(
                pairs_ptr, coefficients_ptr, batch_ptr, first, n_pairs, cols, col_mask, rows_ptr,
                K, D, RAGGED, BLOCK_P, BLOCK_D,
            )  # fmt: skip
            tl.store(partials_ptr + slot * D + cols, acc, mask=col_mask)
            if tl.program_id(1) == 0:
                tl.store(partial_totals_ptr + slot, total)


@triton.jit
def sum_segment(
    j,
    cols,
    col_mask,
    partials_ptr,  # [S, D]
    partial_totals_ptr,  # [S]
    offsets_ptr,  # [L + 1]
    pairs_ptr,  # [P]
    coefficients_ptr,  # [P]
    batch_ptr,  # [N, D]
    rows_ptr,  # [P], unused unless RAGGED
    K,
    D,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the pairs p of segment j of coefficients[p] * batch[row of p, cols], and of the
    coefficients; of a long segment from its partial sums.
    """
    first = tl.load(offsets_ptr + j)
    n_pairs = (tl.load(offsets_ptr + j + 1) - first).to(tl.int32)
    if n_pairs <= SPLIT:
        acc, total = _sum_pairs(
            pairs_ptr, coefficients_ptr, batch_ptr, first, n_pairs, cols, col_mask, rows_ptr,
            K, D, RAGGED, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        total = 0.0
        first_block = first // SPLIT
        n_blocks = ((first + n_pairs - 1) // SPLIT - first_block + 1).to(tl.int32)
        for i in range(n_blocks):
            block = first_block + i
            slot = 2 * block + (first > block * SPLIT).to(tl.int64)
            acc += tl.load(partials_ptr + slot * D + cols, mask=col_mask, other=0.0)
            total += tl.load(partial_totals_ptr + slot)
    return acc, total


@kernel
def _segment_sum_kernel(
    out_ptr,  # [L, D]
    totals_ptr,  # [L]
    partials_ptr,  # [S, D]
    partial_totals_ptr,  # [S]
    offsets_ptr,  # [L + 1]
    pairs_ptr,  # [P]
    coefficients_ptr,  # [P]
    batch_ptr,  # [N, D]
    rows_ptr,  # [P], unused unless RAGGED
    K,
    D,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[j, :] = sum over the pairs p of segment j of coefficients[p] * batch[row of p, :]"""
    j = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    acc, total = sum_segment(
        j, cols, col_mask, partials_ptr, partial_totals_ptr, offsets_ptr, pairs_ptr,
        coefficients_ptr, batch_ptr, rows_ptr, K, D, RAGGED, SPLIT, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    tl.store(out_ptr + j * D + cols, acc.to(out_ptr.dtype.element_ty), mask=col_mask)
    if tl.program_id(1) == 0:
        tl.store(totals_ptr + j, total.to(totals_ptr.dtype.element_ty))


@kernel
def _segment_totals_kernel(
    totals_ptr,  # [L]
    offsets_ptr,  # [L + 1]
    pairs_ptr,  # [P]
    values_ptr,  # [P]
    L,
    BLOCK_L: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """totals[j] = sum over the pairs p of segment j of values[p]"""
    j = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    first = tl.load(offsets_ptr + j, mask=j < L, other=0)
    n_pairs = (tl.load(offsets_ptr + j + 1, mask=j < L, other=0) - first).to(tl.int32)
    acc = tl.zeros((BLOCK_L, BLOCK_P), dtype=tl.float32)
    for start in range(0, tl.max(n_pairs, axis=0), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        live = p[None, :] < n_pairs[:, None]
        pair = tl.load(pairs_ptr + first[:, None] + p[None, :], mask=live, other=0)
        acc += tl.load(values_ptr + pair, mask=live, other=0.0).to(tl.float32)
    tl.store(totals_ptr + j, tl.sum(acc, axis=1), mask=j < L)


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
    ROWS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts[b, :] = sum over the ROWS rows j of block b of coefficients[j] * weight[j, :]"""
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
        ).to(tl.float32)
        acc += tl.sum(tile * coefficient[:, None], axis=0)
    tl.store(parts_ptr + block * D + cols, acc, mask=col_mask)


@triton.jit
def store_square_sum(squares_ptr, j, row):
    """squares[j, tile] = sum of squares of a tile of row j, for `row_norms`"""
    place = j * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + place, tl.sum(row * row, axis=0))


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
    store_square_sum(squares_ptr, j, row)


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
) -> torch.Tensor:
    d = weight.shape[1]
    out = torch.empty(rows.n_rows, d, dtype=weight.dtype, device=weight.device)
    launch = GATHER_SUM
    if out.numel() > 0:
        _gather_sum_kernel[(rows.n_rows, triton.cdiv(d, launch.BLOCK_D))](
            out, coefficients.contiguous(), latents.contiguous(), weight.contiguous(),
            weight if bias is None else bias.contiguous(), *_row_arguments(rows, latents), d,
            HAS_BIAS=bias is not None, RAGGED=rows.k is None, BLOCK_K=launch.BLOCK_K,
            BLOCK_D=launch.BLOCK_D, num_warps=launch.num_warps,
        )  # fmt: skip
    return out


@on_device_of_arguments
def gather_dot(
    batch: torch.Tensor, latents: torch.Tensor, rows: Rows, weight: torch.Tensor
) -> torch.Tensor:
    make = torch.empty if rows.k is not None else torch.zeros
    out = make(latents.shape, dtype=torch.float32, device=weight.device)
    launch = GATHER_DOT
    if out.numel() > 0:
        mean_pairs = triton.cdiv(latents.numel(), rows.n_rows)
        # Fewer programs a row than it has blocks of pairs take several blocks each.
        n_programs = min(triton.cdiv(mean_pairs, launch.BLOCK_K), MAX_GRID[1])
        _gather_dot_kernel[(rows.n_rows, n_programs)](
            out, batch.contiguous(), latents.contiguous(), weight.contiguous(),
            *_row_arguments(rows, latents), weight.shape[1], RAGGED=rows.k is None,
            BLOCK_K=launch.BLOCK_K, BLOCK_D=launch.BLOCK_D, num_warps=launch.num_warps,
        )  # fmt: skip
    return out


@dataclass(frozen=True)
class Segments:
    """The sums that make a weight's gradient, with those over long segments begun.

    Attributes:
        arguments: what `sum_segment` takes from `partials_ptr` to `D`.
        modes: its compile-time arguments but for its tile.
    """

    arguments: tuple[Any, ...]
    modes: dict[str, Any]

    @classmethod
    def of(cls, order: LatentOrder, coefficients: torch.Tensor, batch: torch.Tensor) -> Self:
        """Arguments as `segment_sum`'s."""
        launch = SEGMENT_SUM
        d, n_pairs = batch.shape[1], order.pairs.numel()
        n_slots = 2 * triton.cdiv(n_pairs, launch.SPLIT)
        partials = torch.empty(n_slots, d, dtype=torch.float32, device=batch.device)
        partial_totals = torch.empty(n_slots, dtype=torch.float32, device=batch.device)
        coefficients, batch = coefficients.contiguous(), batch.contiguous()
        rows = order.pairs if order.rows.of_pairs is None else order.rows.of_pairs
        k = order.rows.k or 0
        modes = {"RAGGED": order.rows.k is None, "SPLIT": launch.SPLIT}
        if n_pairs > launch.SPLIT:
            _partial_sums_kernel[(n_slots, triton.cdiv(d, launch.BLOCK_D))](
                partials, partial_totals, order.offsets, order.keys, order.pairs, coefficients,
                batch, rows, n_pairs, order.d_sae, k, d, **modes, BLOCK_P=launch.BLOCK_P,
                BLOCK_D=launch.BLOCK_D, num_warps=launch.num_warps,
            )  # fmt: skip
        arguments = (
            partials, partial_totals, order.offsets, order.pairs, coefficients, batch, rows,
            k, d,
        )  # fmt: skip
        return cls(arguments, modes)


@on_device_of_arguments
def segment_sum(
    order: LatentOrder, coefficients: torch.Tensor, batch: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    d, d_sae, launch = batch.shape[1], order.d_sae, SEGMENT_SUM
    out = torch.empty(d_sae, d, dtype=dtype, device=batch.device)
    totals = torch.empty(d_sae, dtype=dtype, device=batch.device)
    segments = Segments.of(order, coefficients, batch)
    _segment_sum_kernel[(d_sae, triton.cdiv(d, launch.BLOCK_D))](
        out, totals, *segments.arguments, **segments.modes, BLOCK_P=launch.BLOCK_P,
        BLOCK_D=launch.BLOCK_D, num_warps=launch.num_warps,
    )  # fmt: skip
    return out, totals


@on_device_of_arguments
def segment_totals(order: LatentOrder, values: torch.Tensor) -> torch.Tensor:
    totals = torch.empty(order.d_sae, dtype=torch.float32, device=values.device)
    launch = SEGMENT_TOTALS
    _segment_totals_kernel[(triton.cdiv(order.d_sae, launch.BLOCK_L),)](
        totals, order.offsets, order.pairs, values.contiguous(), order.d_sae,
        BLOCK_L=launch.BLOCK_L, BLOCK_P=launch.BLOCK_P, num_warps=launch.num_warps,
    )  # fmt: skip
    return totals


def _row_arguments(rows: Rows, unused: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What kernels take as row_offsets and K."""
    return (unused, rows.k) if rows.k is not None else (rows.starts(unused.device), 0)


@on_device_of_arguments
def add_rows(weight: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    n, d = values.shape
    if n > 0:
        _add_rows_kernel[(n, triton.cdiv(d, 1024))](
            weight, rows.contiguous(), values.contiguous(), d, BLOCK_D=1024, num_warps=4
        )


@on_device_of_arguments
def row_combination(coefficients: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    d_sae, d = weight.shape
    rows = 64
    parts = torch.empty(triton.cdiv(d_sae, rows), d, dtype=torch.float32, device=weight.device)
    _row_combination_kernel[(parts.shape[0], triton.cdiv(d, 512))](
        parts, coefficients.contiguous(), weight.contiguous(), d_sae, d, ROWS=rows, BLOCK_L=4,
        BLOCK_D=512, num_warps=2,
    )  # fmt: skip
    return parts.sum(0).to(weight.dtype)


@on_device_of_arguments
def row_norms(weight: torch.Tensor) -> torch.Tensor:
    squares = empty_square_sums(weight)
    _row_squares_kernel[squares.shape](
        squares, weight.contiguous(), weight.shape[1], BLOCK_D=NORM_COLS, num_warps=1
    )
    return norms_of(squares)


def empty_square_sums(weight: torch.Tensor) -> torch.Tensor:
    """Room for the sums of squares of each row's tiles of NORM_COLS columns."""
    d_sae, d = weight.shape
    tiles = triton.cdiv(d, NORM_COLS)
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
