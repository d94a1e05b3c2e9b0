"""The search for the pairs of rows and latents inside the window of a gate."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from tests.conftest import Target
from tests.support.ops import cublas_switch, require_gpu_memory
from tests.support.threshold_search import (
    BUFFER_BYTES,
    DISTRIBUTIONS,
    Expected,
    Pattern,
    Problem,
    assert_pattern,
    assert_same_bits,
    heavy_tails,
    large_thresholds,
    nothing_to_everything,
    outlier_inputs,
    plain,
    whole_numbers,
)


@pytest.fixture
def searches(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Capacity of each search by Triton's kernels."""
    capacities: list[int] = []
    if target.backend == "triton":
        gate_triton = import_module("saelens_sparse.ops.search.threshold_kernels")
        original = gate_triton.find_pattern

        def spy(*args: Any) -> Any:
            capacities.append(args[5])
            return original(*args)

        monkeypatch.setattr(gate_triton, "find_pattern", spy)
    return capacities


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_pattern_matches_float64(
    distribution: Callable[[int, int, int], Problem],
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    searches: list[int],
) -> None:
    problem = distribution(6, 25, 75)
    problem = problem.to(device, dtype)
    pattern = problem.start(backend).result()
    # In bfloat16 a window beside a large threshold is narrower than a rounding.
    assert_pattern(problem, pattern, clear=0.0 if dtype == torch.bfloat16 else 0.9)
    assert pattern.totals[0] > 0
    assert searches == ([6 * 75] if backend == "triton" else [])


def test_pattern_has_rows_of_nothing_and_of_everything(
    backend: Backend, device: torch.device
) -> None:
    problem = nothing_to_everything(6, 25, 75).to(device)
    counts = problem.start(backend).result().row_counts.tolist()
    assert counts[0] == counts[3] == 75
    assert counts[1] == counts[4] == 1
    assert 1 < counts[2] < 75
    problem.bias[75 // 3] = -5e3
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern)
    assert pattern.offsets.diff()[[1, 4]].tolist() == [0, 0]
    nowhere = replace(problem, threshold=torch.full_like(problem.threshold, 1e5))
    assert nowhere.start(backend).result().totals == (0, 0)


@pytest.mark.parametrize("distribution", [nothing_to_everything], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae"),
    [
        pytest.param(1, 33, 77, id="one row"),
        pytest.param(5, 1, 31, id="d_in=1, less than a word"),
        pytest.param(3, 8, 32, id="one word"),
        pytest.param(3, 7, 65, id="just over two words"),
        pytest.param(9, 12, 1, id="one latent"),
        pytest.param(17, 9, 33, id="more rows than a tile"),
        pytest.param(2, 8, 301, id="more latents than a tile"),
        pytest.param(2, 1101, 40, id="wide"),
        pytest.param(0, 12, 40, id="no rows"),
    ],
)
def test_pattern_takes_any_size(
    n_rows: int,
    d_in: int,
    d_sae: int,
    distribution: Callable[[int, int, int], Problem],
    backend: Backend,
    device: torch.device,
) -> None:
    problem = distribution(n_rows, d_in, d_sae).to(device)
    assert_pattern(problem, problem.start(backend).result())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_pattern_takes_a_non_contiguous_input(
    layout: str, backend: Backend, device: torch.device
) -> None:
    problem = plain(5, 21, 40).to(device)
    x = {
        "transposed": problem.x.T.contiguous().T,
        "strided": torch.stack([problem.x, problem.x + 1], dim=-1)[..., 0],
        "expanded": problem.x[:1].expand(5, 21),
    }[layout]
    assert not x.is_contiguous()
    problem = replace(problem, x=x)
    assert_pattern(problem, problem.start(backend).result())


@pytest.mark.default_algorithms
def test_pattern_repeats_bit_for_bit_and_leaves_its_inputs_alone(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    problem = heavy_tails(5, 24, 70).to(device, dtype)
    before = problem.to("cpu")
    first, second = problem.start(backend).result(), problem.start(backend).result()
    assert_same_bits(first, second)
    for name in ("x", "weight", "bias", "threshold"):
        assert torch.equal(getattr(problem, name).cpu(), getattr(before, name))


def test_pattern_lists_few_pairs_that_are_not_of_it(
    backend: Backend, device: torch.device, target: Target
) -> None:
    problem = plain(target.few_rows(64), 96, 1000).to(device)
    pattern = problem.start(backend).result()
    n_spare = int((pattern.keys[: pattern.totals[0]] == 1000).sum())
    assert n_spare <= (0.02 * pattern.totals[0] if backend == "triton" else 0)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7])
def test_pattern_by_chunks_of_rows_gives_the_same_bits(
    rows_per_chunk: int, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = whole_numbers(7, 15, 45).to(device)
    whole = problem.start(backend).result()
    chunks: list[int] = []
    owner: object = torch.Tensor
    name = "nonzero"
    if backend == "triton":
        owner, name = import_module("saelens_sparse.ops.screen.gpu"), "multiply_float16"
    original = getattr(owner, name)

    def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        chunks.append(tensor.shape[0])
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    # The screen holds two bytes a product, the full computation four.
    product_bytes = 2 if backend == "triton" else 4
    pending = problem.start(backend, buffer_bytes=rows_per_chunk * 45 * product_bytes)
    monkeypatch.undo()
    assert chunks == {1: [1] * 7, 3: [3, 3, 1], 7: [7]}[rows_per_chunk]
    chunked = pending.result()
    assert_same_bits(whole, chunked)
    # The sums are exact, hence the float64 ones.
    exact = problem.to(device, torch.float64)
    pre_acts = exact.x @ exact.weight.T + exact.bias
    inside = pre_acts > exact.threshold - exact.bandwidth / 2
    has_key = chunked.keys < 45
    assert torch.equal(chunked.keys[has_key].long(), inside.nonzero()[:, 1])
    assert torch.equal(chunked.pre_acts[has_key].double(), pre_acts[inside])
    assert torch.equal(chunked.row_counts.long(), (pre_acts > exact.threshold).sum(1))


@pytest.mark.parametrize("buffer_bytes", [1, 500])
def test_pattern_by_chunks_of_rows_matches_float64(
    buffer_bytes: int, backend: Backend, device: torch.device
) -> None:
    """Also with a buffer smaller than a single row, which then holds one row at a time."""
    problem = heavy_tails(7, 24, 90).to(device)
    for capacity in (20, 7 * 90):
        pattern = problem.start(backend, capacity, buffer_bytes).result()
        assert_pattern(problem, pattern)


@pytest.mark.parametrize("distribution", [heavy_tails, nothing_to_everything])
@pytest.mark.parametrize("room", ["none", "one", "half", "one short", "exact", "one more", "ample"])
def test_pattern_is_the_same_with_any_capacity(
    room: str,
    distribution: Callable[[int, int, int], Problem],
    backend: Backend,
    device: torch.device,
    searches: list[int],
) -> None:
    """What does not fit is found a second time, with room for just that."""
    problem = distribution(4, 9, 40).to(device)
    whole = problem.start(backend).result()
    assert_pattern(problem, whole)
    searches.clear()

    n_pairs = whole.totals[0]
    capacity = {
        "none": 0, "one": 1, "half": n_pairs // 2, "one short": n_pairs - 1, "exact": n_pairs,
        "one more": n_pairs + 1, "ample": 1000,
    }[room]  # fmt: skip
    pending = problem.start(backend, capacity)
    if backend == "triton":
        first = pending.pattern
        kept = min(capacity, n_pairs)
        assert first.latents.numel() == capacity
        # What fits is right at once, and the rows end where the room does.
        assert torch.equal(first.offsets, whole.offsets.clamp(max=capacity))
        assert torch.equal(first.keys[:kept], whole.keys[:kept])
        assert torch.equal(first.pre_acts[:kept], whole.pre_acts[:kept])
    result = pending.result()
    assert_same_bits(result, whole)
    assert_pattern(problem, result)
    fits = capacity >= n_pairs
    assert (result.latents is pending.pattern.latents) == (fits or backend == "torch")
    if backend == "triton":
        assert searches == ([capacity] if fits else [capacity, n_pairs])
        assert result.latents.numel() == max(capacity, n_pairs)


def test_a_search_that_nobody_has_any_more_holds_no_memory(
    backend: Backend, device: torch.device
) -> None:
    """Nor until Python looks for circles: a training would hold the inputs of many steps."""
    problem = plain(3, 20, 170).to(device)
    x = problem.x.clone()
    was_dropped = weakref.ref(x)
    gc.disable()
    try:
        search = replace(problem, x=x).start(backend)
        del search, x
        assert was_dropped() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("capacity", [1, 6 * 70])
def test_pattern_attaches_no_graph(capacity: int, backend: Backend, device: torch.device) -> None:
    """Neither at once nor when it is found a second time."""
    problem = plain(6, 24, 70).to(device)
    without = problem.start(backend).result()
    for tensor in (problem.x, problem.weight, problem.bias, problem.threshold):
        tensor.requires_grad_()
    with torch.enable_grad():
        pending = problem.start(backend, capacity)
        assert not pending.pattern.pre_acts.requires_grad
        result = pending.result()
        assert not result.pre_acts.requires_grad
        assert torch.is_grad_enabled()
    assert_same_bits(result, without)


def test_pattern_with_the_capacity_of_an_earlier_batch_under_autocast(
    backend: Backend, device: torch.device, searches: list[int]
) -> None:
    """The size is asked for within the context that the search began in."""
    problem = plain(6, 24, 70).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        whole = problem.start(backend).result()
        again = problem.start(backend, 5).result()
    assert_same_bits(whole, again)
    assert len(searches) == (3 if backend == "triton" else 0)


def test_pattern_under_autocast_is_the_dense_encoder_under_autocast(
    backend: Backend, device: torch.device
) -> None:
    """A bfloat16 product, to which the float32 bias is added in float32."""
    problem = heavy_tails(6, 48, 75).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        dense = problem.x @ problem.weight.T + problem.bias
        pattern = problem.start(backend).result()
    assert pattern.pre_acts.dtype == dense.dtype == torch.float32
    assert_pattern(problem, pattern, torch.bfloat16)
    n_pairs = pattern.totals[0]
    place = pattern.rows[:n_pairs].long(), pattern.latents[:n_pairs]
    if backend == "torch":
        assert torch.equal(pattern.pre_acts, dense[place])
    exact = Expected.of(problem)
    error = (pattern.pre_acts[:n_pairs].double() - exact.pre_acts[place]).abs()
    assert (error > exact.rounding[place]).any()  # or it would not be bfloat16


def test_pattern_keeps_nan_and_inf_under_autocast(backend: Backend, device: torch.device) -> None:
    problem = plain(6, 24, 70).to(device)
    problem.x[3, 2] = torch.nan
    problem.x[4, 5] = torch.inf
    problem.weight[[17, 69]] = torch.nan
    problem.bias[40], problem.bias[41] = torch.inf, -torch.inf
    with torch.autocast(device.type, torch.bfloat16):
        pattern = problem.start(backend).result()
    assert_pattern(problem, pattern, torch.bfloat16)


def scaled_whole_numbers(distance: float) -> Problem:
    """On row 0 every gate is within `distance`, up or down, of a pre-activation of up to 2^22.

    Products are of whole numbers that float16 rounds and whose sums float32 does not.
    """
    problem = Problem(
        x=torch.randint(-4000, 4001, (4, 16)).float(),
        weight=torch.randint(-60, 61, (90, 16)).float(),
        bias=torch.randint(-9, 10, (90,)).float(),
        threshold=torch.zeros(90),
        bandwidth=0.5,
    )
    problem.x[3] = problem.x[0]
    signs = 2 * torch.randint(0, 2, (90,)) - 1
    pre_acts = problem.x[0].double() @ problem.weight.double().T + problem.bias
    problem.threshold.copy_(pre_acts - signs * distance)
    # The input of the test: low precision is wrong about a good part.
    low = problem.x[:1].half().float() @ problem.weight.half().float().T + problem.bias
    above = (low > problem.threshold)[0]
    assert ((above != (signs > 0)).double().mean() > 0.1) and (low.abs() < 2**23).all()
    return problem


def test_gates_closer_than_the_screen_can_tell_are_decided_as_in_float32(
    backend: Backend, device: torch.device
) -> None:
    problem = scaled_whole_numbers(distance=0.5).to(device)
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern, clear=0.5)
    exact = problem.to(device, torch.float64)
    pre_acts = exact.x @ exact.weight.T + exact.bias
    assert torch.equal(pattern.row_counts.long(), (pre_acts > exact.threshold).sum(1))


def test_windows_closer_than_the_screen_can_tell_are_decided_as_in_float32(
    backend: Backend, device: torch.device
) -> None:
    problem = scaled_whole_numbers(distance=8.0).to(device)
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern, clear=0.5)
    exact = problem.to(device, torch.float64)
    pre_acts = exact.x @ exact.weight.T + exact.bias
    expected = (pre_acts > exact.threshold).nonzero()
    has_key = pattern.keys < 90
    assert torch.equal(pattern.keys[has_key].long(), expected[:, 1])
    assert torch.equal(pattern.rows[has_key].long(), expected[:, 0])
    if backend == "triton":
        assert not has_key[: pattern.totals[0]].all()


def test_a_pre_activation_at_its_threshold_is_not_active(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Though it is in the pattern, as are all that are anywhere inside the window."""
    levels = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 1.0])
    problem = Problem(
        x=levels.unsqueeze(1),
        weight=torch.ones(5, 1),
        bias=torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]),
        threshold=torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]),
        bandwidth=1.0,
    ).to(device, dtype)
    pattern = problem.start(backend).result()
    assert pattern.row_counts.tolist() == [0, 0, 0, 0, 5, 5]
    in_pattern = torch.zeros(6, 6, dtype=torch.bool, device=device)
    in_pattern[pattern.rows.long(), pattern.keys.long()] = True
    assert in_pattern[2:, :5].all()
    assert not in_pattern[0, :5].any()


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_pattern_keeps_nan_and_inf_where_they_belong(
    argument: str, value: float, backend: Backend, device: torch.device
) -> None:
    problem = plain(5, 20, 70)
    clean = Expected.of(problem).inside
    tensor: torch.Tensor = getattr(problem, argument)
    tensor[2] = value  # a bias, or all of a row
    if argument != "bias":
        tensor[4, 7] = value
    problem = problem.to(device)
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern)
    in_pattern = torch.zeros(5, 71, dtype=torch.bool)
    in_pattern[pattern.rows.cpu().long(), pattern.keys.cpu().long()] = True
    in_pattern = in_pattern[:, :70]
    bad = torch.zeros(5, 70, dtype=torch.bool)
    for place in (2,) if argument == "bias" else (2, 4):
        (bad if argument == "x" else bad.T)[place] = True
    if value != value:
        assert in_pattern[bad].all()
    assert not (clean[0] & ~bad & ~in_pattern).any()
    assert not (in_pattern & ~bad & ~clean[1]).any()


def test_rows_too_wide_for_a_program_are_computed_in_full(
    backend: Backend, device: torch.device, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        monkeypatch.setattr("saelens_sparse.ops.search.mark_kernels.MAX_D_IN", 20)
    for d_in in (20, 21):
        problem = plain(3, d_in, 40).to(device)
        assert_pattern(problem, problem.start(backend, 1).result())
    assert [capacity == 1 for capacity in searches] == [True, False] * (backend == "triton")


@pytest.mark.parametrize("shape", [(3, 19), (20,), (1, 3, 20)])
def test_search_above_threshold_names_an_input_of_a_wrong_shape(
    shape: tuple[int, ...], backend: Backend, device: torch.device
) -> None:
    problem = replace(plain(3, 20, 40).to(device), x=torch.zeros(shape, device=device))
    with pytest.raises(ValueError, match=r"x must have shape \[n_rows, 20\]; got \["):
        problem.start(backend, 100)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "distribution",
    [plain, heavy_tails, outlier_inputs, large_thresholds, nothing_to_everything],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_pattern_matches_float64_at_a_training_shape(
    autocast: bool,
    distribution: Callable[[int, int, int], Problem],
    gpu_backend: Backend,
) -> None:
    problem = distribution(300, 768, 12_289).to("cuda")
    with (
        # By default cuBLAS may round partial sums to bfloat16, which no bound here allows for.
        cublas_switch("allow_bf16_reduced_precision_reduction", False),
        torch.autocast("cuda", torch.bfloat16, enabled=autocast),
    ):
        patterns = [
            problem.start(gpu_backend, capacity, buffer_bytes).result()
            for capacity in (1000, 300 * 12_289)
            for buffer_bytes in (BUFFER_BYTES, 2**20)
        ]
    for pattern in patterns:
        assert_pattern(problem, pattern, torch.bfloat16 if autocast else None, clear=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_pattern_addresses_products_beyond_32_bits(autocast: bool) -> None:
    """The last rows, in a single chunk of more than 2^31 products, are as by themselves."""
    require_gpu_memory(20)
    n_rows, d_sae, tail = 4200, 2**19 + 8, 20
    assert (n_rows - tail) * d_sae > 2**31
    problem = Problem(
        x=torch.randn(n_rows, 64, device="cuda"),
        weight=torch.randn(d_sae, 64, device="cuda"),
        bias=torch.zeros(d_sae, device="cuda"),
        threshold=torch.full((d_sae,), 36.0, device="cuda"),
    )
    problem.weight[-5] *= 10  # so that one of the last latents is active
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        pattern = problem.start("triton", 2**20, 24 * 2**30).result()
    last_problem = replace(problem, x=problem.x[-tail:])
    first = int(pattern.offsets[-tail - 1])
    row_counts = pattern.row_counts[-tail:]
    last = Pattern(
        pattern.latents[first:],
        pattern.keys[first:],
        pattern.pre_acts[first:],
        pattern.offsets[-tail - 1 :] - first,
        (pattern.rows[first:] - (n_rows - tail)).clamp(min=0),
        row_counts,
        (pattern.totals[0] - first, int(row_counts.sum())),
    )
    assert (last.keys == d_sae - 5).any()
    assert_pattern(last_problem, last, torch.bfloat16 if autocast else None)
