"""Reading the trace that `torch.profiler` exports: what the host did and what that started.

The format is Chrome's trace event format with PyTorch's categories: `cpu_op` for operations,
`user_annotation` for ranges, `cuda_runtime` and `cuda_driver` for calls that start work,
`kernel`, `gpu_memcpy` and `gpu_memset` for that work, `cpu_instant_event` for allocations. Times
are microseconds.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HOST_KINDS = {
    "cpu_op": "op",
    "user_annotation": "range",
    "cuda_runtime": "call",
    "cuda_driver": "call",
}
_DEVICE_KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "fill"}
_OCCUPANCY = "est. achieved occupancy %"


@dataclass(eq=False)
class HostEvent:
    """
    Something that the host did.

    Attributes:
        name: of the operation, the range or the call.
        kind: "op", "range", or "call" of CUDA's runtime or driver.
        start: microseconds.
        end: microseconds.
        shapes: of an operation's inputs, a list of them for a list of tensors.
        types: of its inputs, as PyTorch's profiler names them.
        constants: its other arguments, as text, empty where an input is a tensor.
        sequence: number of the autograd node that it makes or runs.
        is_backward: whether it runs a node.
        parent: the event around it, on the same thread.
        inside: microseconds of the operations directly within it.
    """

    name: str
    kind: str
    start: float
    end: float
    shapes: Sequence[Any] = ()
    types: Sequence[str] = ()
    constants: Sequence[str] = ()
    sequence: int | None = None
    is_backward: bool = False
    parent: HostEvent | None = None
    inside: float = 0.0

    @property
    def self_time(self) -> float:
        """Microseconds that are not those of an operation within it."""
        return max(0.0, self.end - self.start - self.inside)

    def chain(self) -> Iterator[HostEvent]:
        """The event and those around it, from the inside out."""
        event: HostEvent | None = self
        while event is not None:
            yield event
            event = event.parent


@dataclass(eq=False)
class DeviceEvent:
    """
    A kernel, copy or fill.

    Attributes:
        name: as the profiler gives it.
        kind: "kernel", "copy" or "fill".
        start: microseconds.
        duration: microseconds.
        launch: the call that started it, if the trace has it.
        occupancy: percent of the warps that fit, estimated from the launch; kernels only.
        bytes: moved by a copy or a fill.
    """

    name: str
    kind: str
    start: float
    duration: float
    launch: HostEvent | None = None
    occupancy: float | None = None
    bytes: int | None = None


@dataclass(eq=False)
class Allocation:
    """
    A change of the memory that PyTorch's allocators hold.

    Attributes:
        time: microseconds.
        bytes: negative when memory is given back.
        address: of the block.
        total: bytes held afterwards, as far as the profiler knows.
        on_device: whether it is the GPU's memory.
        within: the event that it happened in.
    """

    time: float
    bytes: int
    address: int
    total: int
    on_device: bool
    within: HostEvent | None = None


@dataclass
class Trace:
    """The events of a trace, each list in the order of time."""

    host: list[HostEvent] = field(default_factory=list[HostEvent])
    device: list[DeviceEvent] = field(default_factory=list[DeviceEvent])
    allocations: list[Allocation] = field(default_factory=list[Allocation])

    @classmethod
    def load(cls, path: Path) -> Trace:
        """Read a file that `torch.profiler.profile.export_chrome_trace` wrote."""
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            return cls.of(json.load(file)["traceEvents"])

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Trace:
        """The trace of events in Chrome's format."""
        trace = cls()
        threads: dict[Any, list[HostEvent | Allocation]] = defaultdict(list)
        operations: dict[int, HostEvent] = {}
        calls: list[tuple[HostEvent, int]] = []
        launches: dict[int, HostEvent] = {}
        started: list[tuple[DeviceEvent, int | None]] = []
        for event in events:
            category, arguments = event.get("cat"), event.get("args", {})
            if category in _HOST_KINDS and event.get("ph") == "X":
                host = _host_event(event, arguments)
                threads[event["tid"]].append(host)
                trace.host.append(host)
                external = arguments.get("External id")
                if host.kind == "call" and "correlation" in arguments:
                    launches[arguments["correlation"]] = host
                    calls.append((host, external))
                elif host.kind == "op" and external is not None:
                    operations[external] = host
            elif category in _DEVICE_KINDS and event.get("ph") == "X":
                device = _device_event(event, arguments)
                started.append((device, arguments.get("correlation")))
                trace.device.append(device)
            elif event.get("name") == "[memory]":
                allocation = _allocation(event, arguments)
                threads[event["tid"]].append(allocation)
                trace.allocations.append(allocation)
        for device, correlation in started:
            device.launch = None if correlation is None else launches.get(correlation)
        for thread in threads.values():
            _nest(thread)
        for call, external in calls:
            # Clocks of calls and operations may differ: then their common number tells.
            if all(outer.kind != "op" for outer in call.chain()) and external in operations:
                call.parent = operations[external]
        trace.host.sort(key=lambda event: event.start)
        trace.device.sort(key=lambda event: event.start)
        trace.allocations.sort(key=lambda event: event.time)
        return trace


def flat_shapes(shapes: Sequence[object]) -> list[tuple[int, ...]]:
    """The shapes of an operation's inputs, those in lists of tensors one by one."""
    flat: list[tuple[int, ...]] = []
    for shape in shapes:
        if not isinstance(shape, Sequence):
            continue
        if any(isinstance(item, Sequence) for item in shape):
            flat += flat_shapes([*shape])
        else:
            flat.append(tuple(int(str(size)) for size in shape))
    return flat


def _host_event(event: Mapping[str, Any], arguments: Mapping[str, Any]) -> HostEvent:
    start = float(event["ts"])
    return HostEvent(
        name=event["name"],
        kind=_HOST_KINDS[event["cat"]],
        start=start,
        end=start + float(event.get("dur", 0.0)),
        shapes=arguments.get("Input Dims", ()),
        types=arguments.get("Input type", ()),
        constants=arguments.get("Concrete Inputs", ()),
        sequence=arguments.get("Sequence number"),
        is_backward=bool(arguments.get("Fwd thread id")),
    )


def _device_event(event: Mapping[str, Any], arguments: Mapping[str, Any]) -> DeviceEvent:
    return DeviceEvent(
        name=event["name"],
        kind=_DEVICE_KINDS[event["cat"]],
        start=float(event["ts"]),
        duration=float(event.get("dur", 0.0)),
        occupancy=arguments.get(_OCCUPANCY),
        bytes=arguments.get("bytes"),
    )


def _allocation(event: Mapping[str, Any], arguments: Mapping[str, Any]) -> Allocation:
    return Allocation(
        time=float(event["ts"]),
        bytes=int(arguments["Bytes"]),
        address=int(arguments["Addr"]),
        total=int(arguments["Total Allocated"]),
        # PyTorch's DeviceType: 0 is the CPU, 1 is CUDA.
        on_device=arguments["Device Type"] != 0,
    )


def _nest(events: list[HostEvent | Allocation]) -> None:
    """Set the parents of one thread's events, which lie within each other or apart."""

    def order(event: HostEvent | Allocation) -> tuple[float, float]:
        if isinstance(event, Allocation):
            return event.time, 0.0
        return event.start, -event.end

    around: list[HostEvent] = []
    for event in sorted(events, key=order):
        start = event.time if isinstance(event, Allocation) else event.start
        while around and around[-1].end <= start:
            around.pop()
        parent = around[-1] if around else None
        if isinstance(event, Allocation):
            event.within = parent
            continue
        event.parent = parent
        if event.kind == "op":
            for outer in reversed(around):
                if outer.kind == "op":
                    outer.inside += event.end - event.start
                    break
        around.append(event)
