"""Triton kernels that find the candidates for each row's top k among products of low precision.

1. One read of the products gives each group of latents its largest score. The k-th largest of
   these, or any number just below it, is a lower bound T of the row's k-th largest.
2. Groups that reach T are read again and their latents that reach T become candidates.
3. In float32, candidates are dropped that do not reach the k-th largest of all candidates.

In float32 each screened score carries a bound on its error, and "reaches T" means that
score plus bound does, where T is the k-th largest of score minus bound: first of groups, then of
the candidates themselves, which leaves fewer. Where the bound is proven, a true top-k latent is
always a candidate (`screen/BOUND.md`).

A group is made of runs of RUN neighbours, one from each slab of n_groups * RUN latents: latent l
belongs to group (l / RUN) mod n_groups. Groups of neighbours alone would make T useless where
active latents lie side by side, as in a dictionary that was sorted or has grown; single latents
would make the read of a group's members slow.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, warps
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.screen import bound as bounds
from saelens_sparse.ops.screen.gpu import (
    ROUNDING,
    Chunk,
    Screen,
    row_terms,
    score_of,
    screened,
)

PRODUCT_SLACK = tl.constexpr(bounds.PRODUCT_SLACK)
GROUP_BIAS_ROUNDING = tl.constexpr(bounds.GROUP_BIAS_ROUNDING)
GROUP_SCORE_ROUNDING = tl.constexpr(bounds.GROUP_SCORE_ROUNDING)

# 16 bytes of the buffer: what one thread reads at once.
RUN = 8
# Groups per selected latent: enough that few of the top k share a group, which is what makes
# T close to the k-th largest score.
_GROUPS_PER_LATENT = 16
# Latents of a group, or a run more, while groups are not too many: where one of its latents
# reaches T, all are read again.
_GROUP_LATENTS = 64
_MAX_GROUPS = 8192


@dataclass(frozen=True)
class CandidatesLaunch:
    """Tiles of the kernels that find candidates, chosen at 2304 -> 65,536, k 64, batch 4096, with
    float32 weights, on an H200; for maxima at 262,144 latents too, on an H100.
    """

    MAXIMA_COLS: int = 128
    MAXIMA_ROWS: int = 4
    MAXIMA_WARPS: int = 1
    TERMS_COLS: int = 128
    TERMS_WARPS: int = 4
    GROUPS_PER_WARP: int = 512
    CANDIDATE_TILE: int = 512
    CANDIDATE_WARPS: int = 4
    LISTED_PER_WARP: int = 256


LAUNCH = CandidatesLaunch()


class Candidates(NamedTuple):
    """Each row's list of candidates, in the first `counts` of C places.

    Until they are recomputed in float32, `scores` are the most that a recomputation may give, and
    `pre_acts` the scores that it gives at least.
    """

    latents: Any  # [N, C] int32
    pre_acts: Any  # [N, C] float32
    scores: Any  # [N, C] float32
    counts: Any  # [N] int32

    @classmethod
    def empty(cls, n_rows: int, capacity: int, device: torch.device) -> Self:
        """Lists for capacity candidates each, with nothing written."""
        return cls(
            latents=torch.empty(n_rows, capacity, dtype=torch.int32, device=device),
            pre_acts=torch.empty(n_rows, capacity, dtype=torch.float32, device=device),
            scores=torch.empty(n_rows, capacity, dtype=torch.float32, device=device),
            counts=torch.empty(n_rows, dtype=torch.int32, device=device),
        )


class ReachingGroups(NamedTuple):
    """Each row's groups that may hold one of its top k latents."""

    groups: Any  # [N, C] int32, in the first `counts` places
    counts: Any  # [N] int32: as many as there are, listed or not
    thresholds: Any  # [N] float32: T


@triton.jit
def ordered_key(x):
    """int32 that orders as the float32 x does; NaN above everything."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def kth_largest_key(keys, k):
    """A key that the k largest of the int32 keys reach and, but for ties, no other does.

    Built bit by bit from the top, until exactly k keys reach it.
    """
    count = tl.sum((keys >= 0).to(tl.int32), axis=0)
    threshold = tl.where(count >= k, 0, -2147483648).to(tl.int32)
    bit = 30
    while (bit >= 0) & (count != k):
        trial = threshold | (1 << bit)
        count = tl.sum((keys >= trial).to(tl.int32), axis=0)
        threshold = tl.where(count >= k, trial, threshold)
        bit -= 1
    return threshold


@triton.jit
def keep_topk(keys, k):
    """True at the k largest int32 keys; of those that tie, at the first."""
    kth = kth_largest_key(keys, k)
    kept = keys >= kth
    if tl.sum(kept.to(tl.int32), axis=0) > k:
        above = keys > kth
        room = k - tl.sum(above.to(tl.int32), axis=0)
        ties = (keys == kth).to(tl.int32)
        kept = above | ((ties == 1) & (tl.cumsum(ties, axis=0) <= room))
    return kept


@kernel
def _group_maxima_kernel(
    maxima_ptr,  # [N, G]
    chunk,  # Chunk
    G,
    RUN: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Largest score of every group, infinite if one is NaN; one read of the buffer.

    Grid: a program for COLS / RUN groups of ROWS rows, [G * RUN / COLS, N / ROWS].
    """
    N, L = chunk.N, chunk.L
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    rows = rows.to(tl.int64)
    row = row_terms(chunk, rows[:, None], row_mask[:, None])
    maxima = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    for slab in range(0, L, G * RUN):
        latent = (slab + cols)[None, :]
        live = latent < L
        mask = row_mask[:, None] & live
        s = tl.load(chunk.products + rows[:, None] * L + latent, mask=mask, other=0.0)
        _, score = score_of(s.to(tl.float32), chunk, latent, live, row[0])
        maxima = tl.maximum(maxima, score, propagate_nan=tl.PropagateNan.ALL)
    maxima = tl.where(maxima == maxima, maxima, float("inf"))
    GROUPS: tl.constexpr = COLS // RUN
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    out = rows[:, None] * G + groups[None, :]
    maxima = tl.max(tl.reshape(maxima, (ROWS, GROUPS, RUN)), axis=2)
    tl.store(maxima_ptr + out, maxima, mask=row_mask[:, None] & (groups < G)[None, :])


@kernel
def _group_terms_kernel(
    group_terms_ptr,  # [4, G]: magnitude of the bias, norm, residual, what underflows
    terms_ptr,  # [5, L], see Chunk
    L,
    G,
    RUN: tl.constexpr,
    COLS: tl.constexpr,
):
    """The largest of the latents' terms in every group, infinite if one is NaN.

    Grid: a program for COLS / RUN groups, [G * RUN / COLS].
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    GROUPS: tl.constexpr = COLS // RUN
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    for term in tl.static_range(4):
        largest = tl.zeros((COLS,), tl.float32)
        for slab in range(0, L, G * RUN):
            latent = slab + cols
            value = tl.load(terms_ptr + (term + 1) * L + latent, mask=latent < L, other=0.0)
            largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        # A NaN would not be seen by what follows; its bound is infinite.
        largest = tl.where(largest == largest, largest, float("inf"))
        largest = tl.max(tl.reshape(largest, (GROUPS, RUN)), axis=1)
        tl.store(group_terms_ptr + term * G + groups, largest, mask=groups < G)


@kernel
def _reaching_groups_kernel(
    reaching,  # ReachingGroups, written
    maxima_ptr,  # [N, G]
    group_terms_ptr,  # [4, G], or None where the screen has no errors
    chunk,  # Chunk
    G,
    k,
    CAPACITY: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """T, a lower bound of the k-th largest true maximum; the groups that may reach it.

    A group's true maximum is within d + c p of its screened one, m. Here d is the largest of the
    group's bounds less what depends on the product, and p a bound on the products: |m| plus the
    largest |bias|, or |x'| |w'| where that is less, so that a latent which its bias switches off
    does not loosen the bound of its group. |bias| is at most |m| + |x'| |w'| in turn. Both ends of
    a latent's interval grow with its screened score, so that m's interval holds for the group.

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    mask = group < G
    maximum = tl.load(maxima_ptr + n * G + group, mask=mask, other=float("-inf"))
    lower = maximum
    upper = maximum
    if group_terms_ptr is not None:
        _, weight_norm, weight_residual = row_terms(chunk, n, True)
        terms = group_terms_ptr + group
        bias = tl.load(terms, mask=mask, other=0.0)
        norm = tl.load(terms + G, mask=mask, other=0.0)
        residual = tl.load(terms + 2 * G, mask=mask, other=0.0)
        bound = weight_norm * norm + weight_residual * residual
        bound += tl.load(terms + 3 * G, mask=mask, other=0.0)
        magnitude = tl.abs(maximum)
        largest = weight_residual * PRODUCT_SLACK * (norm + residual)
        product = tl.minimum(magnitude + bias, largest, propagate_nan=tl.PropagateNan.ALL)
        bias = tl.minimum(bias, magnitude + largest, propagate_nan=tl.PropagateNan.ALL)
        bound += product * ROUNDING + bias * GROUP_BIAS_ROUNDING + magnitude * GROUP_SCORE_ROUNDING
        lower = maximum - bound
        upper = maximum + bound
        # What has no bound may be anything: its group reaches T, and does not raise it.
        lower = tl.where(lower == lower, lower, float("-inf"))
        upper = tl.where(mask & (upper != upper), float("inf"), upper)
    key = kth_largest_key(tl.where(mask, ordered_key(lower), -2147483648), k)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    threshold = bits.to(tl.float32, bitcast=True)
    reaches = mask & (upper >= threshold)
    position = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    tl.store(reaching.groups + n * CAPACITY + position, group, mask=reaches & (position < CAPACITY))
    tl.store(reaching.counts + n, tl.sum(reaches.to(tl.int32), axis=0))
    tl.store(reaching.thresholds + n, threshold)


@kernel
def _candidates_kernel(
    found,  # Candidates, written
    flags_ptr,  # [N] int8
    reaching,  # ReachingGroups
    chunk,  # Chunk
    G,
    k,
    RUN: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):
    """The latents of the reaching groups that reach T themselves, in a fixed order.

    Grid: a program a row, [N].
    """
    L = chunk.L
    n = tl.program_id(0).to(tl.int64)
    n_groups = tl.load(reaching.counts + n)
    threshold = tl.load(reaching.thresholds + n)
    inverse, weight_norm, weight_residual = row_terms(chunk, n, True)
    n_elements = tl.minimum(n_groups, CAPACITY) * GROUP_WIDTH
    count = 0
    for start in range(0, n_elements, TILE):
        element = start + tl.arange(0, TILE)
        live = element < n_elements
        group = tl.load(reaching.groups + n * CAPACITY + element // GROUP_WIDTH, mask=live, other=0)
        place = element % GROUP_WIDTH
        latent = (place // RUN) * (G * RUN) + group * RUN + place % RUN
        live = live & (latent < L)
        s = tl.load(chunk.products + n * L + latent, mask=live, other=0.0).to(tl.float32)
        pre_act, score, bound = screened(
            s, chunk, latent, live, inverse, weight_norm, weight_residual
        )
        upper = score + bound
        # A NaN does not fall short of T.
        reaches = live & ((upper >= threshold) | (upper != upper))
        position = count + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        kept = reaches & (position < CAPACITY)
        tl.store(found.latents + n * CAPACITY + position, latent, mask=kept)
        tl.store(found.scores + n * CAPACITY + position, upper, mask=kept)
        lower = pre_act if chunk.terms is None else score - bound
        tl.store(found.pre_acts + n * CAPACITY + position, lower, mask=kept)
        count += tl.sum(reaches.to(tl.int32), axis=0)
    tl.store(found.counts + n, tl.minimum(count, CAPACITY))
    missed = (n_groups > CAPACITY) | (count > CAPACITY) | (count < k)
    tl.store(flags_ptr + n, missed.to(tl.int8))


@kernel
def _refine_kernel(
    refined,  # Candidates; `pre_acts` are not written
    found,  # Candidates
    k,
    CAPACITY: tl.constexpr,
):
    """Keep the candidates that reach the k-th largest of what candidates have at least.

    That is more than T, which counts one latent a group.

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CAPACITY)
    live = c < tl.load(found.counts + n)
    latent = tl.load(found.latents + n * CAPACITY + c, mask=live, other=0)
    upper = tl.load(found.scores + n * CAPACITY + c, mask=live, other=0.0)
    lower = tl.load(found.pre_acts + n * CAPACITY + c, mask=live, other=0.0)
    # What has no bound raises nothing.
    bounded = live & (lower == lower)
    key = kth_largest_key(tl.where(bounded, ordered_key(lower), -2147483648), k)
    kept = live & ((ordered_key(upper) >= key) | (upper != upper))
    position = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.store(refined.latents + n * CAPACITY + position, latent, mask=kept)
    tl.store(refined.scores + n * CAPACITY + position, upper, mask=kept)
    tl.store(refined.counts + n, tl.sum(kept.to(tl.int32), axis=0))


def group_count(d_sae: int, k: int) -> int:
    """Number of groups: many more than k, each of at least one run.

    Odd where it can be, so that latents that fire together at a stride of a power of two, as
    copies in a dictionary that was doubled do, are not in one group.
    """
    for_latents = min(triton.cdiv(d_sae, _GROUP_LATENTS), _MAX_GROUPS)
    wanted = triton.next_power_of_2(max(_GROUPS_PER_LATENT * k, for_latents)) - 1
    return min(wanted, triton.cdiv(d_sae, RUN))


def list_capacity(k: int, screen_dtype: ScreenDtype = "auto") -> int:
    """Room for a row's candidates, and for its reaching groups."""
    # In float8, rows had up to 3.6 k candidates on activations of SmolLM2-135M.
    each = 8 if screen_dtype == "float8" else 4
    return triton.next_power_of_2(max(each * k, 64))


def find_candidates(
    screen: Screen, k: int, capacity: int, buffer_bytes: int
) -> tuple[Candidates, torch.Tensor]:
    """Each row's candidates, and `[n_rows]` int8: nonzero where their list cannot be trusted.

    Args:
        screen: what the candidates are of.
        k: number of latents that a row keeps.
        capacity: room for a row's candidates, and for its reaching groups.
        buffer_bytes: bound on the size of the products of one chunk of rows.
    """
    (n_rows, _), d_sae, device = screen.x.shape, screen.weight.shape[0], screen.x.device
    found = Candidates.empty(n_rows, capacity, device)
    flags = torch.empty(n_rows, dtype=torch.int8, device=device)
    n_groups = group_count(d_sae, k)
    group_terms = _group_terms(screen, n_groups)
    for rows, chunk in screen.chunks(buffer_bytes, LAUNCH.MAXIMA_ROWS):
        reaching = _reaching_groups(chunk, group_terms, n_groups, k, capacity)
        _candidates_kernel[(chunk.N,)](
            found=Candidates(*(part[rows] for part in found)),
            flags_ptr=flags[rows],
            reaching=reaching,
            chunk=chunk,
            G=n_groups,
            k=k,
            RUN=RUN,
            GROUP_WIDTH=RUN * triton.cdiv(d_sae, n_groups * RUN),
            CAPACITY=capacity,
            TILE=LAUNCH.CANDIDATE_TILE,
            num_warps=LAUNCH.CANDIDATE_WARPS,
        )
    if screen.exact:
        return found, flags
    refined = Candidates.empty(n_rows, capacity, device)
    _refine_kernel[(n_rows,)](
        refined=refined, found=found, k=k, CAPACITY=capacity, num_warps=list_warps(capacity, device)
    )
    return refined, flags


def list_warps(capacity: int, device: torch.device) -> int:
    """Warps for a program that holds a row's list."""
    return warps(capacity, LAUNCH.LISTED_PER_WARP, device)


def _group_terms(screen: Screen, n_groups: int) -> torch.Tensor | None:
    """`[4, n_groups]`, what bounds the error of a group's maximum."""
    if screen.terms is None:
        return None
    out = torch.empty(4, n_groups, dtype=torch.float32, device=screen.x.device)
    _group_terms_kernel[(triton.cdiv(n_groups * RUN, LAUNCH.TERMS_COLS),)](
        group_terms_ptr=out,
        terms_ptr=screen.terms,
        L=screen.weight.shape[0],
        G=n_groups,
        RUN=RUN,
        COLS=LAUNCH.TERMS_COLS,
        num_warps=LAUNCH.TERMS_WARPS,
    )
    return out


def _reaching_groups(
    chunk: Chunk, group_terms: torch.Tensor | None, n_groups: int, k: int, capacity: int
) -> ReachingGroups:
    n_rows, device = chunk.N, chunk.products.device
    maxima = torch.empty(n_rows, n_groups, dtype=torch.float32, device=device)
    cols, rows = LAUNCH.MAXIMA_COLS, LAUNCH.MAXIMA_ROWS
    _group_maxima_kernel[(triton.cdiv(n_groups * RUN, cols), triton.cdiv(n_rows, rows))](
        maxima_ptr=maxima,
        chunk=chunk,
        G=n_groups,
        RUN=RUN,
        COLS=cols,
        ROWS=rows,
        num_warps=LAUNCH.MAXIMA_WARPS,
    )
    reaching = ReachingGroups(
        groups=torch.empty(n_rows, capacity, dtype=torch.int32, device=device),
        counts=torch.empty(n_rows, dtype=torch.int32, device=device),
        thresholds=torch.empty(n_rows, dtype=torch.float32, device=device),
    )
    block_g = triton.next_power_of_2(n_groups)
    _reaching_groups_kernel[(n_rows,)](
        reaching=reaching,
        maxima_ptr=maxima,
        group_terms_ptr=group_terms,
        chunk=chunk,
        G=n_groups,
        k=k,
        CAPACITY=capacity,
        BLOCK_G=block_g,
        num_warps=warps(block_g, LAUNCH.GROUPS_PER_WARP, device),
    )
    return reaching
