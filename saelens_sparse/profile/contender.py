"""One contender, measured: how long its step takes, where time goes and what holds memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from saelens_sparse.profile.cases import Case
from saelens_sparse.profile.measure import time_steps
from saelens_sparse.profile.recording import record_steps
from saelens_sparse.profile.trace import PHASES, Frame, StepTrace
from saelens_sparse.profile.trainers import (
    Inputs,
    Trainer,
    build_trainer,
    implementation_of,
    release_memory,
)

CONTENDERS = ("stock", "sparse", "sparse_runner")
# In these, kernels are compiled and a sparse SAE chooses its implementation.
FIRST_STEPS, TRACED_STEPS = 8, {"cuda": 5, "cpu": 2}

Record = dict[str, Any]


def measure_contender(
    name: str,
    case: Case,
    device: str,
    inputs: Inputs,
    steps: int,
    folder: Path,
    done: Callable[[], object],
) -> Record:
    """
    Measure one of `CONTENDERS`, alone on the device. Its trace goes into `folder`; `done` is called
    at each of the timed steps.
    """
    release_memory(device)
    trainer = build_trainer(
        case.registered.stock if name == "stock" else case.architecture,
        case,
        case.precisions[0],
        device,
        inputs.batches,
        inputs.weights,
        sparse_runner=name == "sparse_runner",
    )
    timed = time_steps(trainer, inputs, steps, done, untimed=FIRST_STEPS)
    path = folder / f"trace_{name}.json.gz"
    memory = _held_at_peak(trainer, inputs, path)
    trace = record_steps(trainer, inputs, path, TRACED_STEPS[device])
    ms, busy_ms, items = median(timed.ms), trace.busy_ms, trace.items
    # A profiler hardly changes how long kernels take, but a CPU's operations it does.
    divided_ms = ms if device == "cuda" else trace.step_ms
    implementation = implementation_of(trainer.sae, trainer.autocast_if_enabled)
    return {
        "status": "ok",
        "implementation": implementation or "SAELens's own",
        "ms": ms,
        "ms_min": min(timed.ms),
        "ms_max": max(timed.ms),
        "steps": steps,
        "tokens_per_second": 1e3 * case.batch / ms,
        "busy_ms": busy_ms,
        "divided_ms": divided_ms,
        "idle_ms": max(0.0, divided_ms - busy_ms),
        "launches": len(items) / trace.n_steps,
        "phases_ms": dict.fromkeys(PHASES, 0.0) | trace.ms_by("phase"),
        "backward_ms": trace.ms_by("part"),
        "tensor_core_ms": items.us[items.tensor_cores].sum() / 1e3 / trace.n_steps,
        "waiting_calls": trace.waits(),
        "memory": {"peak_bytes": timed.peak_bytes, "before_bytes": timed.before_bytes, **memory},
        "l0": timed.firing.sum().item(),
        "hardware": {"estimated_occupancy": _mean(items.occupancy, items.us)},
        "kernels": kernel_rows(trace),
        "trace": path.name,
    }


def kernel_rows(trace: StepTrace) -> list[Record]:
    """One row for each kernel by name, those that take longest first; all numbers per step."""
    rows: list[Record] = []
    for name, items in trace.items.groupby("name"):
        known = items[items.bytes.notna()]
        is_known = known.us.sum() >= 0.9 * items.us.sum()
        per_step = known[["bytes", "flops"]].sum() / trace.n_steps
        by_place = items.us.groupby((items.phase + " " + items.part).str.strip()).sum()
        rows.append(
            {
                "name": name,
                "phases": [*by_place.sort_values(ascending=False).index],
                "launches": len(items) / trace.n_steps,
                "ms": items.us.sum() / 1e3 / trace.n_steps,
                "bytes": per_step.bytes if is_known else None,
                "flops": per_step.flops or None if is_known else None,
                "tensor_cores": bool(items.tensor_cores.any()),
                "estimated_occupancy": _mean(items.occupancy, items.us),
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def _held_at_peak(trainer: Trainer, inputs: Inputs, path: Path) -> Record:
    """What holds memory when a recorded step holds most; `path` has its trace meanwhile."""
    gradients: set[int] = set()

    def note_gradients(*_: Any) -> None:
        of = [parameter.grad for parameter in trainer.sae.parameters()]
        gradients.update(grad.untyped_storage().data_ptr() for grad in of if grad is not None)

    hook = trainer.optimizer.register_step_pre_hook(note_gradients)
    trace = record_steps(trainer, inputs, path, 1, with_memory=True)
    hook.remove()
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    standing = {
        "parameters": sum(parameter.nbytes for parameter in trainer.sae.parameters()),
        "optimizer's moments": sum(m.nbytes for m in moments if isinstance(m, torch.Tensor)),
        "batches held for measuring": sum(batch.nbytes for batch in inputs.batches),
    }
    return peak_of(trace, standing, gradients, on_cpu=trainer.cfg.device == "cpu")


def peak_of(
    trace: StepTrace, standing: dict[str, int], gradients: set[int], *, on_cpu: bool
) -> Record:
    """
    What holds memory when a trace's one step holds most: the `standing` bytes, which outlive it,
    the rest that does (not known on a CPU), gradients (by address), and what the step has made, by
    the phase that made it.
    """
    changes: Frame = trace.memory[(trace.memory.device == 0) == on_cpu]
    if changes.empty:
        return {"traced_peak_bytes": None, "peak_phase": None, "parts_bytes": {}}
    peak = changes.loc[changes.total.idxmax()]
    live: Frame = changes.loc[: peak.name].drop_duplicates("address", keep="last")
    live = live[live.change > 0]
    is_gradient = live.address.isin([*gradients]) & (live.phase == "backward")
    holder = ("made in " + live.phase).mask(is_gradient, "gradients")
    made = live.change.groupby(holder).sum().to_dict()
    known = sum(standing.values()) + sum(made.values())
    kept = 0.0 if on_cpu else max(0.0, peak.total - known)
    parts = {**standing, **({"kept between steps": kept} if kept else {}), **made}
    total = float(known if on_cpu else peak.total)
    return {"traced_peak_bytes": total, "peak_phase": peak.phase, "parts_bytes": parts}


def _mean(values: Frame, weights: Frame) -> float | None:
    """Mean of the values that are known, weighted; None if there are none."""
    total = weights[values.notna()].sum()
    return float((values * weights).sum() / total) if total else None
