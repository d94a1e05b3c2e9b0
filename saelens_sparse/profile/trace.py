"""Training steps in a profiler's trace: what ran in which phase, and how memory changed.

A trace is what `torch.profiler` exports: Chrome's trace event format with Kineto's categories,
times in microseconds. What the host does belongs to the innermost range of the product around it,
and a kernel to the phase of its launch. SAELens's trainer sets no ranges: the nodes of the backward
pass and the optimizer's range tell its phases.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saelens_sparse.ops.common.ranges import PREFIX, WORK_PREFIX
from saelens_sparse.profile.work import operation_work

PHASES = (
    "encode", "search", "decode", "losses", "statistics", "backward", "clip", "optimizer", "other",
)  # fmt: skip
_NODE = "autograd::engine::evaluate_function: "
_STEP, _OPTIMIZER = "ProfilerStep#", "Optimizer.step#"
_COLUMNS = {
    "cat": "kind", "name": "name", "tid": "thread", "ts": "start", "dur": "us", "bytes": "copied",
    "External id": "id", "correlation": "correlation", "Sequence number": "node",
    "Fwd thread id": "forward_thread", "Input Dims": "dims", "Input type": "types",
    "Concrete Inputs": "constants", "est. achieved occupancy %": "occupancy", "Addr": "address",
    "Bytes": "change", "Total Allocated": "total", "Device Type": "device",
}  # fmt: skip
_ARGUMENTS = ["dims", "types", "constants"]
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")

Frame = Any  # of pandas, which has no types
Interval = Sequence[Any]  # a name, and microseconds from and to


class StepTrace:
    """
    The steps in a trace.

    Attributes:
        n_steps: how many these are.
        step_ms: milliseconds that the host takes for one, on average.
        items: a row for each kernel, copy and fill, on a CPU for each operation: `name`, `phase`,
            `part` (phase of the forward pass whose gradients a backward pass computes), `start`,
            `us` (without operations within it), `bytes` and `flops` (NaN if not known),
            `tensor_cores`, `occupancy` (percent, estimated by the profiler).
        calls: CUDA's calls: `name`, `phase`, `us`.
        memory: allocations: `start`, `phase`, `change` in bytes at `address`, `total`, `device`.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        rows = [{**event.get("args", {}), **event} for event in events if "ts" in event]
        table = pd.DataFrame(rows).reindex(columns=[*_COLUMNS]).rename(columns=_COLUMNS)
        table = table.sort_values(["start", "us"], ascending=[True, False], ignore_index=True)
        table["end"] = table.start + table.us
        operations = table[table.kind == "cpu_op"]
        ranges = table[table.kind == "user_annotation"]
        steps = _named(ranges, _STEP)
        self.n_steps, self.step_ms = len(steps), steps.us.mean() / 1e3
        phases = _phases(operations, ranges, steps)
        calls = table[table.kind.isin(["cuda_runtime", "cuda_driver"])]
        memory = table[table.name == "[memory]"]
        self.calls, self.memory = (
            frame.assign(phase=_names_at(frame.start, phases))[lambda rows: rows.phase != ""]
            for frame in (calls, memory)
        )

        device = table[table.kind.isin(["kernel", "gpu_memcpy", "gpu_memset"])]
        items = _kernels(device, calls, operations) if len(device) else _operations(operations)
        items["phase"] = _names_at(items.launched, phases)
        items = items[items.phase != ""].reset_index(drop=True)
        forward: Frame = operations[operations.forward_thread == 0]
        made_in = dict(zip(forward.node, _names_at(forward.start, phases), strict=True))
        nodes = _named(operations, _NODE)
        nodes = nodes.assign(name=nodes.node.map(made_in).astype(object).fillna("other"))
        between = [("other", start, end) for _, start, end in _intervals(steps)]
        parts = _names_at(items.launched, between + _intervals(nodes))
        items["part"] = np.where(items.phase == "backward", parts, "")
        declared = _names_at(items.launched, _intervals(_named(ranges, WORK_PREFIX)))
        self.items = _with_work(items, declared)

    @classmethod
    def load(cls, path: Path) -> StepTrace:
        """Read a file that `torch.profiler.profile.export_chrome_trace` wrote, `.json.gz`."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return cls(json.load(file)["traceEvents"])

    def ms_by(self, column: str) -> dict[str, float]:
        """Milliseconds of a step by the values of a column."""
        sums = self.items.groupby(column).us.sum() / 1e3 / self.n_steps
        return {str(name): float(ms) for name, ms in sums.items() if name}

    def waits(self) -> dict[str, dict[str, float]]:
        """CUDA's calls that wait for the device in a step: how many, and milliseconds."""
        every: Frame = self.calls
        calls = every[every.name.str.contains("Synchronize|Memcpy(?!.*Async)")]
        where = calls.name + " in " + calls.phase
        found = calls.groupby(where).us.agg(["count", "sum"]) / self.n_steps
        return {str(name): {"count": n, "ms": us / 1e3} for name, n, us in found.itertuples()}

    @property
    def busy_ms(self) -> float:
        """Milliseconds of a step in which a kernel runs; on a CPU those of all operations."""
        if self.items.device_runs.all():
            ends = self.items.start + self.items.us
            begins = np.maximum(self.items.start, ends.cummax().shift(fill_value=0.0))
            return float((ends - begins).clip(lower=0.0).sum() / 1e3 / self.n_steps)
        return float(self.items.us.sum() / 1e3 / self.n_steps)


def base_name(name: str) -> str:
    """
    A kernel's own name, without namespaces, template arguments and parameters.

    `void at::native::reduce_kernel<512, 1, at::native::ReduceOp<...> >(...)` is `reduce_kernel`.
    """
    shorter = name.replace("(anonymous namespace)::", "")
    while (inner := re.sub(r"<[^<>]*>|\([^()]*\)", "", shorter)) != shorter:
        shorter = inner
    return shorter.split("::")[-1].strip().removeprefix("void ") or name


def _phases(operations: Frame, ranges: Frame, steps: Frame) -> list[Interval]:
    """The phases of all steps; where several intervals hold a moment, the last one counts."""
    nodes, optimizer = _named(operations, _NODE), _named(ranges, _OPTIMIZER)
    # What has no node carries the number of the next: under `no_grad`, of one that never runs.
    has_node = (operations.forward_thread == 0) & operations.node.isin(nodes.node)
    with_node = operations[has_node]
    product = _named(ranges, PREFIX)
    product = product.assign(name=product.name.str.removeprefix(PREFIX))
    product = product[product.name.isin(PHASES)]
    found: list[Interval] = []
    for _, start, end in _intervals(steps):
        (_, decoded), (_, lost), (backward, after), (update, updated) = (
            (part.start.min(), part.end.max())
            for frame in (product[product.name == "decode"], with_node, nodes, optimizer)
            for part in [frame[(frame.start >= start) & (frame.start < end)]]
        )
        found += [("other", start, end), ("losses", decoded, backward)]
        if "statistics" not in product.name.to_numpy():
            found += [("statistics", max(lost, decoded), backward), ("clip", after, update)]
        found += [("backward", backward, after), ("optimizer", update, updated)]
    return found + _intervals(product)


def _kernels(device: Frame, calls: Frame, operations: Frame) -> Frame:
    """What ran on the device, with the operation of PyTorch that launched it, if any did."""
    launches = calls.drop_duplicates("correlation")[["correlation", "id", "start"]]
    launches = launches.rename(columns={"start": "launched"})
    asked = _named(operations, "aten::").drop_duplicates("id")[["id", "name", "start", *_ARGUMENTS]]
    asked = asked.rename(columns={"name": "operation", "start": "asked"})
    items = device.drop(columns=["id", *_ARGUMENTS]).merge(launches, on="correlation")
    items = items.merge(asked, on="id", how="left")
    names = items.name.map(base_name)
    of = items.operation.str.removeprefix("aten::") + ": "
    return items.assign(
        name=of.fillna("") + names,
        launched=items.asked.fillna(items.launched),  # clocks of calls and operations may differ
        device_runs=True,
        asks=items.operation.notna(),
    )


def _operations(operations: Frame) -> Frame:
    """What ran on the CPU; `us` is the time of an operation without those within it."""
    own = operations.us.to_numpy(copy=True)
    for _, rows in operations.assign(place=range(len(operations))).groupby("thread"):
        around: list[tuple[float, int]] = []
        for place, start, end, us in zip(rows.place, rows.start, rows.end, rows.us, strict=True):
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                own[around[-1][1]] -= us
            around.append((end, place))
    return operations.assign(
        name=operations.name.str.removeprefix(_NODE).str.removeprefix("aten::"),
        operation=operations.name,
        launched=operations.start,
        us=own.clip(min=0.0),
        device_runs=False,
        # The work of an operation that calls others is theirs.
        asks=operations.name.str.startswith("aten::") & (own > 0.5 * operations.us),
    )


def _with_work(items: Frame, declared: Any) -> Frame:
    """Add `bytes`, `flops` and `tensor_cores`; kernels of one operation share by time."""
    arguments = map(json.dumps, items[_ARGUMENTS].to_numpy().tolist())
    asked = zip(items.asks, items.operation, arguments, strict=True)
    work = [operation_work(name, given) if asks else None for asks, name, given in asked]
    found = pd.DataFrame([each or (np.nan, np.nan) for each in work], columns=["bytes", "flops"])
    if items.device_runs.all():
        found = found.mul(items.us / items.groupby("id").us.transform("sum"), axis=0)
    copied = items.copied * items.kind.map({"gpu_memcpy": 2.0, "gpu_memset": 1.0})
    launched = pd.Series(declared, dtype=str).str.extract(r"(\d+) (\d+)$").astype(float)
    low = items.types.astype(str).str.contains("c10::Half|c10::BFloat16")
    return items.assign(
        bytes=launched[0].fillna(copied).fillna(found.bytes),
        flops=launched[1].fillna(found.flops),
        tensor_cores=low & items.operation.isin(_PRODUCTS) & items.device_runs,
    )


def _named(events: Frame, prefix: str) -> Frame:
    return events[events.name.str.startswith(prefix)]


def _intervals(events: Frame) -> list[Interval]:
    return events[["name", "start", "end"]].to_numpy().tolist()


def _names_at(times: Any, intervals: Iterable[Interval]) -> Any:
    """The name of the last interval that holds each moment; empty where none does."""
    moments, names = times.to_numpy(), np.full(len(times), "", dtype=object)
    for name, start, end in intervals:
        names[(moments >= start) & (moments < end)] = name
    return names
