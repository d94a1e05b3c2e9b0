"""A screen's scores and bounds, as its kernels see them."""

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel
from saelens_sparse.ops.screen.gpu import Chunk, row_terms, screened


@kernel
def _screened_kernel(
    scores_ptr,  # [N, L]
    bounds_ptr,  # [N, L]
    chunk,  # Chunk
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = latent < chunk.L
    place = n * chunk.L + latent
    row = row_terms(chunk, n, True)
    s = tl.load(chunk.products + place, mask=live, other=0.0).to(tl.float32)
    _, score, bound = screened(s, chunk, latent, live, row[0], row[1], row[2])
    tl.store(scores_ptr + place, score, mask=live)
    tl.store(bounds_ptr + place, bound, mask=live)


def screened_scores(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and bounds, `[rows, d_sae]` float32."""
    scores = torch.empty(chunk.N, chunk.L, device=chunk.products.device)
    bounds = torch.empty_like(scores)
    _screened_kernel[(chunk.N, triton.cdiv(chunk.L, 256))](
        scores_ptr=scores, bounds_ptr=bounds, chunk=chunk, BLOCK=256, num_warps=4
    )
    return scores, bounds
