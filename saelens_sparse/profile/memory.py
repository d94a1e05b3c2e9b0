"""What holds the memory of a training step at its peak, from the allocations in a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from saelens_sparse.profile.phases import Attribution
from saelens_sparse.profile.trace import Allocation, Trace
from saelens_sparse.profile.trainers import Inputs, Trainer

GRADIENTS = "gradients"
KEPT = "kept between steps"


@dataclass(frozen=True)
class Held:
    """
    Bytes by what holds them when a step holds most.

    Attributes:
        peak: all of them.
        parts: by holder; what was allocated in the step by the phase that did so.
        phase: the phase in which the peak lies.
    """

    peak: float
    parts: dict[str, float]
    phase: str


def standing_bytes(trainer: Trainer, inputs: Inputs) -> dict[str, float]:
    """Bytes of the tensors that outlive a step and are known: parameters, moments, inputs."""
    device = torch.device(trainer.cfg.device).type
    moments = [
        value
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return {
        "parameters": _bytes(trainer.sae.parameters(), device),
        "optimizer's moments": _bytes(moments, device),
        "batches held for measuring": _bytes(inputs.batches, device),
    }


def held_at_peak(
    trace: Trace,
    attribution: Attribution,
    standing: Mapping[str, float],
    gradients: Mapping[str, int],
    on_device: bool,
) -> Held | None:
    """
    What holds memory at the peak of a traced step.

    Args:
        trace: of one step, with its allocations.
        attribution: of the trace's events.
        standing: as `standing_bytes` gives it.
        gradients: addresses of the gradients, by parameter.
        on_device: whether the GPU's memory is meant.
    """
    changes = [change for change in trace.allocations if change.on_device == on_device]
    in_step = [
        change
        for change in changes
        if change.within is not None and attribution.of_host(change.within) is not None
    ]
    if not in_step:
        return None
    peak = max(in_step, key=lambda change: change.total)
    live = _live_at(in_step, peak)
    parts = dict(standing)
    made: dict[str, float] = defaultdict(float)
    addresses = set(gradients.values())
    for change in live.values():
        assert change.within is not None
        place = attribution.of_host(change.within)
        assert place is not None
        is_gradient = place.phase == "backward" and change.address in addresses
        made[GRADIENTS if is_gradient else f"made in {place.phase}"] += change.bytes
    # A CPU's allocations are known from the start of the trace only.
    base = peak.total - sum(made.values()) if on_device else sum(standing.values())
    kept = base - sum(standing.values())
    if on_device and kept > 0:
        parts[KEPT] = kept
    parts |= made
    place = attribution.of_host(peak.within) if peak.within is not None else None
    total = float(peak.total) if on_device else sum(parts.values())
    return Held(total, parts, "" if place is None else place.phase)


def _live_at(changes: Iterable[Allocation], peak: Allocation) -> dict[int, Allocation]:
    """What the step has allocated and not given back when it comes to its peak, by address."""
    live: dict[int, Allocation] = {}
    for change in changes:
        if change.bytes > 0:
            live[change.address] = change
        else:
            live.pop(change.address, None)
        if change is peak:
            break
    return live


def _bytes(tensors: Iterable[torch.Tensor], device: str) -> float:
    return float(sum(tensor.nbytes for tensor in tensors if tensor.device.type == device))
