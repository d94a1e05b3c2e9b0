"""The traces and tables in here are written by hand after the formats' own sources.

Traces: PyTorch's profiler writes Chrome's trace event format; categories and arguments are those
of Kineto's `output_json.cpp` (kernels with `correlation` and `est. achieved occupancy %`, calls
with `correlation`) and of PyTorch's `profiler_kineto.cpp` (`Input Dims`, `Input type`,
`Concrete Inputs`, `Sequence number`, `Fwd thread id`, and `[memory]` events with `Bytes`, `Addr`,
`Total Allocated`).

Counters: what `ncu --csv --metrics ...` prints, after the Nsight Compute CLI's documentation: its
own lines begin with `==`, then one line for each metric of each kernel, thousands separated by
commas, `n/a` for a metric that the GPU does not have.
"""

import gzip
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig

import saelens_sparse
from saelens_sparse.cli import main as cli_main
from saelens_sparse.evaluation.cases import AUTOCAST, BFLOAT16, FLOAT32, SPARSE, STOCK, Case
from saelens_sparse.evaluation.command_line import parse_shape
from saelens_sparse.evaluation.measure import time_steps
from saelens_sparse.evaluation.profile import ceilings, command, counters
from saelens_sparse.evaluation.profile.ceilings import Ceilings
from saelens_sparse.evaluation.profile.counters import Counted, KernelCounters, count_step, match
from saelens_sparse.evaluation.profile.kernels import (
    OWN_KERNELS,
    base_name,
    is_gemm,
    is_tensor_core_gemm,
    kernel_work,
)
from saelens_sparse.evaluation.profile.memory import held_at_peak
from saelens_sparse.evaluation.profile.phases import (
    Attribution,
    Sizes,
    places_in_order,
    result_shape,
)
from saelens_sparse.evaluation.profile.ranges import named_parts
from saelens_sparse.evaluation.profile.settings import (
    ARMS,
    Settings,
    case_of_config,
    case_of_shape,
    parse_arms,
    precision_of_config,
)
from saelens_sparse.evaluation.profile.steps import count_waits
from saelens_sparse.evaluation.profile.tables import kernel_table, quantity, summary_table
from saelens_sparse.evaluation.profile.trace import HostEvent, Trace
from saelens_sparse.evaluation.profile.usage import add_counters, kernel_rows, usage_of
from saelens_sparse.evaluation.profile.work import (
    Problem,
    operation_work,
    uses_tensor_cores,
)
from saelens_sparse.evaluation.training import build_trainer, prepare_inputs
from saelens_sparse.runner_config import UsageError, load_config

saelens_sparse.register()

N, D, L = 8, 16, 64
SIZES = Sizes(n_rows=N, d_in=D, d_sae=L)
NODE = "autograd::engine::evaluate_function: "
MAIN, ENGINE = 100, 101


@pytest.fixture(autouse=True, scope="module")
def small_and_fast() -> Iterator[None]:
    """So small a problem runs faster on one thread, and needs no exact ceilings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._SQUARE, "cpu", 64)
        patch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
        yield
    torch.set_num_threads(threads)


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


def test_kernels_of_a_stock_step_go_by_ranges_nodes_shapes_and_time():
    record = Recorder()
    stock_step(record)
    assert places(record.trace()) == {
        "dead_mask": "other",
        "encoder_gemm": "encode",
        "gather_topk": "select",
        "decoder_gemm": "decode",
        "add_b_dec": "decode",
        "mse": "loss",
        "sum_of_mse": "loss",
        "fired": "statistics",
        "grad_b_dec": "backward b_dec",
        "grad_W_dec": "backward W_dec",
        "grad_acts": "backward activations",
        "grad_b_enc": "backward b_enc",
        "grad_W_enc": "backward W_enc",
        "clipped": "clip",
        "adam": "optimizer",
        "scheduler": "other",
        "after_the_step": "-",
    }


def test_kernels_of_the_own_runner_go_by_their_names_and_nodes():
    record = Recorder()
    driver: Any = {"call": "cuLaunchKernelEx", "category": "cuda_driver"}
    with record.range("saelens_sparse::step"):
        with record.range("saelens_sparse::encode"):
            record.kernel("_round_rows_kernel", **driver)
            record.kernel("_group_maxima_kernel", **driver)
            with record.op("aten::sort", [N]):
                record.kernel("DeviceRadixSort")
            fields = {"Sequence number": 5, "Fwd thread id": 0}
            with record.op("_EncodeSelected", [N, D], **fields):
                record.kernel("relu")
        fields = {"Sequence number": 6, "Fwd thread id": 0}
        with record.range("saelens_sparse::decode"), record.op("_DecodeSelected", **fields):
            record.kernel("_gather_sum_kernel", **driver)
        with record.range("saelens_sparse::loss"):
            record.kernel("mse")
        # PyTorch gives nodes of custom functions this form.
        for node, sequence, kernels in (
            ("_DecodeSelectedBackward", 6, ["_gather_dot_kernel", "_segment_sum_kernel"]),
            ("_EncodeSelectedBackward", 5, ["_partial_sums_kernel"]),
        ):
            fields = {"Sequence number": sequence, "Fwd thread id": 1}
            with record.op(NODE + node, thread=ENGINE, **fields):
                for kernel in kernels:
                    record.kernel(kernel, thread=ENGINE, **driver)
        with record.op("aten::sum", [L]):
            record.kernel("count_firings")
        with record.range("Optimizer.step#ClippingAdam.step"):
            record.kernel("_square_sums_kernel", **driver)
            with record.op("aten::linalg_vector_norm", [2]):
                record.kernel("norm")
            record.kernel("_update_kernel", **driver)
    assert places(record.trace(), counts_after_backward=True) == {
        "_round_rows_kernel": "encode",
        "_group_maxima_kernel": "select",
        "DeviceRadixSort": "select",
        "relu": "encode",
        "_gather_sum_kernel": "decode",
        "mse": "loss",
        "_gather_dot_kernel": "backward activations",
        "_segment_sum_kernel": "backward W_dec",
        "_partial_sums_kernel": "backward W_enc",
        "count_firings": "statistics",
        "_square_sums_kernel": "clip",
        "norm": "clip",
        "_update_kernel": "optimizer",
    }


def test_thresholds_get_what_sums_over_rows_in_their_nodes():
    record = Recorder()
    with record.range("saelens_sparse::step"):
        fields = {"Sequence number": 9, "Fwd thread id": 0}
        with record.range("saelens_sparse::encode"), record.op("JumpReLU", [N, L], **fields):
            record.kernel("gate")
        with record.op(
            f"{NODE}JumpReLUBackward", thread=ENGINE, **{"Sequence number": 9, "Fwd thread id": 1}
        ):
            constants = {"Concrete Inputs": ["", "[0]", "False", ""]}
            with record.op("aten::sum", [N, L], [], thread=ENGINE, **constants):
                record.kernel("summed", thread=ENGINE)
            with record.op("aten::mul", [N, L], [N, L], thread=ENGINE):
                record.kernel("masked", thread=ENGINE)
    assert places(record.trace()) == {
        "gate": "select",
        "summed": "backward threshold",
        "masked": "backward activations",
    }


GRAPHED = {
    "copy_x": "encode",
    "_round_rows_kernel": "encode",
    "nvjet_hsh_256x128": "encode",
    "_group_maxima_kernel": "select",
    "_select_kernel": "select",
    "DeviceRadixSortOnesweepKernel": "select",
    "relu": "select",
    "_gather_sum_kernel": "decode",
    "add_b_dec": "loss",
    "mse": "loss",
    "_gather_dot_kernel": "backward activations",
    "_partial_sums_kernel": "backward W_dec",
    "gemv2T": "backward b_dec",
}


def test_a_graph_goes_by_names_in_order():
    assert [f"{place.phase} {place.part}".strip() for place in places_in_order(list(GRAPHED))] == [
        *GRAPHED.values()
    ]
    sums = ["_partial_sums_kernel", "_segment_sum_kernel", "_add_rows_kernel"] * 2
    assert [place.part for place in places_in_order(sums)] == ["W_dec"] * 3 + ["W_enc"] * 3
    short = ["_segment_sum_kernel"] * 2
    assert [place.part for place in places_in_order(short)] == ["W_dec", "W_enc"]


def test_all_kernels_of_one_graph_launch_are_of_its_step():
    record = Recorder()
    with record.range("saelens_sparse::step"):
        record.correlation += 1
        with record.around("cuda_runtime", "cudaGraphLaunch", MAIN, correlation=record.correlation):
            for index, name in enumerate(GRAPHED):
                record.on_device(name, 5.0, start=5000.0 + 10 * index)
        record.kernel("count_firings")
        with record.range("Optimizer.step#ClippingAdam.step"):
            record.kernel("_adam_kernel")
    found = places(record.trace(), counts_after_backward=True)
    assert found == {**GRAPHED, "count_firings": "statistics", "_adam_kernel": "optimizer"}


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("_gather_sum_kernel", "_gather_sum_kernel"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTN", "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTN"),
        (
            "void at::native::vectorized_elementwise_kernel<4, Fill<float>, T<char*> >(int, Fill)",
            "vectorized_elementwise_kernel",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<(int)4>(T1, T2)",
            "multi_tensor_apply_kernel",
        ),
        (
            "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy, false>(int*, long)",
            "DeviceRadixSortOnesweepKernel",
        ),
    ],
)
def test_kernels_are_named_without_templates_and_parameters(name: str, base: str):
    assert base_name(name) == base


@pytest.mark.parametrize(
    ("name", "gemm", "tensor_cores"),
    [
        ("nvjet_hsh_256x128_64x4", True, True),
        ("nvjet_sss_128x64", True, False),
        ("ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", True, True),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16", True, True),
        ("ampere_sgemm_128x64_tn", True, False),
        ("reduce_kernel", False, False),
        ("_gather_dot_kernel", False, False),
    ],
)
def test_gemms_are_known_by_name(name: str, gemm: bool, tensor_cores: bool):
    assert (is_gemm(name), is_tensor_core_gemm(name)) == (gemm, tensor_cores)


def op(name: str, shapes: list[Any], types: list[str], constants: list[str] | None = None):
    return HostEvent(name, "op", 0.0, 1.0, shapes, types, constants or [])


@pytest.mark.parametrize(
    ("operation", "bytes_", "flops"),
    [
        (op("aten::mm", [[8, 16], [16, 64]], ["float"] * 2), 4 * (128 + 1024 + 512), 2 * 8192),
        (op("aten::mm", [[8, 16], [16, 64]], ["c10::BFloat16"] * 2), 2 * 1664, 16384),
        (op("aten::mm", [[8, 16], [16, 64], [8, 64]], ["float"] * 3), 4 * 1664, 16384),
        (op("aten::addmm", [[64], [8, 16], [16, 64]], ["float"] * 3), 4 * 1664, 16384),
        (op("aten::bmm", [[3, 2, 5], [3, 5, 4]], ["float"] * 2), 4 * (30 + 60 + 24), 240),
        (op("aten::mv", [[8, 16], [16]], ["float"] * 2), 4 * (128 + 16 + 8), 256),
        (op("aten::add", [[8, 64], [64], []], ["float", "float", "Scalar"]), 4 * 1088, 512),
        (op("aten::add_", [[8, 64], [64], []], ["float", "float", "Scalar"]), 4 * 1088, 512),
        (op("aten::gt", [[8, 64], []], ["float", "Scalar"]), 4 * 512 + 512, 512),
        (op("aten::copy_", [[8, 64], [8, 64]], ["c10::BFloat16", "float"]), 2 * 512 + 2048, 0),
        (op("aten::zero_", [[8, 64]], ["float"]), 2048, 0),
        (op("aten::sum", [[8, 64], [], [], []], ["float", "", "", ""]), 2048, 512),
        (op("aten::_foreach_norm", [[[8], [4, 4]], []], ["TensorList", "Scalar"]), 96, 24),
        (op("aten::_foreach_mul_", [[[8], [4, 4]], []], ["TensorList", ""]), 192, 24),
        (op("aten::_fused_adam_", [[[8], [4, 4]]] * 4, ["TensorList"] * 4), 28 * 24, 12 * 24),
    ],
)
def test_work_of_operations_follows_from_their_shapes(
    operation: HostEvent, bytes_: float, flops: float
):
    work = operation_work(operation)
    assert work is not None
    assert (work.bytes, work.flops, work.at_least) == (bytes_, flops, False)


def test_work_that_is_not_known_is_not_made_up():
    assert operation_work(op("aten::some_new_operation", [[8, 64]], ["float"])) is None
    assert operation_work(op("_EncodeSelectedBackward", [[8, 64]], ["float"])) is None
    assert operation_work(op("aten::add", [], [])) is None
    assert kernel_work("_some_new_kernel", PROBLEM, 1) is None
    topk = operation_work(op("aten::topk", [[8, 64], []], ["float", "Scalar"]))
    assert topk is not None and topk.at_least


def test_tensor_cores_follow_from_types():
    half = op("aten::mm", [[8, 16], [16, 64]], ["c10::Half"] * 2)
    full = op("aten::mm", [[8, 16], [16, 64]], ["float"] * 2)
    assert uses_tensor_cores(half, allows_tf32=False)
    assert not uses_tensor_cores(full, allows_tf32=False)
    assert uses_tensor_cores(full, allows_tf32=True)
    assert not uses_tensor_cores(op("aten::add", [[8], [8]], ["c10::Half"] * 2), allows_tf32=True)


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


def test_work_of_kernels_follows_from_the_problem():
    def bytes_of(name: str, launches: int) -> float:
        work = kernel_work(name, PROBLEM, launches)
        assert work is not None
        return work.bytes

    # A row of the weight, a coefficient and a latent for each pair, and the batch.
    assert bytes_of("_gather_sum_kernel", 1) == 32 * (4 * D + 12) + 4 * N * D
    # Chunks of the buffer are launched one by one.
    assert bytes_of("_group_maxima_kernel", 1) == bytes_of("_group_maxima_kernel", 3) == 2 * N * L
    assert bytes_of("_round_rows_kernel", 1) == 6 * N * D
    assert bytes_of("_round_rows_kernel", 2) == 6 * (N + L) * D
    assert bytes_of("_adam_kernel", 4) == 28 * PROBLEM.n_parameters
    assert bytes_of("_adam_kernel", 2) == 28 * (L + D)
    both = bytes_of("_partial_sums_kernel", 2) + bytes_of("_segment_sum_kernel", 2)
    assert both == 2 * (32 * (4 * D + 12) + 4 * L * D)
    gather_sum = kernel_work("_gather_sum_kernel", PROBLEM, 1)
    assert gather_sum is not None and gather_sum.flops == 2 * 32 * D


def test_all_kernels_are_known():
    sources = Path(saelens_sparse.__file__).parent.joinpath("ops").glob("*_triton.py")
    defined = set(re.findall(r"^def (_\w+_kernel)\(", "".join(map(Path.read_text, sources)), re.M))
    # The probe, which finds out whether kernels run, is no part of a step.
    assert OWN_KERNELS.keys() == defined - {"_probe_kernel"}


def test_result_shapes():
    assert result_shape(op("aten::mm", [[8, 16], [16, 64]], [])) == (8, 64)
    assert result_shape(op("aten::mm", [[8, 16], [16, 64], [8, 64]], [])) == (8, 64)
    assert result_shape(op("aten::addmm", [[64], [8, 16], [16, 64]], [])) == (8, 64)
    summed = op("aten::sum", [[8, 64], [], [], []], [], ["", "[0]", "True", ""])
    assert result_shape(summed) == (64,)
    assert result_shape(op("aten::sum", [[8, 64], []], [], ["", "[-1]", "False"])) == (8,)
    assert result_shape(op("aten::add", [[64], [8, 64], []], [])) == (8, 64)
    assert result_shape(op("aten::_foreach_mul_", [[[4], [8, 64]], []], [])) == (8, 64)


def test_usage_counts_time_once_and_shares_an_operations_work():
    record = Recorder()
    for start in (5000.0, 5100.0):
        with (
            record.range("saelens_sparse::step"),
            record.range("saelens_sparse::decode"),
            record.op("aten::mm", [N, L], [L, D]),
            record.around("cuda_runtime", "cudaLaunchKernel", correlation=start),
        ):
            record.correlation = start
            record.on_device("split_gemm", 30.0, start)
            record.on_device("reduce_of_gemm", 10.0, start + 25)  # begins before the other ends
    trace = record.trace()
    usage = usage_of(trace, Attribution(trace, SIZES, False), on_device=True, allows_tf32=True)
    assert usage.n_steps == 2 and usage.launches == 2
    assert usage.phases_ms["decode"] == pytest.approx(0.04)
    assert usage.busy_ms == pytest.approx(0.035)
    assert usage.tensor_core_ms == pytest.approx(0.04)
    rows = {row["name"]: row for row in kernel_rows(usage, PROBLEM)}
    bytes_ = 4 * (N * L + L * D + N * D)
    assert rows["mm: split_gemm"]["bytes"] == pytest.approx(0.75 * bytes_)
    assert rows["mm: reduce_of_gemm"]["bytes"] == pytest.approx(0.25 * bytes_)
    assert rows["mm: split_gemm"]["estimated_occupancy"] == 50


NCU_CSV = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "_gather_sum_kernel": 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
{rows}
==PROF== Disconnected from process 4711
"""


def ncu_csv(*kernels: tuple[str, dict[str, tuple[str, str]]]) -> str:
    rows = [
        f'"{launch}","4711","python3.12","127.0.0.1","{name}","1","7","(64, 1, 1)",'
        f'"(4096, 5, 1)","0","9.0","Command line profiler metrics","{metric}","{unit}","{value}"'
        for launch, (name, metrics) in enumerate(kernels)
        for metric, (unit, value) in metrics.items()
    ]
    return NCU_CSV.format(rows="\n".join(rows))


GATHER_COUNTERS = {
    counters.DRAM_BYTES: ("byte", "1,234,567"),
    counters.DRAM_SHARE: ("%", "41.50"),
    counters.DURATION: ("ns", "2,048"),
    counters.TENSOR_SHARE: ("", "n/a"),
    counters.OCCUPANCY: ("%", "73.25"),
}


def test_ncu_csv_is_read_past_its_other_lines():
    text = ncu_csv(
        ("_gather_sum_kernel", GATHER_COUNTERS),
        (
            "void at::native::add<(int)4>(int, T2)",
            {counters.DRAM_BYTES: ("Mbyte", "2.5"), counters.DURATION: ("us", "1,001.5")},
        ),
    )
    gather, add = counters.parse_csv(text.splitlines())
    assert gather.name == "_gather_sum_kernel"
    assert gather.values == {
        counters.DRAM_BYTES: 1234567,
        counters.DRAM_SHARE: 41.5,
        counters.DURATION: 2048,
        counters.OCCUPANCY: 73.25,
    }
    assert add.values == {counters.DRAM_BYTES: 2.5e6, counters.DURATION: 1001.5e3}
    assert counters.parse_csv(["==ERROR== No kernels were profiled"]) == []


def test_counters_are_matched_by_base_name_and_order():
    counted = [
        KernelCounters("void f<(int)4>(int)", {"m": 1.0}),
        KernelCounters("g", {"m": 2.0}),
        KernelCounters("void f<(int)8>(int)", {"m": 3.0}),
    ]
    first, second, third, fourth = match(["void f<4>(int)", "void f<8>(int)", "g", "h"], counted)
    assert first is not None and second is not None and third is not None
    assert [k.values["m"] for k in (first, second, third)] == [1.0, 3.0, 2.0]
    assert fourth is None
    # Another number of launches: which is which is not known.
    assert match(["void f<4>(int)"], counted) == [None]


def test_counters_replace_estimates():
    record = Recorder()
    for _ in range(2):
        with record.range("saelens_sparse::step"), record.range("saelens_sparse::decode"):
            record.kernel("_gather_sum_kernel", duration=2.0)
            record.kernel("other", duration=2.0)
    trace = record.trace()
    usage = usage_of(trace, Attribution(trace, SIZES, False), on_device=True, allows_tf32=False)
    text = ncu_csv(("_gather_sum_kernel", GATHER_COUNTERS))
    assert add_counters(usage, counters.parse_csv(text.splitlines())) == pytest.approx(0.5)
    rows = {row["name"]: row for row in kernel_rows(usage, PROBLEM)}
    assert rows["_gather_sum_kernel"]["occupancy"] == 73.25
    assert rows["_gather_sum_kernel"]["dram_bytes"] == 1234567
    assert rows["other"].get("occupancy") is None


@pytest.fixture
def fake_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts an `ncu` on the PATH that runs a shell script; "$log" is where its CSV belongs."""

    def install(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        ncu = folder / "ncu"
        find_log = 'for a; do [ "$before" = --log-file ] && log="$a"; before="$a"; done'
        note = f'echo "$@" >> {tmp_path}/called'
        ncu.write_text(f"#!/bin/sh\n{find_log}\n{note}\n{script}\n")
        ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return tmp_path / "called"

    return install


def gpu_settings() -> Settings:
    case = case_of_shape([32, 256, 4, 64], "topk_sparse", None, 0.0)
    return Settings(case, FLOAT32, "cuda", 2, 2, counters=True)


def test_a_step_is_counted_by_another_process(fake_ncu: Callable[[str], Path], tmp_path: Path):
    csv_file = tmp_path / "csv"
    csv_file.write_text(ncu_csv(("_gather_sum_kernel", GATHER_COUNTERS)))
    called = fake_ncu(f'cp {csv_file} "$log"')
    counted = count_step(gpu_settings(), SPARSE)
    assert [kernel.name for kernel in counted.kernels] == ["_gather_sum_kernel"]
    arguments = called.read_text()
    assert "--profile-from-start off" in arguments and "--clock-control none" in arguments
    assert counters.OCCUPANCY in arguments
    assert "-m saelens_sparse.evaluation.profile.counted_step" in arguments


@pytest.mark.parametrize(
    ("script", "reason", "calls"),
    [
        (
            "echo '==ERROR== ERR_NVGPUCTRPERM - no permission' > \"$log\"; exit 1",
            "administrators",
            1,
        ),
        ("echo '==ERROR== Failed to find metric xyz' > \"$log\"; exit 1", "find metric xyz", 2),
        ("exit 9", "did not say why", 1),
    ],
)
def test_counters_that_cannot_be_read_have_a_reason(
    script: str, reason: str, calls: int, fake_ncu: Callable[[str], Path]
):
    called = fake_ncu(script)
    counted = count_step(gpu_settings(), SPARSE)
    assert not counted.kernels and reason in counted.reason
    assert len(called.read_text().splitlines()) == calls


def test_counting_ends_at_its_time_limit(fake_ncu: Callable[[str], Path]):
    fake_ncu("sleep 60 & sleep 60")
    begun = time.monotonic()
    counted = count_step(gpu_settings(), SPARSE, time_limit_s=0.5)
    assert time.monotonic() - begun < 20
    assert counted == Counted(reason="ncu took longer than 0.5 s")


def test_where_counters_are_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "PATH" in (counters.why_not("cuda", wanted=True) or "")
    assert "--ncu never" in (counters.why_not("cuda", wanted=False) or "")
    assert "NVIDIA" in (counters.why_not("cpu", wanted=True) or "")


def test_memory_at_the_peak_is_what_the_step_has_not_given_back():
    record = Recorder()
    with record.range("saelens_sparse::step"):
        with record.range("saelens_sparse::encode"), record.op("aten::mm"):
            record.memory(400, address=1, total=1400)
            record.memory(100, address=2, total=1500)
        with record.range("saelens_sparse::decode"), record.op("aten::mm"):
            record.memory(-100, address=2, total=1400)
            record.memory(50, address=3, total=1450)
        with record.op(f"{NODE}MmBackward0"), record.op("aten::mm"):
            record.memory(300, address=4, total=1750)
            record.memory(64, address=9, total=64, device=0)
            record.memory(-300, address=4, total=1450)
            record.memory(400, address=4, total=1850)
        record.memory(-400, address=4, total=1450)
    record.memory(9000, address=7, total=10450)
    trace = record.trace()
    attribution = Attribution(trace, SIZES, False)
    standing = {"parameters": 600.0, "optimizer's moments": 300.0}
    held = held_at_peak(trace, attribution, standing, {"W_dec": 4}, on_device=True)
    assert held is not None
    assert (held.peak, held.phase) == (1850, "backward")
    assert held.parts == {
        **standing,
        "kept between steps": 100,
        "made in encode": 400,
        "made in decode": 50,
        "gradients": 400,
    }
    assert sum(held.parts.values()) == held.peak

    on_cpu = held_at_peak(trace, attribution, standing, {}, on_device=False)
    assert on_cpu is not None
    assert on_cpu.parts == {**standing, "made in backward": 64}
    assert held_at_peak(Trace(), attribution, standing, {}, on_device=True) is None


def test_traces_are_read_from_files(tmp_path: Path):
    record = Recorder()
    stock_step(record)
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"schemaVersion": 1, "traceEvents": record.events}, file)
    trace = Trace.load(path)
    kernel = next(event for event in trace.device if event.name == "decoder_gemm")
    assert kernel.launch is not None and kernel.launch.name == "cudaLaunchKernel"
    assert [event.name for event in kernel.launch.chain()] == [
        "cudaLaunchKernel",
        "aten::mm",
        "saelens_sparse::decode",
        "saelens_sparse::step",
    ]
    assert places(trace)["grad_W_enc"] == "backward W_enc"


def test_calls_that_lie_beside_their_operation_go_by_its_number():
    record = Recorder()
    with record.range("saelens_sparse::step"):
        fields = {"External id": 12}
        with record.range("saelens_sparse::decode"), record.op("aten::mm", **fields):
            pass
        with record.around(
            "cuda_runtime", "cudaLaunchKernel", correlation=1, **{"External id": 12}
        ):
            record.correlation = 1
            record.on_device("decoder_gemm", 1.0)
    assert places(record.trace()) == {"decoder_gemm": "decode"}


def test_quantities_have_prefixes():
    texts = [quantity(value, "B") for value in (None, 0.0, 999.0, 1234.0, 4.31e12, 999.9e6)]
    assert texts == ["-", "0 B", "999 B", "1.23 kB", "4.31 TB", "1 GB"]


def test_floor_is_one_product_and_one_pass_over_the_state():
    measured = Ceilings(1e9, {"float32": 1e9, "bfloat16": 4e9}, {})
    floor = measured.floor_ms(PROBLEM)
    assert measured.best_gemm == "bfloat16"
    assert floor["encoder product"] == pytest.approx(2e3 * N * D * L / 4e9)
    assert floor["update"] == pytest.approx(1e3 * 24 * PROBLEM.n_parameters / 1e9)
    assert floor["total"] == pytest.approx(floor["encoder product"] + floor["update"])


def test_settings_survive_json():
    case = case_of_shape([32, 256, 4, 64], "jumprelu_sparse", 6.0, 0.25)
    settings = Settings(case, AUTOCAST, "cpu", 3, 5, counters=False)
    again = Settings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again.to_json() == settings.to_json()
    assert again.describe() == ("jumprelu, 32 -> 256, mean L0 6, batch 64, 25% dead, autocast")


def test_a_shape_of_an_architecture_without_k_names_its_l0():
    case = case_of_shape([32, 256, 4, 64], "jumprelu", None, 0.0)
    assert (case.k, case.l0, case.architecture) == (None, 4.0, "jumprelu")
    assert case_of_shape([32, 256, 4, 64], "jumprelu", 9.0, 0.0).l0 == 9.0


def config_file(tmp_path: Path, **changes: Any) -> Path:
    values = json.loads(Path("configs/gpt2_small_topk.json").read_text())
    sae = changes.pop("sae", {})
    values |= {"device": "cpu", **changes}
    values["sae"] |= {"d_in": 32, "d_sae": 256, "k": 4, "device": "cpu", **sae}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def config(tmp_path: Path, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    return load_config(config_file(tmp_path, **changes))


def test_a_config_gives_sizes_settings_and_precision(tmp_path: Path):
    cfg = config(
        tmp_path, train_batch_size_tokens=128, autocast=True, sae={"aux_loss_coefficient": 0.5}
    )
    case = case_of_config(cfg, None, None, 0.0)
    assert (case.d_in, case.d_sae, case.k, case.batch) == (32, 256, 4, 128)
    assert case.architecture == "topk" and case.l0 is None
    assert case.options["aux_loss_coefficient"] == 0.5
    # Fields that only the sparse architecture has would be refused by stock.
    assert not {"implementation", "fused_adam", "d_in", "dtype"} & case.options.keys()
    assert precision_of_config(cfg) == AUTOCAST
    assert precision_of_config(config(tmp_path, sae={"dtype": "bfloat16"})) == BFLOAT16
    for arm in (STOCK, SPARSE):
        trainer = build_trainer(arm, case, FLOAT32, "cpu", ())
        assert trainer.sae.cfg.aux_loss_coefficient == 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--shape"),
        (["--shape", "32,256,4"], "--shape: '32,256,4'"),
        (["--shape", "32,256,4,x"], "--shape"),
        (["--shape", "0,256,4,64"], "d_in must be 1 or more; got 0"),
        (["--shape", "32,256,300,64"], "k must be from 1 to d_sae=256; got 300"),
        (["--shape", "32,256,4,64", "--l0", "8"], "--l0"),
        (["--shape", "32,256,4,64", "--architecture", "gated"], "--architecture: 'gated'"),
        (
            ["--shape", "32,256,4,64", "--architecture", "jumprelu_sparse", "--l0", "300"],
            "--l0: must be above 0 and at most d_sae=256; got 300",
        ),
        (["--shape", "32,256,4,64", "--dead-fraction", "1"], "--dead-fraction"),
        (["--shape", "32,256,4,64", "--steps", "0"], "--steps: must be 1 or more; got 0"),
        (["--shape", "32,256,4,64", "--arms", "stock,fast"], "--arms: unknown fast"),
        (["missing.json"], "missing.json"),
        (["missing.json", "--shape", "32,256,4,64"], "either a config file or --shape"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    output = tmp_path / "out"
    assert cli_main(["profile", *arguments, "--output", str(output)]) == 2
    assert named in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli_main(["profile", "--shape", "32,256,4,64", "--device", "cuda"]) == 2
    assert "--device: 'cuda'" in capsys.readouterr().err


def test_dtypes_that_are_not_measured_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"sae\.dtype: 'float64'"):
        precision_of_config(config(tmp_path, sae={"dtype": "float64"}))


def test_arms_and_shapes_are_parsed():
    assert [arm.name for arm in parse_arms("sparse, stock")] == ["stock", "sparse"]
    assert parse_shape("768,24576,32,4096") == [768, 24576, 32, 4096]


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_naming_parts_leaves_the_sae_as_it_was(arm: Any):
    case = case_of_shape([32, 256, 4, 64], "topk_sparse", None, 0.0)
    trainer = build_trainer(arm, case, FLOAT32, "cpu", ())
    before = dict(vars(trainer.sae))
    with named_parts(trainer):
        inside = vars(trainer.sae).keys() - before.keys()
        assert inside == {"encode_with_hidden_pre", "decode", "calculate_aux_loss"}
        hooked = [module for module in trainer.sae.modules() if module._forward_hooks]
        # A CUDA graph is replayed only while nobody hooks into a sparse SAE.
        assert bool(hooked) == (arm == STOCK)
    assert vars(trainer.sae) == before
    assert not any(module._forward_hooks for module in trainer.sae.modules())


def test_steps_are_timed_with_what_fired():
    case = Case("tiny", 32, 256, 4, 64, (FLOAT32,), dead_fraction=0.3)
    inputs = prepare_inputs(case, FLOAT32, "cpu", 2)
    trainer = build_trainer(SPARSE, case, FLOAT32, "cpu", inputs.batches, inputs.weights)
    done: list[int] = []
    timed = time_steps(trainer, inputs, 3, lambda: done.append(1))
    assert len(timed.ms) == len(done) == 3
    assert timed.firing.sum() == pytest.approx(4, rel=0.1)
    assert timed.peak_bytes is None and count_waits(trainer, inputs) is None


TINY = ["--device", "cpu", "--steps", "2", "--warmup-train", "2"]


def profile_tiny(output: Path, *more: str) -> dict[str, Any]:
    shape = ["--shape", "32,512,4,64"]
    assert cli_main(["profile", *shape, *TINY, "--output", str(output), *more]) == 0
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("architecture", ["topk_sparse", "jumprelu_sparse"])
def test_the_command_profiles_all_arms(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    dead = ("--dead-fraction", "0.3") if architecture == "topk_sparse" else ()
    results = profile_tiny(output, "--architecture", architecture, *dead)
    assert list(results["arms"]) == ["stock", "sparse", "sparse_runner"]
    for name, arm in results["arms"].items():
        assert arm["status"] == "ok", arm
        assert arm["ms_min"] <= arm["ms"] <= arm["ms_max"]
        assert sum(arm["phases_ms"].values()) == pytest.approx(arm["busy_ms"])
        assert arm["busy_ms"] + arm["idle_ms"] == pytest.approx(arm["divided_ms"])
        for phase in ("encode", "select", "decode", "loss", "statistics", "backward", "clip"):
            assert arm["phases_ms"][phase] > 0, (name, phase)
        assert arm["phases_ms"]["optimizer"] > 0
        assert sum(arm["backward_ms"].values()) == pytest.approx(arm["phases_ms"]["backward"])
        for part in ("W_enc", "W_dec", "activations"):
            assert arm["backward_ms"][part] > 0, (name, part)
        if architecture == "jumprelu_sparse":
            assert arm["backward_ms"]["threshold"] > 0
        memory = arm["memory"]
        weights = 4 * (2 * 32 * 512 + 512 + 32)
        assert memory["parts_bytes"]["parameters"] >= weights
        assert memory["parts_bytes"]["optimizer's moments"] >= 2 * weights
        assert sum(memory["parts_bytes"].values()) == pytest.approx(memory["traced_peak_bytes"])
        assert arm["l0"] == pytest.approx(4, rel=0.3)
        products = [row for row in arm["kernels"] if row["name"] == "mm"]
        assert products and products[0]["flops"] >= 2 * 64 * 32 * 512
        assert arm["waits"] is None and arm["counters"]["reason"]
        assert Trace.load(output / arm["trace"]).host
    assert "mul" in {row["name"] for row in results["arms"]["stock"]["kernels"]}

    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page and "Not measurable on a CPU" in page
    printed = capsys.readouterr().out
    assert "step over floor" in printed and "sparse, own runner" in printed
    assert not list(output.glob("memory_trace_*"))


def test_without_matplotlib_there_are_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from saelens_sparse.evaluation.profile import pictures

    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    output = tmp_path / "out"
    profile_tiny(output, "--arms", "sparse")
    assert "data:image" not in (output / "report.html").read_text()
    assert not list(output.glob("*.png"))


@pytest.fixture(scope="module")
def record_of_an_arm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("profile")
    return profile_tiny(folder, "--arms", "sparse")["arms"]["sparse"]


@pytest.fixture
def measured_arms(monkeypatch: pytest.MonkeyPatch, record_of_an_arm: dict[str, Any]) -> list[str]:
    """Replaces the measuring of an arm by a record made once; names the arms asked for."""
    asked: list[str] = []

    def measure(arm: Any, *_: Any) -> dict[str, Any]:
        asked.append(arm.name)
        return record_of_an_arm

    monkeypatch.setattr(command, "measure_arm", measure)
    return asked


def test_what_is_measured_is_kept_and_the_rest_added(
    measured_arms: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "out"
    arguments = ["--shape", "32,512,4,64", *TINY, "--output", str(output)]
    measure = command.measure_arm

    def interrupted_at_sparse(arm: Any, *rest: Any) -> dict[str, Any]:
        if arm == SPARSE:
            raise KeyboardInterrupt
        return measure(arm, *rest)

    monkeypatch.setattr(command, "measure_arm", interrupted_at_sparse)
    assert cli_main(["profile", *arguments]) == 130
    assert list(json.loads((output / "results.json").read_text())["arms"]) == ["stock"]
    assert (output / "report.html").exists()
    assert "Interrupted" in capsys.readouterr().err

    def without_memory_at_sparse(arm: Any, *rest: Any) -> dict[str, Any]:
        if arm == SPARSE:
            raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB. GPU 0 has ...")
        return measure(arm, *rest)

    monkeypatch.setattr(command, "measure_arm", without_memory_at_sparse)
    measured_arms.clear()
    assert cli_main(["profile", *arguments]) == 1
    assert measured_arms == ["sparse_runner"]
    arms = json.loads((output / "results.json").read_text())["arms"]
    assert arms["sparse"]["status"] == "out of memory"
    assert "out of memory" in capsys.readouterr().out

    monkeypatch.setattr(command, "measure_arm", measure)
    measured_arms.clear()
    assert cli_main(["profile", *arguments]) == 0
    assert measured_arms == ["sparse"]
    measured_arms.clear()
    assert cli_main(["profile", *arguments]) == 0
    assert measured_arms == []


def test_results_of_other_settings_are_measured_again(
    measured_arms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    profile_tiny(output, "--arms", "stock,sparse")
    measured_arms.clear()
    profile_tiny(output, "--arms", "stock", "--steps", "3")
    assert measured_arms == ["stock"]
    assert "other settings (steps)" in capsys.readouterr().out
    assert list(json.loads((output / "results.json").read_text())["arms"]) == ["stock"]


def test_a_config_can_be_profiled(measured_arms: list[str], tmp_path: Path):
    path = config_file(tmp_path, train_batch_size_tokens=64)
    output = tmp_path / "out"
    arguments = [str(path), *TINY, "--arms", "sparse", "--output", str(output)]
    assert cli_main(["profile", *arguments]) == 0
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert (settings["d_sae"], settings["batch"], settings["precision"]) == (256, 64, "float32")
    assert measured_arms == ["sparse"]


def gpu_results() -> dict[str, Any]:
    """Results as a GPU gives them, of the stock step above."""
    record = Recorder()
    stock_step(record)
    trace = record.trace()
    usage = usage_of(trace, Attribution(trace, SIZES, False), on_device=True, allows_tf32=False)
    arm = {
        "status": "ok", "ms": 1.0, "ms_min": 0.9, "ms_max": 1.1, "steps": 5, "idle_ms": 0.25,
        "divided_ms": 1.0,
        "tokens_per_second": 8000.0, "busy_ms": 0.75, "launches": usage.launches,
        "tensor_core_ms": 0.15, "floor_ms": {"total": 0.5}, "waits": {"topk_sae.py:451": 2},
        "waiting_calls": {"cudaStreamSynchronize": {"count": 2.0, "ms": 0.125}}, "l0": 4.0,
        "memory": {"peak_bytes": 2.0**31, "traced_peak_bytes": 2.0**31},
        "hardware": {"occupancy": 61.2, "dram_bytes": 2e9, "dram_bytes_per_second": 3e12},
        "implementation": "SAELens's own", "kernels": kernel_rows(usage, PROBLEM),
    }  # fmt: skip
    return {
        "settings": {"device": "cuda"},
        "ceilings": {"copy_bytes": 4e12, "gemm_flops": {"bfloat16": 8e14}},
        "arms": {"stock": arm},
    }


def test_tables_of_a_gpu_say_what_only_it_has():
    results = gpu_results()
    summary = {row[0].strip(): row[1] for row in summary_table(results)[1:]}
    assert summary["device idle, waiting for the host"] == "25%"
    assert summary["waits of the host"] == "2"
    assert summary["in CUDA's calls, ms"] == "0.125"
    assert summary["time on tensor cores"] == "20%"
    assert summary["SM occupancy"] == "61%"
    assert summary["of a copy's bandwidth, while busy"] == "75%"
    assert summary["peak memory, GiB"] == "2.00"
    header, *rows = kernel_table(results, results["arms"]["stock"], 3)
    assert "occupancy" in header and len(rows) == 4
    assert rows[-1][0].endswith("more")
    assert all(len(row) == len(header) for row in rows)
    brief = kernel_table(results, results["arms"]["stock"], 3, brief=True)
    assert set(brief[0]) == set(header) - {"per second", "FLOP/s"}
