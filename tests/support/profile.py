"""Traces written by hand after the formats' own sources, and the sizes they are about.

PyTorch's profiler writes Chrome's trace event format; categories and arguments are those of
Kineto's `output_json.cpp` (kernels with `correlation` and `est. achieved occupancy %`, calls with
`correlation`) and of PyTorch's `profiler_kineto.cpp` (`Input Dims`, `Input type`,
`Concrete Inputs`, `Sequence number`, `Fwd thread id`, and `[memory]` events with `Bytes`, `Addr`,
`Total Allocated`).
"""

from typing import Any

from saelens_sparse.profile.phases import Attribution, Sizes
from saelens_sparse.profile.trace import HostEvent, Trace
from saelens_sparse.profile.work import Problem

N, D, L = 8, 16, 64
SIZES = Sizes(n_rows=N, d_in=D, d_sae=L)
NODE = "autograd::engine::evaluate_function: "
MAIN, ENGINE = 100, 101


class Recorder:
    """Writes a trace's events: operations on two threads, and the kernels that they launch."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.clock = 1000.0
        self.correlation: float = 0

    def around(self, category: str, name: str, thread: int = MAIN, **arguments: Any) -> "_Around":
        return _Around(self, category, name, thread, arguments)

    def range(self, name: str) -> "_Around":
        return self.around("user_annotation", name)

    def op(self, name: str, *shapes: Any, thread: int = MAIN, **arguments: Any) -> "_Around":
        types = ["float" if shape and not isinstance(shape[0], list) else "TensorList"
                 for shape in shapes]  # fmt: skip
        dims = {"Input Dims": list(shapes), "Input type": types} if shapes else {}
        return self.around("cpu_op", name, thread, **dims, **arguments)

    def kernel(
        self,
        name: str,
        duration: float = 10.0,
        thread: int = MAIN,
        call: str = "cudaLaunchKernel",
        category: str = "cuda_runtime",
    ) -> None:
        self.correlation += 1
        with self.around(category, call, thread, correlation=self.correlation):
            self.on_device(name, duration)

    def on_device(self, name: str, duration: float, start: float | None = None) -> None:
        self.events.append(
            {
                "ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7,
                "ts": self.clock + 500 if start is None else start, "dur": duration,
                "args": {
                    "device": 0, "context": 1, "stream": 7, "correlation": self.correlation,
                    "registers per thread": 40, "shared memory": 0, "blocks per SM": 4.7,
                    "warps per SM": 75.3, "grid": [800, 1, 1], "block": [512, 1, 1],
                    "est. achieved occupancy %": 50,
                },
            }
        )  # fmt: skip

    def memory(self, bytes_: int, address: int, total: int, device: int = 1) -> None:
        self.clock += 1
        self.events.append(
            {
                "ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", "pid": MAIN,
                "tid": MAIN, "ts": self.clock,
                "args": {
                    "Total Reserved": 0, "Total Allocated": total, "Bytes": bytes_,
                    "Device Id": 0, "Device Type": device, "Addr": address,
                },
            }
        )  # fmt: skip
        self.clock += 1

    def trace(self) -> Trace:
        return Trace.of(self.events)


class _Around:
    def __init__(
        self, recorder: Recorder, category: str, name: str, thread: int, args: dict[str, Any]
    ) -> None:
        self.recorder, self.start = recorder, 0.0
        self.event = {"ph": "X", "cat": category, "name": name, "pid": MAIN, "tid": thread,
                      "args": args}  # fmt: skip

    def __enter__(self) -> None:
        self.recorder.clock += 1
        self.start = self.recorder.clock

    def __exit__(self, *_: object) -> None:
        self.recorder.clock += 1
        ended = {**self.event, "ts": self.start, "dur": self.recorder.clock - self.start}
        self.recorder.events.append(ended)
        self.recorder.clock += 1


def places(trace: Trace, counts_after_backward: bool = False) -> dict[str, str]:
    """By kernel the phase, and the part where there is one."""
    attribution = Attribution(trace, SIZES, counts_after_backward)
    found: dict[str, str] = {}
    for event in trace.device:
        place = attribution.of_device(event)
        found[event.name] = "-" if place is None else f"{place.phase} {place.part}".strip()
    return found


def stock_step(record: Recorder) -> None:
    """A stock Top-K's step as the trainer takes it, its backward pass on a thread of its own."""
    with record.range("saelens_sparse::step"):
        with record.op("aten::gt", [L]):
            record.kernel("dead_mask")
        with record.range("saelens_sparse::encode"):
            with record.op(
                "aten::mm", [N, D], [D, L], **{"Sequence number": 1, "Fwd thread id": 0}
            ):
                record.kernel("encoder_gemm")
            with record.range("saelens_sparse::select"), record.op("aten::topk", [N, L]):
                record.kernel("gather_topk")
        with record.range("saelens_sparse::decode"):
            with record.op(
                "aten::mm", [N, L], [L, D], **{"Sequence number": 2, "Fwd thread id": 0}
            ):
                record.kernel("decoder_gemm")
            with record.op("aten::add", [N, D], [D], **{"Sequence number": 3, "Fwd thread id": 0}):
                record.kernel("add_b_dec")
        with record.range("saelens_sparse::loss"), record.op("aten::mse_loss", [N, D], [N, D]):
            record.kernel("mse")
        with record.op("aten::sum", [N, D]):
            record.kernel("sum_of_mse")
        with record.range("saelens_sparse::loss"):
            pass
        with record.op("aten::_to_copy", [N, L]):
            record.kernel("fired")
        backward = {"thread": ENGINE, "Fwd thread id": 1}
        for node, sequence, operations in (
            ("AddBackward0", 3, [("aten::sum", [[N, D], []], "grad_b_dec")]),
            (
                "MmBackward0",
                2,
                [("aten::mm", [[L, N], [N, D]], "grad_W_dec"),
                 ("aten::mm", [[N, D], [D, L]], "grad_acts")],
            ),
            ("AddBackward0", 1, [("aten::sum", [[N, L], []], "grad_b_enc")]),
            ("MmBackward0", 1, [("aten::mm", [[D, N], [N, L]], "grad_W_enc")]),
        ):  # fmt: skip
            name = f"{NODE}{node}"
            with record.op(name, **backward, **{"Sequence number": sequence}):
                for operation, shapes, kernel in operations:
                    constants = {"Concrete Inputs": ["", "[0]", "True", ""]}
                    with record.op(operation, *shapes, thread=ENGINE, **constants):
                        record.kernel(kernel, thread=ENGINE)
        with record.op("aten::_foreach_mul_", [[L, D], [D, L]]):
            record.kernel("clipped")
        with record.range("Optimizer.step#Adam.step"), record.op("aten::_foreach_add_", [[L, D]]):
            record.kernel("adam")
        with record.op("aten::add", [L]):
            record.kernel("scheduler")
    record.kernel("after_the_step")


def op(name: str, shapes: list[Any], types: list[str], constants: list[str] | None = None):
    return HostEvent(name, "op", 0.0, 1.0, shapes, types, constants or [])


PROBLEM = Problem(
    n_rows=N,
    d_in=D,
    d_sae=L,
    pairs=4.0 * N,
    long_pairs=N,
    selected=True,
    weight_bytes=4,
    exact=False,
    n_dead=0,
    n_parameters=2 * L * D + L + D,
)
