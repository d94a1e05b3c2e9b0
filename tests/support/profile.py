"""Traces written by hand, in the form of PyTorch's profiler.

Categories and arguments are those of Kineto's `output_json.cpp` (kernels and calls with
`correlation` and `External id`, kernels with `est. achieved occupancy %`) and of PyTorch's
`profiler_kineto.cpp` (`Input Dims`, `Input type`, `Concrete Inputs`, `Sequence number`,
`Fwd thread id`, and `[memory]` events with `Bytes`, `Addr`, `Total Allocated`).
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from saelens_sparse.profile.trace import StepTrace

N, D, L = 8, 16, 64
NODE = "autograd::engine::evaluate_function: "
MAIN, ENGINE = 100, 101


class Recorder:
    """Writes a trace's events: operations on two threads, and the kernels that they launch."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.clock = 1000.0
        self.ids = 0
        self.within: list[int] = []

    @contextmanager
    def around(
        self, category: str, name: str, thread: int = MAIN, **arguments: Any
    ) -> Generator[None]:
        self.ids += 1
        event: dict[str, Any] = {"ph": "X", "cat": category, "name": name, "tid": thread}
        event |= {"args": {"External id": self.ids, **arguments}, "ts": self.tick()}
        self.events.append(event)
        self.within += [self.ids] if category == "cpu_op" else []
        yield
        self.within = self.within[:-1] if category == "cpu_op" else self.within
        event["dur"] = self.tick() - event["ts"]

    def step(self):
        return self.around("user_annotation", "ProfilerStep#1")

    def range(self, name: str):
        return self.around("user_annotation", name)

    def op(self, name: str, *shapes: Any, kind: str = "float", thread: int = MAIN, **more: Any):
        lists = [bool(shape) and isinstance(shape[0], list) for shape in shapes]
        types = ["TensorList" if of_lists else kind for of_lists in lists]
        dims = {"Input Dims": [*shapes], "Input type": types, "Concrete Inputs": [""] * len(shapes)}
        return self.around("cpu_op", name, thread, **{**(dims if shapes else {}), **more})

    def kernel(self, name: str, duration: float = 10.0, start: float | None = None) -> None:
        """A launch, and a kernel that begins long after it unless `start` is given."""
        launch = {"correlation": self.ids, "External id": self.within[-1] if self.within else 0}
        with self.around("cuda_driver", "cuLaunchKernelEx", **launch):
            start = self.clock + 500 if start is None else start
        arguments = {**launch, "est. achieved occupancy %": 50, "grid": [800, 1, 1]}
        event = {"ph": "X", "cat": "kernel", "name": name, "tid": 7, "ts": start, "dur": duration}
        self.events.append({**event, "args": arguments})

    def memory(self, change: int, address: int, total: int, device: int = 1) -> None:
        arguments = {"Bytes": change, "Addr": address, "Total Allocated": total}
        arguments |= {"Device Type": device, "Device Id": 0}
        event = {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "tid": MAIN}
        self.events.append({**event, "ts": self.tick(), "args": arguments})

    def tick(self) -> float:
        self.clock += 1
        return self.clock

    def trace(self) -> StepTrace:
        return StepTrace(self.events)


def places(trace: StepTrace) -> dict[str, str]:
    """By kernel the phase, and in the backward pass the phase whose gradients it computes."""
    names = trace.items.name.str.split(": ").str[-1]
    found = zip(names, trace.items.phase, trace.items.part, strict=True)
    return {name: f"{phase} {part}".strip() for name, phase, part in found}


def forward(sequence: int) -> dict[str, Any]:
    return {"Sequence number": sequence, "Fwd thread id": 0}


def stock_step(record: Recorder) -> None:
    """A stock Top-K's step as SAELens's trainer takes it, its backward pass on another thread."""
    with record.step():
        with record.op("aten::gt", [L]):
            record.kernel("dead_mask")
        with record.range("saelens_sparse::encode"), record.op("aten::mm", [N, D], **forward(1)):
            record.kernel("encoder_gemm", 30.0)
        with record.range("saelens_sparse::search"), record.op("aten::topk", [N, L], **forward(2)):
            record.kernel("gather_topk")
        with record.range("saelens_sparse::decode"), record.op("aten::mm", [N, L], **forward(3)):
            record.kernel("decoder_gemm", 30.0)
        with record.op("aten::mse_loss", [N, D], [N, D], **forward(4)):
            record.kernel("mse")
        with record.op("aten::_to_copy", [N, L], **forward(5)):  # no node has this number
            record.kernel("fired")
        for node, sequence, kernel in (
            ("MseLossBackward0", 4, "grad_recons"),
            ("MmBackward0", 3, "grad_W_dec"),
            ("TopkBackward0", 2, "grad_acts"),
            ("MmBackward0", 1, "grad_W_enc"),
        ):
            fields: Any = {"Sequence number": sequence, "Fwd thread id": 1}
            with record.op(NODE + node, thread=ENGINE, **fields), record.op("aten::mm", [L, N]):
                record.kernel(kernel)
        with record.op(f"{NODE}torch::autograd::AccumulateGrad", thread=ENGINE):
            record.kernel("accumulated")
        with record.op("aten::_foreach_mul_", [[L, D], [D, L]], []):
            record.kernel("clipped")
        with record.range("Optimizer.step#Adam.step"), record.op("aten::mul_", [L, D], []):
            record.kernel("adam")
        with record.op("aten::add", [L]):
            record.kernel("scheduler")
    record.kernel("after_the_step")
