"""Triton kernels that use a `RowGradient` without writing it: its norm, and Adam's update.

Both sum the pairs of a latent where they need its row; only the partial sums of long segments are
kept from the one for the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device
from saelens_sparse.ops.rows.kernels import (
    NORM_COLS,
    empty_square_sums,
    norms_of,
    store_square_sum,
)
from saelens_sparse.ops.rows.segment_kernels import (
    SEGMENT_SUM,
    SegmentSums,
    sum_segment,
    work_of_sums,
)
from saelens_sparse.ops.screen.round_kernels import reciprocal_power, round_to, settle_rows
from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_rule
from saelens_sparse.ops.update.rounding_kernels import round_moments
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.weight_cache import WeightCopy


@dataclass(frozen=True)
class RowGradientLaunch:
    """How these kernels are launched.

    Attributes:
        COLS: columns of a tile, a warp for each.
        SQUARED_LATENTS: latents that a program of the norm's kernel takes one after the other:
            most may have no pairs.
        BY_LATENT_PAIRS: pairs for each latent up to which the update goes latent by latent. That is
            the order of the weights in memory. With more pairs it goes tile by tile, so that the
            cache keeps the tile of the batch that is summed.
    """

    COLS: int = NORM_COLS
    SQUARED_LATENTS: int = 16
    BY_LATENT_PAIRS: float = 1.0


# Of tiles of 256 to 1024 columns these are within 2% of the fastest at 2304 -> 65,536 and 262,144,
# and at 4096 -> 131,072, k 64, batch 4096 (H100). So is the order.
LAUNCH = RowGradientLaunch()


class BlockRows(NamedTuple):
    """Dense rows that are added to those of some latents; None where there are none."""

    slots: torch.Tensor | None  # [L] int32, the row of each latent in the block, or -1
    rows: torch.Tensor | None  # [width, D]


class CopiedRows(NamedTuple):
    """What an update writes of a weight for the next step; None of what is not wanted."""

    rows: torch.Tensor | None  # [L, D], in lower precision
    inverses: torch.Tensor | None  # [L], powers of two that undo the scale of these rows
    squares: torch.Tensor | None  # [L, T], sums over tiles, of the scaled rows if there is a scale
    residual_squares: torch.Tensor | None  # [L, T], of what rounding takes from scaled rows


@triton.jit
def _load_once(places, mask):
    """As float32 what is read once a step: the cache is for the rows that are summed."""
    return tl.load(places, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _store_once(places, values, mask):
    """Store what is read in the next step, in the dtype of its place."""
    tl.store(places, values.to(places.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def _copy_row(copy, row, j, tile, place, mask):
    """Write what is wanted of columns of row j, whose tile this is among those of all rows."""
    if copy.inverses is not None:
        row = row * reciprocal_power(tl.load(copy.inverses + j))
    if copy.rows is not None:
        rounded, again = round_to(row, copy.rows.dtype.element_ty)
        _store_once(copy.rows + place, rounded, mask)
        if copy.residual_squares is not None:
            residual = tl.where(mask, row - again, 0.0)
            store_square_sum(copy.residual_squares + tile, residual)
    if copy.squares is not None:
        store_square_sum(copy.squares + tile, tl.where(mask, row, 0.0))


@triton.jit
def _gradient_row(
    sums,  # SegmentSums
    block,  # BlockRows
    j,
    cols,
    D,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Columns of row j of the gradient."""
    gradient, _ = sum_segment(sums, j, cols, D, SPLIT, BLOCK_D)
    if block.slots is not None:
        slot = tl.load(block.slots + j).to(tl.int64)
        width = tl.where(slot >= 0, D, 0)
        row = tl.load(block.rows + slot * D + cols, mask=cols < width, other=0.0)
        gradient += row.to(tl.float32)
    return gradient


@kernel.asking(work_of_sums)
def _square_sums_kernel(
    out_ptr,  # [B, T]
    sums,  # SegmentSums
    block,  # BlockRows
    L,
    D,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, t] = sum over rows j of block b and columns of tile t of gradient[j, :] squared

    Grid: blocks of ROWS latents, tiles of columns.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for j in range(first, tl.minimum(first + ROWS, L)):
        gradient = _gradient_row(sums, block, j, cols, D, SPLIT, BLOCK_D)
        squares += gradient * gradient
    out = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + out, tl.sum(squares, axis=0))


@kernel.asking(work_of_sums)
def _update_kernel(
    weight_ptr,  # [L, D], as the moments
    first_moment_ptr,
    second_moment_ptr,
    copy,  # CopiedRows
    rule,  # AdamRule
    sums,  # SegmentSums
    block,  # BlockRows
    D,
    SPLIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BY_LATENT: tl.constexpr,
):
    """Adam on row j with its gradient / divisor; what the next step takes of the row

    Grid: tiles of columns of latents: by latent all of one latent come first, else the first of all
    latents.
    """
    program, n_tiles = tl.program_id(0), tl.cdiv(D, BLOCK_D)
    if BY_LATENT:
        j, tile = program // n_tiles, program % n_tiles
    else:
        n_latents = tl.num_programs(0) // n_tiles
        j, tile = program % n_latents, program // n_latents
    j = j.to(tl.int64)
    cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    place = j * D + cols
    weight = _load_once(weight_ptr + place, col_mask)
    first = _load_once(first_moment_ptr + place, col_mask)
    second = _load_once(second_moment_ptr + place, col_mask)
    gradient = _gradient_row(sums, block, j, cols, D, SPLIT, BLOCK_D)
    weight, first, second = adam_rule(rule, weight, gradient, first, second)
    first, second = round_moments(rule, first, second, j, cols)
    # What the copy is made of is what is stored, also where that is bfloat16.
    stored = weight.to(weight_ptr.dtype.element_ty)
    _store_once(weight_ptr + place, stored, col_mask)
    _store_once(first_moment_ptr + place, first, col_mask)
    _store_once(second_moment_ptr + place, second, col_mask)
    _copy_row(copy, stored.to(tl.float32), j, j * n_tiles + tile, place, col_mask)


class RowGradientSums:
    """A `RowGradient` with the sums over its long segments made."""

    def __init__(self, gradient: RowGradient) -> None:
        self._d_sae, self._d = gradient.order.d_sae, gradient.batch.shape[1]
        self._device = gradient.batch.device
        with on_device(self._device):
            self._sums = SegmentSums.of(gradient.order, gradient.coefficients, gradient.batch)
        self._block = BlockRows(None, None)
        if gradient.block is not None and gradient.block_gradient is not None:
            latents = gradient.block.latents
            slots = torch.full((self._d_sae,), -1, dtype=torch.int32, device=self._device)
            places = torch.arange(latents.numel(), dtype=torch.int32, device=self._device)
            slots.index_copy_(0, latents, places)
            self._block = BlockRows(slots, gradient.block_gradient.contiguous())

    def square_sum(self) -> torch.Tensor:
        """The squared norm of the gradient, a float32 scalar."""
        blocks = triton.cdiv(self._d_sae, LAUNCH.SQUARED_LATENTS)
        tiles = triton.cdiv(self._d, LAUNCH.COLS)
        out = torch.empty(blocks, tiles, dtype=torch.float32, device=self._device)
        with on_device(self._device):
            _square_sums_kernel[(blocks, tiles)](
                out,
                sums=self._sums,
                block=self._block,
                L=self._d_sae,
                D=self._d,
                SPLIT=SEGMENT_SUM.SPLIT,
                ROWS=LAUNCH.SQUARED_LATENTS,
                BLOCK_D=LAUNCH.COLS,
                num_warps=1,
            )
        return out.sum()

    def update(
        self,
        rows: torch.Tensor,
        first_moment: torch.Tensor,
        second_moment: torch.Tensor,
        step: torch.Tensor,
        divisor: torch.Tensor,
        settings: AdamSettings,
        copy: WeightCopy | None,
    ) -> None:
        """Adam's update of a weight in place, and the copy of it that is wanted.

        Args:
            rows: `[d_sae, d]`, contiguous, as the moments.
            first_moment: running mean of the gradients.
            second_moment: running mean of their squares.
            step: one element, float32, the number of this update, counted from one.
            divisor: one element, what the gradient is divided by first.
            settings: the rest of what Adam needs.
            copy: what to write a copy to, or None.
        """
        assert all(part.is_contiguous() for part in (rows, first_moment, second_moment))
        copied = _room_for(copy, rows, LAUNCH.COLS)
        n_pairs = self._sums.list.rows.numel()
        with on_device(self._device):
            _update_kernel[(self._d_sae * triton.cdiv(self._d, LAUNCH.COLS),)](
                rows,
                first_moment_ptr=first_moment,
                second_moment_ptr=second_moment,
                copy=copied,
                rule=settings.rule(step, divisor),
                sums=self._sums,
                block=self._block,
                D=self._d,
                SPLIT=SEGMENT_SUM.SPLIT,
                BLOCK_D=LAUNCH.COLS,
                BY_LATENT=n_pairs <= LAUNCH.BY_LATENT_PAIRS * self._d_sae,
                num_warps=1,
            )
        if copy is None or copied.squares is None:
            return
        if copied.residual_squares is None:
            norms_of(copied.squares, out=copy.values)
        else:
            assert copy.errors is not None
            settle_rows(rows, copy.values, copy.errors, copied.squares, copied.residual_squares)


def _room_for(copy: WeightCopy | None, rows: torch.Tensor, tile: int) -> CopiedRows:
    """Where an update by tiles of so many columns writes what is wanted of `rows`."""
    if copy is None:
        return CopiedRows(None, None, None, None)
    if copy.is_norms:
        return CopiedRows(None, None, empty_square_sums(rows, tile), None)
    if copy.errors is None:
        return CopiedRows(copy.values, None, None, None)
    squares, residual_squares = (empty_square_sums(rows, tile) for _ in range(2))
    return CopiedRows(copy.values, copy.errors[0], squares, residual_squares)
