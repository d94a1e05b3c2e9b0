"""What the kernels of a trace moved, computed and held, and the tables of it."""

import re
from pathlib import Path
from typing import Any

import pytest

import saelens_sparse
from saelens_sparse.profile.ceilings import Ceilings
from saelens_sparse.profile.kernels import OWN_KERNELS, kernel_work
from saelens_sparse.profile.memory import held_at_peak
from saelens_sparse.profile.phases import Attribution
from saelens_sparse.profile.tables import kernel_table, quantity, summary_table
from saelens_sparse.profile.trace import HostEvent, Trace
from saelens_sparse.profile.usage import kernel_rows, usage_of
from saelens_sparse.profile.work import operation_work, uses_tensor_cores
from tests.support.profile import NODE, PROBLEM, SIZES, D, L, N, Recorder, op, stock_step


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
    sources = Path(saelens_sparse.__file__).parent.joinpath("ops").rglob("*.py")
    defined = set(re.findall(r"^def (_\w+_kernel)\(", "".join(map(Path.read_text, sources)), re.M))
    # The probe, which finds out whether kernels run, is no part of a step.
    assert OWN_KERNELS.keys() == defined - {"_probe_kernel"}


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
