"""What the kernels of a trace did, in which phase of the step, and what held its memory."""

import json
from typing import Any

import pytest

from saelens_sparse.profile.contender import kernel_rows, peak_of
from saelens_sparse.profile.trace import base_name
from saelens_sparse.profile.work import operation_work
from tests.support.profile import ENGINE, NODE, D, L, N, Recorder, forward, places, stock_step


def test_kernels_of_a_stock_step_go_by_ranges_nodes_and_time():
    record = Recorder()
    stock_step(record)
    assert places(record.trace()) == {
        "dead_mask": "other",
        "encoder_gemm": "encode",
        "gather_topk": "search",
        "decoder_gemm": "decode",
        "mse": "losses",
        "fired": "statistics",
        "grad_recons": "backward losses",
        "grad_W_dec": "backward decode",
        "grad_acts": "backward search",
        "grad_W_enc": "backward encode",
        "accumulated": "backward other",
        "clipped": "clip",
        "adam": "optimizer",
        "scheduler": "other",
    }


def test_kernels_of_the_sparse_runner_go_by_its_ranges():
    record = Recorder()
    with record.step(), record.range("saelens_sparse::step"):
        with record.range("saelens_sparse::encode"):
            record.kernel("_round_rows_kernel")
            with record.range("saelens_sparse::search"):
                record.kernel("_group_maxima_kernel")
            with record.op("_EncodeSelected", [N, D], **forward(5)):
                record.kernel("relu")
        with record.range("saelens_sparse::decode"), record.op("_Decode", [N, D], **forward(6)):
            record.kernel("_gather_sum_kernel")
        with record.range("saelens_sparse::losses"):
            record.kernel("mse")
        with record.range("saelens_sparse::backward"):
            for node, sequence in (("_DecodeBackward", 6), ("_EncodeSelectedBackward", 5)):
                fields: Any = {"Sequence number": sequence, "Fwd thread id": 1}
                with record.op(NODE + node, thread=ENGINE, **fields):
                    record.kernel(f"{node}_kernel")
            record.kernel("after_all_nodes")
        with record.range("saelens_sparse::statistics"):
            record.kernel("count_firings")
        record.kernel("between")
        optimizer = record.range("Optimizer.step#ClippingAdam.step")
        with optimizer, record.range("saelens_sparse::optimizer"):
            with record.range("saelens_sparse::clip"):
                record.kernel("_square_sums_kernel")
            record.kernel("_update_kernel")
    assert places(record.trace()) == {
        "_round_rows_kernel": "encode",
        "_group_maxima_kernel": "search",
        "relu": "encode",
        "_gather_sum_kernel": "decode",
        "mse": "losses",
        "_DecodeBackward_kernel": "backward decode",
        "_EncodeSelectedBackward_kernel": "backward encode",
        "after_all_nodes": "backward other",
        "count_firings": "statistics",
        "between": "other",
        "_square_sums_kernel": "clip",
        "_update_kernel": "optimizer",
    }


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("_gather_sum_kernel", "_gather_sum_kernel"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTN", "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTN"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD"),
        (
            "void at::native::vectorized_elementwise_kernel<4, Fill<float>, T<char*> >(int, Fill)",
            "vectorized_elementwise_kernel",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<(int)4>(T1, T2)",
            "multi_tensor_apply_kernel",
        ),
        (
            "void at::native::elementwise_kernel<128, f<at::g()::{lambda()#1}>(T&)::{l#2}>(int, T)",
            "elementwise_kernel",
        ),
    ],
)
def test_kernels_are_named_without_templates_and_parameters(name: str, base: str):
    assert base_name(name) == base


FLOAT, LISTS = "float", "TensorList"


@pytest.mark.parametrize(
    ("name", "shapes", "types", "bytes_", "flops"),
    [
        ("mm", [[8, 16], [16, 64]], [FLOAT] * 2, 4 * (128 + 1024 + 512), 2 * 8192),
        ("mm", [[8, 16], [16, 64]], ["c10::BFloat16"] * 2, 2 * 1664, 16384),
        ("mm", [[8, 16], [16, 64], [8, 64]], [FLOAT] * 3, 4 * 1664, 16384),
        ("addmm", [[64], [8, 16], [16, 64]], [FLOAT] * 3, 4 * (64 + 1664), 16384),
        ("bmm", [[3, 2, 5], [3, 5, 4]], [FLOAT] * 2, 4 * (30 + 60 + 24), 240),
        ("mv", [[8, 16], [16]], [FLOAT] * 2, 4 * (128 + 16 + 8), 128),
        ("add", [[8, 64], [64], 1], [FLOAT, FLOAT, "Scalar"], 4 * 1088, 512),
        ("add_", [[8, 64], [64], 1], [FLOAT, FLOAT, "Scalar"], 4 * 1088, 512),
        ("gt", [[8, 64], 0], [FLOAT, "Scalar"], 4 * 512 + 512, 512),
        ("copy_", [[8, 64], [8, 64], False], ["c10::BFloat16", FLOAT, ""], 1024 + 2048, 0),
        ("zero_", [[8, 64]], [FLOAT], 2048, 0),
        ("sum", [[8, 64], [0], True, None], [FLOAT, "", "", ""], 2048 + 256, 512),
        ("any", [[8, 64], 1, False], ["c10::BFloat16", "", ""], 1024 + 8, 512),
        ("norm", [[8, 64], 2, [1], False], [FLOAT, "Scalar", "", ""], 2048 + 32, 512),
        ("div_", [[8, 64], [64], "floor"], [FLOAT, FLOAT, ""], 2048 + 256 + 2048, 512),
        ("_foreach_norm", [[[8], [4, 4]], 2.0, None], [LISTS, "Scalar", ""], 96 + 8, 24),
        ("_foreach_mul_", [[[8], [4, 4]], []], [LISTS, FLOAT], 192 + 4, 24),
    ],
)
def test_work_of_operations_follows_from_their_arguments(
    name: str, shapes: list[Any], types: list[str], bytes_: float, flops: float
):
    is_tensor = [kind == LISTS or kind in ("float", "c10::BFloat16") for kind in types]
    if name == "addmm":
        shapes, types, is_tensor = [*shapes, 1, 1], [*types, "", ""], [*is_tensor, False, False]
    pairs = list(zip(shapes, is_tensor, strict=True))
    constants = ["" if tensor or value is None else repr(value) for value, tensor in pairs]
    dims = [shape if tensor else [] for shape, tensor in pairs]
    work = operation_work(f"aten::{name}", json.dumps([dims, types, constants]))
    assert work == (bytes_, flops)


def test_work_of_a_product_into_a_buffer():
    float8, half = "c10::Float8_e4m3fn", "c10::Half"
    dims: list[Any] = [[32, 64], [64, 48], [], [], [], [], [], [], [32, 48]]
    types = [float8, float8, "float", "float", "", "", "Scalar", "Scalar", half]
    constants = ["", "", "", "", "", "", "5", "False", ""]
    bytes_ = 32 * 64 + 64 * 48 + 2 * 4 + 2 * 32 * 48
    work = operation_work("aten::_scaled_mm", json.dumps([dims, types, constants]))
    assert work == (bytes_, 2 * 32 * 64 * 48)
    dims, types = [[8, 64], [64, 16], [8, 16]], [half, half, "float"]
    work = operation_work("aten::mm", json.dumps([dims, types, ["", "", ""]]))
    assert work == (2 * 8 * 64 + 2 * 64 * 16 + 4 * 8 * 16, 2 * 8 * 64 * 16)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("aten::some_new_operation", [[[8, 64]], ["float"], [""]]),
        ("_EncodeSelectedBackward", [[[8, 64]], ["float"], [""]]),
        ("aten::add", [[], [], []]),
        ("aten::t", [[[8, 64]], ["float"], [""]]),  # a view moves nothing
        ("aten::nonzero", [[[8, 64]], ["float"], [""]]),  # depends on the data
    ],
)
def test_work_that_is_not_known_is_not_made_up(name: str, arguments: list[Any]):
    assert operation_work(name, json.dumps(arguments)) is None


def test_time_is_counted_once_and_kernels_share_their_operations_work():
    record = Recorder()
    for start in (5000.0, 5100.0):
        operation = record.op("aten::mm", [N, L], [L, D], kind="c10::Half")
        with record.step(), record.range("saelens_sparse::decode"), operation:
            record.kernel("split_gemm", 30.0, start)
            record.kernel("reduce_of_gemm", 10.0, start + 25)  # begins before the other ends
    trace = record.trace()
    assert trace.n_steps == 2 and trace.ms_by("phase") == {"decode": pytest.approx(0.04)}
    assert trace.busy_ms == pytest.approx(0.035)
    rows = {row["name"]: row for row in kernel_rows(trace)}
    bytes_ = 2 * (N * L + L * D + N * D)
    assert rows["mm: split_gemm"]["bytes"] == pytest.approx(0.75 * bytes_)
    assert rows["mm: reduce_of_gemm"]["bytes"] == pytest.approx(0.25 * bytes_)
    assert rows["mm: split_gemm"]["flops"] == pytest.approx(0.75 * 2 * N * L * D)
    assert rows["mm: split_gemm"]["tensor_cores"] and rows["mm: split_gemm"]["launches"] == 1
    assert rows["mm: split_gemm"]["estimated_occupancy"] == 50


def test_kernels_ask_for_what_their_launch_declares():
    record = Recorder()
    with record.step(), record.range("saelens_sparse::decode"):
        for bytes_ in (1000, 3000):
            with record.range(f"saelens_sparse::work {bytes_} 500"):
                record.kernel("_gather_sum_kernel")
        record.kernel("_undeclared_kernel")
    declared, undeclared = kernel_rows(record.trace())
    assert (declared["bytes"], declared["flops"], declared["phases"]) == (4000, 1000, ["decode"])
    assert (undeclared["bytes"], undeclared["flops"]) == (None, None)


def test_waits_are_found_by_phase():
    record = Recorder()
    with record.step(), record.range("saelens_sparse::encode"):
        record.kernel("search")
        for name in ("cudaStreamSynchronize", "cudaMemcpyAsync", "cudaStreamSynchronize"):
            with record.around("cuda_runtime", name):
                record.clock += 98
    waits = record.trace().waits()
    assert waits == {"cudaStreamSynchronize in encode": {"count": 2, "ms": pytest.approx(0.198)}}


def test_memory_at_the_peak_is_what_the_step_has_not_given_back():
    record = Recorder()
    with record.step():
        with record.range("saelens_sparse::encode"):
            record.memory(400, address=1, total=1400)
            record.memory(100, address=2, total=1500)
        with record.range("saelens_sparse::decode"):
            record.memory(-100, address=2, total=1400)
            record.memory(50, address=3, total=1450)
        with record.range("saelens_sparse::backward"):
            record.kernel("gradients")
            record.memory(300, address=4, total=1750)
            record.memory(-300, address=4, total=1450)
            record.memory(400, address=4, total=1850)
        record.memory(-400, address=4, total=1450)
    record.memory(9000, address=7, total=10450)
    standing = {"parameters": 600, "optimizer's moments": 300}
    made = {"made in encode": 400, "made in decode": 50, "gradients": 400}
    assert peak_of(record.trace(), standing) == {
        "traced_peak_bytes": 1850,
        "peak_phase": "backward",
        "parts_bytes": {**standing, "kept between steps": 100, **made},
    }
    record = Recorder()
    with record.step(), record.range("saelens_sparse::backward"), record.op("aten::mm", [N, D]):
        record.memory(64, address=9, total=64, device=0)
        record.memory(-64, address=9, total=0, device=0)
    on_cpu = peak_of(record.trace(), standing)
    assert on_cpu["parts_bytes"] == {**standing, "made in backward": 64}
