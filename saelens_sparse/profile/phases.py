"""Which phase of its training step a kernel, or on a CPU an operation, belongs to.

A kernel goes by the host call that launched it, that by what it lies within: a range placed around
a part of the forward pass, a node of the backward pass, the optimizer's step. Between these, by
time. Nodes are attributed to parameters by the shape of what is computed, and by the part of the
forward pass that made the node. Sizes that coincide (d_in = d_sae, or either equal to the batch)
cannot be told apart.

What a CUDA graph launches is attributed by kernel names, in order.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from saelens_sparse.profile.kernels import (
    ACTIVATIONS,
    OTHER,
    OWN_KERNELS,
    WEIGHT,
    Place,
    base_name,
    is_gemm,
    is_sort,
)
from saelens_sparse.profile.ranges import PREFIX, STEP
from saelens_sparse.profile.trace import DeviceEvent, HostEvent, Trace, flat_shapes

PHASES = (
    "encode",
    "select",
    "decode",
    "loss",
    "statistics",
    "backward",
    "clip",
    "optimizer",
    "other",
)
PARTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", ACTIVATIONS, OTHER)

_NODE = "autograd::engine::evaluate_function: "
_OPTIMIZER = "Optimizer."
# What finds the active latents: SAELens's JumpReLU, and the operations that select and sort.
_SELECTING = {
    "JumpReLU", "arange", "cat", "cumsum", "gather", "le", "lt", "nonzero", "scatter_",
    "searchsorted", "sort", "sum", "topk", "where",
}  # fmt: skip
_GATHERING = {
    "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only", "index", "index_select",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The sizes that shapes are recognised by."""

    n_rows: int
    d_in: int
    d_sae: int


@dataclass(eq=False)
class _Window:
    """One step, and when its parts began and ended; infinite where a part has no event."""

    start: float
    end: float
    forward_start: float = math.inf
    loss_end: float = -math.inf
    decode_start: float = math.inf
    backward_start: float = math.inf
    backward_end: float = -math.inf
    optimizer_start: float = math.inf
    optimizer_end: float = -math.inf
    phase_of_node: dict[int, str] = field(default_factory=dict[int, str])


class Attribution:
    """
    The places of a trace's events.

    Args:
        trace: holds steps taken within `named_step` and `named_parts`.
        sizes: of the SAE and the batch.
        counts_after_backward: whether firing is counted between the backward pass and the
            optimizer, as `SparseSAETrainer` does, where SAELens's trainer clips.
    """

    def __init__(self, trace: Trace, sizes: Sizes, counts_after_backward: bool) -> None:
        self.sizes = sizes
        self._after_backward = "statistics" if counts_after_backward else "clip"
        self._windows = [
            _Window(event.start, event.end)
            for event in trace.host
            if event.name == PREFIX + STEP and event.kind == "range"
        ]
        self._starts = [window.start for window in self._windows]
        for event in trace.host:
            window = self._window_at(event.start)
            if window is not None:
                self._note(window, event)
        for event in trace.host:
            window = self._window_at(event.start)
            if window is not None and event.sequence is not None and not event.is_backward:
                # Operations without a node carry the next node's number: the last one has it.
                window.phase_of_node[event.sequence] = self._in_forward(event, window).phase
        self._by_name = self._places_in_graphs(trace.device)

    @property
    def n_steps(self) -> int:
        """Number of steps in the trace."""
        return len(self._windows)

    @property
    def step_ms(self) -> float:
        """Milliseconds that the host took for a traced step, on average."""
        return sum(window.end - window.start for window in self._windows) / 1e3 / self.n_steps

    def step_of(self, event: HostEvent) -> int:
        """Which step of the trace a host event is in; -1 if in none."""
        window = self._window_at(event.start)
        return -1 if window is None else self._windows.index(window)

    def of_host(self, event: HostEvent, kernel: str = "") -> Place | None:
        """
        Where a host event belongs; None if that is no step.

        Args:
            event: an operation, a call, or whatever memory was allocated in.
            kernel: base name of the kernel that it launched.
        """
        window = self._window_at(event.start)
        if window is None:
            return None
        node = _node_of(event)
        if node is not None:
            return Place("backward", self._part(event, node, kernel, window))
        if any(outer.name.startswith(_OPTIMIZER) for outer in event.chain()):
            names = [kernel, *(outer.name for outer in event.chain())]
            clips = _own_phase(kernel) == "clip" or any("norm" in name for name in names)
            return Place("clip" if clips else "optimizer")
        return self._in_forward(event, window, kernel)

    def of_device(self, event: DeviceEvent) -> Place | None:
        """Where a kernel, copy or fill belongs; None if that is no step."""
        if event in self._by_name:
            return self._by_name[event]
        if event.launch is None:
            return None
        return self.of_host(event.launch, base_name(event.name))

    def _window_at(self, time: float) -> _Window | None:
        index = bisect_right(self._starts, time) - 1
        if index < 0 or time > self._windows[index].end:
            return None
        return self._windows[index]

    def _note(self, window: _Window, event: HostEvent) -> None:
        if event.name.startswith(_NODE):
            window.backward_start = min(window.backward_start, event.start)
            window.backward_end = max(window.backward_end, event.end)
        elif event.name.startswith(_OPTIMIZER):
            window.optimizer_start = min(window.optimizer_start, event.start)
            window.optimizer_end = max(window.optimizer_end, event.end)
        elif _launches_graph(event):
            window.forward_start = min(window.forward_start, event.start)
            window.backward_start = min(window.backward_start, event.start)
            window.backward_end = max(window.backward_end, event.end)
        elif event.kind == "range" and event.name.startswith(PREFIX):
            part = event.name.removeprefix(PREFIX)
            if part == "encode":
                window.forward_start = min(window.forward_start, event.start)
            elif part == "decode":
                window.decode_start = min(window.decode_start, event.start)
            elif part == "loss":
                window.loss_end = max(window.loss_end, event.end)

    def _in_forward(self, event: HostEvent, window: _Window, kernel: str = "") -> Place:
        """The place of what is neither a node's nor the optimizer's."""
        for outer in event.chain():
            part = outer.name.removeprefix(PREFIX)
            if outer.kind != "range" or not outer.name.startswith(PREFIX) or part == STEP:
                continue
            return Place("select" if part == "encode" and _selects(event, kernel) else part)
        time = event.start
        if time < window.forward_start:
            return Place("other")
        if window.decode_start < time < window.loss_end:
            return Place("loss")
        if time < window.backward_start:
            if any(outer.name == "aten::ones_like" for outer in event.chain()):
                return Place("backward", OTHER)  # the gradient of the loss
            counts_here = self._after_backward == "clip"
            return Place("statistics" if counts_here else "other")
        if window.backward_end <= time < window.optimizer_start:
            return Place(self._after_backward)
        return Place("other")

    def _part(self, event: HostEvent, node: HostEvent, kernel: str, window: _Window) -> str:
        """What the gradient is of that the event helps to compute."""
        phase = "" if node.sequence is None else window.phase_of_node.get(node.sequence, "")
        name = node.name.removeprefix(_NODE)
        encodes = phase in ("encode", "select") or "Encode" in name
        weight = "W_enc" if encodes else "W_dec"
        if kernel in OWN_KERNELS:
            part = OWN_KERNELS[kernel].place.part or ACTIVATIONS
            return weight if part == WEIGHT else part
        if "Norm" in name:
            return "W_dec"
        operation = next((outer for outer in event.chain() if outer.kind == "op"), node)
        return self._part_by_shape(operation, weight, name)

    def _part_by_shape(self, operation: HostEvent, weight: str, node: str) -> str:
        sizes = self.sizes
        rows, d_in, d_sae = sizes.n_rows, sizes.d_in, sizes.d_sae
        shape = result_shape(operation)
        plain = operation.name.removeprefix("aten::")
        if plain in _GATHERING:
            # Rows of a weight for products with activations, or rows of the batch for a weight.
            source = flat_shapes(operation.shapes)[:1]
            return weight if source == [(rows, d_in)] else ACTIVATIONS
        if shape == (d_in, d_sae):
            return "W_enc"
        if shape == (d_sae, d_in):
            return weight
        if shape and shape[0] == rows:
            return ACTIVATIONS
        if shape in ((d_sae,), (1, d_sae)):
            gates = any(word in node for word in ("JumpReLU", "Step", "Gated", "Clamp"))
            return "threshold" if gates else "b_enc" if weight == "W_enc" else "W_dec"
        if shape in ((d_in,), (1, d_in)):
            return "b_dec"
        if "Encode" in node or "Decode" in node:
            # Flat pairs are activations; what sorts and counts them is for the sums.
            return ACTIVATIONS if len(shape) == 1 and "Gated" in node else weight
        return OTHER

    def _places_in_graphs(self, events: Iterable[DeviceEvent]) -> dict[DeviceEvent, Place | None]:
        """Places of what graphs launched: of one launch all events in the order of time."""
        launched: dict[HostEvent, list[DeviceEvent]] = {}
        for event in events:
            if event.launch is not None and _launches_graph(event.launch):
                launched.setdefault(event.launch, []).append(event)
        places: dict[DeviceEvent, Place | None] = {}
        for launch, members in launched.items():
            known = self._window_at(launch.start) is not None
            by_name = places_in_order([base_name(member.name) for member in members])
            places |= {
                member: place if known else None
                for member, place in zip(members, by_name, strict=True)
            }
        return places


def places_in_order(names: Sequence[str]) -> list[Place]:
    """
    Places of the kernels of a forward and backward pass by their base names alone.

    A kernel that could be anything belongs to what the last one before it that is known led up to.
    """
    places: list[Place] = []
    after = Place("encode")
    weights = iter(("W_dec", "W_enc"))
    weight, last = "", ""
    for name in names:
        place, own = after, OWN_KERNELS[name].place if name in OWN_KERNELS else None
        before_decoder = after.phase in ("encode", "select")
        if own is not None and own.part == ACTIVATIONS and before_decoder:
            place = after = Place("select")  # JumpReLU's candidates are recomputed as gradients are
        elif own is not None and own.part == WEIGHT:
            # Of one weight: partial sums if there are long segments, sums, added rows if any.
            begins = name == "_partial_sums_kernel" or last != "_partial_sums_kernel"
            if begins and name != "_add_rows_kernel":
                weight = next(weights, weight)
            place = after = Place("backward", weight)
        elif own is not None:
            place = own
            after = Place("loss") if place.phase == "decode" else place
        elif is_sort(name) and before_decoder:
            place = after = Place("select")
        elif after.phase == "backward" and "gemv" in name:
            place = Place("backward", "b_dec")
        elif is_gemm(name) and after.phase == "select":
            place = Place("encode")  # the next chunk of rows
        places.append(place)
        last = name
    return places


def result_shape(operation: HostEvent) -> tuple[int, ...]:
    """The shape of what an operation gives, as far as its inputs tell; its largest input's else."""
    name = operation.name.removeprefix("aten::").rstrip("_")
    shapes = [shape for shape in flat_shapes(operation.shapes) if shape]
    if not shapes:
        return ()
    # What is added comes first, and where the result goes, if it is given, last.
    factors = shapes[1:3] if name.startswith("add") else shapes[:2]
    if name in ("mm", "addmm") and len(factors) == 2:
        return factors[0][0], factors[1][1]
    if name in ("mv", "addmv") and len(factors) == 2:
        return (factors[0][0],)
    largest = max(shapes, key=math.prod)
    if name in ("sum", "mean") and len(operation.constants) > 1:
        dims = operation.constants[1].strip("[]")
        if dims.lstrip("-").isdecimal():
            summed = int(dims) % len(largest)
            return tuple(size for dim, size in enumerate(largest) if dim != summed)
    return largest


def _own_phase(kernel: str) -> str:
    return OWN_KERNELS[kernel].place.phase if kernel in OWN_KERNELS else ""


def _node_of(event: HostEvent) -> HostEvent | None:
    return next((outer for outer in event.chain() if outer.name.startswith(_NODE)), None)


def _launches_graph(event: HostEvent) -> bool:
    return event.kind == "call" and "GraphLaunch" in event.name


def _selects(event: HostEvent, kernel: str) -> bool:
    """Whether what is within an encoder's range finds the active latents."""
    if kernel in OWN_KERNELS:
        return _own_phase(kernel) != "encode"
    names = [outer.name.removeprefix("aten::") for outer in event.chain() if outer.kind == "op"]
    return any(name in _SELECTING for name in names)
