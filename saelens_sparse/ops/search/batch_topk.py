"""Search for the largest scores of a batch, without a full-precision `[n_rows, d_sae]` tensor.

Rows come in chunks. The limit that the largest scores exceed is not known before the last chunk.
What is known is a lower bound of the limit that only rises: the n-th largest score of the rows so
far. A score that does not exceed it can be dropped at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.measured import MAX_CPU_CANDIDATES
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.chunks import pre_act_chunks
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.rows.operations import gather_dot
from saelens_sparse.ops.screen import cpu as screen_cpu
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.update.weight_cache import WeightCopy

# On a CPU a screen is of use once the limit is near what it becomes: one row in so many, the first
# ones, is computed in full.
_FIRST_ROWS = 16
# Elements that are compared at a time where they do not have to fit into a CPU's cache.
_COMPARED_ELEMENTS = 2**24


@torch.no_grad()
def search_batch_topk(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    count: int,
    backend: Backend,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
    screen_dtype: ScreenDtype = "auto",
) -> FoundPairs:
    """Find the `count` largest positive `(x @ weight.T + bias) * norms` of all rows together.

    The pre-activations, which do not have the norms, have the precision that the caller asks for:
    float32 for float32 inputs, the autocast dtype under autocast. Of scores that tie at the limit
    the first are taken, in the order of rows and then of latents. A NaN counts as larger than any
    number, as in `torch.topk`.

    Args:
        x: `[n_rows, d_in]`, centred encoder inputs.
        weight: `[d_sae, d_in]`, one contiguous encoder vector per latent.
        bias: `[d_sae]`.
        norms: `[d_sae]` decoder norms that scale the scores, or None.
        count: number of pairs to keep, `0 <= count <= n_rows * d_sae`.
        backend: `"triton"` screens with a low-precision product and recomputes the candidates;
            so does `"torch"` on a CPU that is faster at it, and else computes row chunks in full.
        buffer_bytes: bound on the size of the `[rows, d_sae]` buffer of one chunk of rows.
        rounded: a copy of `weight` in the dtype of the screen, which is then not made; or None.
        screen_dtype: "float8" lets the kernels screen in float8, which may miss a few.

    Returns:
        Pairs whose scores are positive, fewer than `count` if there are no more. Pairs of a row
        ascend by latent. The kernels' list has `count` places, of which those beyond the last row
        stay empty.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [n_rows, {weight.shape[1]}]; got {list(x.shape)}")
    if not 0 <= count <= x.shape[0] * weight.shape[0]:
        raise ValueError(
            f"count must be between 0 and {x.shape[0]} rows x {weight.shape[0]} latents; "
            f"got {count}"
        )
    arguments = (x, weight, bias, norms, count, buffer_bytes)
    if backend == "triton":
        from saelens_sparse.ops.search import mark_kernels

        if count > 0 and mark_kernels.can_screen(x):
            return _search_by_kernels(*arguments, rounded, screen_dtype)
    elif screen_cpu.can_screen(x, weight):
        largest = _find_by_cpu_screen(*arguments)
        if largest is not None:
            return FoundPairs(largest.pairs(x.shape[0]))
    return FoundPairs(_find_in_full(*arguments))


@dataclass(frozen=True)
class AllCandidates:
    """That a list had room for all candidates, and that these reach far enough down.

    Attributes:
        found: `[2]` int64, number of candidates, and whether they reach far enough down.
        capacity: number of candidates that there was room for.
    """

    found: HostCopy
    capacity: int

    def passed(self) -> bool:
        n_candidates, is_reached = self.found.values().tolist()
        return n_candidates <= self.capacity and bool(is_reached)

    def renewed(self) -> AllCandidates:
        return AllCandidates(self.found.renewed(), self.capacity)


def _search_by_kernels(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    count: int,
    buffer_bytes: int,
    rounded: WeightCopy | None,
    screen_dtype: ScreenDtype,
    *,
    is_certain: bool = False,
) -> FoundPairs:
    from saelens_sparse.ops.search import batch_topk_kernels

    arguments = (x, weight, bias, norms, count, buffer_bytes)
    pairs, found, capacity = batch_topk_kernels.find_largest(
        *arguments, rounded, screen_dtype, is_certain=is_certain
    )

    def find_again() -> FoundPairs:
        if is_certain:
            return FoundPairs(_find_in_full(*arguments))
        return _search_by_kernels(*arguments, rounded, screen_dtype, is_certain=True).complete()

    return FoundPairs(pairs, AllCandidates(HostCopy(found), capacity), find_again)


def _find_in_full(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    count: int,
    buffer_bytes: int,
) -> ActivePairs:
    largest = _Largest(count)
    _add_in_full(largest, x, weight, bias, norms, buffer_bytes)
    return largest.pairs(x.shape[0])


class _Largest:
    """The `count` largest positive scores of what was added, which comes in the order of pairs.

    Attributes:
        limit: what the scores of others must exceed, or be NaN, to be among them.
    """

    def __init__(self, count: int) -> None:
        self.limit = 0.0
        self._count = count
        self._parts: list[tuple[torch.Tensor, ...]] = []
        self._n_pairs = 0

    def add(
        self,
        rows: torch.Tensor,
        latents: torch.Tensor,
        pre_acts: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """Add pairs, `[n_pairs]` each, that come after those added before."""
        self._parts.append((rows, latents, pre_acts, _keys_of(scores)))
        self._n_pairs += rows.numel()
        if self._n_pairs > 2 * self._count:
            self._drop_others()

    def pairs(self, n_rows: int) -> ActivePairs:
        """Them, of a batch of so many rows."""
        self._drop_others()
        ((rows, latents, pre_acts, _),) = self._parts
        in_rows = Rows.of_ascending(rows, n_rows)
        return ActivePairs(latents, latents.to(torch.int32), pre_acts, in_rows)

    def _drop_others(self) -> None:
        parts = [torch.cat(part) for part in zip(*self._parts, strict=True)]
        keys = parts[-1]
        if keys.numel() > self._count:
            kept = keep_largest(keys, self._count)
            parts = [part[kept] for part in parts]
            if self._count > 0:
                self.limit = float(_scores_of(parts[-1].amin()))
        else:
            parts = [part[keys > 0] for part in parts]
        self._parts, self._n_pairs = [tuple(parts)], parts[0].numel()


def keep_largest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest of integers, as far as they are positive; of those that tie, at
    the first.

    Args:
        keys: `[n]` integer, n >= count.
        count: how many.
    """
    if count == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    least = keys.topk(count, sorted=False).values.amin()
    above = keys > least
    ties = (keys == least) & (keys > 0)
    return above | (ties & (ties.cumsum(0) <= count - above.sum()))


def _keys_of(scores: torch.Tensor) -> torch.Tensor:
    """Integers that order as the scores do where these are positive, and else are zero; the largest
    is that of a NaN.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    dtype = torch.int32 if scores.dtype == torch.float32 else torch.int64
    keys = torch.where(scores > 0, scores, 0.0).view(dtype)
    return keys.masked_fill_(scores.isnan(), torch.iinfo(dtype).max)


def _scores_of(keys: torch.Tensor) -> torch.Tensor:
    """What `_keys_of` has made positive keys of; infinity for NaN."""
    dtype = torch.float32 if keys.dtype == torch.int32 else torch.float64
    return keys.view(dtype).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _add_in_full(
    largest: _Largest,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    buffer_bytes: int,
) -> None:
    d_sae = weight.shape[0]
    for start, chunk in pre_act_chunks(x, weight, bias, buffer_bytes):
        n_compared = _COMPARED_ELEMENTS
        if chunk.device.type == "cpu":
            n_compared = screen_cpu.SCORE_BYTES // chunk.element_size()
        first = start
        for pre_acts in chunk.split(max(1, n_compared // d_sae)):
            scores = pre_acts if norms is None else pre_acts * norms
            rows, latents = _exceeding(scores, largest.limit)
            places = (rows, latents)
            largest.add(rows + first, latents, pre_acts[places], scores[places])
            first += pre_acts.shape[0]


def _exceeding(scores: torch.Tensor, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and latents of scores `[rows, d_sae]` above a limit or NaN."""
    rows, latents = scores.le(limit).logical_not_().nonzero().unbind(1)
    return rows, latents


def _find_by_cpu_screen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    count: int,
    buffer_bytes: int,
) -> _Largest | None:
    """The largest, computing only those pairs in full that could be among them.

    None if these are so many that the product of all is faster.
    """
    n_rows, d_sae = x.shape[0], weight.shape[0]
    n_first = max(1, n_rows // _FIRST_ROWS)
    largest = _Largest(count)
    _add_in_full(largest, x[:n_first], weight, bias, norms, buffer_bytes)
    if n_first == n_rows:
        return largest
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    n_waiting = n_found = 0

    def recompute() -> None:
        rows, latents = (torch.cat(part) for part in zip(*waiting, strict=True))
        waiting.clear()
        in_rows = Rows.of_ascending(rows, n_rows)
        pre_acts = gather_dot(x, latents, in_rows, weight, "torch").add_(bias[latents])
        scores = pre_acts if norms is None else pre_acts * norms[latents]
        largest.add(rows, latents, pre_acts, scores)

    for start, bounds in screen_cpu.upper_bounds(x[n_first:], weight, bias, norms, buffer_bytes):
        first = n_first + start
        rows, latents = _exceeding(bounds, largest.limit)
        waiting.append((rows + first, latents))
        n_waiting += rows.numel()
        n_found += rows.numel()
        if n_found > MAX_CPU_CANDIDATES * n_rows * d_sae:
            return None
        if n_waiting >= count:
            recompute()
            n_waiting = 0
    if waiting:
        recompute()
    return largest
