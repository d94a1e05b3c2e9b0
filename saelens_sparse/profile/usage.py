"""From a trace to numbers: time by phase, and what each kernel (on a CPU, operation) did in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from saelens_sparse.profile.counters import (
    DRAM_BYTES,
    DRAM_SHARE,
    OCCUPANCY,
    TENSOR_SHARE,
    KernelCounters,
    match,
)
from saelens_sparse.profile.kernels import (
    OWN_KERNELS,
    Place,
    base_name,
    is_tensor_core_gemm,
    kernel_work,
)
from saelens_sparse.profile.phases import PARTS, PHASES, Attribution
from saelens_sparse.profile.trace import DeviceEvent, HostEvent, Trace
from saelens_sparse.profile.work import (
    Problem,
    Work,
    operation_work,
    uses_tensor_cores,
)

# Percent of the time. PyTorch's elementwise kernels keep part of that pipe busy for up to 3.
_TENSOR_PIPE_IN_USE = 5.0


@dataclass
class Item:
    """
    A kernel, copy or fill on a GPU; on a CPU an operation without those that it calls.

    Attributes:
        name: that its time is reported under.
        ms: milliseconds.
        place: where in the step.
        step: which of the traced steps.
        operation: the PyTorch operation that it is, or that launched it.
        event: on a GPU, the trace's.
        work: what it was asked for; None if that is not known.
        in_tensor_cores: whether it uses them: by types and names, or by its counters.
        counters: of the hardware, if they were read.
    """

    name: str
    ms: float
    place: Place
    step: int
    operation: HostEvent | None
    event: DeviceEvent | None = None
    work: Work | None = None
    in_tensor_cores: bool = False
    counters: KernelCounters | None = None


@dataclass
class Usage:
    """
    What the steps of a trace did, per step.

    Attributes:
        items: of all steps.
        n_steps: how many these are.
        phases_ms: milliseconds by phase.
        backward_ms: those of the backward phase, by what the gradient is of.
    """

    items: list[Item]
    n_steps: int
    phases_ms: dict[str, float] = field(default_factory=dict[str, float])
    backward_ms: dict[str, float] = field(default_factory=dict[str, float])

    def __post_init__(self) -> None:
        self.phases_ms = dict.fromkeys(PHASES, 0.0)
        self.backward_ms = dict.fromkeys(PARTS, 0.0)
        for item in self.items:
            self.phases_ms[item.place.phase] += item.ms / self.n_steps
            if item.place.phase == "backward":
                self.backward_ms[item.place.part] += item.ms / self.n_steps

    @property
    def busy_ms(self) -> float:
        """Milliseconds in which at least one kernel runs; on a CPU those of all operations."""
        events = [item.event for item in self.items if item.event is not None]
        if not events:
            return sum(item.ms for item in self.items) / self.n_steps
        busy, until = 0.0, float("-inf")
        for event in sorted(events, key=lambda event: event.start):
            end = event.start + event.duration
            busy += max(0.0, end - max(until, event.start))
            until = max(until, end)
        return busy / 1e3 / self.n_steps

    @property
    def launches(self) -> float:
        """Kernels, copies and fills of a step; on a CPU operations."""
        return len(self.items) / self.n_steps

    @property
    def tensor_core_ms(self) -> float:
        """Milliseconds in kernels that use tensor cores."""
        return sum(item.ms for item in self.items if item.in_tensor_cores) / self.n_steps


def usage_of(trace: Trace, attribution: Attribution, on_device: bool, allows_tf32: bool) -> Usage:
    """
    What the trace's steps did.

    Args:
        trace: of the steps.
        attribution: of its events.
        on_device: whether a GPU's kernels are meant, or a CPU's operations.
        allows_tf32: whether products of float32 may run on tensor cores.
    """
    items = _device_items(trace, attribution) if on_device else _host_items(trace, attribution)
    shares = _shares_of_operations(items)
    for item, share in zip(items, shares, strict=True):
        if item.event is not None and item.event.kind != "kernel":
            item.work = None if item.event.bytes is None else Work(2.0 * item.event.bytes)
            if item.event.kind == "fill" and item.event.bytes is not None:
                item.work = Work(float(item.event.bytes))
        elif item.operation is not None and item.name not in OWN_KERNELS:
            work = None if _is_part(item) else operation_work(item.operation)
            item.work = None if work is None else share * work
        if on_device and item.event is not None:
            name = base_name(item.event.name)
            named = is_tensor_core_gemm(name)
            known = item.operation is not None and uses_tensor_cores(item.operation, allows_tf32)
            item.in_tensor_cores = known or (named and item.operation is None)
    return Usage(items, attribution.n_steps)


def _is_part(item: Item) -> bool:
    """Whether the work of a CPU's operation is already that of one around it."""
    if item.event is not None or item.operation is None:
        return False
    around = list(item.operation.chain())[1:]
    return any(outer.kind == "op" and operation_work(outer) is not None for outer in around)


def add_counters(usage: Usage, counted: Sequence[KernelCounters]) -> float:
    """
    Give kernels the counters of one counted step.

    Returns:
        The share of the kernels' time that has them.
    """
    kernels = [item for item in usage.items if item.event and item.event.kind == "kernel"]
    for step in range(usage.n_steps):
        part = [item for item in kernels if item.step == step]
        names = [item.event.name for item in part if item.event is not None]
        for item, counters in zip(part, match(names, counted), strict=True):
            item.counters = counters
            busy = counters and counters.values.get(TENSOR_SHARE)
            if busy is not None:
                item.in_tensor_cores = busy >= _TENSOR_PIPE_IN_USE
    total = sum(item.ms for item in kernels)
    return sum(item.ms for item in kernels if item.counters) / total if total else 0.0


def kernel_rows(usage: Usage, problem: Problem) -> list[dict[str, Any]]:
    """One row for each kernel by name, those that take longest first; all numbers per step."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in usage.items:
        groups[item.name].append(item)
    rows = [_row(name, items, usage.n_steps, problem) for name, items in groups.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def _row(name: str, items: Sequence[Item], n_steps: int, problem: Problem) -> dict[str, Any]:
    ms = sum(item.ms for item in items) / n_steps
    launches = len(items) / n_steps
    if name in OWN_KERNELS:
        work = kernel_work(name, problem, launches)
    else:
        work = _sum_of_work(items, n_steps)
    places: dict[str, float] = defaultdict(float)
    for item in items:
        part = f" {item.place.part}" if item.place.part else ""
        places[item.place.phase + part] += item.ms
    occupancy = weighted_mean((i.ms, i.event.occupancy) for i in items if i.event)
    counted = [item for item in items if item.counters is not None]
    row: dict[str, Any] = {
        "name": name,
        "phases": sorted(places, key=lambda place: -places[place]),
        "launches": launches,
        "ms": ms,
        "bytes": None if work is None else work.bytes,
        "flops": None if work is None or not work.flops else work.flops,
        "at_least": work is not None and work.at_least,
        "tensor_cores": any(item.in_tensor_cores for item in items),
        "estimated_occupancy": occupancy,
    }
    if not counted:
        return row
    row["occupancy"] = _mean_counter(items, OCCUPANCY)
    row["dram_share"] = _mean_counter(items, DRAM_SHARE)
    row["tensor_pipe_share"] = _mean_counter(items, TENSOR_SHARE)
    moved = [item.counters.values.get(DRAM_BYTES) for item in counted if item.counters]
    if len(counted) == len(items) and None not in moved:
        row["dram_bytes"] = sum(value for value in moved if value is not None) / n_steps
    return row


def _sum_of_work(items: Sequence[Item], n_steps: int) -> Work | None:
    """The work of items; None unless that of nine tenths of their time is known."""
    known = [item for item in items if item.work is not None]
    if not known or sum(item.ms for item in known) < 0.9 * sum(item.ms for item in items):
        return None
    total = Work(0.0)
    for item in known:
        assert item.work is not None
        total += item.work
    total += Work(0.0, at_least=len(known) < len(items))
    return (1 / n_steps) * total


def weighted_mean(weighted: Iterable[tuple[float, float | None]]) -> float | None:
    """Mean of the values that are known, each of which stands behind its weight."""
    known = [(weight, value) for weight, value in weighted if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total else None


def _mean_counter(items: Sequence[Item], metric: str) -> float | None:
    return weighted_mean((i.ms, i.counters.values.get(metric)) for i in items if i.counters)


def _device_items(trace: Trace, attribution: Attribution) -> list[Item]:
    items: list[Item] = []
    for event in trace.device:
        place = attribution.of_device(event)
        if place is None:
            continue
        operation = None
        if event.launch is not None:
            chain = event.launch.chain()
            operation = next((outer for outer in chain if outer.kind == "op"), None)
        name = base_name(event.name)
        asked = "" if operation is None else operation.name
        if asked.startswith("aten::") and name not in OWN_KERNELS:
            name = f"{asked.removeprefix('aten::')}: {name}"
        step = -1 if event.launch is None else attribution.step_of(event.launch)
        items.append(Item(name, event.duration / 1e3, place, step, operation, event))
    return items


def _host_items(trace: Trace, attribution: Attribution) -> list[Item]:
    items: list[Item] = []
    for event in trace.host:
        if event.kind != "op" or event.self_time == 0.0:
            continue
        place = attribution.of_host(event)
        if place is not None:
            name = event.name.removeprefix("autograd::engine::evaluate_function: ")
            name = name.removeprefix("aten::")
            step = attribution.step_of(event)
            items.append(Item(name, event.self_time / 1e3, place, step, event))
    return items


def _shares_of_operations(items: Sequence[Item]) -> list[float]:
    """The share of each item in the time of all kernels that the same operation launched."""
    totals: dict[HostEvent, float] = defaultdict(float)
    for item in items:
        if item.operation is not None:
            totals[item.operation] += item.ms
    return [
        item.ms / totals[item.operation]
        if item.operation is not None and totals[item.operation]
        else 1.0
        for item in items
    ]
