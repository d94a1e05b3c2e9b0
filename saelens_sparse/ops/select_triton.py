"""Triton top-k selection: screen in low precision, keep a superset, recompute, select exactly.

1. A low-precision GEMM fills a `[rows, d_sae]` buffer, a chunk of rows at a time.
2. One read of the buffer gives each group of neighbouring latents its largest score. The k-th
   largest of these, or any number just below it, is a lower bound T of the row's k-th largest.
3. Groups that reach T are read again and their latents that reach T become candidates.
4. Candidates are recomputed in float32, and the top k of them selected.

For float32 the buffer is float16, of operands scaled by powers of two to norms of 64 to 128, so
that no product overflows. Each screened score carries a proven bound on its error (below), and
"reaches T" means that score plus bound does, where T is the k-th largest of score minus bound. So
a true top-k latent is always a candidate. float16 has an eighth of bfloat16's rounding error: at
2304 -> 65,536, k 64 a row has 100 candidates on average, with bfloat16 153, without a bound 94.
Where the caller computes in bfloat16, the screen is the computation: bounds are zero and step 4
recomputes nothing.

The bound, for latent j of row n, with rounding residuals dx and dw, Cauchy-Schwarz twice:

    |x.w - x'.w'| <= |dx| |w| + |x'| |dw| + accumulation + rounding of the result to float16

A row is flagged, to be computed in full by the caller, when its candidates outgrow their list
or a recomputed score exceeds its bound.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.device import on_device_of_arguments
from saelens_sparse.ops.select import Selection

# Rows up to these widths are held in one program's registers.
MAX_KEEP_COLUMNS = 32768
MAX_ROUND_COLUMNS = 32768
# Beyond this a launch grid would exceed CUDA's limit.
_MAX_CHUNK_ROWS = 2**20

_MIN_GROUP_WIDTH, _MAX_GROUP_WIDTH = 8, 1024
# Groups per selected latent: enough that few of the top k share a group, which is what makes
# T close to the k-th largest score.
_GROUPS_PER_LATENT = 16


@dataclass(frozen=True)
class SelectLaunch:
    """Tile sizes of the selection kernels, chosen at 2304 -> 65,536, k 64, batch 4096 (H200)."""

    BOUND_COLS: int = 1024
    BOUND_ROWS: int = 2
    BOUND_ITERATIONS: int = 16
    CANDIDATE_TILE: int = 1024
    RESCORE_CANDIDATES: int = 8
    RESCORE_COLS: int = 512


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


@triton.jit
def _round_rows_kernel(
    rounded_ptr,  # [R, D] float16
    inverse_scales_ptr,  # [R]
    norms_ptr,  # [R]
    residuals_ptr,  # [R]
    rows_ptr,  # [R, D] float32
    D,
    BLOCK_D: tl.constexpr,
):
    """rounded = fp16(row * 2^e), of norm 64 to 128; |row| and |row - rounded / 2^e|"""
    r = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    x = tl.load(rows_ptr + r * D + cols, mask=cols < D, other=0.0)
    # Squares of tiny or huge rows leave float32's range, so scale by the largest element first.
    exponent = tl.floor(tl.log2(tl.max(tl.abs(x), axis=0)))
    exponent = tl.minimum(tl.maximum(exponent, -100.0), 100.0)
    x = x * tl.exp2(-exponent)
    norm = tl.sqrt(tl.sum(x * x, axis=0))
    shrink = tl.exp2(6.0 - tl.floor(tl.log2(tl.maximum(norm, 1.0))))
    x = x * shrink
    rounded = x.to(tl.float16)
    error = x - rounded.to(tl.float32)
    tl.store(rounded_ptr + r * D + cols, rounded, mask=cols < D)
    inverse = tl.exp2(exponent) / shrink
    tl.store(inverse_scales_ptr + r, inverse)
    tl.store(norms_ptr + r, norm * tl.exp2(exponent))
    tl.store(residuals_ptr + r, tl.sqrt(tl.sum(error * error, axis=0)) * inverse)


@triton.jit
def _score(s, bias, norm):
    return (s + bias) * norm


@triton.jit
def _bound(s, inverse, x_norm, x_residual, w_norm, w_residual, bias, norm, accumulation):
    """Bound on the error of _score(s, bias, norm): this module's docstring has the formula."""
    x_part = 1.001 * x_residual + accumulation * x_norm
    rounding = tl.abs(s) * 4.8828125e-4 + 2.98e-8 * inverse  # 2^-11, and 2^-25 for subnormals
    float32 = 4.0e-7 * (tl.abs(s) + tl.abs(bias))
    w_part = 1.001 * (x_norm + x_residual) * w_residual
    return (x_part * w_norm + w_part + rounding + float32) * norm


@triton.jit
def _group_bounds_kernel(
    lower_ptr,  # [N, G] largest (score - bound) of each group
    upper_ptr,  # [N, G] largest (score + bound) of each group; not written if EXACT
    screen_ptr,  # [N, L]
    bias_ptr,  # [L]
    norms_ptr,  # [L] or unused
    x_inverse_ptr,  # [N], unused if EXACT, as the next five
    x_norms_ptr,  # [N]
    x_residuals_ptr,  # [N]
    w_inverse_ptr,  # [L]
    w_norms_ptr,  # [L]
    w_residuals_ptr,  # [L]
    N,
    L,
    G,
    accumulation,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
    ITERATIONS: tl.constexpr,
):
    """Largest score of every group of GROUP_WIDTH latents; one read of the buffer."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    col_mask = cols < L
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0)[None, :]
    norm = tl.full((1, COLS), 1.0, tl.float32)
    if HAS_NORMS:
        norm = tl.load(norms_ptr + cols, mask=col_mask, other=0.0)[None, :]
    if not EXACT:
        w_inverse = tl.load(w_inverse_ptr + cols, mask=col_mask, other=0.0)[None, :]
        w_norm = tl.load(w_norms_ptr + cols, mask=col_mask, other=0.0)[None, :]
        w_residual = tl.load(w_residuals_ptr + cols, mask=col_mask, other=0.0)[None, :]
    GROUPS: tl.constexpr = COLS // GROUP_WIDTH
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    for iteration in range(ITERATIONS):
        rows = (tl.program_id(1) * ITERATIONS + iteration) * ROWS + tl.arange(0, ROWS)
        row_mask = rows < N
        rows = rows.to(tl.int64)
        mask = row_mask[:, None] & col_mask[None, :]
        s = tl.load(screen_ptr + rows[:, None] * L + cols[None, :], mask=mask, other=0.0)
        s = s.to(tl.float32)
        if EXACT:
            lower = _score(s, bias, norm)
            lower = tl.where(lower == lower, lower, float("inf"))
        else:
            x_inverse = tl.load(x_inverse_ptr + rows, mask=row_mask, other=0.0)[:, None]
            x_norm = tl.load(x_norms_ptr + rows, mask=row_mask, other=0.0)[:, None]
            x_residual = tl.load(x_residuals_ptr + rows, mask=row_mask, other=0.0)[:, None]
            inverse = x_inverse * w_inverse
            s = s * inverse
            score = _score(s, bias, norm)
            bound = _bound(
                s, inverse, x_norm, x_residual, w_norm, w_residual, bias, norm, accumulation
            )
            upper = score + bound
            upper = tl.where(upper == upper, upper, float("inf"))
            upper = tl.where(mask, upper, float("-inf"))
            upper = tl.max(tl.reshape(upper, (ROWS, GROUPS, GROUP_WIDTH)), axis=2)
            # What cannot be screened may be anything: it must not raise T.
            lower = score - bound
            lower = tl.where(lower == lower, lower, float("-inf"))
        lower = tl.where(mask, lower, float("-inf"))
        lower = tl.max(tl.reshape(lower, (ROWS, GROUPS, GROUP_WIDTH)), axis=2)
        out = rows[:, None] * G + groups[None, :]
        out_mask = row_mask[:, None] & (groups < G)[None, :]
        tl.store(lower_ptr + out, lower, mask=out_mask)
        if not EXACT:
            tl.store(upper_ptr + out, upper, mask=out_mask)


@triton.jit
def _reaching_groups_kernel(
    groups_ptr,  # [N, CAPACITY] int32
    n_groups_ptr,  # [N] int32
    thresholds_ptr,  # [N]
    lower_ptr,  # [N, G]
    upper_ptr,  # [N, G]
    G,
    k,
    CAPACITY: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """T, a lower bound of the k-th largest of lower; the groups whose upper reaches it."""
    n = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    mask = group < G
    lower = tl.load(lower_ptr + n * G + group, mask=mask, other=float("-inf"))
    key = _kth_largest_key(tl.where(mask, _ordered_key(lower), -2147483648), k)
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    threshold = bits.to(tl.float32, bitcast=True)
    upper = tl.load(upper_ptr + n * G + group, mask=mask, other=float("-inf"))
    reaches = mask & (upper >= threshold)
    position = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    tl.store(groups_ptr + n * CAPACITY + position, group, mask=reaches & (position < CAPACITY))
    tl.store(n_groups_ptr + n, tl.sum(reaches.to(tl.int32), axis=0))
    tl.store(thresholds_ptr + n, threshold)


@triton.jit
def _candidates_kernel(
    latents_ptr,  # [N, C] int32
    pre_acts_ptr,  # [N, C], written only if EXACT
    scores_ptr,  # [N, C], score + bound: the most that a recomputation may give
    counts_ptr,  # [N] int32
    flags_ptr,  # [N] int8
    groups_ptr,  # [N, CAPACITY]
    n_groups_ptr,  # [N]
    thresholds_ptr,  # [N]
    screen_ptr,  # [N, L]
    bias_ptr,  # [L]
    norms_ptr,  # [L]
    x_inverse_ptr,  # [N]
    x_norms_ptr,  # [N]
    x_residuals_ptr,  # [N]
    w_inverse_ptr,  # [L]
    w_norms_ptr,  # [L]
    w_residuals_ptr,  # [L]
    L,
    k,
    accumulation,
    EXACT: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
):
    """The latents of the reaching groups that reach T themselves, in order."""
    n = tl.program_id(0).to(tl.int64)
    n_groups = tl.load(n_groups_ptr + n)
    threshold = tl.load(thresholds_ptr + n)
    if not EXACT:
        x_inverse = tl.load(x_inverse_ptr + n)
        x_norm = tl.load(x_norms_ptr + n)
        x_residual = tl.load(x_residuals_ptr + n)
    GROUPS: tl.constexpr = TILE // GROUP_WIDTH
    count = 0
    for start in range(0, tl.minimum(n_groups, CAPACITY), GROUPS):
        slot = start + tl.arange(0, TILE) // GROUP_WIDTH
        live = slot < tl.minimum(n_groups, CAPACITY)
        group = tl.load(groups_ptr + n * CAPACITY + slot, mask=live, other=0)
        latent = group * GROUP_WIDTH + tl.arange(0, TILE) % GROUP_WIDTH
        live = live & (latent < L)
        s = tl.load(screen_ptr + n * L + latent, mask=live, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + latent, mask=live, other=0.0)
        norm = tl.full((TILE,), 1.0, tl.float32)
        if HAS_NORMS:
            norm = tl.load(norms_ptr + latent, mask=live, other=0.0)
        if EXACT:
            upper = _score(s, bias, norm)
        else:
            inverse = x_inverse * tl.load(w_inverse_ptr + latent, mask=live, other=0.0)
            w_norm = tl.load(w_norms_ptr + latent, mask=live, other=0.0)
            w_residual = tl.load(w_residuals_ptr + latent, mask=live, other=0.0)
            s = s * inverse
            upper = _score(s, bias, norm) + _bound(
                s, inverse, x_norm, x_residual, w_norm, w_residual, bias, norm, accumulation
            )
        # A NaN does not fall short of T.
        reaches = live & ((upper >= threshold) | (upper != upper))
        position = count + tl.cumsum(reaches.to(tl.int32), axis=0) - 1
        kept = reaches & (position < C)
        tl.store(latents_ptr + n * C + position, latent, mask=kept)
        tl.store(scores_ptr + n * C + position, upper, mask=kept)
        if EXACT:
            tl.store(pre_acts_ptr + n * C + position, s + bias, mask=kept)
        count += tl.sum(reaches.to(tl.int32), axis=0)
    tl.store(counts_ptr + n, tl.minimum(count, C))
    missed = (n_groups > CAPACITY) | (count > C) | (count < k)
    tl.store(flags_ptr + n, missed.to(tl.int8))


@triton.jit
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
    if tl.program_id(1) * BLOCK_C < count:
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
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


@triton.jit
def _select_kernel(
    out_latents_ptr,  # [N, k] int64
    out_pre_acts_ptr,  # [N, k]
    out_scores_ptr,  # [N, k]
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
    tl.store(out_scores_ptr + out, score.to(out_scores_ptr.dtype.element_ty), mask=kept)


@triton.jit
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
    """Whether there are rows, and latents enough per selected one, for groups to be of use."""
    d_sae, d_in = weight.shape
    return x.shape[0] > 0 and d_in <= MAX_ROUND_COLUMNS and d_sae >= 4 * k * _MIN_GROUP_WIDTH


def group_width(d_sae: int, k: int) -> int:
    """Latents per group: a power of two that leaves many more groups than k."""
    width = max(1, d_sae // (_GROUPS_PER_LATENT * k))
    return min(max(1 << (width.bit_length() - 1), _MIN_GROUP_WIDTH), _MAX_GROUP_WIDTH)


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
) -> tuple[Selection, torch.Tensor]:
    """The selection, and `[n_rows]` bool: the rows that it cannot vouch for.

    Arguments as `saelens_sparse.ops.select_topk`'s; `can_screen` must hold.
    """
    device, n_rows, d_sae = x.device, x.shape[0], weight.shape[0]
    compute_dtype = x.dtype
    if torch.is_autocast_enabled(device.type):
        compute_dtype = torch.get_autocast_dtype(device.type)
    exact = compute_dtype != torch.float32
    pre_acts_dtype = torch.promote_types(compute_dtype, bias.dtype)
    scores_dtype = pre_acts_dtype
    if norms is not None:
        scores_dtype = torch.promote_types(pre_acts_dtype, norms.dtype)

    x, weight = x.contiguous(), weight.contiguous()
    bias32 = bias.float().contiguous()
    norms32 = bias32 if norms is None else norms.float().contiguous()
    if exact:
        screen_x, screen_weight = x.to(compute_dtype), weight.to(compute_dtype)
        x_error = w_error = (bias32,) * 3
    else:
        screen_x, *x_error = _round_rows(x)
        screen_weight, *w_error = _round_rows(weight)
    # Tensor cores add sums of at least 8 products one after the other, each time off by at most
    # 2^-22 of the partial sum.
    accumulation = (x.shape[1] / 8 + 16) * 2.0**-22

    width, capacity = group_width(d_sae, k), list_capacity(k)
    latents = torch.empty(n_rows, capacity, dtype=torch.int32, device=device)
    pre_acts = torch.empty(n_rows, capacity, dtype=torch.float32, device=device)
    scores = torch.empty(n_rows, capacity, dtype=torch.float32, device=device)
    counts = torch.empty(n_rows, dtype=torch.int32, device=device)
    flags = torch.empty(n_rows, dtype=torch.int8, device=device)
    step = buffer_bytes // (d_sae * screen_x.element_size())
    step = max(1, min(n_rows, step, _MAX_CHUNK_ROWS))
    screen = torch.empty(step, d_sae, dtype=screen_x.dtype, device=device)
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        chunk = screen[: rows.stop - rows.start]
        with torch.autocast(device.type, enabled=False), _float32_accumulation(device):
            torch.mm(screen_x[rows], screen_weight.T, out=chunk)
        _find_candidates(
            latents[rows], pre_acts[rows], scores[rows], counts[rows], flags[rows], chunk,
            bias32, norms32, [part[rows] for part in x_error] if not exact else x_error, w_error,
            k, width, accumulation, exact=exact, has_norms=norms is not None,
        )  # fmt: skip
    del screen
    if not exact:
        block_c = LAUNCH.RESCORE_CANDIDATES
        _rescore_kernel[(n_rows, triton.cdiv(capacity, block_c))](
            pre_acts, scores, flags, latents, counts, x, weight, bias32, norms32, x.shape[1],
            HAS_NORMS=norms is not None, C=capacity, BLOCK_C=block_c,
            BLOCK_D=LAUNCH.RESCORE_COLS, num_warps=4,
        )  # fmt: skip
    out_latents = torch.empty(n_rows, k, dtype=torch.int64, device=device)
    out_pre_acts = torch.empty(n_rows, k, dtype=pre_acts_dtype, device=device)
    out_scores = torch.empty(n_rows, k, dtype=scores_dtype, device=device)
    out_keys = torch.empty(n_rows, k, dtype=torch.int32, device=device)
    _select_kernel[(n_rows,)](
        out_latents, out_pre_acts, out_scores, out_keys, latents, pre_acts, scores, counts,
        d_sae, k, C=capacity, num_warps=_warps(capacity, per_warp=256),
    )  # fmt: skip
    return Selection(out_latents, out_pre_acts, out_scores, out_keys), flags.view(torch.bool)


@on_device_of_arguments
def topk_values(
    products: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `saelens_sparse.ops.topk_values`, for at most MAX_KEEP_COLUMNS columns."""
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
            num_warps=_warps(block, per_warp=KEEP_PER_WARP),
        )  # fmt: skip
    return values, kept.view(torch.bool)


@contextmanager
def _float32_accumulation(device: torch.device) -> Iterator[None]:
    """Keep cuBLAS from adding partial sums in float16, which the bound does not cover."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    settings = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction, matmul.allow_fp16_accumulation = settings


def _round_rows(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    n_rows, d = rows.shape
    rounded = torch.empty(n_rows, d, dtype=torch.float16, device=rows.device)
    inverse_scales, norms, residuals = torch.empty(
        3, n_rows, dtype=torch.float32, device=rows.device
    )
    block = triton.next_power_of_2(d)
    _round_rows_kernel[(n_rows,)](
        rounded, inverse_scales, norms, residuals, rows, d,
        BLOCK_D=block, num_warps=_warps(block, per_warp=512),
    )  # fmt: skip
    return rounded, inverse_scales, norms, residuals


def _find_candidates(
    latents: torch.Tensor,
    pre_acts: torch.Tensor,
    scores: torch.Tensor,
    counts: torch.Tensor,
    flags: torch.Tensor,
    screen: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor,
    x_error: list[torch.Tensor] | tuple[torch.Tensor, ...],
    w_error: list[torch.Tensor] | tuple[torch.Tensor, ...],
    k: int,
    width: int,
    accumulation: float,
    *,
    exact: bool,
    has_norms: bool,
) -> None:
    n_rows, d_sae = screen.shape
    capacity = latents.shape[1]
    n_groups = triton.cdiv(d_sae, width)
    lower = torch.empty(n_rows, n_groups, dtype=torch.float32, device=screen.device)
    upper = lower if exact else torch.empty_like(lower)
    rows_per_program = LAUNCH.BOUND_ROWS * LAUNCH.BOUND_ITERATIONS
    grid = (triton.cdiv(d_sae, LAUNCH.BOUND_COLS), triton.cdiv(n_rows, rows_per_program))
    modes = {"EXACT": exact, "HAS_NORMS": has_norms, "GROUP_WIDTH": width}
    _group_bounds_kernel[grid](
        lower, upper, screen, bias, norms, *x_error, *w_error, n_rows, d_sae, n_groups,
        accumulation, **modes, COLS=LAUNCH.BOUND_COLS, ROWS=LAUNCH.BOUND_ROWS,
        ITERATIONS=LAUNCH.BOUND_ITERATIONS, num_warps=4,
    )  # fmt: skip
    reaching = torch.empty(n_rows, capacity, dtype=torch.int32, device=screen.device)
    n_reaching = torch.empty(n_rows, dtype=torch.int32, device=screen.device)
    thresholds = torch.empty(n_rows, dtype=torch.float32, device=screen.device)
    block_g = triton.next_power_of_2(n_groups)
    _reaching_groups_kernel[(n_rows,)](
        reaching, n_reaching, thresholds, lower, upper, n_groups, k,
        CAPACITY=capacity, BLOCK_G=block_g, num_warps=_warps(block_g, per_warp=512),
    )  # fmt: skip
    _candidates_kernel[(n_rows,)](
        latents, pre_acts, scores, counts, flags, reaching, n_reaching, thresholds, screen,
        bias, norms, *x_error, *w_error, d_sae, k, accumulation, **modes,
        CAPACITY=capacity, C=capacity, TILE=max(LAUNCH.CANDIDATE_TILE, width), num_warps=4,
    )  # fmt: skip


def _warps(elements: int, per_warp: int) -> int:
    return min(32, max(1, triton.next_power_of_2(triton.cdiv(elements, per_warp))))
