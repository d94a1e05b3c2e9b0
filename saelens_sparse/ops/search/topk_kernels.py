"""Triton top-k selection: screen in low precision, keep a superset, recompute, select exactly.

1. A low-precision GEMM fills a `[rows, d_sae]` buffer (`screen/gpu.py`).
2. The latents that may be among a row's top k become its candidates (`candidate_kernels.py`).
3. Candidates are recomputed in float32, and the top k of them selected. Where the screen is the
   computation itself, nothing is recomputed.

A row is flagged, to be computed in full by the caller, when its candidates outgrow their list
or a recomputed score exceeds its bound.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments, warps
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.screen.float16_product import has_float32_sums
from saelens_sparse.ops.screen.gpu import MAX_D_IN, Screen
from saelens_sparse.ops.search.candidate_kernels import (
    RUN,
    Candidates,
    find_candidates,
    keep_topk,
    list_capacity,
    list_warps,
    ordered_key,
)
from saelens_sparse.ops.update.weight_cache import WeightCopy

# Rows up to this width are held in one program's registers.
MAX_KEEP_COLUMNS = 32768
# Lists up to this length, of k up to 8,192, likewise.
MAX_LISTED = 32768


@dataclass(frozen=True)
class SelectLaunch:
    """Tiles of the kernels that select, chosen with float32 weights at batch 4096: for rescoring at
    768 -> 24,576, k 32, at 2304 -> 65,536 and 4096 -> 131,072, k 64 (H100).
    """

    RESCORE_CANDIDATES: int = 16
    RESCORE_COLS: int = 64
    RESCORE_WARPS: int = 2
    KEEP_PER_WARP: int = 2048


LAUNCH = SelectLaunch()


@kernel
def _rescore_kernel(
    candidates,  # Candidates: upper bounds in, pre-activations and scores out
    flags_ptr,  # [N], or None where bounds are not proven
    x_ptr,  # [N, D]
    weight_ptr,  # [L, D]
    bias_ptr,  # [L]
    norms_ptr,  # [L] or None
    D,
    CAPACITY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """pre_acts[n, c] = <x[n], weight[latents[n, c]]> + bias in float32

    Grid: programs that share the candidates of a row, BLOCK_C at a time, [N, any].
    """
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(candidates.counts + n)
    for first in range(tl.program_id(1) * BLOCK_C, count, tl.num_programs(1) * BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        live = c < count
        latent = tl.load(candidates.latents + n * CAPACITY + c, mask=live, other=0).to(tl.int64)
        acc = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + n * D + cols, mask=cols < D, other=0.0).to(tl.float32)
            w = tl.load(
                weight_ptr + latent[:, None] * D + cols[None, :],
                mask=live[:, None] & (cols < D)[None, :],
                other=0.0,
            ).to(tl.float32)
            acc += w * x[None, :]
        pre_act = tl.sum(acc, axis=1) + tl.load(bias_ptr + latent, mask=live, other=0.0)
        score = pre_act
        if norms_ptr is not None:
            score = pre_act * tl.load(norms_ptr + latent, mask=live, other=0.0)
        upper = tl.load(candidates.scores + n * CAPACITY + c, mask=live, other=0.0)
        tl.store(candidates.pre_acts + n * CAPACITY + c, pre_act, mask=live)
        tl.store(candidates.scores + n * CAPACITY + c, score, mask=live)
        if flags_ptr is not None:  # noqa: SIM102  known when compiled
            if tl.sum((live & (score > upper)).to(tl.int32), axis=0) > 0:
                tl.store(flags_ptr + n, 1)


@kernel
def _select_kernel(
    out_latents_ptr,  # [N, k] int64
    out_pre_acts_ptr,  # [N, k]
    out_keys_ptr,  # [N, k] int32
    candidates,  # Candidates
    L,
    k,
    CAPACITY: tl.constexpr,
):
    """The k candidates with the largest scores; of those that tie, the first.

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CAPACITY)
    live = c < tl.load(candidates.counts + n)
    score = tl.load(candidates.scores + n * CAPACITY + c, mask=live, other=0.0)
    kept = keep_topk(tl.where(live, ordered_key(score), -2147483648), k)
    position = tl.cumsum(kept.to(tl.int32), axis=0) - 1
    latent = tl.load(candidates.latents + n * CAPACITY + c, mask=live, other=0)
    pre_act = tl.load(candidates.pre_acts + n * CAPACITY + c, mask=live, other=0.0)
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
    norms_ptr,  # [n] or None
    n_columns,
    M,
    k,
    BLOCK_M: tl.constexpr,
):
    """products + bias at the k largest (products + bias) * norms of a row, zero elsewhere

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    live = m < n_columns
    bias = tl.load(bias_ptr + m, mask=live, other=0.0)
    pre_act = tl.load(products_ptr + n * M + m, mask=live, other=0.0).to(tl.float32) + bias
    score = pre_act
    if norms_ptr is not None:
        score = pre_act * tl.load(norms_ptr + m, mask=live, other=0.0)
    kept = live & keep_topk(tl.where(live, ordered_key(score), -2147483648), k)
    values = tl.where(kept, pre_act, 0.0).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + n * M + m, values, mask=m < M)
    tl.store(kept_ptr + n * M + m, kept.to(tl.int8), mask=m < M)


def can_screen(
    x: torch.Tensor, weight: torch.Tensor, k: int, screen_dtype: ScreenDtype = "auto"
) -> bool:
    """Whether there are rows, of a width and with lists that one program can hold, latents enough
    per selected one for groups to be of use, and products that bounds hold for.
    """
    d_sae, d_in = weight.shape
    fits = d_in <= MAX_D_IN and list_capacity(k, screen_dtype) <= MAX_LISTED
    return x.shape[0] > 0 and fits and d_sae >= 4 * k * RUN and has_float32_sums(x)


@on_device_of_arguments
def select_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
    screen_dtype: ScreenDtype = "auto",
) -> tuple[ActivePairs, torch.Tensor]:
    """The pairs, and `[n_rows]` bool: the rows that it cannot vouch for.

    Arguments as `search_topk`'s; `can_screen` must hold.
    """
    device, n_rows, d_sae = x.device, x.shape[0], weight.shape[0]
    x = x.contiguous()
    screen = Screen.of(
        x,
        weight,
        bias,
        tile=LAUNCH.RESCORE_COLS,
        norms=norms,
        rounded=rounded,
        screen_dtype=screen_dtype,
    )
    capacity = list_capacity(k, screen_dtype)
    candidates, flags = find_candidates(screen, k, capacity, buffer_bytes)
    if not screen.exact:
        _rescore(candidates, flags if screen.is_proven else None, screen, x, weight, k)
    pairs = ActivePairs(
        latents=torch.empty(n_rows * k, dtype=torch.int64, device=device),
        keys=torch.empty(n_rows * k, dtype=torch.int32, device=device),
        pre_acts=torch.empty(n_rows * k, dtype=screen.pre_acts_dtype, device=device),
        rows=Rows.regular(n_rows, k),
    )
    _select_kernel[(n_rows,)](
        out_latents_ptr=pairs.latents,
        out_pre_acts_ptr=pairs.pre_acts,
        out_keys_ptr=pairs.keys,
        candidates=candidates,
        L=d_sae,
        k=k,
        CAPACITY=capacity,
        num_warps=list_warps(capacity, device),
    )
    return pairs, flags.view(torch.bool)


def _rescore(
    candidates: Candidates,
    flags: torch.Tensor | None,
    screen: Screen,
    x: torch.Tensor,
    weight: torch.Tensor,
    k: int,
) -> None:
    """Compute candidates in float32; flag rows on which one exceeds its bound, if it is proven."""
    # Enough that each has one tile on most rows, which have some 1.3 k candidates, or 1.6 k if
    # they were screened in float8.
    n_programs = triton.cdiv(2 * k, LAUNCH.RESCORE_CANDIDATES)
    _rescore_kernel[(x.shape[0], n_programs)](
        candidates=candidates,
        flags_ptr=flags,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=screen.bias,
        norms_ptr=screen.norms,
        D=x.shape[1],
        CAPACITY=candidates.latents.shape[1],
        BLOCK_C=LAUNCH.RESCORE_CANDIDATES,
        BLOCK_D=LAUNCH.RESCORE_COLS,
        num_warps=LAUNCH.RESCORE_WARPS,
    )


@on_device_of_arguments
def topk_values(
    products: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `search.topk.topk_values`, for at most MAX_KEEP_COLUMNS columns."""
    products = products.contiguous()
    n_rows, width = products.shape
    values = torch.empty_like(products)
    kept = torch.empty(n_rows, width, dtype=torch.int8, device=products.device)
    if n_rows > 0:
        block = triton.next_power_of_2(width)
        _topk_values_kernel[(n_rows,)](
            values_ptr=values,
            kept_ptr=kept,
            products_ptr=products,
            bias_ptr=bias.float().contiguous(),
            norms_ptr=None if norms is None else norms.float().contiguous(),
            n_columns=bias.numel(),
            M=width,
            k=k,
            BLOCK_M=block,
            num_warps=warps(block, LAUNCH.KEEP_PER_WARP, products.device),
        )
    return values, kept.view(torch.bool)
