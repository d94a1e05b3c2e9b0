"""Triton kernels of the row operations; `row_ops.py` says what they compute."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.latent_order import LatentOrder


@dataclass(frozen=True)
class GatherSumLaunch:
    """Tile of `gather_sum`: BLOCK_K gathered rows of BLOCK_D columns are in flight at once."""

    BLOCK_K: int = 8
    BLOCK_D: int = 512
    num_warps: int = 2


@dataclass(frozen=True)
class GatherDotLaunch:
    """Tile of `gather_dot`: BLOCK_K dot products, BLOCK_D columns at a time."""

    BLOCK_K: int = 16
    BLOCK_D: int = 256
    num_warps: int = 4


@dataclass(frozen=True)
class SegmentSumLaunch:
    """Tile of `segment_sum`, and the length at which a segment is split.

    A latent that fires on every row would be one serial loop; SPLIT pairs at most are summed
    by one program, longer segments through partial sums in a fixed order.
    """

    BLOCK_P: int = 2
    BLOCK_D: int = 512
    SPLIT: int = 128
    num_warps: int = 1


GATHER_SUM = GatherSumLaunch()
GATHER_DOT = GatherDotLaunch()
SEGMENT_SUM = SegmentSumLaunch()


@triton.jit
def _gather_sum_kernel(
    out_ptr,  # [N, D]
    coefficients_ptr,  # [N, K]
    latents_ptr,  # [N, K]
    weight_ptr,  # [L, D]
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[n, :] = sum_i coefficients[n, i] * weight[latents[n, i], :]"""
    n = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        coefficient = tl.load(coefficients_ptr + n * K + i, mask=i < K, other=0.0).to(tl.float32)
        # Rows with a zero coefficient (clipped by the ReLU) are not read.
        used = (i < K) & (coefficient != 0.0)
        latent = tl.load(latents_ptr + n * K + i, mask=used, other=0).to(tl.int64)
        tile = tl.load(
            weight_ptr + latent[:, None] * D + cols[None, :],
            mask=used[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += tl.sum(tile * coefficient[:, None], axis=0)
    tl.store(out_ptr + n * D + cols, acc.to(out_ptr.dtype.element_ty), mask=col_mask)


@triton.jit
def _gather_dot_kernel(
    out_ptr,  # [N, K]
    batch_ptr,  # [N, D]
    latents_ptr,  # [N, K]
    weight_ptr,  # [L, D]
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[n, i] = <batch[n, :], weight[latents[n, i], :]>"""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    latent = tl.load(latents_ptr + n * K + i, mask=i < K, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_mask = cols < D
        x = tl.load(batch_ptr + n * D + cols, mask=col_mask, other=0.0).to(tl.float32)
        tile = tl.load(
            weight_ptr + latent[:, None] * D + cols[None, :],
            mask=(i < K)[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += tile * x[None, :]
    tl.store(out_ptr + n * K + i, tl.sum(acc, axis=1), mask=i < K)


@triton.jit
def _sum_pairs(
    pairs_ptr,
    coefficients_ptr,
    batch_ptr,
    first,
    n_pairs,
    cols,
    col_mask,
    K,
    D,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of coefficient * batch row over n_pairs sorted pairs, and of the coefficients."""
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    totals = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for start in range(0, n_pairs, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        used = p < n_pairs
        pair = tl.load(pairs_ptr + first + p, mask=used, other=0)
        coefficient = tl.load(coefficients_ptr + pair, mask=used, other=0.0).to(tl.float32)
        row = pair // K
        tile = tl.load(
            batch_ptr + row[:, None] * D + cols[None, :],
            mask=used[:, None] & col_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += tl.sum(tile * coefficient[:, None], axis=0)
        totals += coefficient
    return acc, tl.sum(totals, axis=0)


@triton.jit
def _partial_sums_kernel(
    partials_ptr,  # [S, D]
    partial_totals_ptr,  # [S]
    chunk_latents_ptr,  # [S], L beyond the last chunk
    first_chunks_ptr,  # [L]
    offsets_ptr,  # [L + 1]
    pairs_ptr,  # [P]
    coefficients_ptr,  # [P]
    batch_ptr,  # [N, D]
    L,
    K,
    D,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum over one chunk of at most SPLIT pairs of a long segment."""
    s = tl.program_id(0).to(tl.int64)
    latent = tl.load(chunk_latents_ptr + s)
    if latent < L:
        chunk = s - tl.load(first_chunks_ptr + latent)
        first = tl.load(offsets_ptr + latent) + chunk * SPLIT
        n_pairs = tl.minimum(tl.load(offsets_ptr + latent + 1) - first, SPLIT)
        cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        col_mask = cols < D
        acc, total = _sum_pairs(
            pairs_ptr, coefficients_ptr, batch_ptr, first, n_pairs, cols, col_mask, K, D,
            BLOCK_P, BLOCK_D,
        )  # fmt: skip
        tl.store(partials_ptr + s * D + cols, acc, mask=col_mask)
        if tl.program_id(1) == 0:
            tl.store(partial_totals_ptr + s, total)


@triton.jit
def _segment_sum_kernel(
    out_ptr,  # [L, D]
    totals_ptr,  # [L]
    partials_ptr,  # [S, D]
    partial_totals_ptr,  # [S]
    first_chunks_ptr,  # [L]
    offsets_ptr,  # [L + 1]
    pairs_ptr,  # [P]
    coefficients_ptr,  # [P]
    batch_ptr,  # [N, D]
    K,
    D,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[j, :] = sum over the pairs p of segment j of coefficients[p] * batch[p // K, :]"""
    j = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + j)
    n_pairs = tl.load(offsets_ptr + j + 1) - first
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    col_mask = cols < D
    if n_pairs <= SPLIT:
        acc, total = _sum_pairs(
            pairs_ptr, coefficients_ptr, batch_ptr, first, n_pairs, cols, col_mask, K, D,
            BLOCK_P, BLOCK_D,
        )  # fmt: skip
    else:
        acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        total = 0.0
        first_chunk = tl.load(first_chunks_ptr + j)
        for chunk in range(0, (n_pairs + SPLIT - 1) // SPLIT):
            s = first_chunk + chunk
            acc += tl.load(partials_ptr + s * D + cols, mask=col_mask, other=0.0)
            total += tl.load(partial_totals_ptr + s)
    tl.store(out_ptr + j * D + cols, acc.to(out_ptr.dtype.element_ty), mask=col_mask)
    if tl.program_id(1) == 0:
        tl.store(totals_ptr + j, total.to(totals_ptr.dtype.element_ty))


@triton.jit
def _probe_kernel(out_ptr):
    tl.store(out_ptr, 1)


def gather_sum(
    coefficients: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    n_rows, k = latents.shape
    d = weight.shape[1]
    out = torch.empty(n_rows, d, dtype=weight.dtype, device=weight.device)
    launch = GATHER_SUM
    if out.numel() > 0:
        _gather_sum_kernel[(n_rows, triton.cdiv(d, launch.BLOCK_D))](
            out, coefficients.contiguous(), latents.contiguous(), weight.contiguous(), k, d,
            BLOCK_K=launch.BLOCK_K, BLOCK_D=launch.BLOCK_D, num_warps=launch.num_warps,
        )  # fmt: skip
    return out


def gather_dot(batch: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    n_rows, k = latents.shape
    d = weight.shape[1]
    out = torch.empty(n_rows, k, dtype=torch.float32, device=weight.device)
    launch = GATHER_DOT
    if out.numel() > 0:
        _gather_dot_kernel[(n_rows, triton.cdiv(k, launch.BLOCK_K))](
            out, batch.contiguous(), latents.contiguous(), weight.contiguous(), k, d,
            BLOCK_K=launch.BLOCK_K, BLOCK_D=launch.BLOCK_D, num_warps=launch.num_warps,
        )  # fmt: skip
    return out


def segment_sum(
    order: LatentOrder, coefficients: torch.Tensor, batch: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    d, d_sae, launch = batch.shape[1], order.d_sae, SEGMENT_SUM
    out = torch.empty(d_sae, d, dtype=dtype, device=batch.device)
    totals = torch.empty(d_sae, dtype=dtype, device=batch.device)
    coefficients, batch = coefficients.contiguous(), batch.contiguous()

    first_chunks, chunk_latents = _plan_chunks(order, launch.SPLIT)
    n_chunks = chunk_latents.numel()
    partials = torch.empty(n_chunks, d, dtype=torch.float32, device=batch.device)
    partial_totals = torch.empty(n_chunks, dtype=torch.float32, device=batch.device)
    tiles = triton.cdiv(d, launch.BLOCK_D)
    tile = {"BLOCK_P": launch.BLOCK_P, "BLOCK_D": launch.BLOCK_D, "num_warps": launch.num_warps}
    if n_chunks > 0:
        _partial_sums_kernel[(n_chunks, tiles)](
            partials, partial_totals, chunk_latents, first_chunks, order.offsets, order.pairs,
            coefficients, batch, d_sae, order.k, d, SPLIT=launch.SPLIT, **tile,
        )  # fmt: skip
    _segment_sum_kernel[(d_sae, tiles)](
        out, totals, partials, partial_totals, first_chunks, order.offsets, order.pairs,
        coefficients, batch, order.k, d, SPLIT=launch.SPLIT, **tile,
    )  # fmt: skip
    return out, totals


def _plan_chunks(order: LatentOrder, split: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the partial sums of long segments lie.

    Returns:
        The first chunk of each latent, `[d_sae]`, and the latent of each chunk, `[n_chunks]`
        (d_sae for chunks that are not needed). Their number is the most that this many pairs
        can need, so that the host need not know how many there are.
    """
    counts = order.counts()
    chunks = torch.where(counts > split, (counts + split - 1) // split, 0)
    ends = chunks.cumsum(0)
    most = 2 * order.pairs.numel() // (split + 1)
    numbers = torch.arange(most, device=ends.device)
    return ends - chunks, torch.searchsorted(ends, numbers, right=True)


def launch_probe(device: torch.device) -> None:
    """Compile and run a kernel; raises whatever keeps Triton from doing so."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    _probe_kernel[(1,)](out)
    if out.item() != 1:
        raise RuntimeError("a test kernel did not write its output")
