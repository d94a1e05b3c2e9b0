"""Selection of each row's top k latents, without a full-precision `[n_rows, d_sae]` tensor."""

from dataclasses import dataclass

import torch

from saelens_sparse.implementation import Backend


@dataclass(frozen=True)
class Selection:
    """The top k latents of each row, in no particular order.

    Attributes:
        latents: `[n_rows, k]` int64.
        pre_acts: `[n_rows, k]`, their pre-activations `x @ W_enc + b_enc`, before any scaling
            by decoder norms; in the dtype that the dense encoder would give.
        scores: `[n_rows, k]`, what was compared: the pre-activations times `norms`.
        rows_recomputed: 0-dim int64 tensor, the number of rows for which the screen could not
            vouch for the selection and that were computed again in full precision.
    """

    latents: torch.Tensor
    pre_acts: torch.Tensor
    scores: torch.Tensor
    rows_recomputed: torch.Tensor


@torch.no_grad()
def select_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    backend: Backend,
    buffer_bytes: int,
) -> Selection:
    """Each row's k latents with the largest `(x @ weight.T + bias) * norms`.

    The pre-activations have the precision that the caller asks for: float32 for float32
    inputs, the autocast dtype under autocast. Ties are broken arbitrarily. A NaN counts as
    larger than any number, as in `torch.topk`.

    Args:
        x: `[n_rows, d_in]`, centred encoder inputs.
        weight: `[d_sae, d_in]`, one contiguous encoder vector per latent.
        bias: `[d_sae]`.
        norms: `[d_sae]` decoder norms that scale the scores, or None.
        k: number of latents to keep, `1 <= k <= d_sae`.
        backend: `"triton"` screens with a low-precision product and recomputes the candidates;
            `"torch"` computes row chunks in full.
        buffer_bytes: bound on the size of the `[rows, d_sae]` buffer of one chunk of rows.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [n_rows, {weight.shape[1]}]; got {list(x.shape)}")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be between 1 and d_sae={weight.shape[0]}; got {k}")
    if backend == "triton":
        from saelens_sparse.ops import select_triton

        if select_triton.can_screen(x, weight, k):
            selection, uncertain = select_triton.select_topk(
                x, weight, bias, norms, k, buffer_bytes
            )
            return _recompute(selection, uncertain, x, weight, bias, norms, buffer_bytes)
    return _exact_topk(x, weight, bias, norms, k, buffer_bytes)


@torch.no_grad()
def topk_mask(scores: torch.Tensor, k: int, backend: Backend) -> torch.Tensor:
    """True at each row's k largest scores, exactly k per row; `[n_rows, n]` bool."""
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be between 1 and {scores.shape[1]}; got {k}")
    if backend == "triton":
        from saelens_sparse.ops import select_triton

        if scores.shape[1] <= select_triton.MAX_MASK_COLUMNS:
            return select_triton.topk_mask(scores, k)
    kept = scores.topk(k, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)


def _exact_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    buffer_bytes: int,
) -> Selection:
    # The dense encoder's own expression, so that autocast acts on it as it does in stock.
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    row_bytes = weight.shape[0] * torch.promote_types(x.dtype, torch.float32).itemsize
    step = max(1, buffer_bytes // row_bytes)
    for start in range(0, max(1, x.shape[0]), step):
        pre_acts = x[start : start + step] @ weight.T + bias
        scores = pre_acts if norms is None else pre_acts * norms
        top_scores, latents = scores.topk(k, dim=-1, sorted=False)
        parts.append((latents, pre_acts.gather(1, latents), top_scores))
    latents, pre_acts, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Selection(latents, pre_acts, scores, torch.zeros((), dtype=torch.int64, device=x.device))


def _recompute(
    selection: Selection,
    uncertain: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    buffer_bytes: int,
) -> Selection:
    rows = uncertain.nonzero().squeeze(1)
    if rows.numel() > 0:
        k = selection.latents.shape[1]
        exact = _exact_topk(x[rows], weight, bias, norms, k, buffer_bytes)
        selection.latents[rows] = exact.latents
        selection.pre_acts[rows] = exact.pre_acts.to(selection.pre_acts.dtype)
        selection.scores[rows] = exact.scores.to(selection.scores.dtype)
    return Selection(
        selection.latents, selection.pre_acts, selection.scores, uncertain.sum(dtype=torch.int64)
    )
