from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.pairs import Rows
from saelens_sparse.ops.rows import operations
from saelens_sparse.ops.rows.operations import add_rows, row_combination, row_norms
from tests.conftest import Target
from tests.support.ops import (
    assert_within_budget,
    dense_code,
    gather_dot,
    gather_sum,
    order_of,
    random_latents,
    require_gpu_memory,
    segment_sum,
)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def check_gather_sum(
    backend: Backend, coefficients: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor
) -> None:
    out = gather_sum(coefficients, latents, weight, backend)
    assert out.dtype == weight.dtype
    assert out.device == weight.device
    gathered = weight[latents]
    exact = torch.einsum("nk,nkd->nd", coefficients.double(), gathered.double())
    plain = torch.einsum("nk,nkd->nd", coefficients.to(weight.dtype), gathered)
    size = torch.einsum("nk,nkd->nd", coefficients.double().abs(), gathered.double().abs())
    assert_within_budget(out, plain, exact, size)


def check_gather_dot(
    backend: Backend, batch: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor
) -> None:
    out = gather_dot(batch, latents, weight, backend)
    assert out.dtype == torch.float32
    assert out.device == weight.device
    gathered = weight[latents]
    exact = torch.einsum("nd,nkd->nk", batch.double(), gathered.double())
    plain = torch.einsum("nd,nkd->nk", batch.float(), gathered.float())
    size = torch.einsum("nd,nkd->nk", batch.double().abs(), gathered.double().abs())
    assert_within_budget(out, plain, exact, size)


def check_segment_sum(
    backend: Backend,
    latents: torch.Tensor,
    active: torch.Tensor,
    d_sae: int,
    coefficients: torch.Tensor,
    batch: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    order = order_of(latents, active, d_sae)
    sums, totals = segment_sum(order, coefficients, batch, dtype, backend)
    assert sums.dtype == totals.dtype == dtype
    assert sums.shape == (d_sae, batch.shape[1])
    assert totals.shape == (d_sae,)

    code = dense_code(latents, coefficients.masked_fill(~active, 0), d_sae)
    exact = code.double().T @ batch.double()
    plain = (code.to(batch.dtype).T @ batch).to(dtype)
    assert_within_budget(sums, plain, exact, code.double().abs().T @ batch.double().abs())
    assert_within_budget(
        totals.unsqueeze(1),
        code.sum(0).unsqueeze(1).to(dtype),
        code.double().sum(0).unsqueeze(1),
        code.double().abs().sum(0).unsqueeze(1),
    )

    never = torch.ones(d_sae, dtype=torch.bool, device=batch.device)
    never[latents[active]] = False
    assert torch.equal(sums[never], torch.zeros_like(sums[never]))
    assert torch.equal(totals[never], torch.zeros_like(totals[never]))


def test_uninitialized_memory_holds_nan_in_these_tests(device: torch.device) -> None:
    """Or else a row that nobody wrote could pass for zero."""
    assert torch.empty(64, device=device).isnan().all()
    assert torch.zeros(1, device=device).new_empty(64).isnan().all()


@pytest.mark.parametrize("law", ["uniform", "zipf"])
@pytest.mark.parametrize(
    ("n_rows", "d_sae", "k", "d"),
    [
        pytest.param(7, 33, 5, 19, id="odd"),
        pytest.param(1, 12, 3, 8, id="one row"),
        pytest.param(9, 1, 1, 6, id="one latent"),
        pytest.param(5, 40, 1, 1, id="k=1, d=1"),
        pytest.param(4, 16, 16, 12, id="k=d_sae"),
        pytest.param(2, 14, 7, 2501, id="wide"),
        pytest.param(12, 30, 20, 70, id="large k"),
    ],
)
def test_row_ops_match_float64(
    n_rows: int,
    d_sae: int,
    k: int,
    d: int,
    law: str,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    latents = random_latents(n_rows, d_sae, k, law, device)
    active = (torch.rand(n_rows, k) > 0.3).to(device)
    coefficients = torch.randn(n_rows, k).to(device, dtype)
    weight = torch.randn(d_sae, d).to(device, dtype)
    batch = torch.randn(n_rows, d).to(device, dtype)

    check_gather_sum(backend, coefficients, latents, weight)
    check_gather_dot(backend, batch, latents, weight)
    check_segment_sum(backend, latents, active, d_sae, coefficients, batch, dtype)


def test_row_ops_take_coefficients_and_batch_in_another_dtype_than_the_weight(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    latents = random_latents(6, 20, 4, device=device)
    coefficients = torch.randn(6, 4).to(device, other)
    weight = torch.randn(20, 35).to(device, dtype)
    batch = torch.randn(6, 35).to(device, other)

    check_gather_sum(backend, coefficients, latents, weight)
    check_gather_dot(backend, batch, latents, weight)
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), 20)
    sums, totals = segment_sum(order, coefficients, batch, dtype, backend)
    assert sums.dtype == totals.dtype == dtype
    code = dense_code(latents, coefficients, 20).double()
    exact = code.T @ batch.double()
    assert_within_budget(sums, exact.to(dtype), exact, code.abs().T @ batch.double().abs())


def test_row_ops_on_an_empty_batch(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    latents = torch.zeros(0, 3, dtype=torch.int64, device=device)
    coefficients = torch.zeros(0, 3, device=device, dtype=dtype)
    weight = torch.randn(12, 8).to(device, dtype)
    batch = torch.zeros(0, 8, device=device, dtype=dtype)

    assert gather_sum(coefficients, latents, weight, backend).shape == (0, 8)
    assert gather_dot(batch, latents, weight, backend).shape == (0, 3)
    order = order_of(latents, torch.zeros(0, 3, dtype=torch.bool, device=device), 12)
    sums, totals = segment_sum(order, coefficients, batch, dtype, backend)
    assert torch.equal(sums, torch.zeros_like(weight))
    assert torch.equal(totals, torch.zeros(12, device=device, dtype=dtype))


def test_segment_sum_without_any_active_pair_is_zero(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    latents = random_latents(5, 9, 2, device=device)
    coefficients = torch.full((5, 2), torch.nan, device=device, dtype=dtype)
    batch = torch.randn(5, 7).to(device, dtype)
    order = order_of(latents, torch.zeros(5, 2, dtype=torch.bool, device=device), 9)
    sums, totals = segment_sum(order, coefficients, batch, dtype, backend)
    assert torch.equal(sums, torch.zeros(9, 7, device=device, dtype=dtype))
    assert torch.equal(totals, torch.zeros(9, device=device, dtype=dtype))


def test_segment_sum_ignores_coefficients_of_inactive_pairs(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    latents = random_latents(20, 15, 6, device=device)
    active = (torch.rand(20, 6) > 0.5).to(device)
    coefficients = torch.randn(20, 6).to(device, dtype).masked_fill_(~active, torch.nan)
    batch = torch.randn(20, 11).to(device, dtype)
    check_segment_sum(backend, latents, active, 15, coefficients, batch, dtype)


@pytest.mark.parametrize(
    ("n_rows", "n_long"), [(1000, 1), (300, 3), (127, 1), (128, 2), (129, 2), (256, 1), (257, 1)]
)
def test_segment_sum_of_latents_that_are_on_every_row(
    n_rows: int, n_long: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Long segments beside latents that fire rarely or never."""
    d_sae, k = 12, n_long + 1
    latents = torch.full((n_rows, k), 4)
    latents[:, :n_long] = torch.tensor([3, 0, 11])[:n_long]
    latents[: n_rows // 50, -1] = 7
    active = torch.ones(n_rows, k, dtype=torch.bool)
    active[2::3, -1] = False
    check_segment_sum(
        backend,
        latents.to(device),
        active.to(device),
        d_sae,
        torch.randn(n_rows, k).to(device, dtype),
        torch.randn(n_rows, 21).to(device, dtype),
        dtype,
    )


def test_segment_sum_of_long_segments_in_tiles(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target.backend != "triton":
        return
    launch = import_module("saelens_sparse.ops.rows.segment_kernels").SegmentSumLaunch
    monkeypatch.setattr(
        "saelens_sparse.ops.rows.segment_kernels.SEGMENT_SUM", launch(SUM_COLS=32, PARTIAL_COLS=16)
    )
    latents = torch.tensor([3, 0]).repeat(150, 1).to(target.device)
    active = torch.ones_like(latents, dtype=torch.bool)
    active[40:, 1] = False
    coefficients, batch = torch.randn(150, 2), torch.randn(150, 53)
    check_segment_sum(
        target.backend,
        latents,
        active,
        5,
        coefficients.to(target.device),
        batch.to(target.device),
        torch.float32,
    )


def test_segment_sum_reads_no_row_with_a_zero_coefficient(target: Target) -> None:
    if target.backend != "triton":
        return
    latents = torch.tensor([[0, 1]]).repeat(70, 1).to(target.device)
    latents[30:, 1] = 2
    coefficients = torch.ones(70, 2, device=target.device)
    batch = torch.ones(70, 37, device=target.device)
    batch[5], coefficients[5] = float("nan"), 0
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), 4)
    sums, totals = segment_sum(order, coefficients, batch, torch.float32, target.backend)
    assert totals.tolist() == [69, 29, 40, 0]
    assert torch.equal(sums, totals[:, None].expand(4, 37))


def test_segment_sum_weighs_each_pair_once(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """With unit inputs every sum is a count, exact in any order of additions."""
    latents = random_latents(240, 20, 3, "zipf", device)
    active = (torch.rand(240, 3) > 0.2).to(device)
    ones = torch.ones(240, 3, device=device, dtype=dtype)
    batch = torch.ones(240, 5, device=device, dtype=dtype)
    order = order_of(latents, active, 20)
    sums, totals = segment_sum(order, ones, batch, dtype, backend)
    counts = torch.bincount(latents[active], minlength=20).to(dtype)
    assert counts.max() > 128
    assert torch.equal(totals, counts)
    assert torch.equal(sums, counts.unsqueeze(1).expand(20, 5))


@pytest.mark.default_algorithms
def test_row_ops_repeat_bit_for_bit_and_leave_their_inputs_alone(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    n_rows, d_sae, k, d = 150, 8, 2, 33
    latents = random_latents(n_rows, d_sae, k, "zipf", device)
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), d_sae)
    coefficients = torch.randn(n_rows, k).to(device, dtype)
    weight = torch.randn(d_sae, d).to(device, dtype)
    batch = torch.randn(n_rows, d).to(device, dtype)
    inputs = [latents, order.pairs, order.offsets, coefficients, weight, batch]
    before = [tensor.clone() for tensor in inputs]

    def run() -> tuple[torch.Tensor, ...]:
        return (
            gather_sum(coefficients, latents, weight, backend),
            gather_dot(batch, latents, weight, backend),
            *segment_sum(order, coefficients, batch, dtype, backend),
        )

    first = run()
    for _ in range(1 if device.type == "cpu" else 5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("n_rows", [9, 140])
def test_row_ops_give_the_same_bits_under_autocast(
    n_rows: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Backward may run inside the context or outside."""
    latents = random_latents(n_rows, 8, 2, "zipf", device)
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), 8)
    coefficients = torch.randn(n_rows, 2).to(device, dtype)
    weight = torch.randn(8, 33).to(device, dtype)
    batch = torch.randn(n_rows, 33).to(device, dtype)
    results: list[tuple[torch.Tensor, ...]] = []
    for enabled in (False, True):
        with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            results.append(
                (
                    gather_sum(coefficients, latents, weight, backend),
                    gather_dot(batch, latents, weight, backend),
                    *segment_sum(order, coefficients, batch, dtype, backend),
                )
            )
    for without, under in zip(*results, strict=True):
        assert without.dtype == under.dtype
        assert torch.equal(without, under)


NON_CONTIGUOUS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.T.contiguous().T,
    "strided": lambda tensor: torch.stack([tensor, tensor + 1], dim=-1)[..., 0],
    "expanded rows": lambda tensor: tensor[:1].expand_as(tensor),
    "expanded everywhere": lambda tensor: tensor[:1, :1].expand_as(tensor),
}


@pytest.mark.parametrize("layout", NON_CONTIGUOUS)
def test_row_ops_take_non_contiguous_batches_and_coefficients(
    layout: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Upstream gradients come transposed, sliced, or expanded with strides of zero."""
    n_rows, d_sae, k, d = 13, 17, 5, 9
    laid_out = NON_CONTIGUOUS[layout]
    latents = random_latents(n_rows, d_sae, k, device=device).T.contiguous().T
    active = (torch.rand(k, n_rows) > 0.3).to(device).T
    coefficients = laid_out(torch.randn(n_rows, k).to(device, dtype))
    batch = laid_out(torch.randn(n_rows, d).to(device, dtype))
    weight = torch.randn(d_sae, d).to(device, dtype)
    assert not coefficients.is_contiguous()
    assert not batch.is_contiguous()

    check_gather_sum(backend, coefficients, latents, weight)
    check_gather_dot(backend, batch, latents, weight)
    check_segment_sum(backend, latents, active, d_sae, coefficients, batch, dtype)


def test_row_ops_take_a_weight_inside_a_larger_tensor(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    latents = random_latents(6, 10, 3, device=device)
    weight = torch.randn(11, 14).to(device, dtype)[1:]
    check_gather_sum(backend, torch.randn(6, 3).to(device, dtype), latents, weight)
    check_gather_dot(backend, torch.randn(6, 14).to(device, dtype), latents, weight)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_row_ops_let_nan_and_inf_through_where_they_belong_and_nowhere_else(
    value: float, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    n_rows, d_sae, k, d = 20, 9, 2, 10
    latents = random_latents(n_rows, d_sae, k, device=device)
    clean_coefficients = (torch.rand(n_rows, k) + 1).to(device, dtype)
    clean_weight = (torch.rand(d_sae, d) + 1).to(device, dtype)
    clean_batch = (torch.rand(n_rows, d) + 1).to(device, dtype)
    coefficients, weight, batch = (
        tensor.clone() for tensor in (clean_coefficients, clean_weight, clean_batch)
    )
    coefficients[3, 1] = value
    weight[latents[0, 0], 6] = value
    batch[17, 2] = value
    bad_latent = latents == latents[0, 0]

    def assert_bad_exactly_at(expected: torch.Tensor, *actual: torch.Tensor) -> None:
        for tensor in actual:
            assert torch.equal(~tensor.isfinite(), expected.expand_as(tensor))

    def nowhere(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bool, device=device)

    expected = nowhere(n_rows, 1)
    expected[3] = True
    assert_bad_exactly_at(expected, gather_sum(coefficients, latents, clean_weight, backend))
    expected = nowhere(n_rows, d)
    expected[bad_latent.any(1), 6] = True
    assert_bad_exactly_at(expected, gather_sum(clean_coefficients, latents, weight, backend))

    assert_bad_exactly_at(bad_latent, gather_dot(clean_batch, latents, weight, backend))
    expected = nowhere(n_rows, 1)
    expected[17] = True
    assert_bad_exactly_at(expected, gather_dot(batch, latents, clean_weight, backend))

    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), d_sae)
    sums, totals = segment_sum(order, clean_coefficients, batch, dtype, backend)
    expected = nowhere(d_sae, d)
    expected[latents[17], 2] = True
    assert_bad_exactly_at(expected, sums)
    assert totals.isfinite().all()
    sums, totals = segment_sum(order, coefficients, clean_batch, dtype, backend)
    expected = nowhere(d_sae, 1)
    expected[latents[3, 1]] = True
    assert_bad_exactly_at(expected, sums, totals.unsqueeze(1))


@pytest.mark.parametrize("n", [0, 1, 7, 20])
def test_add_rows_adds_to_those_rows_alone(
    n: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    weight = torch.randn(20, 1100).to(device, dtype)
    rows = torch.randperm(20)[:n].to(device)
    values = torch.randn(n, 1100).to(device, dtype)
    expected = weight.clone()
    expected[rows] += values
    add_rows(weight, rows, values, backend)
    assert torch.equal(weight, expected)


def test_add_rows_takes_non_contiguous_rows_and_values_of_another_dtype(
    backend: Backend, device: torch.device
) -> None:
    weight = torch.zeros(20, 9, device=device)
    rows = torch.arange(1, 19, device=device)[::3]
    values = torch.arange(54.0, device=device).view(9, 6).T
    expected = weight.clone()
    expected[rows] += values
    add_rows(weight, rows, values.bfloat16(), backend)
    assert torch.equal(weight, expected)
    add_rows(weight, rows, values[:, :1].expand(6, 9), backend)
    expected[rows] += values[:, :1]
    assert torch.equal(weight, expected)


def test_row_ops_in_torch_take_float64() -> None:
    latents = random_latents(6, 20, 4)
    coefficients, batch = torch.randn(6, 4).double(), torch.randn(6, 35).double()
    weight = torch.randn(20, 35).double()
    gathered = weight[latents]
    sums = gather_sum(coefficients, latents, weight, "torch")
    torch.testing.assert_close(sums, torch.einsum("nk,nkd->nd", coefficients, gathered))
    dots = gather_dot(batch, latents, weight, "torch")
    torch.testing.assert_close(dots, torch.einsum("nd,nkd->nk", batch, gathered))
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), 20)
    grads, totals = segment_sum(order, coefficients, batch, torch.float64, "torch")
    code = dense_code(latents, coefficients, 20)
    torch.testing.assert_close(grads, code.T @ batch)
    torch.testing.assert_close(totals, code.sum(0))


def test_row_ops_in_torch_without_embedding_bag(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of devices for which PyTorch has no `embedding_bag`."""
    monkeypatch.setattr("saelens_sparse.ops.rows.operations._has_embedding_bag", lambda _: False)
    # Three rows a chunk: several chunks, the last one partial.
    monkeypatch.setattr("saelens_sparse.ops.rows.operations._CHUNK_BYTES", 3 * 5 * 19 * 4)
    latents = random_latents(17, 33, 5, "zipf")
    active = torch.rand(17, 5) > 0.3
    coefficients, batch = torch.randn(17, 5), torch.randn(17, 19)
    check_gather_sum("torch", coefficients, latents, torch.randn(33, 19))
    check_gather_dot("torch", batch, latents, torch.randn(33, 19))
    check_segment_sum("torch", latents, active, 33, coefficients, batch, torch.float32)


def test_row_ops_name_the_argument_with_a_wrong_shape(
    backend: Backend, device: torch.device
) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    latents, rows = random_latents(4, 6, 2, device=device), Rows.regular(4, 2)
    flat = latents.flatten()
    with pytest.raises(ValueError, match=r"coefficients must have shape \[8\]; got \[12\]"):
        operations.gather_sum(zeros(12), flat, rows, zeros(6, 5), backend)
    with pytest.raises(ValueError, match=r"bias must have shape \[5\]; got \[4\]"):
        operations.gather_sum(zeros(8), flat, rows, zeros(6, 5), backend, zeros(4))
    with pytest.raises(ValueError, match=r"batch must have shape \[4, 5\]; got \[4, 6\]"):
        operations.gather_dot(zeros(4, 6), flat, rows, zeros(6, 5), backend)
    with pytest.raises(ValueError, match=r"latents must have 4 x 2 elements; got 4"):
        operations.gather_sum(zeros(4), flat[:4], rows, zeros(6, 5), backend)
    with pytest.raises(ValueError, match=r"latents must have one dimension.*\[4, 2\]"):
        operations.gather_sum(zeros(4, 2), latents, rows, zeros(6, 5), backend)
    with pytest.raises(ValueError, match=r"latents must have one dimension and weight two.*\[5\]"):
        operations.gather_dot(zeros(4, 5), flat, rows, zeros(5), backend)
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), 6)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[8\]; got \[12\]"):
        operations.segment_sum(order, zeros(12), zeros(4, 5), torch.float32, backend)
    with pytest.raises(ValueError, match=r"batch must have 4 rows; got \[3, 5\]"):
        operations.segment_sum(order, zeros(8), zeros(3, 5), torch.float32, backend)
    with pytest.raises(ValueError, match=r"values must have shape \[4, 5\]; got \[4, 6\]"):
        add_rows(zeros(6, 5), latents[:, 0], zeros(4, 6), backend)


def test_backend_triton_runs_the_triton_kernels(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "triton":
        pytest.skip("about the Triton backend")
    called: list[str] = []

    def spy_on(module_name: str, name: str) -> None:
        module = import_module(f"saelens_sparse.ops.rows.{module_name}")
        original = getattr(module, name)

        def spy(*args: Any) -> Any:
            called.append(name)
            return original(*args)

        monkeypatch.setattr(module, name, spy)

    for name in ("gather_sum", "gather_dot", "add_rows"):
        spy_on("kernels", name)
    spy_on("segment_kernels", "segment_sum")
    latents = random_latents(4, 6, 2, device=device)
    order = order_of(latents, torch.ones_like(latents, dtype=torch.bool), 6)
    coefficients = torch.randn(4, 2).to(device)
    batch, weight = torch.randn(4, 5).to(device), torch.randn(6, 5).to(device)
    gather_sum(coefficients, latents, weight, backend)
    gather_dot(batch, latents, weight, backend)
    segment_sum(order, coefficients, batch, torch.float32, backend)
    add_rows(weight, latents[:3, 0], batch[:3], backend)
    assert called == ["gather_sum", "gather_dot", "segment_sum", "add_rows"]


@pytest.mark.gpu
@pytest.mark.parametrize("law", ["uniform", "zipf"])
@pytest.mark.parametrize("gpu_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
def test_row_ops_match_float64_at_a_training_shape(
    gpu_backend: Backend, gpu_dtype: torch.dtype, law: str
) -> None:
    n_rows, d_sae, k, d = 2048, 12_288, 32, 768
    latents = random_latents(n_rows, d_sae, k, law, "cuda")
    active = torch.rand(n_rows, k, device="cuda") > 0.1
    coefficients = torch.randn(n_rows, k, device="cuda").to(gpu_dtype)
    weight = torch.randn(d_sae, d, device="cuda").to(gpu_dtype)
    batch = torch.randn(n_rows, d, device="cuda").to(gpu_dtype)
    check_gather_sum(gpu_backend, coefficients, latents, weight)
    check_gather_dot(gpu_backend, batch, latents, weight)
    check_segment_sum(gpu_backend, latents, active, d_sae, coefficients, batch, gpu_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
def test_row_ops_address_weights_beyond_32_bits(gpu_backend: Backend) -> None:
    """The last rows of a huge weight give what the same rows give by themselves."""
    require_gpu_memory(20)
    d_sae, d, tail = 2**20 + 7, 2304, 300
    assert (d_sae - tail) * d > 2**31
    weight = torch.zeros(d_sae, d, device="cuda", dtype=torch.bfloat16)
    weight[-tail:] = torch.randn(tail, d, device="cuda")
    near = random_latents(64, tail, 8, "zipf", "cuda")
    far = near + d_sae - tail
    coefficients = torch.randn(64, 8, device="cuda", dtype=torch.bfloat16)
    batch = torch.randn(64, d, device="cuda", dtype=torch.bfloat16)

    sums = gather_sum(coefficients, far, weight, gpu_backend)
    assert torch.equal(sums, gather_sum(coefficients, near, weight[-tail:], gpu_backend))
    dots = gather_dot(batch, far, weight, gpu_backend)
    assert torch.equal(dots, gather_dot(batch, near, weight[-tail:], gpu_backend))
    del weight

    active = torch.ones_like(near, dtype=torch.bool)
    order = order_of(far, active, d_sae)
    grads, totals = segment_sum(order, coefficients, batch, torch.bfloat16, gpu_backend)
    order = order_of(near, active, tail)
    near_grads, near_totals = segment_sum(order, coefficients, batch, torch.bfloat16, gpu_backend)
    assert torch.equal(grads[-tail:], near_grads)
    assert torch.equal(totals[-tail:], near_totals)
    assert not grads[:-tail].any()
    rows = torch.tensor([0, d_sae - 3], device="cuda")
    expected = grads[-3] + batch[1]
    add_rows(grads, rows, batch[:2], gpu_backend)
    assert torch.equal(grads[0], batch[0])
    assert torch.equal(grads[-3], expected)
    assert not grads[1:-tail].any()


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
def test_row_ops_address_batches_beyond_32_bits(gpu_backend: Backend) -> None:
    """The last rows of a huge batch give what the same rows give by themselves."""
    require_gpu_memory(30)
    n_rows, d, d_sae, tail = 2**20 + 7, 2304, 12, 200
    assert (n_rows - tail) * d > 2**31
    batch = torch.zeros(n_rows, d, device="cuda", dtype=torch.bfloat16)
    batch[-tail:] = torch.randn(tail, d, device="cuda")
    latents = torch.zeros(n_rows, 1, device="cuda", dtype=torch.int64)
    latents[-tail:] = torch.randint(1, d_sae, (tail, 1), device="cuda")
    coefficients = torch.randn(n_rows, 1, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(d_sae, d, device="cuda", dtype=torch.bfloat16)
    near_batch, near_latents, near_coefficients = (
        tensor[-tail:].clone() for tensor in (batch, latents, coefficients)
    )

    dots = gather_dot(batch, latents, weight, gpu_backend)
    near_dots = gather_dot(near_batch, near_latents, weight, gpu_backend)
    torch.testing.assert_close(dots[-tail:], near_dots, rtol=1e-5, atol=1e-4)
    sums = gather_sum(coefficients, latents, weight, gpu_backend)
    near_sums = gather_sum(near_coefficients, near_latents, weight, gpu_backend)
    assert torch.equal(sums[-tail:], near_sums)
    del sums

    order = order_of(latents, latents > 0, d_sae)
    grads, _ = segment_sum(order, coefficients, batch, torch.bfloat16, gpu_backend)
    order = order_of(near_latents, near_latents > 0, d_sae)
    near_grads, _ = segment_sum(order, near_coefficients, near_batch, torch.bfloat16, gpu_backend)
    assert torch.equal(grads, near_grads)


@pytest.mark.parametrize("shape", [(1, 1), (70, 37), (129, 600)], ids=str)
def test_row_combination_and_norms_match_float64(
    target: Target, backend: Backend, shape: tuple[int, int]
) -> None:
    for dtype in target.dtypes:
        weight = torch.randn(shape).to(target.device, dtype)
        coefficients = torch.randn(shape[0]).to(target.device, dtype)
        coefficients[::3] = 0
        exact = coefficients.double() @ weight.double()
        scale = coefficients.double().abs() @ weight.double().abs()
        eps = torch.finfo(dtype).eps
        combined = row_combination(coefficients, weight, backend)
        assert combined.dtype == dtype
        assert ((combined.double() - exact).abs() <= 2 * eps * scale + 1e-30).all()
        norms = row_norms(weight, backend).double()
        torch.testing.assert_close(norms, weight.double().norm(dim=1), rtol=4 * eps, atol=0)


def test_row_combination_of_rounded_rows(target: Target, backend: Backend) -> None:
    if target.interpreted:
        pytest.skip("Triton's interpreter does not round to bfloat16")
    weight = torch.randn(70, 37, device=target.device)
    coefficients = torch.randn(70, device=target.device)
    combined = row_combination(coefficients, weight, backend, torch.bfloat16)
    assert combined.dtype == torch.float32
    assert torch.equal(combined, row_combination(coefficients, weight.bfloat16(), backend))
    assert not torch.equal(combined, row_combination(coefficients, weight, backend))


def test_row_combination_reads_no_row_with_a_zero_coefficient(target: Target) -> None:
    if target.backend != "triton":
        return
    weight = torch.randn(70, 37, device=target.device)
    weight[5] = float("nan")
    coefficients = torch.ones(70, device=target.device)
    coefficients[5] = 0
    assert row_combination(coefficients, weight, "triton").isfinite().all()


def test_row_combination_names_a_wrong_shape(target: Target, backend: Backend) -> None:
    weight = torch.randn(70, 37, device=target.device)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[70\]; got \[3\]"):
        row_combination(torch.ones(3, device=target.device), weight, backend)
