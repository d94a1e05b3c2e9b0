"""The pairs that matter to a JumpReLU, found without a full-precision `[n_rows, d_sae]` tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.chunks import pre_act_chunks
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.ops.pairs.ragged import RaggedRows
from saelens_sparse.ops.rows.operations import gather_dot
from saelens_sparse.ops.screen import cpu as screen_cpu
from saelens_sparse.ops.search.types import GatePattern, gate_and_edge
from saelens_sparse.ops.update.weight_copy import WeightCopy

# Share of the pairs that a screen on a CPU may leave open. One in 50 takes as long as screening
# saves at 512 -> 16,384, 1024 rows.
_MAX_CPU_CANDIDATES = 1 / 32


class PendingPattern:
    """A pattern that is queued on the device, and its size, which is on its way.

    Work queued between `start_find_pattern` and `result` hides the wait for the size.

    Attributes:
        pattern: as many of the pairs as there was room for.
        totals: number of pairs, and of active ones.
    """

    def __init__(
        self,
        pattern: GatePattern,
        totals: torch.Tensor,
        find_again: Callable[[int], PendingPattern] | None = None,
    ) -> None:
        self.pattern = pattern
        self.totals = HostCopy(totals)
        self._find_again = find_again

    def holds(self) -> bool:
        """Whether `pattern` has all pairs. Waits until the device has counted them."""
        return int(self.totals.values()[0]) <= self.pattern.latents.numel()

    def result(self) -> GatePattern:
        """The pattern; found again with room for all pairs if there were too many."""
        n_pairs, n_active = (int(total) for total in self.totals.values())
        if not self.holds():
            assert self._find_again is not None
            return self._find_again(n_pairs).result()
        return replace(self.pattern, totals=(n_pairs, n_active))


@torch.no_grad()
def start_find_pattern(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    capacity: int,
    backend: Backend,
    buffer_bytes: int,
    rounded: WeightCopy | None = None,
) -> PendingPattern:
    """Find the latents with `x @ weight.T + bias > threshold - bandwidth / 2`.

    Pre-activations have the precision that the caller asks for: float32 for float32 inputs, the
    autocast dtype under autocast. Which latents are in the pattern is decided in that precision.

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
    """
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape [n_rows, {weight.shape[1]}]; got {list(x.shape)}")
    if backend == "triton":
        from saelens_sparse.ops.search import threshold_kernels as gate_triton

        if gate_triton.can_screen(x):
            return _find_by_screen(
                x, weight, bias, threshold, bandwidth, capacity, buffer_bytes, rounded
            )
    arguments = (x, weight, bias, threshold, bandwidth, buffer_bytes)
    pairs = _find_by_cpu_screen(*arguments) if screen_cpu.can_screen(x, weight) else None
    if pairs is None:
        pairs = _find_by_chunks(*arguments)
    return PendingPattern(*_pattern_of(*pairs, n_rows=x.shape[0]))


@torch.no_grad()
def _find_by_screen(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    bandwidth: float,
    capacity: int,
    buffer_bytes: int,
    rounded: WeightCopy | None,
) -> PendingPattern:
    from saelens_sparse.ops.search.threshold_kernels import find_pattern

    arguments = (x, weight, bias, threshold, bandwidth)
    pattern, totals = find_pattern(*arguments, capacity, buffer_bytes, rounded)
    return PendingPattern(
        pattern, totals, lambda room: _find_by_screen(*arguments, room, buffer_bytes, rounded)
    )


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
        gate, edge = gate_and_edge(threshold, bandwidth, pre_acts.dtype)
        rows, latents = pre_acts.lt(edge).logical_not_().nonzero().unbind(1)  # NaN is inside
        values = pre_acts[rows, latents]
        parts.append((rows + start, latents, values, values > gate[latents]))
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
    """As `_find_by_chunks`, computing only those pairs in full that could be in the pattern.

    None if these are so many that the product of all is faster.
    """
    gate, edge = gate_and_edge(threshold, bandwidth, x.dtype)
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    n_found = 0
    for start, bounds in screen_cpu.upper_bounds(x, weight, bias, None, buffer_bytes):
        rows, latents = bounds.lt(edge).logical_not_().nonzero().unbind(1)
        n_found += rows.numel()
        if n_found > _MAX_CPU_CANDIDATES * (start + bounds.shape[0]) * bounds.shape[1]:
            return None
        parts.append((rows + start, latents))
    rows, latents = (torch.cat(part) for part in zip(*parts, strict=True))
    ragged = RaggedRows.of_rows(rows, x.shape[0])
    values = gather_dot(x, latents, weight, "torch", ragged).add_(bias[latents])
    inside = values.lt(edge[latents]).logical_not_()
    rows, latents, values = rows[inside], latents[inside], values[inside]
    return rows, latents, values, values > gate[latents]


def _pattern_of(
    rows: torch.Tensor,
    latents: torch.Tensor,
    values: torch.Tensor,
    active: torch.Tensor,
    n_rows: int,
) -> tuple[GatePattern, torch.Tensor]:
    """The pattern of all pairs, and its totals."""
    ragged = RaggedRows.of_rows(rows, n_rows)
    row_counts = torch.bincount(rows[active], minlength=n_rows).to(torch.int32)
    pattern = GatePattern(latents, latents.to(torch.int32), values, ragged, row_counts)
    return pattern, torch.stack([ragged.offsets[-1], row_counts.sum()])
