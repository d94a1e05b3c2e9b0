"""Triton search for the pairs that matter to a JumpReLU: screen, mark, list, recompute.

1. A low-precision GEMM fills a `[rows, d_sae]` buffer (`screen/gpu.py`).
2. The latents that may be above the lower edge of their window are listed (`mark_kernels.py`).
3. In float32 they are recomputed; then those truly above the edge get a key, and the active ones
   are counted.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.rows.kernels import GATHER_DOT, gather_dot
from saelens_sparse.ops.screen.gpu import Screen
from saelens_sparse.ops.search import mark_kernels
from saelens_sparse.ops.search.found import threshold_and_edge
from saelens_sparse.ops.update.weight_cache import WeightCopy


@dataclass(frozen=True)
class GateLaunch:
    """Tile of the kernel that decides, chosen at 2304 -> 65,536, batch 4096, with float32 weights,
    on an H200.
    """

    RESOLVE_PAIRS: int = 256
    RESOLVE_WARPS: int = 4


LAUNCH = GateLaunch()


@kernel
def _resolve_kernel(
    keys_ptr,  # [P] int32
    row_counts_ptr,  # [N] int32
    pre_acts_ptr,  # [P]; with a bias, read without it and written with it
    latents_ptr,  # [P]
    offsets_ptr,  # [N + 1]
    gates_ptr,  # [L]
    edges_ptr,  # [L]
    bias_ptr,  # [L] or None
    BLOCK_P: tl.constexpr,
):
    """Keys of the pairs that reach their edge; how many of a row are above their gate.

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets_ptr + n)
    n_pairs = (tl.load(offsets_ptr + n + 1) - first).to(tl.int32)
    active = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for start in range(0, n_pairs, BLOCK_P):
        i = start + tl.arange(0, BLOCK_P)
        live = i < n_pairs
        latent = tl.load(latents_ptr + first + i, mask=live, other=0)
        pre_act = tl.load(pre_acts_ptr + first + i, mask=live, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            pre_act += tl.load(bias_ptr + latent, mask=live, other=0.0)
            tl.store(pre_acts_ptr + first + i, pre_act, mask=live)
        below = pre_act < tl.load(edges_ptr + latent, mask=live, other=0.0)
        # A NaN does not fall short of the edge.
        tl.store(keys_ptr + first + i, latent.to(tl.int32), mask=live & (below == 0))
        above = pre_act > tl.load(gates_ptr + latent, mask=live, other=0.0)
        active += (live & above).to(tl.int32)
    tl.store(row_counts_ptr + n, tl.sum(active, axis=0))


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
    screen_dtype: ScreenDtype = "auto",
) -> tuple[ActivePairs, torch.Tensor]:
    """The pairs, as far as they fit, and `[2]` int64: number of pairs and of active ones.

    Arguments as `search_above_threshold`'s; `can_screen` must hold.
    """
    device, n_rows, d_sae = x.device, x.shape[0], weight.shape[0]
    x = x.contiguous()
    screen = Screen.of(
        x,
        weight,
        bias,
        tile=GATHER_DOT.BLOCK_D,
        rounded=rounded,
        screen_dtype=screen_dtype,
        float8_margins=2,
    )
    gate, edge = threshold_and_edge(threshold, bandwidth, screen.pre_acts_dtype)
    gate, edge = gate.float(), edge.float()

    marked = mark_kernels.MarkedPairs(screen, capacity, screen.pre_acts_dtype)
    for rows, chunk in screen.chunks(buffer_bytes, mark_kernels.LAUNCH.MARK_ROWS):
        marked.add(rows, chunk, mark_kernels.marks_of(chunk, edge))
    latents, pre_acts, rows = marked.latents, marked.pre_acts, marked.rows
    if pre_acts is None:
        pre_acts = gather_dot(x, latents, rows, weight)
    keys = torch.full((capacity,), d_sae, dtype=torch.int32, device=device)
    row_counts = torch.empty(n_rows, dtype=torch.int32, device=device)
    _resolve_kernel[(n_rows,)](
        keys_ptr=keys,
        row_counts_ptr=row_counts,
        pre_acts_ptr=pre_acts,
        latents_ptr=latents,
        offsets_ptr=rows.offsets,
        gates_ptr=gate,
        edges_ptr=edge,
        bias_ptr=None if screen.exact else screen.bias,
        BLOCK_P=LAUNCH.RESOLVE_PAIRS,
        num_warps=LAUNCH.RESOLVE_WARPS,
    )
    pairs = ActivePairs(latents, keys, pre_acts, rows, row_counts)
    return pairs, torch.stack([marked.total, row_counts.sum()])
