"""Triton kernels that use a `RowGradient` without writing it: its norm, and Adam's update.

Both sum the pairs of a latent where they need its row; only the partial sums of long segments are
kept from the one for the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device
from saelens_sparse.ops.rows.kernels import (
    NORM_COLS,
    Segments,
    empty_square_sums,
    norms_of,
    store_square_sum,
    sum_segment,
)
from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_rule
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.weight_cache import WeightCopy


@dataclass(frozen=True)
class SumLaunch:
    """Tile of a kernel that sums pairs: BLOCK_D columns of a row, BLOCK_P pairs at a time."""

    BLOCK_P: int
    BLOCK_D: int
    num_warps: int


# At 2304 -> 65,536 and 4096 -> 131,072, k 64, batch 4096 (H200), milliseconds; of tiles of 256 to
# 2048 columns these are the fastest. Squares: 0.26 and 0.44 (0.25 and 0.68 with 512 columns).
SQUARES = SumLaunch(BLOCK_P=2, BLOCK_D=1024, num_warps=2)
# Update: 1.12 and 3.55 (whole rows: 1.34 and 3.82).
UPDATE = SumLaunch(BLOCK_P=2, BLOCK_D=NORM_COLS, num_warps=1)
# Update with a bfloat16 copy: 1.27 and 4.03 (with the tile above: 1.38 and 4.19).
ROUNDING_UPDATE = SumLaunch(BLOCK_P=1, BLOCK_D=1024, num_warps=4)


@triton.jit
def _add_block_row(acc, j, cols, slots_ptr, block_ptr, D):
    """acc, plus the row of the block that belongs to latent j if there is one."""
    slot = tl.load(slots_ptr + j).to(tl.int64)
    width = tl.where(slot >= 0, D, 0)
    row = tl.load(block_ptr + slot * D + cols, mask=cols < width, other=0.0)
    return acc + row.to(tl.float32)


@kernel
def _square_sums_kernel(
    out_ptr,  # [L, T]
    slots_ptr,  # [L] int32, unused unless HAS_BLOCK, as the next
    block_ptr,  # [width, D]
    partials_ptr,  # what follows: see sum_segment
    partial_totals_ptr,
    offsets_ptr,
    pairs_ptr,
    coefficients_ptr,
    batch_ptr,
    rows_ptr,
    K,
    D,
    HAS_BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[j, t] = sum over the columns of tile t of gradient[j, :] squared"""
    j = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    gradient, _ = sum_segment(
        j, cols, col_mask, partials_ptr, partial_totals_ptr, offsets_ptr, pairs_ptr,
        coefficients_ptr, batch_ptr, rows_ptr, K, D, RAGGED, SPLIT, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    if HAS_BLOCK:
        gradient = _add_block_row(gradient, j, cols, slots_ptr, block_ptr, D)
    out = j * tl.num_programs(1) + tl.program_id(1)
    tl.store(out_ptr + out, tl.sum(gradient * gradient, axis=0))


@kernel
def _update_kernel(
    weight_ptr,  # [L, D], as the moments
    first_moment_ptr,
    second_moment_ptr,
    copy_ptr,  # [L, D] if ROUNDS, [L, T] if SQUARES, else unused
    step_ptr,  # one element
    divisor_ptr,  # one element
    lr_ptr,  # one element
    log_beta1,
    log_beta2,
    rest1,
    rest2,
    eps,
    slots_ptr,  # [L] int32, unused unless HAS_BLOCK, as the next
    block_ptr,  # [width, D]
    partials_ptr,  # what follows: see sum_segment
    partial_totals_ptr,
    offsets_ptr,
    pairs_ptr,
    coefficients_ptr,
    batch_ptr,
    rows_ptr,
    K,
    D,
    ROUNDS: tl.constexpr,
    SQUARES: tl.constexpr,
    HAS_BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adam on row j with its gradient / divisor; the row's low-precision copy, or its squares"""
    j = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    place = j * D + cols
    weight = tl.load(weight_ptr + place, mask=col_mask, other=0.0).to(tl.float32)
    first = tl.load(first_moment_ptr + place, mask=col_mask, other=0.0).to(tl.float32)
    second = tl.load(second_moment_ptr + place, mask=col_mask, other=0.0).to(tl.float32)
    gradient, _ = sum_segment(
        j, cols, col_mask, partials_ptr, partial_totals_ptr, offsets_ptr, pairs_ptr,
        coefficients_ptr, batch_ptr, rows_ptr, K, D, RAGGED, SPLIT, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    if HAS_BLOCK:
        gradient = _add_block_row(gradient, j, cols, slots_ptr, block_ptr, D)
    weight, first, second = adam_rule(
        weight, gradient, first, second, step_ptr, divisor_ptr, lr_ptr, log_beta1, log_beta2, rest1,
        rest2, eps,
    )  # fmt: skip
    # What the copy is made of is what is stored, also where that is bfloat16.
    stored = weight.to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + place, stored, mask=col_mask)
    tl.store(first_moment_ptr + place, first.to(first_moment_ptr.dtype.element_ty), mask=col_mask)
    tl.store(
        second_moment_ptr + place, second.to(second_moment_ptr.dtype.element_ty), mask=col_mask
    )
    if ROUNDS:
        tl.store(copy_ptr + place, stored.to(copy_ptr.dtype.element_ty), mask=col_mask)
    if SQUARES:
        store_square_sum(copy_ptr, j, tl.where(col_mask, stored.to(tl.float32), 0.0))


class RowGradientSums:
    """A `RowGradient` with the sums over its long segments made."""

    def __init__(self, gradient: RowGradient) -> None:
        self._d_sae, self._d = gradient.order.d_sae, gradient.batch.shape[1]
        self._device = gradient.batch.device
        with on_device(self._device):
            self._segments = Segments.of(gradient.order, gradient.coefficients, gradient.batch)
        self._has_block = gradient.block is not None and gradient.block_gradient is not None
        unused = gradient.order.offsets
        self._block: tuple[torch.Tensor, ...] = (unused, unused)
        if gradient.block is not None and gradient.block_gradient is not None:
            latents = gradient.block.latents
            slots = torch.full((self._d_sae,), -1, dtype=torch.int32, device=self._device)
            places = torch.arange(latents.numel(), dtype=torch.int32, device=self._device)
            slots.index_copy_(0, latents, places)
            self._block = (slots, gradient.block_gradient.contiguous())

    def square_sum(self) -> torch.Tensor:
        """The squared norm of the gradient, a float32 scalar."""
        tiles = triton.cdiv(self._d, SQUARES.BLOCK_D)
        sums = torch.empty(self._d_sae, tiles, dtype=torch.float32, device=self._device)
        with on_device(self._device):
            _square_sums_kernel[(self._d_sae, tiles)](
                sums, *self._block, *self._segments.arguments, HAS_BLOCK=self._has_block,
                **self._segments.modes, **asdict(SQUARES),
            )  # fmt: skip
        return sums.sum()

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
        rounds = copy is not None and not copy.is_norms
        squares = empty_square_sums(rows) if copy is not None and copy.is_norms else None
        target = squares if copy is None or copy.is_norms else copy.values
        target = rows if target is None else target
        launch = ROUNDING_UPDATE if rounds else UPDATE
        with on_device(self._device):
            _update_kernel[(self._d_sae, triton.cdiv(self._d, launch.BLOCK_D))](
                rows, first_moment, second_moment, target, step, divisor,
                *settings.arguments, *self._block, *self._segments.arguments, ROUNDS=rounds,
                SQUARES=squares is not None, HAS_BLOCK=self._has_block, **self._segments.modes,
                **asdict(launch),
            )  # fmt: skip
        if copy is not None and squares is not None:
            norms_of(squares, out=copy.values)
