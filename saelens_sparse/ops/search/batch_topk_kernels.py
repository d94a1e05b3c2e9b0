"""Triton search for the largest scores of a batch: screen, count, mark, list, recompute, keep.

1. A low-precision GEMM fills a `[rows, d_sae]` buffer (`screen/gpu.py`).
2. A histogram of some scores gives an edge that the largest of all scores reach.
3. The latents that may reach the edge are listed (`mark_kernels.py`).
4. In float32 they are recomputed. The largest are kept, exactly as many as asked for.

A batch of a single chunk has a histogram of a sample, one score in 16. An edge that somewhat more
of the sample reach than its share is most probably low enough. It is if the scores that are kept
reach it. The buffer is read once.

With several chunks the histogram counts all scores, each by what it is at least
(`screen/BOUND.md`). Where enough scores are in some bin or above it, the bin's lower end is certain
to be low enough. It rises with each chunk. The buffer is read twice.

Nothing depends on how the active latents are spread over the rows.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, max_warps, on_device_of_arguments
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.rows.kernels import GATHER_DOT, gather_dot
from saelens_sparse.ops.screen.gpu import Chunk, Screen, row_terms, screened
from saelens_sparse.ops.search.mark_kernels import LAUNCH as MARK_LAUNCH
from saelens_sparse.ops.search.mark_kernels import MarkedPairs, marks_of
from saelens_sparse.ops.update.weight_cache import WeightCopy

# A bin holds the positive float32 numbers that differ in their last bits alone: with 13, bins are a
# thousandth of their value wide.
_BIN_BITS = tl.constexpr(13)
_N_BINS = 2 ** (31 - _BIN_BITS.value)
# Latents of a sample that are neighbours: 32 bytes, what is read at once.
_SAMPLED_RUN = tl.constexpr(16)
# Runs of which one is in the sample.
_SAMPLED_OF = 16
# Standard deviations of a sample's number of large scores that an edge allows for.
_DEVIATIONS = 6
# Which bits of a count of two kinds count the first.
_LOW = tl.constexpr(2**32 - 1)


@dataclass(frozen=True)
class BatchTopKLaunch:
    """Tiles of the kernels that count and keep; not yet compared with others."""

    COUNT_COLS: int = 512
    COUNT_ROWS: int = 8
    COUNT_WARPS: int = 4
    EDGE_BINS: int = 16384
    EDGE_WARPS: int = 16
    KEPT_PAIRS: int = 512
    KEPT_WARPS: int = 4


LAUNCH = BatchTopKLaunch()


@kernel
def _histogram_kernel(
    counts_ptr,  # [bins] int32, added to
    edge_ptr,  # [1] float32
    chunk,  # Chunk
    OF: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """counts[b] += scores of bin b of which it is certain that they reach the edge

    With OF > 1 of a sample alone, one run of latents in OF, of each row another.

    Grid: a program for COLS latents of ROWS rows, [L / (OF * COLS), N / ROWS].
    """
    N, L = chunk.N, chunk.L
    cols = (tl.program_id(0) * COLS + tl.arange(0, COLS))[None, :]
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    row_mask = rows < N
    rows = rows.to(tl.int64)
    latent = cols
    if OF > 1:
        run = (cols // _SAMPLED_RUN) * OF + (rows % OF).to(tl.int32)
        latent = run * _SAMPLED_RUN + cols % _SAMPLED_RUN
    live = latent < L
    inverse, weight_norm, weight_residual = row_terms(chunk, rows, row_mask)
    s = tl.load(chunk.products + rows * L + latent, mask=row_mask & live, other=0.0)
    _, score, bound = screened(
        s.to(tl.float32), chunk, latent, live, inverse, weight_norm, weight_residual
    )
    least = score - bound
    # A NaN is not counted.
    counted = row_mask & live & (least >= tl.load(edge_ptr))
    place = least.to(tl.int32, bitcast=True) >> _BIN_BITS
    tl.atomic_add(counts_ptr + place, 1, mask=counted, sem="relaxed")


@kernel
def _edge_kernel(
    edge_ptr,  # [1] int32, the bits of a float32
    counts_ptr,  # [bins] int32
    count,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lower end of the highest bin that has `count` scores in it and above; the smallest
    positive number if there are not so many.

    Grid: one program.
    """
    bins = tl.arange(0, BLOCK)
    start = BINS - BLOCK
    above = tl.zeros((), dtype=tl.int64)
    counts = tl.load(counts_ptr + start + bins).to(tl.int64)
    here = tl.sum(counts, axis=0)
    while (start > 0) & (above + here < count):
        above += here
        start -= BLOCK
        counts = tl.load(counts_ptr + start + bins).to(tl.int64)
        here = tl.sum(counts, axis=0)
    from_bin = above + here - tl.cumsum(counts, axis=0) + counts
    n_bins = tl.sum((from_bin >= count).to(tl.int32), axis=0)
    bits = (start + n_bins - 1) << _BIN_BITS
    tl.store(edge_ptr, tl.maximum(bits, 1))


@kernel
def _keys_kernel(
    keys_ptr,  # [P] int32
    pre_acts_ptr,  # [P]; with a bias, read without it and written with it
    latents_ptr,  # [P]
    bias_ptr,  # [L] or None
    norms_ptr,  # [L] or None
    n_pairs_ptr,  # [1] int64
    P,
    BLOCK_P: tl.constexpr,
):
    """Keys that order as positive scores do, zero for others, and the largest for a NaN.

    Grid: a program for BLOCK_P pairs, [P / BLOCK_P].
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = i < tl.minimum(tl.load(n_pairs_ptr), P)
    latent = tl.load(latents_ptr + i, mask=live, other=0)
    score = tl.load(pre_acts_ptr + i, mask=live, other=0.0)
    if bias_ptr is not None:
        score += tl.load(bias_ptr + latent, mask=live, other=0.0)
        tl.store(pre_acts_ptr + i, score, mask=live)
    if norms_ptr is not None:
        score *= tl.load(norms_ptr + latent, mask=live, other=0.0)
    key = tl.where(score > 0.0, score.to(tl.int32, bitcast=True), 0)
    key = tl.where(score == score, key, 0x7FFFFFFF)
    tl.store(keys_ptr + i, tl.where(live, key, 0), mask=i < P)


@kernel
def _count_kept_kernel(
    counts_ptr,  # [P] int64
    found_ptr,  # [2] int64
    keys_ptr,  # [P]
    least_ptr,  # [1] int32
    edge_ptr,  # [1] int32, the bits of a float32
    n_pairs_ptr,  # [1] int64
    P,
    BLOCK_P: tl.constexpr,
):
    """counts[p] = 1 if the key is above the least one, 2^32 if it is the least one
    found = number of candidates, and whether the edge was low enough

    Grid: a program for BLOCK_P pairs, [P / BLOCK_P].
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    key = tl.load(keys_ptr + i, mask=i < P, other=0)
    least, edge = tl.load(least_ptr), tl.load(edge_ptr)
    if tl.program_id(0) == 0:
        tl.store(found_ptr, tl.load(n_pairs_ptr))
        # Nothing positive is below the smallest positive number.
        tl.store(found_ptr + 1, ((least >= edge) | (edge == 1)).to(tl.int64))
    ties = (key == least) & (key > 0)
    count = (key > least).to(tl.int64) + (ties.to(tl.int64) << 32)
    tl.store(counts_ptr + i, count, mask=i < P)


@triton.jit
def _kept_before(counts_ptr, i, mask, room):
    """How many pairs are kept of those before place i, all above the least and the first ties."""
    count = tl.load(counts_ptr + i - 1, mask=mask & (i > 0), other=0)
    return (count & _LOW) + tl.minimum(count >> 32, room)


@kernel
def _keep_kernel(
    out_latents_ptr,  # [n_kept] int64
    out_keys_ptr,  # [n_kept] int32
    out_rows_ptr,  # [n_kept] int32
    out_pre_acts_ptr,  # [n_kept]
    counts_ptr,  # [P] int64, summed up to each pair
    latents_ptr,  # [P]
    rows_ptr,  # [P]
    pre_acts_ptr,  # [P]
    n_kept,
    L,
    P,
    BLOCK_P: tl.constexpr,
):
    """The pairs that are kept, in their order, and beyond them pairs that take part in no sum.

    Grid: a program for BLOCK_P pairs, [P / BLOCK_P].
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = i < P
    room = n_kept - (tl.load(counts_ptr + P - 1) & _LOW)
    empty = (i >= _kept_before(counts_ptr, P, True, room)) & (i < n_kept)
    tl.store(out_latents_ptr + i, 0, mask=empty)
    tl.store(out_keys_ptr + i, L, mask=empty)
    tl.store(out_rows_ptr + i, 0, mask=empty)
    tl.store(out_pre_acts_ptr + i, 0.0, mask=empty)
    place = _kept_before(counts_ptr, i, live, room)
    kept = live & (_kept_before(counts_ptr, i + 1, live, room) > place)
    latent = tl.load(latents_ptr + i, mask=kept, other=0)
    tl.store(out_latents_ptr + place, latent, mask=kept)
    tl.store(out_keys_ptr + place, latent.to(tl.int32), mask=kept)
    tl.store(out_rows_ptr + place, tl.load(rows_ptr + i, mask=kept, other=0), mask=kept)
    pre_act = tl.load(pre_acts_ptr + i, mask=kept, other=0.0)
    tl.store(out_pre_acts_ptr + place, pre_act.to(out_pre_acts_ptr.dtype.element_ty), mask=kept)


@kernel
def _kept_offsets_kernel(
    out_offsets_ptr,  # [N + 1] int64
    offsets_ptr,  # [N + 1]
    counts_ptr,  # [P] int64, summed up to each pair
    n_kept,
    N,
    P,
    BLOCK_N: tl.constexpr,
):
    """Where each row begins among the pairs that are kept.

    Grid: a program for BLOCK_N rows, [N / BLOCK_N].
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n <= N
    room = n_kept - (tl.load(counts_ptr + P - 1) & _LOW)
    first = tl.load(offsets_ptr + n, mask=live, other=0)
    tl.store(out_offsets_ptr + n, _kept_before(counts_ptr, first, live, room), mask=live)


@on_device_of_arguments
def find_largest(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    count: int,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
    screen_dtype: ScreenDtype = "auto",
    *,
    is_certain: bool = False,
) -> tuple[ActivePairs, torch.Tensor, int]:
    """The pairs; `[2]` int64 on the device, how many candidates there were and whether they reach
    far enough down; and for how many there was room.

    Arguments as `search_batch_topk`'s; `mark_kernels.can_screen` must hold and `count` be positive.
    With `is_certain` candidates reach far enough down for certain.
    """
    n_rows, d_sae = x.shape[0], weight.shape[0]
    x = x.contiguous()
    screen = Screen.of(
        x,
        weight,
        bias,
        tile=GATHER_DOT.BLOCK_D,
        norms=norms,
        rounded=rounded,
        screen_dtype=screen_dtype,
    )
    rows_per_program = min(MARK_LAUNCH.MARK_ROWS, LAUNCH.COUNT_ROWS)
    n_chunks = triton.cdiv(n_rows, screen.rows_at_once(buffer_bytes, rows_per_program))
    is_certain = is_certain or n_chunks > 1
    capacity = min(list_capacity(count, n_chunks, screen_dtype), n_rows * d_sae)
    marked = MarkedPairs(screen, capacity, torch.float32)
    # The smallest positive number.
    edge = torch.ones(1, dtype=torch.int32, device=x.device).view(torch.float32)
    sample, counts = torch.zeros(2, _N_BINS, dtype=torch.int32, device=x.device)
    for rows, chunk in screen.chunks(buffer_bytes, rows_per_program):
        if rows.start == 0:
            _add_scores(sample, chunk, edge, _SAMPLED_OF)
            edge = _edge_of(sample, count if is_certain else _share_of_sample(count))
        if is_certain:
            # Few reach the edge of the sample's own largest scores, and are counted.
            _add_scores(counts, chunk, edge, 1)
            edge = _edge_of(counts, count)
        marked.add(rows, chunk, marks_of(chunk, edge.expand(d_sae).contiguous()))
    pairs, found = _keep(marked, edge, screen, x, weight, count)
    return pairs, found, capacity


def _share_of_sample(count: int) -> int:
    """How many of the sample are to reach an edge that `count` of all scores reach."""
    share = count / _SAMPLED_OF
    return math.ceil(share + _DEVIATIONS * (math.sqrt(share) + 1))


def list_capacity(count: int, n_chunks: int, screen_dtype: ScreenDtype = "auto") -> int:
    """Room for the candidates of a batch.

    The i-th chunk of rows adds those of its scores that are among the `count` largest so far. Where
    rows are in no order, that is one i-th of `count`. As many again, and once more, have room that
    bounds leave open. The margin of a float8 screen lets in 1.5 to 1.7 times as many candidates,
    where one normal score in 1,000 to 8,000 is kept. Twice as many have room.
    """
    each = 2 if screen_dtype == "float8" else 1
    return math.ceil(each * count * (3 + math.log(n_chunks))) + 1024


def _add_scores(counts: torch.Tensor, chunk: Chunk, edge: torch.Tensor, of: int) -> None:
    """Count the scores that are sure to reach the edge, of one latent in `of`."""
    n_latents = triton.cdiv(triton.cdiv(chunk.L, _SAMPLED_RUN.value), of) * _SAMPLED_RUN.value
    cols, rows = LAUNCH.COUNT_COLS, LAUNCH.COUNT_ROWS
    _histogram_kernel[(triton.cdiv(n_latents, cols), triton.cdiv(chunk.N, rows))](
        counts_ptr=counts,
        edge_ptr=edge,
        chunk=chunk,
        OF=of,
        COLS=cols,
        ROWS=rows,
        num_warps=LAUNCH.COUNT_WARPS,
    )


def _edge_of(counts: torch.Tensor, count: int) -> torch.Tensor:
    """The lower end, `[1]` float32, of the highest bin that has `count` scores in it and above; the
    smallest positive number if there are not so many.
    """
    edge = torch.empty(1, dtype=torch.int32, device=counts.device)
    _edge_kernel[(1,)](
        edge_ptr=edge,
        counts_ptr=counts,
        count=count,
        BINS=_N_BINS,
        BLOCK=LAUNCH.EDGE_BINS,
        num_warps=min(LAUNCH.EDGE_WARPS, max_warps(counts.device)),
    )
    return edge.view(torch.float32)


def _keep(
    marked: MarkedPairs,
    edge: torch.Tensor,
    screen: Screen,
    x: torch.Tensor,
    weight: torch.Tensor,
    count: int,
) -> tuple[ActivePairs, torch.Tensor]:
    """Of pairs that were marked for an edge those with the `count` largest positive scores, of ties
    the first; and `found` of `_count_kept_kernel`.
    """
    device, rows, latents, pre_acts = x.device, marked.rows, marked.latents, marked.pre_acts
    bias = None
    if pre_acts is None:
        pre_acts, bias = gather_dot(x, latents, rows, weight), screen.bias
    n_pairs, block = latents.numel(), LAUNCH.KEPT_PAIRS
    grid = (triton.cdiv(n_pairs, block),)
    launch = {"P": n_pairs, "BLOCK_P": block, "num_warps": LAUNCH.KEPT_WARPS}
    keys = torch.empty(n_pairs, dtype=torch.int32, device=device)
    _keys_kernel[grid](
        keys_ptr=keys,
        pre_acts_ptr=pre_acts,
        latents_ptr=latents,
        bias_ptr=bias,
        norms_ptr=screen.norms,
        n_pairs_ptr=marked.total,
        **launch,
    )
    counts = torch.empty(n_pairs, dtype=torch.int64, device=device)
    found = torch.empty(2, dtype=torch.int64, device=device)
    _count_kept_kernel[grid](
        counts_ptr=counts,
        found_ptr=found,
        keys_ptr=keys,
        least_ptr=keys.topk(count, sorted=False).values.amin(),
        edge_ptr=edge.view(torch.int32),
        n_pairs_ptr=marked.total,
        **launch,
    )
    torch.cumsum(counts, 0, out=counts)
    assert rows.of_pairs is not None and rows.offsets is not None
    offsets = torch.empty_like(rows.offsets)
    kept = ActivePairs(
        latents=torch.empty(count, dtype=torch.int64, device=device),
        keys=torch.empty(count, dtype=torch.int32, device=device),
        pre_acts=torch.empty(count, dtype=screen.pre_acts_dtype, device=device),
        rows=Rows.ragged(offsets, torch.empty(count, dtype=torch.int32, device=device)),
    )
    _keep_kernel[grid](
        out_latents_ptr=kept.latents,
        out_keys_ptr=kept.keys,
        out_rows_ptr=kept.rows.of_pairs,
        out_pre_acts_ptr=kept.pre_acts,
        counts_ptr=counts,
        latents_ptr=latents,
        rows_ptr=rows.of_pairs,
        pre_acts_ptr=pre_acts,
        n_kept=count,
        L=weight.shape[0],
        **launch,
    )
    _kept_offsets_kernel[(triton.cdiv(rows.n_rows + 1, block),)](
        out_offsets_ptr=offsets,
        offsets_ptr=rows.offsets,
        counts_ptr=counts,
        n_kept=count,
        N=rows.n_rows,
        P=n_pairs,
        BLOCK_N=block,
        num_warps=LAUNCH.KEPT_WARPS,
    )
    return kept, found
