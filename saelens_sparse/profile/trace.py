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
_COLUMNS = {
    "cat": "kind", "name": "name", "tid": "thread", "ts": "start", "dur": "us", "bytes": "copied",
    "External id": "id", "correlation": "correlation", "Sequence number": "node",
    "Fwd thread id": "forward_thread", "Input Dims": "dims", "Input type": "types",
    "Concrete Inputs": "constants", "est. achieved occupancy %": "occupancy", "Addr": "address",
    "Bytes": "change", "Total Allocated": "total", "Device Type": "device",
}  # fmt: skip
_ARGUMENTS = ["dims", "types", "constants"]
_PLACE = ["phase", "part", "declared"]
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")

Frame = Any  # of pandas, which has no types
Interval = Sequence[Any]  # a name, and microseconds from and to


class StepTrace:
    """
    The steps in a trace.

    Attributes:
        n_steps: how many these are.
        step_ms: milliseconds that the host takes for one, on average.
        on_device: whether kernels ran on a GPU.
        items: a row for each kernel, copy and fill, on a CPU for each operation: `name`, `phase`,
            `part` (phase of the forward pass whose gradients a backward pass computes), `start`,
            `us` (without operations within it), `bytes` and `flops` (NaN if not known),
            `tensor_cores`, `occupancy` (percent, estimated by the profiler).
        calls: CUDA's calls: `name`, `phase`, `us`.
        memory: allocations of the last step: `phase`, `change` in bytes at `address`, `total`,
            `device`.
    """

    def __init__(self, events: Iterable[Mapping[str, Any]]) -> None:
        rows = [{**event.get("args", {}), **event} for event in events if "ts" in event]
        table = pd.DataFrame(rows).reindex(columns=[*_COLUMNS]).rename(columns=_COLUMNS)
        table = table.sort_values(["start", "us"], ascending=[True, False], ignore_index=True)
        table["end"] = table.start + table.us
        operations, ranges = (table[table.kind == kind] for kind in ("cpu_op", "user_annotation"))
        steps, nodes = _named(ranges, "ProfilerStep#"), _named(operations, _NODE)
        self.n_steps, self.step_ms = len(steps), steps.us.mean() / 1e3

        table["phase"] = _names_at(table.start, _phases(operations, ranges, steps, nodes))
        forward: Frame = table[table.forward_thread == 0]
        forward = forward.drop_duplicates("node", keep="last")
        made_in = nodes.node.map(forward.set_index("node").phase).fillna("other")
        parts = _intervals(steps.assign(name="other")) + _intervals(nodes.assign(name=made_in))
        table["part"] = np.where(table.phase == "backward", _names_at(table.start, parts), "")
        table["declared"] = _names_at(table.start, _intervals(_named(ranges, WORK_PREFIX)))

        inside = table[table.phase != ""]
        self.calls = inside[inside.kind.isin(["cuda_runtime", "cuda_driver"])]
        self.memory = inside[(inside.name == "[memory]") & (inside.start >= steps.start.max())]
        device = table[table.kind.isin(["kernel", "gpu_memcpy", "gpu_memset"])]
        operations, self.on_device = table[table.kind == "cpu_op"], len(device) > 0
        items = _kernels(device, self.calls, operations) if self.on_device else _own(operations)
        self.items = _with_work(items[items.phase != ""].reset_index(drop=True), self.on_device)

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
        found = calls.groupby(where).us.agg(["count", "sum"])
        return {
            str(name): {"count": n / self.n_steps, "ms": us / 1e3 / self.n_steps}
            for name, n, us in found.itertuples()
        }

    @property
    def busy_ms(self) -> float:
        """Milliseconds of a step in which a kernel runs; on a CPU those of all operations."""
        busy = self.items.us
        if self.on_device:
            ends = self.items.start + busy
            busy = np.minimum(busy, ends - ends.cummax().shift(fill_value=0.0)).clip(lower=0.0)
        return float(busy.sum() / 1e3 / self.n_steps)


def base_name(name: str) -> str:
    """
    A kernel's own name, without namespaces, template arguments and parameters.

    `void at::native::reduce_kernel<512, 1, at::native::ReduceOp<...> >(...)` is `reduce_kernel`.
    """
    shorter = name.replace("(anonymous namespace)::", "")
    while (inner := re.sub(r"<[^<>]*>|\([^()]*\)", "", shorter)) != shorter:
        shorter = inner
    return shorter.split("::")[-1].strip().removeprefix("void ") or name


def _phases(operations: Frame, ranges: Frame, steps: Frame, nodes: Frame) -> list[Interval]:
    """The phases of all steps; where several intervals hold a moment, the last one counts."""
    # What has no node carries the number of the next: under `no_grad`, of one that never runs.
    has_node = (operations.forward_thread == 0) & operations.node.isin(nodes.node)
    product = _named(ranges, PREFIX)
    product = product.assign(name=product.name.str.removeprefix(PREFIX))
    product = product[product.name.isin(PHASES)]
    bounds = (product[product.name == "decode"], operations[has_node], nodes)
    found: list[Interval] = []
    for _, start, end in _intervals(steps):
        (_, decoded), (_, lost), (backward, after), (update, updated) = (
            (part.start.min(), part.end.max())
            for frame in (*bounds, _named(ranges, "Optimizer.step#"))
            for part in [frame[(frame.start >= start) & (frame.start < end)]]
        )
        found += [("other", start, end), ("losses", decoded, backward)]
        if "statistics" not in product.name.to_numpy():
            found += [("statistics", max(lost, decoded), backward), ("clip", after, update)]
        found += [("backward", backward, after), ("optimizer", update, updated)]
    return found + _intervals(product)


def _kernels(device: Frame, calls: Frame, operations: Frame) -> Frame:
    """What ran on the device, placed by the operation of PyTorch that launched it, if any did."""
    launches = calls.drop_duplicates("correlation")[["correlation", "id", *_PLACE]]
    asked = _named(operations, "aten::").drop_duplicates("id")[["id", "name", *_ARGUMENTS, *_PLACE]]
    items = device[["name", "kind", "start", "us", "copied", "occupancy", "correlation"]]
    items = items.merge(launches, on="correlation").merge(
        asked.rename(columns={"name": "operation"}), on="id", how="left", suffixes=("_call", "")
    )
    for column in _PLACE:  # clocks of calls and operations may differ
        items[column] = items[column].fillna(items[f"{column}_call"])
    operation = items.operation.str.removeprefix("aten::") + ": "
    return items.assign(name=operation.fillna("") + items.name.map(base_name))


def _own(operations: Frame) -> Frame:
    """What ran on the CPU; `us` is the time of an operation without those within it."""
    own: dict[Any, float] = dict(operations.us.items())
    for _, rows in operations.groupby("thread"):
        around: list[tuple[float, Any]] = []
        for place, start, end, us in rows[["start", "end", "us"]].itertuples():
            while around and around[-1][0] <= start:
                around.pop()
            if around:
                own[around[-1][1]] -= us
            around.append((end, place))
    us = pd.Series(own).clip(lower=0.0)
    # The work of an operation that calls others is theirs.
    asks = operations.name.str.startswith("aten::") & (us > 0.5 * operations.us)
    name = operations.name.str.removeprefix(_NODE).str.removeprefix("aten::")
    return operations.assign(name=name, operation=operations.name.where(asks), us=us)


def _with_work(items: Frame, on_device: bool) -> Frame:
    """Add `bytes`, `flops` and `tensor_cores`; kernels of one operation share by time."""
    arguments = map(json.dumps, items[_ARGUMENTS].to_numpy().tolist())
    asked = zip(items.operation, items.operation.notna(), arguments, strict=True)
    work = [asks and operation_work(name, given) for name, asks, given in asked]
    found = pd.DataFrame([each or (np.nan, np.nan) for each in work], columns=["bytes", "flops"])
    if on_device:
        found = found.mul(items.us / items.groupby("id").us.transform("sum"), axis=0)
    copied = items.copied * items.kind.map({"gpu_memcpy": 2.0, "gpu_memset": 1.0})
    launched = items.declared.astype(str).str.extract(r"(\d+) (\d+)$").astype(float)
    low = items.types.astype(str).str.contains("c10::Half|c10::BFloat16")
    return items.assign(
        bytes=launched[0].fillna(copied).fillna(found.bytes),
        flops=launched[1].fillna(found.flops),
        tensor_cores=on_device & low & items.operation.isin(_PRODUCTS),
    )


def _named(events: Frame, prefix: str) -> Frame:
    return events[events.name.str.startswith(prefix)]


def _intervals(events: Frame) -> list[Interval]:
    return events[["name", "start", "end"]].to_numpy().tolist()


def _names_at(times: Frame, intervals: Iterable[Interval]) -> Any:
    """The name of the last interval that holds each moment; empty where none does."""
    moments, names = times.to_numpy(), np.full(len(times), "", dtype=object)
    for name, start, end in intervals:
        names[(moments >= start) & (moments < end)] = name
    return names
