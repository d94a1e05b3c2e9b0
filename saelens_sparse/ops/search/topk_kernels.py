"""Triton top-k selection: screen in low precision, keep a superset, recompute, select exactly.

1. A low-precision GEMM fills a `[rows, d_sae]` buffer (`screen_triton.py`).
2. One read of the buffer gives each group of latents its largest score. The k-th largest of
   these, or any number just below it, is a lower bound T of the row's k-th largest.
3. Groups that reach T are read again and their latents that reach T become candidates.
4. Candidates are recomputed in float32, and the top k of them selected.

In float32 each screened score carries a proven bound on its error, and "reaches T" means that
score plus bound does, where T is the k-th largest of score minus bound: first of groups, then of
the candidates themselves, which leaves fewer. So a true top-k latent is always a candidate. Where
the screen is the computation itself, step 4 recomputes nothing.

A row is flagged, to be computed in full by the caller, when its candidates outgrow their list
or a recomputed score exceeds its bound.

A group is made of runs of RUN neighbours, one from each slab of n_groups * RUN latents: latent l
belongs to group (l / RUN) mod n_groups. Groups of neighbours alone would make T useless where
active latents lie side by side, as in a dictionary that was sorted or has grown; single latents
would make the read of a group's members slow.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.screen.float16_product import has_float32_sums
from saelens_sparse.ops.screen.gpu import (
    MAX_D_IN,
    ROUNDING,
    SUBNORMAL,
    Screen,
    row_terms,
    score_of,
    screened,
    warps,
)
from saelens_sparse.ops.update.weight_cache import WeightCopy

# Rows up to this width are held in one program's registers.
MAX_KEEP_COLUMNS = 32768
# Lists up to this length, of k up to 8,192, likewise.
MAX_LISTED = 32768

# 16 bytes of the buffer: what one thread reads at once.
RUN = 8
# Groups per selected latent: enough that few of the top k share a group, which is what makes
# T close to the k-th largest score.
_GROUPS_PER_LATENT = 16


@dataclass(frozen=True)
class SelectLaunch:
    """Tile sizes of the selection kernels, chosen at 2304 -> 65,536, k 64, batch 4096 (H200)."""

    MAXIMA_COLS: int = 256
    MAXIMA_ROWS: int = 8
    MAXIMA_WARPS: int = 4
    CANDIDATE_TILE: int = 512
    RESCORE_CANDIDATES: int = 16
    RESCORE_COLS: int = 256


LAUNCH = SelectLaunch()
KEEP_PER_WARP = 2048


@triton.jit
def _ordered_key(x):
    """int32 that orders as the float32 x does; NaN above everything."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, 0x7FFFFFFF)


@triton.jit
def _kth_largest_key(keys, k):
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
def _topk(keys, k):
    """True at the k largest int32 keys; of those that tie, at the first."""
    kth = _kth_largest_key(keys, k)
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
    screen_ptr,  # [N, L]
    x_error_ptr,  # see row_terms, as the next
    x_stride,
    terms_ptr,  # see score_of
    N,
    L,
    G,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    RUN: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Largest score of every group, infinite if one is NaN; one read of the buffer."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < N
    rows = rows.to(tl.int64)
    row = row_terms(x_error_ptr, x_stride, rows[:, None], row_mask[:, None], 0.0, EXACT)
    maxima = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    for slab in range(0, L, G * RUN):
        latent = (slab + cols)[None, :]
        live = latent < L
        mask = row_mask[:, None] & live
        s = tl.load(screen_ptr + rows[:, None] * L + latent, mask=mask, other=0.0)
        _, score = score_of(s.to(tl.float32), latent, live, row[0], terms_ptr, L, EXACT, HAS_NORMS)
        maxima = tl.maximum(maxima, score, propagate_nan=tl.PropagateNan.ALL)
    maxima = tl.where(maxima == maxima, maxima, float("inf"))
    GROUPS: tl.constexpr = COLS // RUN
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    out = rows[:, None] * G + groups[None, :]
    maxima = tl.max(tl.reshape(maxima, (ROWS, GROUPS, RUN)), axis=2)
    tl.store(maxima_ptr + out, maxima, mask=row_mask[:, None] & (groups < G)[None, :])


@kernel
def _group_terms_kernel(
    group_terms_ptr,  # [4, G]: inverse scale, magnitude of the bias, norm, residual
    terms_ptr,  # [5, L], see score_of
    L,
    G,
    RUN: tl.constexpr,
    COLS: tl.constexpr,
):
    """The largest of the latents' terms in every group, infinite if one is NaN."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    GROUPS: tl.constexpr = COLS // RUN
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    for term in tl.static_range(4):
        largest = tl.zeros((COLS,), tl.float32)
        for slab in range(0, L, G * RUN):
            latent = slab + cols
            value = tl.load(terms_ptr + term * L + latent, mask=latent < L, other=0.0)
            largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
        # A NaN would not be seen by what follows; its bound is infinite.
        largest = tl.where(largest == largest, largest, float("inf"))
        largest = tl.max(tl.reshape(largest, (GROUPS, RUN)), axis=1)
        tl.store(group_terms_ptr + term * G + groups, largest, mask=groups < G)


@kernel
def _reaching_groups_kernel(
    groups_ptr,  # [N, CAPACITY] int32
    n_groups_ptr,  # [N] int32
    thresholds_ptr,  # [N]
    maxima_ptr,  # [N, G]
    group_terms_ptr,  # [4, G], unused if EXACT
    x_error_ptr,  # this and the next two: see row_terms
    x_stride,
    accumulation,
    G,
    k,
    EXACT: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """T, a lower bound of the k-th largest true maximum; the groups that may reach it.

    A group's true maximum is within d + c p of its screened one, m. Here d is the largest of the
    group's bounds less what depends on the product, and p a bound on the products: |m| plus the
    largest |bias|, or |x'| |w'| where that is less, so that a latent which its bias switches off
    does not loosen the bound of its group. |bias| is at most |m| + |x'| |w'| in turn. Both ends of
    a latent's interval grow with its screened score, so that m's interval holds for the group.
    """
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    mask = group < G
    maximum = tl.load(maxima_ptr + n * G + group, mask=mask, other=float("-inf"))
    lower = maximum
    upper = maximum
    if not EXACT:
        inverse, weight_norm, weight_residual = row_terms(
            x_error_ptr, x_stride, n, True, accumulation, EXACT
        )
        terms = group_terms_ptr + group
        bound = SUBNORMAL * inverse * tl.load(terms, mask=mask, other=0.0)
        bias = tl.load(terms + G, mask=mask, other=0.0)
        norm = tl.load(terms + 2 * G, mask=mask, other=0.0)
        residual = tl.load(terms + 3 * G, mask=mask, other=0.0)
        bound += weight_norm * norm + weight_residual * residual
        magnitude = tl.abs(maximum)
        largest = 1.002 * weight_residual * (norm + residual)
        product = tl.minimum(magnitude + bias, largest, propagate_nan=tl.PropagateNan.ALL)
        bias = tl.minimum(bias, magnitude + largest, propagate_nan=tl.PropagateNan.ALL)
        # Besides the product's rounding those of three additions in float32, here and there.
        bound += ROUNDING * product + 6e-7 * bias + 3e-7 * magnitude
        lower = maximum - bound
        upper = maximum + bound
        # What has no bound may be anything: its group reaches T, and does not raise it.
        lower = tl.where(lower == lower, lower, float("-inf"))
        upper = tl.where(mask & (upper != upper), float("inf"), upper)
    key = _kth_largest_key(tl.where(mask, _ordered_key(lower), -2147483648), k)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    threshold = bits.to(tl.float32, bitcast=True)
    reaches = mask & (upper >= threshold)
    position = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + n * CAPACITY + position, group, mask=reaches & (position < CAPACITY))
    tl.store(n_groups_ptr + n, tl.sum(reaches.to(tl.int32), axis=0))
    tl.store(thresholds_ptr + n, threshold)


@kernel
def _candidates_kernel(
    latents_ptr,  # [N, C] int32
    pre_acts_ptr,  # [N, C]; unless EXACT score - bound: the least that a recomputation may give
    scores_ptr,  # [N, C], score + bound: the most
    counts_ptr,  # [N] int32
    flags_ptr,  # [N] int8
    groups_ptr,  # [N, CAPACITY]
    n_groups_ptr,  # [N]
    thresholds_ptr,  # [N]
    screen_ptr,  # [N, L]
    x_error_ptr,  # this and the next three: see row_terms and screened
    x_stride,
    terms_ptr,
    accumulation,
    L,
    G,
    k,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    RUN: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
):
    """The latents of the reaching groups that reach T themselves, in a fixed order."""
    n = tl.program_id(0).to(tl.int64)
    n_groups = tl.load(n_groups_ptr + n)
    threshold = tl.load(thresholds_ptr + n)
    inverse, weight_norm, weight_residual = row_terms(
        x_error_ptr, x_stride, n, True, accumulation, EXACT
    )
    n_elements = tl.minimum(n_groups, CAPACITY) * GROUP_WIDTH
    count = 0
    for start in range(0, n_elements, TILE):
        element = start + tl.arange(0, TILE)
        live = element < n_elements
        group = tl.load(groups_ptr + n * CAPACITY + element // GROUP_WIDTH, mask=live, other=0)
        place = element % GROUP_WIDTH
        latent = (place // RUN) * (G * RUN) + group * RUN + place % RUN
        live = live & (latent < L)
        s = tl.load(screen_ptr + n * L + latent, mask=live, other=0.0).to(tl.float32)
        pre_act, score, bound = screened(
            s, latent, live, inverse, weight_norm, weight_residual, terms_ptr, L, EXACT, HAS_NORMS,
        )  # fmt: skip
        upper = score + bound
        # A NaN does not fall short of T.
        reaches = live & ((upper >= threshold) | (upper != upper))
        position = count + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        kept = reaches & (position < C)
        tl.store(latents_ptr + n * C + position, latent, mask=kept)
        tl.store(scores_ptr + n * C + position, upper, mask=kept)
        # A place that the recomputation fills is put to use before.
        lower = pre_act if EXACT else score - bound
        tl.store(pre_acts_ptr + n * C + position, lower, mask=kept)
        count += tl.sum(reaches.to(tl.int32), axis=0)
    tl.store(counts_ptr + n, tl.minimum(count, C))
    missed = (n_groups > CAPACITY) | (count > C) | (count < k)
    tl.store(flags_ptr + n, missed.to(tl.int8))


@kernel
def _refine_kernel(
    latents_ptr,  # [N, C]
    scores_ptr,  # [N, C], the most that a recomputation may give
    pre_acts_ptr,  # [N, C], the least
    counts_ptr,  # [N]
    k,
    C: tl.constexpr,
):
    """Keep the candidates that reach the k-th largest of what candidates have at least.

    That is more than T, which counts one latent a group.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    live = c < tl.load(counts_ptr + n)
    latent = tl.load(latents_ptr + n * C + c, mask=live, other=0)
    upper = tl.load(scores_ptr + n * C + c, mask=live, other=0.0)
    lower = tl.load(pre_acts_ptr + n * C + c, mask=live, other=0.0)
    # What has no bound raises nothing.
    bounded = live & (lower == lower)
    key = _kth_largest_key(tl.where(bounded, _ordered_key(lower), -2147483648), k)
    kept = live & ((_ordered_key(upper) >= key) | (upper != upper))
    position = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    tl.debug_barrier()  # all has been read
    tl.store(latents_ptr + n * C + position, latent, mask=kept)
    tl.store(scores_ptr + n * C + position, upper, mask=kept)
    tl.store(counts_ptr + n, tl.sum(kept.to(tl.int32), axis=0))


@kernel
def _rescore_kernel(
    pre_acts_ptr,  # [N, C]
    scores_ptr,  # [N, C], upper bounds in, scores out
    flags_ptr,  # [N]
    latents_ptr,  # [N, C]
    counts_ptr,  # [N]
    x_ptr,  # [N, D]
    weight_ptr,  # [L, D]
    bias_ptr,  # [L]
    norms_ptr,  # [L]
    D,
    HAS_NORMS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pre_acts[n, c] = <x[n], weight[latents[n, c]]> + bias in float32"""
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + n)
    for first in range(tl.program_id(1) * BLOCK_C, count, tl.num_programs(1) * BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        live = c < count
        latent = tl.load(latents_ptr + n * C + c, mask=live, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + n * D + cols, mask=cols < D, other=0.0)
            w = tl.load(
                weight_ptr + latent[:, None] * D + cols[None, :],
                mask=live[:, None] & (cols < D)[None, :],
                other=0.0,
            )
            acc += w * x[None, :]
        pre_act = tl.sum(acc, axis=1) + tl.load(bias_ptr + latent, mask=live, other=0.0)
        score = pre_act
        if HAS_NORMS:
            score = pre_act * tl.load(norms_ptr + latent, mask=live, other=0.0)
        upper = tl.load(scores_ptr + n * C + c, mask=live, other=0.0)
        tl.store(pre_acts_ptr + n * C + c, pre_act, mask=live)
        tl.store(scores_ptr + n * C + c, score, mask=live)
        if tl.sum((live & (score > upper)).to(tl.int32), axis=0) > 0:
            tl.store(flags_ptr + n, 1)


@kernel
def _select_kernel(
    out_latents_ptr,  # [N, k] int64
    out_pre_acts_ptr,  # [N, k]
    out_keys_ptr,  # [N, k] int32
    latents_ptr,  # [N, C]
    pre_acts_ptr,  # [N, C]
    scores_ptr,  # [N, C]
    counts_ptr,  # [N]
    L,
    k,
    C: tl.constexpr,
):
    """The k candidates with the largest scores; of those that tie, the first."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, C)
    live = c < tl.load(counts_ptr + n)
    score = tl.load(scores_ptr + n * C + c, mask=live, other=0.0)
    kept = _topk(tl.where(live, _ordered_key(score), -2147483648), k)
    position = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    latent = tl.load(latents_ptr + n * C + c, mask=live, other=0)
    pre_act = tl.load(pre_acts_ptr + n * C + c, mask=live, other=0.0)
    out = n * k + position
    tl.store(out_latents_ptr + out, latent.to(tl.int64), mask=kept)
    tl.store(out_keys_ptr + out, tl.where(score <= 0.0, L, latent), mask=kept)
    tl.store(out_pre_acts_ptr + out, pre_act.to(out_pre_acts_ptr.dtype.element_ty), mask=kept)


@kernel
def _topk_values_kernel(
    values_ptr,  # [N, M]
    kept_ptr,  # [N, M] int8
    products_ptr,  # [N, M]
    bias_ptr,  # [n]
    norms_ptr,  # [n] or unused
    n_columns,
    M,
    k,
    HAS_NORMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """products + bias at the k largest (products + bias) * norms of a row, zero elsewhere"""
    n = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    live = m < n_columns
    bias = tl.load(bias_ptr + m, mask=live, other=0.0)
    pre_act = tl.load(products_ptr + n * M + m, mask=live, other=0.0).to(tl.float32) + bias
    score = pre_act
    if HAS_NORMS:
        score = pre_act * tl.load(norms_ptr + m, mask=live, other=0.0)
    kept = live & _topk(tl.where(live, _ordered_key(score), -2147483648), k)
    values = tl.where(kept, pre_act, 0.0).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + n * M + m, values, mask=m < M)
    tl.store(kept_ptr + n * M + m, kept.to(tl.int8), mask=m < M)


def can_screen(x: torch.Tensor, weight: torch.Tensor, k: int) -> bool:
    """Whether there are rows, of a width and with lists that one program can hold, latents enough
    per selected one for groups to be of use, and products that bounds hold for.
    """
    d_sae, d_in = weight.shape
    fits = d_in <= MAX_D_IN and list_capacity(k) <= MAX_LISTED
    return x.shape[0] > 0 and fits and d_sae >= 4 * k * RUN and has_float32_sums(x)


def group_count(d_sae: int, k: int) -> int:
    """Number of groups: many more than k, each of at least one run.

    Odd where it can be, so that latents that fire together at a stride of a power of two, as
    copies in a dictionary that was doubled do, are not in one group.
    """
    wanted = triton.next_power_of_2(_GROUPS_PER_LATENT * k) - 1
    return min(wanted, triton.cdiv(d_sae, RUN))


def list_capacity(k: int) -> int:
    """Room for a row's candidates, and for its reaching groups."""
    return triton.next_power_of_2(max(4 * k, 64))


@on_device_of_arguments
def select_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
) -> tuple[ActivePairs, torch.Tensor]:
    """The pairs, and `[n_rows]` bool: the rows that it cannot vouch for.

    Arguments as `search_topk`'s; `can_screen` must hold.
    """
    device, n_rows, d_sae = x.device, x.shape[0], weight.shape[0]
    x, weight = x.contiguous(), weight.contiguous()
    screen = Screen.of(x, weight, bias, norms, rounded)
    capacity = list_capacity(k)
    list_warps = warps(capacity, 256, device)
    found = _Candidates(
        latents=torch.empty(n_rows, capacity, dtype=torch.int32, device=device),
        pre_acts=torch.empty(n_rows, capacity, dtype=torch.float32, device=device),
        scores=torch.empty(n_rows, capacity, dtype=torch.float32, device=device),
        counts=torch.empty(n_rows, dtype=torch.int32, device=device),
        flags=torch.empty(n_rows, dtype=torch.int8, device=device),
        group_terms=_group_terms(screen, group_count(d_sae, k)),
    )
    for rows, products in screen.chunks(buffer_bytes, LAUNCH.MAXIMA_ROWS):
        _find_candidates(found, screen, rows, products, k)
    if not screen.exact:
        _refine_kernel[(n_rows,)](
            found.latents, found.scores, found.pre_acts, found.counts, k, C=capacity,
            num_warps=list_warps,
        )  # fmt: skip
        block_c = LAUNCH.RESCORE_CANDIDATES
        # As many programs a row as have work on most rows, which have some 1.3 k candidates.
        _rescore_kernel[(n_rows, triton.cdiv(4 * k, 3 * block_c))](
            found.pre_acts, found.scores, found.flags, found.latents, found.counts, x, weight,
            screen.bias, screen.bias if norms is None else screen.norms, x.shape[1],
            HAS_NORMS=norms is not None, C=capacity, BLOCK_C=block_c,
            BLOCK_D=LAUNCH.RESCORE_COLS, num_warps=4,
        )  # fmt: skip
    pairs = ActivePairs(
        latents=torch.empty(n_rows * k, dtype=torch.int64, device=device),
        keys=torch.empty(n_rows * k, dtype=torch.int32, device=device),
        pre_acts=torch.empty(n_rows * k, dtype=screen.pre_acts_dtype, device=device),
        rows=Rows.regular(n_rows, k),
    )
    _select_kernel[(n_rows,)](
        pairs.latents, pairs.pre_acts, pairs.keys, found.latents, found.pre_acts, found.scores,
        found.counts, d_sae, k, C=capacity, num_warps=list_warps,
    )  # fmt: skip
    return pairs, found.flags.view(torch.bool)


@on_device_of_arguments
def topk_values(
    products: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `search.topk.topk_values`, for at most MAX_KEEP_COLUMNS columns."""
    products = products.contiguous()
    n_rows, width = products.shape
    values = torch.empty_like(products)
    kept = torch.empty(n_rows, width, dtype=torch.int8, device=products.device)
    bias = bias.float().contiguous()
    norms32 = bias if norms is None else norms.float().contiguous()
    if n_rows > 0:
        block = triton.next_power_of_2(width)
        _topk_values_kernel[(n_rows,)](
            values, kept, products, bias, norms32, bias.numel(), width, k,
            HAS_NORMS=norms is not None, BLOCK_M=block,
            num_warps=warps(block, KEEP_PER_WARP, products.device),
        )  # fmt: skip
    return values, kept.view(torch.bool)


@dataclass(frozen=True)
class _Candidates:
    """Each row's list of candidates, in the first `counts` of C places."""

    latents: torch.Tensor  # [n_rows, C] int32
    pre_acts: torch.Tensor  # [n_rows, C]
    scores: torch.Tensor  # [n_rows, C]
    counts: torch.Tensor  # [n_rows] int32
    flags: torch.Tensor  # [n_rows] int8, nonzero where the list cannot be trusted
    group_terms: torch.Tensor  # [4, n_groups], what bounds the error of a group's maximum


def _group_terms(screen: Screen, n_groups: int) -> torch.Tensor:
    out = torch.empty(4, n_groups, dtype=torch.float32, device=screen.x.device)
    if not screen.exact:
        _group_terms_kernel[(triton.cdiv(n_groups * RUN, 128),)](
            out, screen.terms, screen.weight.shape[0], n_groups, RUN=RUN, COLS=128, num_warps=4
        )
    return out


def _find_candidates(
    found: _Candidates, screen: Screen, rows: slice, products: torch.Tensor, k: int
) -> None:
    n_rows, d_sae = products.shape
    device, capacity = products.device, found.latents.shape[1]
    n_groups = found.group_terms.shape[1]
    maxima = torch.empty(n_rows, n_groups, dtype=torch.float32, device=device)
    arguments = screen.arguments(rows)
    x_error, x_stride, terms, accumulation = arguments
    grid = (
        triton.cdiv(n_groups * RUN, LAUNCH.MAXIMA_COLS),
        triton.cdiv(n_rows, LAUNCH.MAXIMA_ROWS),
    )
    _group_maxima_kernel[grid](
        maxima, products, x_error, x_stride, terms, n_rows, d_sae, n_groups, **screen.modes,
        RUN=RUN, COLS=LAUNCH.MAXIMA_COLS, ROWS=LAUNCH.MAXIMA_ROWS, num_warps=LAUNCH.MAXIMA_WARPS,
    )  # fmt: skip
    reaching = torch.empty(n_rows, capacity, dtype=torch.int32, device=device)
    n_reaching = torch.empty(n_rows, dtype=torch.int32, device=device)
    thresholds = torch.empty(n_rows, dtype=torch.float32, device=device)
    block_g = triton.next_power_of_2(n_groups)
    _reaching_groups_kernel[(n_rows,)](
        reaching, n_reaching, thresholds, maxima, found.group_terms, x_error, x_stride,
        accumulation, n_groups, k, EXACT=screen.exact, CAPACITY=capacity, BLOCK_G=block_g,
        num_warps=warps(block_g, 512, device),
    )  # fmt: skip
    _candidates_kernel[(n_rows,)](
        found.latents[rows], found.pre_acts[rows], found.scores[rows], found.counts[rows],
        found.flags[rows], reaching, n_reaching, thresholds, products, *arguments, d_sae,
        n_groups, k, **screen.modes, RUN=RUN, GROUP_WIDTH=RUN * triton.cdiv(d_sae, n_groups * RUN),
        CAPACITY=capacity, C=capacity, TILE=LAUNCH.CANDIDATE_TILE, num_warps=4,
    )  # fmt: skip
