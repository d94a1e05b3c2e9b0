"""One arm, measured: its record as it is kept and reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from saelens_sparse.profile.cases import Arm
from saelens_sparse.profile.ceilings import Ceilings
from saelens_sparse.profile.counters import (
    DRAM_BYTES,
    DURATION,
    OCCUPANCY,
    TENSOR_SHARE,
    Counted,
    count_step,
)
from saelens_sparse.profile.measure import TimedSteps, time_steps
from saelens_sparse.profile.memory import held_at_peak, standing_bytes
from saelens_sparse.profile.phases import Attribution, Sizes
from saelens_sparse.profile.settings import Settings
from saelens_sparse.profile.steps import (
    FIRST_STEPS,
    count_waits,
    prepared_trainer,
    trace_steps,
)
from saelens_sparse.profile.trace import Trace
from saelens_sparse.profile.trainers import (
    Inputs,
    Trainer,
    implementation_of,
    release_memory,
)
from saelens_sparse.profile.usage import (
    Usage,
    add_counters,
    kernel_rows,
    usage_of,
    weighted_mean,
)
from saelens_sparse.profile.work import Problem
from saelens_sparse.training.trainer import SparseSAETrainer

# What waits, of CUDA's calls.
_WAITING_CALLS = ("Synchronize", "cudaMemcpy", "cuMemcpy")


@dataclass(frozen=True)
class Measurement:
    """
    What is measured, and where traces go.

    Attributes:
        settings: what decides the numbers.
        inputs: what every arm starts from.
        folder: of the results.
    """

    settings: Settings
    inputs: Inputs
    folder: Path

    @property
    def on_device(self) -> bool:
        """Whether a GPU is measured."""
        return self.settings.device == "cuda"


def problem_of(settings: Settings, firing: torch.Tensor | None = None) -> Problem:
    """
    The sizes that work follows from.

    Args:
        settings: of the profile.
        firing: `[d_sae]`, share of the rows on which each latent fires; without it pairs are
            those that are expected, none of them in long segments.
    """
    case, precision = settings.case, settings.precision
    pairs = case.batch * (float(case.k) if case.k is not None else case.l0 or 0.0)
    long_pairs = 0.0
    if firing is not None:
        counts = case.batch * firing.double()
        pairs = counts.sum().item()
        if settings.device == "cuda":
            from saelens_sparse.ops.rows.kernels import SEGMENT_SUM

            long_pairs = counts[counts > SEGMENT_SUM.SPLIT].sum().item()
    biases = case.d_sae * (2 if case.k is None else 1) + case.d_in
    return Problem(
        n_rows=case.batch,
        d_in=case.d_in,
        d_sae=case.d_sae,
        pairs=pairs,
        long_pairs=long_pairs,
        selected=case.k is not None,
        weight_bytes=precision.dtype.itemsize,
        exact=precision.autocast or precision.dtype == torch.bfloat16,
        n_dead=round(case.dead_fraction * case.d_sae),
        n_parameters=2 * case.d_sae * case.d_in + biases,
    )


def measure_arm(
    arm: Arm, measurement: Measurement, ceilings: Ceilings, done: Callable[[int], object]
) -> dict[str, Any]:
    """
    Measure one arm, alone on the device.

    Args:
        arm: which.
        measurement: what and where.
        ceilings: of the device.
        done: called with a number of pieces of work that are done, of `pieces_of` in all.

    Returns:
        The arm's record.
    """
    settings, inputs = measurement.settings, measurement.inputs
    torch.set_float32_matmul_precision(arm.matmul_precision)
    release_memory(settings.device)
    trainer = prepared_trainer(arm, settings, inputs)
    timed = time_steps(trainer, inputs, settings.steps, lambda: done(1), untimed=FIRST_STEPS)
    waits = count_waits(trainer, inputs)
    path = measurement.folder / f"trace_{arm.name}.json.gz"
    trace_steps(trainer, inputs, path, with_memory=False)
    done(1)
    memory = _memory(trainer, measurement, arm, timed)
    done(1)
    is_own = isinstance(trainer, SparseSAETrainer)
    implementation = implementation_of(trainer.sae, trainer.autocast_if_enabled)
    del trainer
    release_memory(settings.device)
    counted = count_step(settings, arm)
    done(1)

    trace = Trace.load(path)
    attribution = Attribution(trace, _sizes(settings), is_own)
    usage = usage_of(trace, attribution, measurement.on_device, arm.matmul_precision != "highest")
    counted_share = add_counters(usage, counted.kernels) if counted.kernels else 0.0
    problem = problem_of(settings, timed.firing)
    return {
        "status": "ok",
        "implementation": implementation or "SAELens's own",
        **_times(timed, usage, settings, attribution.step_ms),
        "floor_ms": ceilings.floor_ms(problem),
        "waits": waits,
        "waiting_calls": _waiting_calls(trace, attribution) if measurement.on_device else None,
        "memory": memory,
        "l0": timed.firing.sum().item(),
        "counters": {"share_of_time": counted_share, "reason": counted.reason},
        "hardware": _hardware(usage, counted),
        "kernels": kernel_rows(usage, problem),
        "trace": path.name,
    }


def pieces_of(settings: Settings) -> int:
    """How often `measure_arm` reports something done."""
    return settings.steps + 3


def _sizes(settings: Settings) -> Sizes:
    return Sizes(settings.case.batch, settings.case.d_in, settings.case.d_sae)


def _times(timed: TimedSteps, usage: Usage, settings: Settings, traced_ms: float) -> dict[str, Any]:
    ms, busy = median(timed.ms), usage.busy_ms
    # A profiler hardly changes how long kernels take, but a CPU's operations it does.
    divided_ms = ms if settings.device == "cuda" else traced_ms
    return {
        "ms": ms,
        "ms_min": min(timed.ms),
        "ms_max": max(timed.ms),
        "steps": len(timed.ms),
        "tokens_per_second": 1e3 * settings.case.batch / ms,
        "busy_ms": busy,
        "divided_ms": divided_ms,
        "idle_ms": max(0.0, divided_ms - busy),
        "launches": usage.launches,
        "phases_ms": usage.phases_ms,
        "backward_ms": usage.backward_ms,
        "tensor_core_ms": usage.tensor_core_ms,
    }


def _memory(
    trainer: Trainer, measurement: Measurement, arm: Arm, timed: TimedSteps
) -> dict[str, Any]:
    """The peak of the timed steps, and what holds that of a traced one."""
    path = measurement.folder / f"memory_trace_{arm.name}.json.gz"
    gradients = trace_steps(trainer, measurement.inputs, path, with_memory=True)
    trace = Trace.load(path)
    path.unlink()
    attribution = Attribution(
        trace, _sizes(measurement.settings), isinstance(trainer, SparseSAETrainer)
    )
    held = held_at_peak(
        trace,
        attribution,
        standing_bytes(trainer, measurement.inputs),
        gradients,
        measurement.on_device,
    )
    return {
        "peak_bytes": timed.peak_bytes,
        "before_bytes": timed.before_bytes,
        "traced_peak_bytes": None if held is None else held.peak,
        "peak_phase": None if held is None else held.phase,
        "parts_bytes": {} if held is None else held.parts,
    }


def _waiting_calls(trace: Trace, attribution: Attribution) -> dict[str, dict[str, float]]:
    """CUDA's calls that wait for the device, per step: how many, and milliseconds of the host."""
    calls: dict[str, dict[str, float]] = {}
    for event in trace.host:
        waits = any(word in event.name for word in _WAITING_CALLS) and "Async" not in event.name
        if event.kind != "call" or not waits or attribution.of_host(event) is None:
            continue
        call = calls.setdefault(event.name, {"count": 0.0, "ms": 0.0})
        call["count"] += 1 / attribution.n_steps
        call["ms"] += (event.end - event.start) / 1e3 / attribution.n_steps
    return calls


def _hardware(usage: Usage, counted: Counted) -> dict[str, float | None]:
    """Of all kernels of a step together, weighted by their time."""
    estimated = weighted_mean((item.ms, item.event.occupancy) for item in usage.items if item.event)
    found = {"estimated_occupancy": estimated}
    if not counted.kernels:
        return found
    lasting = sum(kernel.values.get(DURATION, 0.0) for kernel in counted.kernels)
    for name, metric in (("occupancy", OCCUPANCY), ("tensor_pipe_share", TENSOR_SHARE)):
        found[name] = weighted_mean(
            (kernel.values.get(DURATION, 0.0), kernel.values.get(metric))
            for kernel in counted.kernels
        )
    moved = sum(kernel.values.get(DRAM_BYTES, 0.0) for kernel in counted.kernels)
    found["dram_bytes"] = moved
    found["dram_bytes_per_second"] = 1e9 * moved / lasting if lasting else None
    return found
