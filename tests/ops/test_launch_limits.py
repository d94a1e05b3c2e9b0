"""Sizes beyond what one grid, one program or one list of a kernel holds."""

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.activation.dense import dense_jumprelu, dense_jumprelu_gradients
from tests.conftest import Target, target_parameters
from tests.support import threshold_search as gate_helpers
from tests.support import topk_search as select_helpers
from tests.support.ops import gather_dot, random_latents, require_gpu_memory

pytest.importorskip("triton")


@pytest.fixture(
    params=[
        parameter
        for parameter in target_parameters(interpreted=True)
        if parameter.values[0].backend == "triton"
    ]
)
def target(request: pytest.FixtureRequest) -> Target:
    """Where the kernels run."""
    return request.param


def module(name: str) -> Any:
    return import_module(f"saelens_sparse.ops.{name}")


@pytest.mark.parametrize("grid", [(2**31,), (1, 2**16), (1, 1, 2**16)])
def test_a_grid_that_no_gpu_launches_is_refused_in_one_line(grid: tuple[int, ...]) -> None:
    kernel = module("rows.kernels")._probe_kernel
    with pytest.raises(ValueError, match=r"_probe_kernel needs a grid of .*; at most") as raised:
        kernel[grid]
    assert str(grid[-1]) in str(raised.value) and "\n" not in str(raised.value)


@pytest.fixture
def forgotten_devices() -> Iterator[None]:
    """Nothing is known of a device before, nor after."""
    module("common.launch").max_warps.cache_clear()
    yield
    module("common.launch").max_warps.cache_clear()


@pytest.mark.usefixtures("forgotten_devices")
@pytest.mark.parametrize(("warp_size", "warps"), [(32, 32), (64, 16)])
def test_a_program_has_1024_threads_at_most(
    warp_size: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(warp_size=warp_size)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    device = torch.device("cuda", 0)
    assert module("common.launch").max_warps(device) == warps
    assert module("common.launch").warps(2**15, 512, device) == warps
    assert module("common.launch").warps(1024, 512, device) == 2


def test_a_screen_has_no_more_rows_than_a_grid_of_its_kernels(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    topk = select_helpers.random_problem(19, 16, 130, 3).to(device)
    pattern = gate_helpers.plain(19, 16, 90).to(device)
    expected = topk.select(backend), pattern.start(backend).result()
    screen, chunks = module("screen.gpu"), list[int]()
    multiply = screen.multiply_float16

    def spy(x: torch.Tensor, *rest: torch.Tensor) -> None:
        chunks.append(x.shape[0])
        multiply(x, *rest)

    monkeypatch.setattr(screen, "multiply_float16", spy)
    monkeypatch.setattr(screen, "MAX_GRID", (2**31 - 1, 1, 1))
    found = topk.select(backend), pattern.start(backend).result()
    assert chunks == [4, 4, 4, 4, 3, 8, 8, 3]
    assert torch.equal(found[0].latents, expected[0].latents)
    assert torch.equal(found[0].pre_acts, expected[0].pre_acts)
    gate_helpers.assert_same_bits(found[1], expected[1])


def test_pairs_beyond_the_programs_of_a_grid_are_computed(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, weight = torch.randn(3, 24, device=device), torch.randn(90, 24, device=device)
    latents = random_latents(3, 90, 70, device=device)
    expected = gather_dot(batch, latents, weight, backend)
    monkeypatch.setattr(module("rows.kernels"), "MAX_GRID", (2**31 - 1, 2, 2))
    assert torch.equal(gather_dot(batch, latents, weight, backend), expected)


@pytest.mark.parametrize("words", [1, 2, 4])
def test_marked_latents_beyond_one_list_of_words_are_found(
    words: int, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = gate_helpers.nothing_to_everything(3, 12, 100).to(device)
    expected = problem.start(backend).result()
    marks = module("search.mark_kernels")
    monkeypatch.setattr(marks, "LAUNCH", marks.MarkLaunch(LIST_WORDS=words))
    for capacity in (None, 25):
        pattern = problem.start(backend, capacity).result()
        gate_helpers.assert_same_bits(pattern, expected)


def test_a_list_that_no_program_holds_is_not_made(backend: Backend, device: torch.device) -> None:
    select = module("search.topk_kernels")
    x, weight = torch.empty(1, 1, device=device), torch.empty(2**20, 1, device=device)
    assert select.can_screen(x, weight, 8192)
    assert not select.can_screen(x, weight, 8193)
    bias = torch.randperm(2**20, device=device).float()
    problem = select_helpers.Problem(x.zero_(), weight.zero_(), bias, None, 8193)
    selection = problem.select(backend, 2**22)
    assert torch.equal(selection.latents.sort().values, bias.topk(8193).indices[None].sort().values)


def rows_above_grid(n_rows: int, d_in: int, d_sae: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n_rows, d_in, device="cuda")
    return x, torch.randn(d_sae, d_in, device="cuda") / d_in**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_a_grid_has_programs_for_are_screened_on_a_gpu(dtype: torch.dtype) -> None:
    require_gpu_memory(8)
    x, weight = (tensor.to(dtype) for tensor in rows_above_grid(2**19 + 100, 64, 256))
    bias = torch.zeros(256, device="cuda", dtype=dtype)
    problem = select_helpers.Problem(x, weight, bias, None, 4)
    selection = problem.select("triton", 2**30)
    threshold = torch.full((256,), 2.0, device="cuda", dtype=dtype)
    gate = gate_helpers.Problem(x, weight, bias, threshold)
    pattern = gate.start("triton", 2**24, 2**30).result()
    tail = select_helpers.Problem(x[-200:], weight, bias, None, 4).select("triton", 2**30)
    assert torch.equal(selection.latents[-200:], tail.latents)
    assert torch.equal(selection.pre_acts[-200:], tail.pre_acts)
    last = gate_helpers.Problem(x[-200:], weight, bias, threshold).start("triton").result()
    assert torch.equal(pattern.row_counts[-200:], last.row_counts)


@pytest.mark.gpu
def test_more_rows_than_a_grid_has_blocks_for_pass_a_dense_gate_on_a_gpu() -> None:
    require_gpu_memory(24)
    products = torch.randn(64 * 2**16 + 64, 300, device="cuda")
    bias, threshold = torch.zeros(300, device="cuda"), torch.full((300,), 0.5, device="cuda")
    acts, row_counts, latent_counts, _ = dense_jumprelu(
        products, bias, threshold, 0.1, torch.float32, "triton"
    )
    active = products > 0.5
    assert torch.equal(acts, products * active)
    assert torch.equal(row_counts, active.sum(1, dtype=torch.int32))
    assert torch.equal(latent_counts, active.sum(0, dtype=torch.int32))
    grad = torch.ones_like(products)
    grads, *_ = dense_jumprelu_gradients(
        products, bias, threshold, 0.1, False, grad, None, "triton"
    )
    assert torch.equal(grads, active.float())
