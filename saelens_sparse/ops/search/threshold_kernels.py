"""Triton search for the pairs that matter to a JumpReLU: screen, mark, list, recompute.

1. A low-precision GEMM fills a `[rows, d_sae]` buffer (`screen_triton.py`).
2. One read of the buffer marks, a bit each, the latents that may be above the lower edge of their
   window: in float32 those whose screened pre-activation plus its proven bound is.
3. The marked latents are listed row by row, in order, each row where the one before it ends.
4. In float32 they are recomputed; then those truly above the edge get a key, and the active ones
   are counted.

How many there are is known only on the device: the list has a given capacity, and what does not
fit is counted but not written.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.rows.kernels import gather_dot
from saelens_sparse.ops.screen.float16_product import has_float32_sums
from saelens_sparse.ops.screen.gpu import (
    MAX_D_IN,
    ROUNDING,
    SUBNORMAL,
    Screen,
    row_terms,
    score_of,
    warps,
)
from saelens_sparse.ops.search.found import threshold_and_edge
from saelens_sparse.ops.update.weight_cache import WeightCopy

_WORD = tl.constexpr(32)


@dataclass(frozen=True)
class GateLaunch:
    """Tile sizes of the search kernels, chosen at 2304 -> 65,536, batch 4096 (H200)."""

    MARK_COLS: int = 512
    MARK_ROWS: int = 8
    MARK_WARPS: int = 2
    LIST_WORDS: int = 32768  # at most: more marks of a row are listed by several programs
    RESOLVE_PAIRS: int = 256


LAUNCH = GateLaunch()


@kernel
def _mark_kernel(
    words_ptr,  # [N, W] int32, bit i of word w is latent 32 w + i
    edges_ptr,  # [L]
    screen_ptr,  # [N, L]
    x_error_ptr,  # this and the next three: see row_terms and score_of
    x_stride,
    terms_ptr,
    accumulation,
    N,
    L,
    W,
    EXACT: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """words: pre-activation + bound reaches the edge; one read of the buffer."""
    latent = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    rows = rows.to(tl.int64)
    live = latent < L
    mask = row_mask[:, None] & live
    inverse, weight_norm, weight_residual = row_terms(
        x_error_ptr, x_stride, rows[:, None], row_mask[:, None], accumulation, EXACT
    )
    weight_norm *= 1.001
    weight_residual *= 1.001
    s = tl.load(screen_ptr + rows[:, None] * L + latent, mask=mask, other=0.0).to(tl.float32)
    edge = tl.load(edges_ptr + latent, mask=live, other=0.0)
    if EXACT:
        _, most = score_of(s, latent, live, inverse, terms_ptr, L, EXACT, HAS_NORMS=False)
    else:
        # product + c |product| + bias + d >= edge if product + (1 + 2c) d reaches what follows:
        # the bias, and all that is proportional to a product at the edge, go to the other side.
        bias = tl.load(terms_ptr + L + latent, mask=live, other=0.0)
        edge = edge - bias - 5e-7 * tl.abs(bias)
        edge -= (ROUNDING + 1e-6) * tl.abs(edge)
        scale = inverse * tl.load(terms_ptr + latent, mask=live, other=0.0)
        most = (s + 1.001 * SUBNORMAL) * scale
        most += weight_norm * tl.load(terms_ptr + 2 * L + latent, mask=live, other=0.0)
        most += weight_residual * tl.load(terms_ptr + 3 * L + latent, mask=live, other=0.0)
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
    """counts[n, b] = marks in block b of BLOCK_W words of row n"""
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    w = block * BLOCK_W + tl.arange(0, BLOCK_W)
    words = tl.load(words_ptr + n * W + w, mask=w < W, other=0).to(tl.uint32, bitcast=True)
    count = tl.sum(_count_bits(words), axis=0).to(tl.int64)
    tl.store(counts_ptr + n * tl.num_programs(1) + block, count)


@kernel
def _list_marks_kernel(
    latents_ptr,  # [P] int64
    rows_ptr,  # [P] int32
    pre_acts_ptr,  # [P], written only if EXACT
    offsets_ptr,  # [N B + 1], where the marks of each block of words begin
    words_ptr,  # [N, W]
    screen_ptr,  # [N, L]
    bias_ptr,  # [L]
    first_row,
    P,
    L,
    W,
    EXACT: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The marked latents of a block of words in order; each turn lists the lowest mark left in
    every word.
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
        if EXACT:
            s = tl.load(screen_ptr + n * L + latent, mask=live, other=0.0).to(tl.float32)
            pre_act = s + tl.load(bias_ptr + latent, mask=live, other=0.0)
            tl.store(pre_acts_ptr + position, pre_act.to(pre_acts_ptr.dtype.element_ty), mask=live)
        words = words & (words - 1)
        position += 1


@kernel
def _resolve_kernel(
    keys_ptr,  # [P] int32
    row_counts_ptr,  # [N] int32
    pre_acts_ptr,  # [P]; unless EXACT, read without the bias and written with it
    latents_ptr,  # [P]
    offsets_ptr,  # [N + 1]
    gates_ptr,  # [L]
    edges_ptr,  # [L]
    bias_ptr,  # [L], unused if EXACT
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Keys of the pairs that reach their edge; how many of a row are above their gate."""
    n = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + n)
    n_pairs = (tl.load(offsets_ptr + n + 1) - first).to(tl.int32)
    active = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for start in range(0, n_pairs, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        live = i < n_pairs
        latent = tl.load(latents_ptr + first + i, mask=live, other=0)
        pre_act = tl.load(pre_acts_ptr + first + i, mask=live, other=0.0).to(tl.float32)
        if not EXACT:
            pre_act += tl.load(bias_ptr + latent, mask=live, other=0.0)
            tl.store(pre_acts_ptr + first + i, pre_act, mask=live)
        below = pre_act < tl.load(edges_ptr + latent, mask=live, other=0.0)
        # A NaN does not fall short of the edge.
        tl.store(keys_ptr + first + i, latent.to(tl.int32), mask=live & (below == 0))
        above = pre_act > tl.load(gates_ptr + latent, mask=live, other=0.0)
        active += (live & above).to(tl.int32)
    tl.store(row_counts_ptr + n, tl.sum(active, axis=0))


def can_screen(x: torch.Tensor) -> bool:
    """Whether there are rows, of a width that one program can hold, and products that bounds hold
    for.
    """
    return x.shape[0] > 0 and x.shape[1] <= MAX_D_IN and has_float32_sums(x)


@on_device_of_arguments
def find_pattern(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    capacity: int,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
) -> tuple[ActivePairs, torch.Tensor]:
    """The pairs, as far as they fit, and `[2]` int64: number of pairs and of active ones.

    Arguments as `search_above_threshold`'s; `can_screen` must hold.
    """
    device, n_rows, d_sae = x.device, x.shape[0], weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    screen = Screen.of(x, weight, bias, rounded=rounded)
    gate, edge = threshold_and_edge(threshold, bandwidth, screen.pre_acts_dtype)
    gate, edge = gate.float(), edge.float()

    latents = torch.zeros(capacity, dtype=torch.int64, device=device)
    rows_of_pairs = torch.zeros(capacity, dtype=torch.int32, device=device)
    # Written while the buffer is at hand, if that is all the precision there is to be had.
    pre_acts = torch.zeros(
        capacity if screen.exact else 0, dtype=screen.pre_acts_dtype, device=device
    )
    keys = torch.full((capacity,), d_sae, dtype=torch.int32, device=device)
    row_counts = torch.empty(n_rows, dtype=torch.int32, device=device)
    n_words = triton.cdiv(d_sae, _WORD.value)
    block_w = min(triton.next_power_of_2(n_words), LAUNCH.LIST_WORDS)
    n_blocks, n_warps = triton.cdiv(n_words, block_w), warps(block_w, 512, device)
    offsets = torch.zeros(n_rows * n_blocks + 1, dtype=torch.int64, device=device)
    for rows, products in screen.chunks(buffer_bytes, LAUNCH.MARK_ROWS):
        n_chunk = products.shape[0]
        words = torch.empty(n_chunk, n_words, dtype=torch.int32, device=device)
        grid = (triton.cdiv(d_sae, LAUNCH.MARK_COLS), triton.cdiv(n_chunk, LAUNCH.MARK_ROWS))
        _mark_kernel[grid](
            words, edge, products, *screen.arguments(rows), n_chunk, d_sae, n_words,
            EXACT=screen.exact, COLS=LAUNCH.MARK_COLS, ROWS=LAUNCH.MARK_ROWS,
            num_warps=LAUNCH.MARK_WARPS,
        )  # fmt: skip
        counts = torch.empty(n_chunk * n_blocks, dtype=torch.int64, device=device)
        _count_marks_kernel[(n_chunk, n_blocks)](
            counts, words, n_words, BLOCK_W=block_w, num_warps=n_warps
        )
        chunk_offsets = offsets[rows.start * n_blocks : rows.stop * n_blocks + 1]
        torch.cumsum(counts, 0, out=chunk_offsets[1:])
        if rows.start > 0:
            chunk_offsets[1:] += chunk_offsets[0]
        _list_marks_kernel[(n_chunk, n_blocks)](
            latents, rows_of_pairs, pre_acts, chunk_offsets, words, products,
            screen.bias, rows.start, capacity, d_sae, n_words, EXACT=screen.exact,
            BLOCK_W=block_w, num_warps=n_warps,
        )  # fmt: skip
    # Where there is no room, rows end early.
    offsets_of_rows = offsets[::n_blocks].clamp(max=capacity)
    pair_rows = Rows.ragged(offsets_of_rows, rows_of_pairs)
    if not screen.exact:
        pre_acts = gather_dot(x, latents, pair_rows, weight)
    _resolve_kernel[(n_rows,)](
        keys, row_counts, pre_acts, latents, offsets_of_rows, gate, edge, screen.bias,
        EXACT=screen.exact, BLOCK_P=LAUNCH.RESOLVE_PAIRS, num_warps=4,
    )  # fmt: skip
    pairs = ActivePairs(latents, keys, pre_acts, pair_rows, row_counts)
    return pairs, torch.stack([offsets[-1], row_counts.sum()])
