"""One contender, measured: how long its step takes, where time goes and what holds memory."""

from __future__ import annotations

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
    build_trainer,
    implementation_of,
    release_memory,
)

CONTENDERS = ("stock", "sparse", "sparse_runner")
# In these, kernels are compiled and a sparse SAE chooses its implementation.
FIRST_STEPS, TRACED_STEPS = 8, {"cuda": 5, "cpu": 2}

Record = dict[str, Any]


def measure_contender(
    name: str, case: Case, device: str, inputs: Inputs, steps: int, folder: Path
) -> Record:
    """Measure one of `CONTENDERS`, alone on the device. Its trace goes into `folder`."""
    release_memory(device)
    architecture = case.registered.stock if name == "stock" else case.architecture
    settings = (architecture, case, case.precisions[0], device, inputs.batches, inputs.weights)
    trainer = build_trainer(*settings, sparse_runner=name == "sparse_runner")
    timed = time_steps(trainer, inputs, steps, untimed=FIRST_STEPS)
    path = folder / f"trace_{name}.json.gz"
    trace = record_steps(trainer, inputs, path, TRACED_STEPS[device])
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    standing = {
        "parameters": sum(parameter.nbytes for parameter in trainer.sae.parameters()),
        "optimizer's moments": sum(m.nbytes for m in moments if isinstance(m, torch.Tensor)),
        "batches held for measuring": sum(batch.nbytes for batch in inputs.batches),
    }
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
        "tokens_per_second": 1e3 * case.batch / ms,
        "busy_ms": busy_ms,
        "divided_ms": divided_ms,
        "idle_ms": max(0.0, divided_ms - busy_ms),
        "launches": len(items) / trace.n_steps,
        "phases_ms": dict.fromkeys(PHASES, 0.0) | trace.ms_by("phase"),
        "backward_ms": trace.ms_by("part"),
        "tensor_core_ms": items.us[items.tensor_cores].sum() / 1e3 / trace.n_steps,
        "waiting_calls": trace.waits(),
        "memory": {"peak_bytes": timed.peak_bytes, **peak_of(trace, standing)},
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
        sums = known[["bytes", "flops"]].sum() / trace.n_steps
        by_place = items.us.groupby((items.phase + " " + items.part).str.strip()).sum()
        rows.append(
            {
                "name": name,
                "phases": [*by_place.sort_values(ascending=False).index],
                "launches": len(items) / trace.n_steps,
                "ms": items.us.sum() / 1e3 / trace.n_steps,
                "bytes": sums.bytes if is_known else None,
                "flops": sums.flops or None if is_known else None,
                "tensor_cores": bool(items.tensor_cores.any()),
                "estimated_occupancy": _mean(items.occupancy, items.us),
            }
        )
    return sorted(rows, key=lambda row: -row["ms"])


def peak_of(trace: StepTrace, standing: dict[str, int]) -> Record:
    """
    What holds memory when a trace's last step holds most: the `standing` bytes, which outlive it,
    the rest that does (not known on a CPU), and what the step has made, by the phase that made it;
    what the backward pass makes and does not give back is gradients.
    """
    changes: Frame = trace.memory[(trace.memory.device == 0) != trace.on_device]
    if changes.empty:
        return {"traced_peak_bytes": None, "peak_phase": None, "parts_bytes": {}}
    peak = changes.loc[changes.total.idxmax()]
    live: Frame = changes.loc[: peak.name].drop_duplicates("address", keep="last")
    live = live[live.change > 0]
    freed_in = changes.loc[peak.name + 1 :].drop_duplicates("address").set_index("address").phase
    is_gradient = (live.phase == "backward") & (live.address.map(freed_in) != "backward")
    made = live.change.groupby(("made in " + live.phase).mask(is_gradient, "gradients")).sum()
    parts = {**standing, **made.to_dict()}
    known = sum(parts.values())
    if trace.on_device and peak.total > known:
        parts["kept between steps"] = float(peak.total - known)
    total = peak.total if trace.on_device else known
    return {"traced_peak_bytes": float(total), "peak_phase": peak.phase, "parts_bytes": parts}


def _mean(values: Frame, weights: Frame) -> float | None:
    """Mean of the values that are known, weighted; None if there are none."""
    total = weights[values.notna()].sum()
    return float((values * weights).sum() / total) if total else None
