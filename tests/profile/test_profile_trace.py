"""Each kernel of a trace goes to a phase of its step."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from saelens_sparse.profile.kernels import base_name, is_gemm, is_tensor_core_gemm
from saelens_sparse.profile.phases import places_in_order, result_shape
from saelens_sparse.profile.trace import Trace
from tests.support.profile import ENGINE, MAIN, NODE, D, L, N, Recorder, op, places, stock_step


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
        ("nvjet_sm90_hsh_320x128_64x3_1x2_h_bz_coopB_TNT", True, True),
        ("nvjet_sm90_sss_128x64", True, False),
        ("ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn", True, True),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize128x128x16", True, True),
        ("ampere_sgemm_128x64_tn", True, False),
        ("reduce_kernel", False, False),
        ("_gather_dot_kernel", False, False),
    ],
)
def test_gemms_are_known_by_name(name: str, gemm: bool, tensor_cores: bool):
    assert (is_gemm(name), is_tensor_core_gemm(name)) == (gemm, tensor_cores)


def test_result_shapes():
    assert result_shape(op("aten::mm", [[8, 16], [16, 64]], [])) == (8, 64)
    assert result_shape(op("aten::mm", [[8, 16], [16, 64], [8, 64]], [])) == (8, 64)
    assert result_shape(op("aten::addmm", [[64], [8, 16], [16, 64]], [])) == (8, 64)
    summed = op("aten::sum", [[8, 64], [], [], []], [], ["", "[0]", "True", ""])
    assert result_shape(summed) == (64,)
    assert result_shape(op("aten::sum", [[8, 64], []], [], ["", "[-1]", "False"])) == (8,)
    assert result_shape(op("aten::add", [[64], [8, 64], []], [])) == (8, 64)
    assert result_shape(op("aten::_foreach_mul_", [[[4], [8, 64]], []], [])) == (8, 64)


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
