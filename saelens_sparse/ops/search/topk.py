"""Search for each row's top k latents, without a full-precision `[n_rows, d_sae]` tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saelens_sparse.measured import MAX_UNCERTAIN_ROWS
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.chunks import pre_act_chunks
from saelens_sparse.ops.common.host_copy import HostCount
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.rows.operations import gather_dot
from saelens_sparse.ops.screen import cpu as screen_cpu
from saelens_sparse.ops.search.found import FoundPairs, NoneUncertain
from saelens_sparse.ops.update.weight_cache import WeightCopy


@torch.no_grad()
def search_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    backend: Backend,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
    screen_dtype: ScreenDtype = "auto",
) -> FoundPairs:
    """Find each row's k latents with the largest `(x @ weight.T + bias) * norms`.

    The pre-activations, which do not have the norms, have the precision that the caller asks for:
    float32 for float32 inputs, the autocast dtype under autocast. Ties are broken arbitrarily. A
    NaN counts as larger than any number, as in `torch.topk`. A pair whose score a ReLU clips takes
    part in no sum.

    Args:
        x: `[n_rows, d_in]`, centred encoder inputs.
        weight: `[d_sae, d_in]`, one contiguous encoder vector per latent.
        bias: `[d_sae]`.
        norms: `[d_sae]` decoder norms that scale the scores, or None.
        k: number of latents to keep, `1 <= k <= d_sae`.
        backend: `"triton"` screens with a low-precision product and recomputes the candidates;
            so does `"torch"` on a CPU that is faster at it, and else computes row chunks in full.
        buffer_bytes: bound on the size of the `[rows, d_sae]` buffer of one chunk of rows.
        rounded: a copy of `weight` in the dtype of the screen, which is then not made; or None.
        screen_dtype: "float8" lets the kernels screen in float8, which may miss a few.

    Returns:
        k pairs a row, in no particular order. They are wrong on rows for which a screen could not
        vouch, until `complete` computes those in full.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [n_rows, {weight.shape[1]}]; got {list(x.shape)}")
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k must be between 1 and d_sae={weight.shape[0]}; got {k}")

    def in_full(rows: torch.Tensor) -> ActivePairs:
        return _topk_in_full(x[rows], weight, bias, norms, k, buffer_bytes)

    if backend == "triton":
        from saelens_sparse.ops.search import topk_kernels

        if topk_kernels.can_screen(x, weight, k, screen_dtype):
            pairs, uncertain = topk_kernels.select_topk(
                x, weight, bias, norms, k, buffer_bytes, rounded, screen_dtype
            )
            check = NoneUncertain(HostCount(uncertain))
            return FoundPairs(pairs, check, lambda: FoundPairs(_mend(pairs, uncertain, in_full)))
    elif screen_cpu.can_screen(x, weight) and _n_candidates(x, k) <= weight.shape[0] // 4:
        screened = _topk_by_cpu_screen(x, weight, bias, norms, k, buffer_bytes)
        if screened is not None:
            # Where the host computes, there is no wait that other work could hide.
            return FoundPairs(_mend(*screened, in_full))
    return FoundPairs(_topk_in_full(x, weight, bias, norms, k, buffer_bytes))


@torch.no_grad()
def topk_values(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`products + bias` at each row's k largest `(products + bias) * norms`, zero elsewhere.

    Args:
        products: `[n_rows, width]`; columns beyond the length of `bias` are padding, never kept.
        bias: `[n]`, n <= width.
        norms: `[n]` or None.
        k: number of columns to keep, `1 <= k <= n`.
        backend: `"triton"` or `"torch"`.

    Returns:
        The values, in the dtype of `products`, and which were kept (bool, exactly k a row);
        both `[n_rows, width]`.
    """
    n, width = bias.numel(), products.shape[1]
    if not 1 <= k <= n <= width:
        raise ValueError(f"need 1 <= k <= len(bias) <= width; got k={k}, {n} and {width}")
    if backend == "triton":
        from saelens_sparse.ops.search import topk_kernels

        if n <= topk_kernels.MAX_KEEP_COLUMNS:
            return topk_kernels.topk_values(products, bias, norms, k)
    pre_acts = products[:, :n] + bias
    scores = pre_acts if norms is None else pre_acts * norms
    kept = torch.zeros_like(products, dtype=torch.bool)
    kept.scatter_(1, scores.topk(k, sorted=False).indices, True)
    values = torch.zeros_like(products)
    values[:, :n] = torch.where(kept[:, :n], pre_acts, 0.0)
    return values, kept


def _mend(
    pairs: ActivePairs, uncertain: torch.Tensor, in_full: Callable[[torch.Tensor], ActivePairs]
) -> ActivePairs:
    """The pairs with those of uncertain rows, `[n_rows]` bool, found in full."""
    uncertain_rows = uncertain.nonzero().squeeze(1)
    if uncertain_rows.numel() == 0:
        return pairs
    exact, rows = in_full(uncertain_rows), pairs.rows
    assert rows.k is not None
    parts: dict[str, torch.Tensor] = {}
    for name in ("latents", "pre_acts", "keys"):
        part: torch.Tensor = getattr(pairs, name).view(rows.n_rows, rows.k)
        new: torch.Tensor = getattr(exact, name).view(-1, rows.k)
        parts[name] = part.index_copy(0, uncertain_rows, new.to(part.dtype)).view(-1)
    return ActivePairs(**parts, rows=rows, rows_recomputed=uncertain_rows.numel())


def _n_candidates(x: torch.Tensor, k: int) -> int:
    """How many candidates of a row to find on a CPU.

    The bound grows with the root of d_in, measured against the spread of the scores. Twice k
    leaves a row in fifty uncertain at 512 -> 16,384, k 32, three times k a row in a thousand at
    2304 -> 16,384, k 64.
    """
    return k * (2 + x.shape[1] // 1024) + 32


def _topk_by_cpu_screen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    buffer_bytes: int,
) -> tuple[ActivePairs, torch.Tensor] | None:
    """The pairs, and which rows the screen cannot vouch for, `[n_rows]` bool.

    None if these are so many among the first rows that screening the others would save nothing.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start, bounds in screen_cpu.upper_bounds(x, weight, bias, norms, buffer_bytes):
        largest, candidates = bounds.topk(_n_candidates(x, k), dim=-1, sorted=False)
        found.append((candidates, largest.amin(1)))
        if start == 0 and bounds.shape[0] < x.shape[0]:
            first = x[: bounds.shape[0]]
            _, uncertain = _topk_of_candidates(first, weight, bias, norms, k, *found[0])
            if uncertain.double().mean() > MAX_UNCERTAIN_ROWS:
                return None
    candidates, beyond = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _topk_of_candidates(x, weight, bias, norms, k, candidates, beyond)


def _topk_of_candidates(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    candidates: torch.Tensor,
    beyond: torch.Tensor,
) -> tuple[ActivePairs, torch.Tensor]:
    """The pairs among candidates, `[n_rows, n]`, and on which rows others could be higher.

    `beyond`, `[n_rows]`, is what the scores of the others do not exceed.
    """
    rows = Rows.regular(*candidates.shape)
    products = gather_dot(x, candidates.flatten(), rows, weight, "torch")
    pre_acts = products.view_as(candidates).add_(bias[candidates])
    scores = pre_acts if norms is None else pre_acts * norms[candidates]
    scores, places = scores.topk(k, dim=-1, sorted=False)
    latents = candidates.gather(1, places)
    pairs = _pairs_of(latents, pre_acts.gather(1, places), scores, weight.shape[0])
    return pairs, scores.amin(1).ge(beyond).logical_not_()  # also where either is NaN


def _topk_in_full(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    buffer_bytes: int,
) -> ActivePairs:
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    d_sae, buffer = weight.shape[0], None
    for _, chunk in pre_act_chunks(x, weight, bias, buffer_bytes):
        rows = max(1, chunk.shape[0])
        if chunk.device.type == "cpu":
            rows = max(1, screen_cpu.SCORE_BYTES // (d_sae * chunk.element_size()))
        for pre_acts in chunk.split(rows):
            scores = pre_acts
            if norms is not None:
                if buffer is None:  # fresh memory for each part would cost more than the product
                    buffer = torch.empty_like(pre_acts, dtype=torch.result_type(pre_acts, norms))
                scores = torch.mul(pre_acts, norms, out=buffer[: pre_acts.shape[0]])
            top_scores, latents = scores.topk(k, dim=-1, sorted=False)
            parts.append((latents, pre_acts.gather(1, latents), top_scores))
    latents, pre_acts, scores = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return _pairs_of(latents, pre_acts, scores, d_sae)


def _pairs_of(
    latents: torch.Tensor, pre_acts: torch.Tensor, scores: torch.Tensor, d_sae: int
) -> ActivePairs:
    """Pairs from what lies by row, `[n_rows, k]`."""
    keys = torch.where(scores <= 0, d_sae, latents).to(torch.int32)
    rows = Rows.regular(*latents.shape)
    return ActivePairs(latents.flatten(), keys.flatten(), pre_acts.flatten(), rows)
