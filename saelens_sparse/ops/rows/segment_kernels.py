"""Triton kernels that sum over the pairs of each latent; `operations.py` says what they compute."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import LatentOrder


@dataclass(frozen=True)
class SegmentSumLaunch:
    """Columns of a tile of `segment_sum` and of one of partial sums, a warp for each, and the
    length at which a segment is split.

    A latent that fires on every row would be one serial loop; SPLIT pairs at most are summed
    by one program, longer segments through partial sums in a fixed order.
    """

    SUM_COLS: int = 512
    PARTIAL_COLS: int = 256
    SPLIT: int = 64


@dataclass(frozen=True)
class SegmentTotalsLaunch:
    """Tile of `segment_totals`: BLOCK_P values of each of BLOCK_L latents at a time."""

    BLOCK_L: int = 8
    BLOCK_P: int = 128
    num_warps: int = 4


# Chosen at 2304 -> 65,536, k 64, batch 4096, and for partial sums at up to 262,144 latents (H100).
SEGMENT_SUM = SegmentSumLaunch()
SEGMENT_TOTALS = SegmentTotalsLaunch()
_PAIRS_AT_ONCE = 1024


class PairList(NamedTuple):
    """Pairs by latent, with what is summed over them: a kernel that looked up each pair's position
    by row, and then its row and its coefficient, would wait for one more read of each.
    """

    offsets: torch.Tensor  # [L + 1], where each latent's segment begins
    rows: torch.Tensor  # [P] int32, the row of each pair
    coefficients: torch.Tensor  # [P] float32
    batch: torch.Tensor  # [N, D]

    @classmethod
    def of(cls, order: LatentOrder, coefficients: torch.Tensor, batch: torch.Tensor) -> Self:
        """The list from coefficients `[n_pairs]` by row, and a batch `[n_rows, d]`."""
        n_pairs, of_pairs = order.pairs.numel(), order.rows.of_pairs
        rows = torch.empty(n_pairs, dtype=torch.int32, device=batch.device)
        by_latent = torch.empty(n_pairs, dtype=torch.float32, device=batch.device)
        if n_pairs > 0:
            _by_latent_kernel[(triton.cdiv(n_pairs, _PAIRS_AT_ONCE),)](
                rows,
                by_latent,
                pairs_ptr=order.pairs,
                row_of_pairs_ptr=of_pairs,
                coefficients_ptr=coefficients.contiguous(),
                P=n_pairs,
                k=order.rows.k,
                BLOCK=_PAIRS_AT_ONCE,
                num_warps=4,
            )
        return cls(order.offsets, rows, by_latent, batch.contiguous())


@kernel
def _by_latent_kernel(
    rows_out_ptr,  # [P]
    coefficients_out_ptr,  # [P]
    pairs_ptr,  # [P], positions by row
    row_of_pairs_ptr,  # [P], by row; None if each row has k
    coefficients_ptr,  # [P], by row
    P,
    k,
    BLOCK: tl.constexpr,
):
    """Rows and coefficients of pairs in another order. Grid: blocks of pairs."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = p < P
    pair = tl.load(pairs_ptr + p, mask=live, other=0)
    if row_of_pairs_ptr is None:
        row = pair // k
    else:
        row = tl.load(row_of_pairs_ptr + pair, mask=live, other=0)
    tl.store(rows_out_ptr + p, row.to(tl.int32), mask=live)
    coefficient = tl.load(coefficients_ptr + pair, mask=live, other=0.0)
    tl.store(coefficients_out_ptr + p, coefficient.to(tl.float32), mask=live)


class SegmentSums(NamedTuple):
    """The sums over the pairs of each latent, with those over long segments begun.

    A sum over more than SPLIT pairs is one of partial sums, in a fixed order: a latent that fires
    on every row would be one serial loop.
    """

    list: PairList
    partials: torch.Tensor  # [S, D]
    partial_totals: torch.Tensor  # [S]

    @classmethod
    def of(cls, order: LatentOrder, coefficients: torch.Tensor, batch: torch.Tensor) -> Self:
        """
        Begin the sums.

        Args:
            order: the pairs by latent.
            coefficients: `[n_pairs]`, by row.
            batch: `[n_rows, d]`.
        """
        launch = SEGMENT_SUM
        d, n_pairs = batch.shape[1], order.pairs.numel()
        n_slots = 2 * triton.cdiv(n_pairs, launch.SPLIT)
        pairs = PairList.of(order, coefficients, batch)
        partials = torch.empty(n_slots, d, dtype=torch.float32, device=batch.device)
        totals = torch.empty(n_slots, dtype=torch.float32, device=batch.device)
        if n_pairs > launch.SPLIT:
            _partial_sums_kernel[(n_slots, triton.cdiv(d, launch.PARTIAL_COLS))](
                partials,
                partial_totals_ptr=totals,
                keys_ptr=order.keys,
                list=pairs,
                P=n_pairs,
                L=order.d_sae,
                D=d,
                SPLIT=launch.SPLIT,
                BLOCK_D=launch.PARTIAL_COLS,
                num_warps=1,
            )
        return cls(pairs, partials, totals)


def work_of_sums(arguments: Mapping[str, Any]) -> tuple[float, float]:
    """Work of a kernel that sums over the pairs of each latent, and reads and writes what else it
    is given: bytes and flops.
    """
    sums, width = arguments["sums"].list, arguments["D"]
    others = sum(
        (2 if "moment" in name or name == "weight_ptr" else 1) * value.nbytes
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    )
    n_pairs, row_bytes = sums.rows.numel(), width * sums.batch.element_size()
    lists = sums.rows.nbytes + sums.coefficients.nbytes
    return float(n_pairs * row_bytes + lists + others), 2.0 * n_pairs * width


@triton.jit
def _sum_pairs(
    list,  # noqa: A002  PairList
    first,
    n_pairs,
    cols,
    D,
    BLOCK_D: tl.constexpr,
):
    """Sum of coefficient * batch row over n_pairs sorted pairs, and of the coefficients."""
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    total = 0.0
    for p in range(n_pairs):
        row = tl.load(list.rows + first + p).to(tl.int64)
        coefficient = tl.load(list.coefficients + first + p)
        width = tl.where(coefficient != 0.0, D, 0)
        values = tl.load(list.batch + row * D + cols, mask=cols < width, other=0.0)
        acc += coefficient * values.to(tl.float32)
        total += coefficient
    return acc, total


@kernel
def _partial_sums_kernel(
    partials_ptr,  # [S, D]
    partial_totals_ptr,  # [S]
    keys_ptr,  # [P]
    list,  # noqa: A002  PairList
    P,
    L,
    D,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the part of a long segment that lies in one block of SPLIT sorted pairs.

    A segment longer than SPLIT that touches a block covers its first or its last pair, so two
    slots a block suffice: slot 2c for the segment at the first pair, 2c + 1 for that at the last.

    Grid: slots, tiles of columns.
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
        first = tl.load(list.offsets + latent)
        end = tl.load(list.offsets + latent + 1)
        if end - first > SPLIT:
            first = tl.maximum(first, block_first)
            n_pairs = (tl.minimum(end, block_last + 1) - first).to(tl.int32)
            cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
            acc, total = _sum_pairs(list, first, n_pairs, cols, D, BLOCK_D)
            tl.store(partials_ptr + slot * D + cols, acc, mask=cols < D)
            if tl.program_id(1) == 0:
                tl.store(partial_totals_ptr + slot, total)


@triton.jit
def sum_segment(
    sums,  # SegmentSums
    j,
    cols,
    D,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over the pairs of latent j of coefficient * batch[row, cols], and of the coefficients;
    of a long segment from its partial sums.
    """
    first = tl.load(sums.list.offsets + j)
    n_pairs = (tl.load(sums.list.offsets + j + 1) - first).to(tl.int32)
    if n_pairs <= SPLIT:
        acc, total = _sum_pairs(sums.list, first, n_pairs, cols, D, BLOCK_D)
    else:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        total = 0.0
        first_block = first // SPLIT
        n_blocks = ((first + n_pairs - 1) // SPLIT - first_block + 1).to(tl.int32)
        for i in range(n_blocks):
            block = first_block + i
            slot = 2 * block + (first > block * SPLIT).to(tl.int64)
            acc += tl.load(sums.partials + slot * D + cols, mask=cols < D, other=0.0)
            total += tl.load(sums.partial_totals + slot)
    return acc, total


@kernel.asking(work_of_sums)
def _segment_sum_kernel(
    out_ptr,  # [L, D]
    totals_ptr,  # [L]
    sums,  # SegmentSums
    D,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[j, :] = sum over the pairs p of latent j of coefficients[p] * batch[row of p, :]

    Grid: latents, tiles of columns.
    """
    j = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc, total = sum_segment(sums, j, cols, D, SPLIT, BLOCK_D)
    tl.store(out_ptr + j * D + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < D)
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
    """totals[j] = sum over the pairs p of latent j of values[p]

    Grid: blocks of latents.
    """
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


@on_device_of_arguments
def segment_sum(
    order: LatentOrder, coefficients: torch.Tensor, batch: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `operations.segment_sum`."""
    d, d_sae, launch = batch.shape[1], order.d_sae, SEGMENT_SUM
    out = torch.empty(d_sae, d, dtype=dtype, device=batch.device)
    totals = torch.empty(d_sae, dtype=dtype, device=batch.device)
    _segment_sum_kernel[(d_sae, triton.cdiv(d, launch.SUM_COLS))](
        out,
        totals,
        sums=SegmentSums.of(order, coefficients, batch),
        D=d,
        SPLIT=launch.SPLIT,
        BLOCK_D=launch.SUM_COLS,
        num_warps=1,
    )
    return out, totals


@on_device_of_arguments
def segment_totals(order: LatentOrder, values: torch.Tensor) -> torch.Tensor:
    """As `operations.segment_totals`."""
    totals = torch.empty(order.d_sae, dtype=torch.float32, device=values.device)
    launch = SEGMENT_TOTALS
    _segment_totals_kernel[(triton.cdiv(order.d_sae, launch.BLOCK_L),)](
        totals,
        offsets_ptr=order.offsets,
        pairs_ptr=order.pairs,
        values_ptr=values.contiguous(),
        L=order.d_sae,
        **vars(launch),
    )
    return totals
