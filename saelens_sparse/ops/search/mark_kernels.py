"""Lists of the latents of each row that may reach an edge: screen, mark, list.

1. One read of the products of low precision marks, a bit each, the latents that may reach the edge:
   in float32 those whose screened score plus its bound does (`screen/BOUND.md`).
2. The marked latents are listed row by row, in order, each row where the one before it ends.

How many there are is known only on the device: the list has a given capacity, and what does not
fit is counted but not written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, warps
from saelens_sparse.ops.pairs import Rows
from saelens_sparse.ops.screen import bound
from saelens_sparse.ops.screen.float16_product import has_float32_sums
from saelens_sparse.ops.screen.gpu import (
    MAX_D_IN,
    UNDERFLOW,
    Chunk,
    Screen,
    row_terms,
    score_of,
)

_WORD = tl.constexpr(32)
MARK_SLACK = tl.constexpr(bound.MARK_SLACK)
MARK_BIAS_ROUNDING = tl.constexpr(bound.MARK_BIAS_ROUNDING)
MARK_EDGE_ROUNDING = tl.constexpr(bound.MARK_EDGE_ROUNDING)


@dataclass(frozen=True)
class MarkLaunch:
    """Tiles of the kernels that mark and list, chosen at 2304 -> 65,536, batch 4096, with float32
    weights, on an H200.
    """

    MARK_COLS: int = 512
    MARK_ROWS: int = 8
    MARK_WARPS: int = 2
    LIST_WORDS: int = 32768  # at most: more marks of a row are listed by several programs
    WORDS_PER_WARP: int = 512


LAUNCH = MarkLaunch()


@kernel
def _mark_kernel(
    words_ptr,  # [N, W] int32, bit i of word w is latent 32 w + i
    edges_ptr,  # [L]
    chunk,  # Chunk
    W,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """words: score + bound reaches the edge; one read of the buffer.

    Grid: a program for COLS latents of ROWS rows, [L / COLS, N / ROWS].
    """
    N, L = chunk.N, chunk.L
    latent = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    rows = rows.to(tl.int64)
    live = latent < L
    mask = row_mask[:, None] & live
    inverse, weight_norm, weight_residual = row_terms(chunk, rows[:, None], row_mask[:, None])
    weight_norm *= MARK_SLACK
    weight_residual *= MARK_SLACK
    s = tl.load(chunk.products + rows[:, None] * L + latent, mask=mask, other=0.0).to(tl.float32)
    edge = tl.load(edges_ptr + latent, mask=live, other=0.0)
    if chunk.terms is None:
        _, most = score_of(s, chunk, latent, live, inverse)
    else:
        # product + c |product| + bias + d >= edge if product + (1 + 2c) d reaches what follows:
        # the bias, and all that is proportional to a product at the edge, go to the other side.
        terms = chunk.terms + latent
        bias = tl.load(terms + L, mask=live, other=0.0)
        edge = edge - bias - tl.abs(bias) * MARK_BIAS_ROUNDING
        edge -= tl.abs(edge) * MARK_EDGE_ROUNDING
        if chunk.norms is None:
            edge -= 2.0 * UNDERFLOW
        else:
            edge -= tl.load(terms + 4 * L, mask=live, other=0.0)
        scale = inverse * tl.load(terms, mask=live, other=0.0)
        most = s * scale
        most += weight_norm * tl.load(terms + 2 * L, mask=live, other=0.0)
        most += weight_residual * tl.load(terms + 3 * L, mask=live, other=0.0)
    # A NaN does not fall short of the edge.
    bits = tl.where(most < edge, 0, tl.where(live, 1 << (latent % _WORD), 0))
    WORDS: tl.constexpr = COLS // _WORD
    words = tl.sum(tl.reshape(bits, (ROWS, WORDS, _WORD)), axis=2)
    place = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    out = rows[:, None] * W + place[None, :]
    tl.store(words_ptr + out, words, mask=row_mask[:, None] & (place < W)[None, :])


@triton.jit
def _count_bits(words):
    """Number of bits set in each uint32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@kernel
def _count_marks_kernel(
    counts_ptr,  # [N, B] int64
    words_ptr,  # [N, W]
    W,
    BLOCK_W: tl.constexpr,
):
    """counts[n, b] = marks in block b of BLOCK_W words of row n

    Grid: a program a block, [N, B].
    """
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = block * BLOCK_W + tl.arange(0, BLOCK_W)
    words = tl.load(words_ptr + n * W + w, mask=w < W, other=0).to(tl.uint32, bitcast=True)
    count = tl.sum(_count_bits(words), axis=0).to(tl.int64)
    tl.store(counts_ptr + n * tl.num_programs(1) + block, count)


@kernel
def _list_marks_kernel(
    latents_ptr,  # [P] int64
    rows_ptr,  # [P] int32
    pre_acts_ptr,  # [P], or None where pairs are recomputed
    offsets_ptr,  # [N B + 1], where the marks of each block of words begin
    words_ptr,  # [N, W]
    chunk,  # Chunk
    first_row,
    P,
    W,
    BLOCK_W: tl.constexpr,
):
    """The marked latents of a block of words in order; each turn lists the lowest mark left in
    every word.

    Grid: a program a block, [N, B].
    """
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = block * BLOCK_W + tl.arange(0, BLOCK_W)
    words = tl.load(words_ptr + n * W + w, mask=w < W, other=0).to(tl.uint32, bitcast=True)
    counts = _count_bits(words)
    first = tl.load(offsets_ptr + n * tl.num_programs(1) + block)
    position = first + tl.cumsum(counts, axis=0) - counts
    for _ in range(tl.max(counts, axis=0)):
        lowest = words & (~words + 1)
        latent = w * _WORD + _count_bits(lowest - 1)
        live = (words != 0) & (position < P)
        tl.store(latents_ptr + position, latent.to(tl.int64), mask=live)
        row = tl.full((BLOCK_W,), 0, tl.int32) + (first_row + n).to(tl.int32)
        tl.store(rows_ptr + position, row, mask=live)
        if pre_acts_ptr is not None:
            s = tl.load(chunk.products + n * chunk.L + latent, mask=live, other=0.0)
            pre_act = s.to(tl.float32) + tl.load(chunk.bias + latent, mask=live, other=0.0)
            tl.store(pre_acts_ptr + position, pre_act.to(pre_acts_ptr.dtype.element_ty), mask=live)
        words = words & (words - 1)
        position += 1


def can_screen(x: torch.Tensor) -> bool:
    """Whether there are rows, of a width that one program can hold, and products that bounds hold
    for.
    """
    return x.shape[0] > 0 and x.shape[1] <= MAX_D_IN and has_float32_sums(x)


class MarkedPairs:
    """A list of marked pairs, row by row, each row where the one before it ends.

    What does not fit is counted but not written. Places beyond the last row hold zeros.

    Args:
        screen: what the marks are of.
        capacity: number of pairs to make room for.
        pre_acts_dtype: dtype of the pre-activations that the screen computes.

    Attributes:
        latents: `[capacity]` int64.
        pre_acts: `[capacity]`, without norms; None where the screen does not compute them.
    """

    def __init__(self, screen: Screen, capacity: int, pre_acts_dtype: torch.dtype) -> None:
        device, n_rows, d_sae = screen.x.device, screen.x.shape[0], screen.weight.shape[0]
        self.latents = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._rows = torch.zeros(capacity, dtype=torch.int32, device=device)
        # Written while the buffer is at hand, if that is all the precision there is to be had.
        self.pre_acts = None
        if screen.exact:
            self.pre_acts = torch.zeros(capacity, dtype=pre_acts_dtype, device=device)
        n_words = triton.cdiv(d_sae, _WORD.value)
        self._block_w = min(triton.next_power_of_2(n_words), LAUNCH.LIST_WORDS)
        self._n_blocks = triton.cdiv(n_words, self._block_w)
        n_offsets = n_rows * self._n_blocks + 1
        self._offsets = torch.zeros(n_offsets, dtype=torch.int64, device=device)

    @property
    def total(self) -> torch.Tensor:
        """Number of marks so far, fitting or not; int64, on the device."""
        return self._offsets[-1]

    @property
    def rows(self) -> Rows:
        """The rows of the pairs. Where there is no room, they end early."""
        offsets = self._offsets[:: self._n_blocks].clamp(max=self.latents.numel())
        return Rows.ragged(offsets, self._rows)

    def add(self, rows: slice, chunk: Chunk, words: torch.Tensor) -> None:
        """Add the marks of a chunk of rows, which follow those added before."""
        n_words, n_blocks, block_w = words.shape[1], self._n_blocks, self._block_w
        n_warps = warps(block_w, LAUNCH.WORDS_PER_WARP, words.device)
        counts = torch.empty(chunk.N * n_blocks, dtype=torch.int64, device=words.device)
        _count_marks_kernel[(chunk.N, n_blocks)](
            counts_ptr=counts, words_ptr=words, W=n_words, BLOCK_W=block_w, num_warps=n_warps
        )
        offsets = self._offsets[rows.start * n_blocks : rows.stop * n_blocks + 1]
        torch.cumsum(counts, 0, out=offsets[1:])
        if rows.start > 0:
            offsets[1:] += offsets[0]
        _list_marks_kernel[(chunk.N, n_blocks)](
            latents_ptr=self.latents,
            rows_ptr=self._rows,
            pre_acts_ptr=self.pre_acts,
            offsets_ptr=offsets,
            words_ptr=words,
            chunk=chunk,
            first_row=rows.start,
            P=self.latents.numel(),
            W=n_words,
            BLOCK_W=block_w,
            num_warps=n_warps,
        )


def marks_of(chunk: Chunk, edge: torch.Tensor) -> torch.Tensor:
    """`[rows, d_sae / 32]` int32: a bit for each latent that may reach its edge, `[d_sae]`."""
    n_words = triton.cdiv(chunk.L, _WORD.value)
    words = torch.empty(chunk.N, n_words, dtype=torch.int32, device=edge.device)
    grid = (triton.cdiv(chunk.L, LAUNCH.MARK_COLS), triton.cdiv(chunk.N, LAUNCH.MARK_ROWS))
    _mark_kernel[grid](
        words_ptr=words,
        edges_ptr=edge,
        chunk=chunk,
        W=n_words,
        COLS=LAUNCH.MARK_COLS,
        ROWS=LAUNCH.MARK_ROWS,
        num_warps=LAUNCH.MARK_WARPS,
    )
    return words
