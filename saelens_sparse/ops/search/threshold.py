"""Search for the latents above a threshold or near it, without a full-precision `[n_rows, d_sae]`
tensor.
"""

from __future__ import annotations

import torch

from saelens_sparse.measured import MAX_CPU_CANDIDATES
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.chunks import pre_act_chunks
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.rows.operations import gather_dot
from saelens_sparse.ops.screen import cpu as screen_cpu
from saelens_sparse.ops.search.found import EnoughRoom, FoundPairs, threshold_and_edge
from saelens_sparse.ops.update.weight_cache import WeightCopy


@torch.no_grad()
def search_above_threshold(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    capacity: int,
    backend: Backend,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
    screen_dtype: ScreenDtype = "auto",
) -> FoundPairs:
    """Find the latents with `x @ weight.T + bias > threshold - bandwidth / 2`.

    These are the latents above their threshold, united with those inside its straight-through
    window. A few others may be among the pairs, which take part in no sum. Pairs of a row ascend by
    latent.

    Pre-activations have the precision that the caller asks for: float32 for float32 inputs, the
    autocast dtype under autocast. Which latents are found is decided in that precision.

    Args:
        x: `[n_rows, d_in]`, centred encoder inputs.
        weight: `[d_sae, d_in]`, one contiguous encoder vector per latent.
        bias: `[d_sae]`.
        threshold: `[d_sae]`.
        bandwidth: width of the window in which a threshold gets a gradient.
        capacity: number of pairs to make room for; more are no error, but found a second time.
            The PyTorch path finds room by itself.
        backend: `"triton"` screens with a low-precision product and recomputes the candidates;
            so does `"torch"` on a CPU that is faster at it, and else computes row chunks in full.
        buffer_bytes: bound on the size of the `[rows, d_sae]` buffer of one chunk of rows.
        rounded: a copy of `weight` in the dtype of the screen, which is then not made; or None.
        screen_dtype: "float8" lets the kernels screen in float8, which may miss a few.
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [n_rows, {weight.shape[1]}]; got {list(x.shape)}")
    arguments = (x, weight, bias, threshold, bandwidth)
    if backend == "triton":
        from saelens_sparse.ops.search import mark_kernels

        if mark_kernels.can_screen(x):
            return _search_by_kernels(arguments, capacity, buffer_bytes, rounded, screen_dtype)
    pairs = None
    if screen_cpu.can_screen(x, weight):
        pairs = _find_by_cpu_screen(*arguments, buffer_bytes)
    if pairs is None:
        pairs = _find_by_chunks(*arguments, buffer_bytes)
    return _found(*pairs, n_rows=x.shape[0])


def _search_by_kernels(
    arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float],
    capacity: int,
    buffer_bytes: int,
    rounded: WeightCopy | None,
    screen_dtype: ScreenDtype,
) -> FoundPairs:
    from saelens_sparse.ops.search import threshold_kernels

    pairs, totals = threshold_kernels.find_pattern(
        *arguments, capacity, buffer_bytes, rounded, screen_dtype
    )
    found = HostCopy(totals)

    def with_room_for_all() -> FoundPairs:
        n_pairs = int(found.values()[0])
        return _search_by_kernels(
            arguments, n_pairs, buffer_bytes, rounded, screen_dtype
        ).complete()

    return FoundPairs(pairs, EnoughRoom(found, capacity), with_room_for_all, found)


def _find_by_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    buffer_bytes: int,
) -> tuple[torch.Tensor, ...]:
    """Pairs by row: row, latent, pre-activation, whether active; each `[n_pairs]`."""
    parts: list[tuple[torch.Tensor, ...]] = []
    for start, pre_acts in pre_act_chunks(x, weight, bias, buffer_bytes):
        limits, edge = threshold_and_edge(threshold, bandwidth, pre_acts.dtype)
        rows, latents = pre_acts.lt(edge).logical_not_().nonzero().unbind(1)  # NaN is inside
        values = pre_acts[rows, latents]
        parts.append((rows + start, latents, values, values > limits[latents]))
    rows, latents, values, active = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows, latents, values, active


def _find_by_cpu_screen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    buffer_bytes: int,
) -> tuple[torch.Tensor, ...] | None:
    """As `_find_by_chunks`, computing only those pairs in full that could be among them.

    None if these are so many that the product of all is faster.
    """
    limits, edge = threshold_and_edge(threshold, bandwidth, x.dtype)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    n_found = 0
    for start, bounds in screen_cpu.upper_bounds(x, weight, bias, None, buffer_bytes):
        rows, latents = bounds.lt(edge).logical_not_().nonzero().unbind(1)
        n_found += rows.numel()
        if n_found > MAX_CPU_CANDIDATES * (start + bounds.shape[0]) * bounds.shape[1]:
            return None
        parts.append((rows + start, latents))
    rows, latents = (torch.cat(part) for part in zip(*parts, strict=True))
    candidates = Rows.of_ascending(rows, x.shape[0])
    values = gather_dot(x, latents, candidates, weight, "torch").add_(bias[latents])
    inside = values.lt(edge[latents]).logical_not_()
    rows, latents, values = rows[inside], latents[inside], values[inside]
    return rows, latents, values, values > limits[latents]


def _found(
    rows: torch.Tensor,
    latents: torch.Tensor,
    values: torch.Tensor,
    active: torch.Tensor,
    n_rows: int,
) -> FoundPairs:
    row_counts = torch.bincount(rows[active], minlength=n_rows).to(torch.int32)
    rows_of_pairs = Rows.of_ascending(rows, n_rows)
    pairs = ActivePairs(latents, latents.to(torch.int32), values, rows_of_pairs, row_counts)
    totals = torch.stack([rows_of_pairs.starts(rows.device)[-1], row_counts.sum()])
    return FoundPairs(pairs, totals=HostCopy(totals))
