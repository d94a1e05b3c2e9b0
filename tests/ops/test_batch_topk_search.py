"""The search for the largest scores of a batch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.screen import cpu as screen_cpu
from saelens_sparse.ops.search import batch_topk
from tests.conftest import Target
from tests.support.batch_topk_search import (
    assert_keeps_largest,
    assert_well_formed,
    find,
    kept,
    search,
)
from tests.support.ops import require_gpu_memory
from tests.support.saes import LargestTensor
from tests.support.topk_search import (
    DISTRIBUTIONS,
    Problem,
    all_negative,
    equal_large_biases,
    huge_weights,
    no_norms,
    outlier_inputs,
    plain,
    random_problem,
    wide_row_scales,
)

MODULE = "saelens_sparse.ops.search.batch_topk_kernels"


@pytest.fixture
def searches(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each search by Triton's kernels, whether its candidates fit and reach far enough down."""
    fitting: list[bool] = []
    if target.backend == "triton":
        kernels = import_module(MODULE)
        original = kernels.find_largest

        def spy(*args: Any, **options: Any) -> Any:
            found = original(*args, **options)
            fitting.append(bool(found[1][0] <= found[2] and found[1][1]))
            return found

        monkeypatch.setattr(kernels, "find_largest", spy)
    return fitting


@pytest.fixture(params=["", "screen"])
def on_a_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """With and without the screen of a CPU; numbers of rows screened."""
    rows: list[int] = []
    monkeypatch.setattr(screen_cpu, "_multiplies_bfloat16", lambda: request.param == "screen")
    monkeypatch.setattr(screen_cpu, "MIN_SCREENED_PRODUCT", 0)
    original = screen_cpu.upper_bounds

    def spy(x: torch.Tensor, *args: Any) -> Any:
        rows.append(x.shape[0])
        return original(x, *args)

    monkeypatch.setattr(screen_cpu, "upper_bounds", spy)
    return rows


def uneven(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    """One row has most of the largest scores, one nearly as many, and half of them have none."""
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.x *= 0.01
    problem.x[n_rows // 2] *= 2000
    problem.x[n_rows // 3] *= 1000
    problem.bias[:] = 0.02 * torch.rand(d_sae)
    problem.x[: n_rows // 2 : 2] = 0
    problem.bias[d_sae // 2 :] = -0.1
    return problem


def positive_on_few_rows(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = all_negative(n_rows, d_in, d_sae, k)
    problem.x[1] *= 20
    return problem


ALL_DISTRIBUTIONS = [*DISTRIBUTIONS, uneven, positive_on_few_rows]


@pytest.mark.parametrize("distribution", ALL_DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_matches_float64(
    distribution: Callable[[int, int, int, int], Problem],
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    searches: list[bool],
) -> None:
    problem = distribution(6, 24, 170, 5).to(device, dtype)
    # In bfloat16 large scores cannot be told apart.
    clear = 0.98 if dtype != torch.bfloat16 else 0.0
    clear = 0.6 if distribution is equal_large_biases and dtype == torch.float32 else clear
    assert_keeps_largest(problem, 31, find(problem, 31, backend), clear)
    if distribution is not equal_large_biases:
        assert searches == [True] * (backend == "triton")


@pytest.mark.parametrize("distribution", ALL_DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_on_a_cpu_it_matches_float64(
    distribution: Callable[[int, int, int, int], Problem], on_a_cpu: list[int]
) -> None:
    problem = distribution(37, 24, 1500, 5)
    clear = 0.6 if distribution is equal_large_biases else 0.98
    assert_keeps_largest(problem, 187, find(problem, 187, "torch"), clear)
    assert on_a_cpu in ([], [35])


def test_on_a_cpu_few_pairs_are_recomputed(
    on_a_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a screen that leaves too many is given up."""
    n_pairs: list[int] = []
    original = batch_topk.gather_dot

    def spy(x: torch.Tensor, latents: torch.Tensor, *args: Any) -> torch.Tensor:
        n_pairs.append(latents.numel())
        return original(x, latents, *args)

    monkeypatch.setattr(batch_topk, "gather_dot", spy)
    # Parts of three rows.
    monkeypatch.setattr(screen_cpu, "SCORE_BYTES", 4 * 1500 * 3)
    problem = plain(64, 24, 1500, 5)
    assert_keeps_largest(problem, 320, find(problem, 320, "torch"))
    if on_a_cpu:
        assert 320 < sum(n_pairs) < 0.1 * 64 * 1500
        assert len(n_pairs) > 1
    monkeypatch.setattr(batch_topk, "MAX_CPU_CANDIDATES", 1e-4)
    n_pairs.clear()
    assert_keeps_largest(problem, 320, find(problem, 320, "torch"))
    assert n_pairs == []


@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae", "count"),
    [
        pytest.param(3, 16, 100, 1, id="one pair"),
        pytest.param(3, 1, 100, 30, id="d_in=1"),
        pytest.param(1, 33, 353, 11, id="one row, prime d_sae"),
        pytest.param(2, 1100, 200, 5, id="wide"),
        pytest.param(9, 20, 513, 200, id="just over a tile"),
        pytest.param(5, 12, 1, 3, id="one latent"),
        pytest.param(5, 12, 37, 5 * 37, id="all"),
        pytest.param(5, 12, 37, 0, id="none"),
    ],
)
def test_takes_any_size(
    n_rows: int, d_in: int, d_sae: int, count: int, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(n_rows, d_in, d_sae, 1).to(device)
    assert_keeps_largest(problem, count, find(problem, count, backend), clear=0.9)


def test_an_empty_batch(backend: Backend, device: torch.device) -> None:
    problem = random_problem(0, 12, 600, 1).to(device)
    pairs = find(problem, 0, backend)
    assert_well_formed(pairs, 0, 600)
    assert pairs.rows.count() == 0


def test_no_score_is_positive(backend: Backend, device: torch.device, searches: list[bool]) -> None:
    problem = all_negative(6, 20, 170, 1).to(device)
    pairs = find(problem, 30, backend)
    assert_well_formed(pairs, 6, 170)
    assert pairs.rows.count() == 0
    assert searches == [True] * (backend == "triton")


@pytest.mark.parametrize("count", [1, 40, 400])
def test_scores_of_zero_are_not_kept(count: int, backend: Backend, device: torch.device) -> None:
    """As for rows of zeros in the first steps, when biases are zero."""
    problem = random_problem(6, 20, 170, 1).to(device)
    problem.x[[0, 3, 4]] = 0
    problem.bias.zero_()
    pairs = find(problem, count, backend)
    # Of the others about a half is positive: with 400, zero is the limit.
    assert_keeps_largest(problem, count, pairs, clear=0.98 if count < 200 else 0.4)
    assert not torch.isin(kept(pairs)[0], torch.tensor([0, 3, 4], device=device)).any()


@pytest.mark.parametrize("buffer_rows", [1, 3, 8])
def test_ties_are_cut_in_order_whatever_the_chunks(
    buffer_rows: int, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers: exact in any order of additions, and tied many times."""
    n_rows, d_sae, count = 8, 107, 97
    problem = Problem(
        x=torch.randint(-2, 3, (n_rows, 16)).float(),
        weight=torch.randint(-2, 3, (d_sae, 16)).float(),
        bias=torch.zeros(d_sae),
        norms=None,
        k=1,
    ).to(device)
    chunks: list[int] = []
    if backend == "triton":
        gpu = import_module("saelens_sparse.ops.screen.gpu")
        original = gpu.multiply_float16

        def spy(x: torch.Tensor, *args: Any) -> Any:
            chunks.append(x.shape[0])
            return original(x, *args)

        monkeypatch.setattr(gpu, "multiply_float16", spy)
    rows, latents, pre_acts = kept(
        find(problem, count, backend, buffer_rows * d_sae * (2 if backend == "triton" else 4))
    )
    if backend == "triton":
        assert chunks == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[buffer_rows]
    scores = problem.dense()[0].flatten()
    order = scores.sort(descending=True, stable=True).indices[:count]
    assert scores[order[-1]] == scores.sort(descending=True).values[count], "nothing ties"
    expected = order.sort().values
    assert torch.equal(rows * d_sae + latents, expected)
    assert torch.equal(pre_acts, scores[expected])


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_rows_that_are_sorted_by_their_scores(
    order: str, backend: Backend, device: torch.device, searches: list[bool]
) -> None:
    """Where they rise, each chunk of rows has the largest scores so far."""
    problem = random_problem(9, 24, 170, 1)
    scale = torch.logspace(0, 2, 9).unsqueeze(1)
    problem.x *= scale if order == "rising" else scale.flip(0)
    problem = problem.to(device)
    whole = find(problem, 300, backend)
    assert_keeps_largest(problem, 300, whole)
    chunked = find(problem, 300, backend, 170 * 2)
    for a, b in zip(kept(whole)[:2], kept(chunked)[:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(kept(whole)[2], kept(chunked)[2], rtol=1e-5, atol=1e-4)
    assert all(searches)


@pytest.mark.parametrize("filled", ["none", "few", "all"])
def test_the_edge_is_the_highest_that_enough_scores_reach(
    filled: str, device: torch.device, target: Target
) -> None:
    if target.backend != "triton":
        pytest.skip("of the kernels")
    kernels = import_module(MODULE)
    share = {"none": 0.0, "few": 1e-3, "all": 1.0}[filled]
    # Bins up to infinity's.
    values = torch.rand(2**18) < share
    values[0x7F800000 >> 13 :] = False
    counts = (values * torch.randint(1, 4, values.shape)).int().to(device)
    total = int(counts.sum())
    for count in {1, 2, 99, 30_000, max(1, total), total + 1}:
        edge = kernels._edge_of(counts, count)
        reached = counts.flip(0).cumsum(0).flip(0) >= count
        places = reached.nonzero()
        bits = (int(places[-1]) << 13) if len(places) else 0
        assert int(edge.view(torch.int32)) == max(bits, 1), count


def test_the_edge_rises_so_that_later_chunks_list_few(
    device: torch.device, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target.backend != "triton":
        pytest.skip("of the kernels")
    kernels = import_module(MODULE)
    edges: list[float] = []
    original = kernels._edge_of

    def spy(counts: torch.Tensor, count: int) -> torch.Tensor:
        edges.append(float(original(counts, count)))
        return original(counts, count)

    monkeypatch.setattr(kernels, "_edge_of", spy)
    problem = plain(8, 24, 1600, 1).to(device)
    _, (n_candidates, is_reached), capacity = kernels.find_largest(
        problem.x, problem.weight, problem.bias, problem.norms, 80, 2 * 1600 * 2
    )
    assert is_reached
    # Of a sample of the first chunk, then of each chunk.
    assert len(edges) == 5
    assert edges == sorted(edges)
    assert edges[0] > 0.1
    assert edges[-1] > 1.02 * edges[1] > edges[0]
    limit = problem.dense()[1].flatten().topk(80).values[-1]
    assert 0.99 * limit <= edges[-1] <= limit
    assert 80 <= n_candidates < 250 < capacity


def test_an_overflow_is_computed_in_full(
    backend: Backend,
    device: torch.device,
    target: Target,
    searches: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = plain(6, 24, 170, 1).to(device)
    problem.x[:] = problem.x[0]  # six latents tie at the limit
    expected = find(problem, 31, backend)
    if target.backend == "triton":
        monkeypatch.setattr(import_module(MODULE), "list_capacity", lambda count, *_: count + 1)
    found = search(problem, 31, backend)
    result = found.complete()
    assert_keeps_largest(problem, 31, result.pairs, clear=0.95)
    assert (result is found) == (backend == "torch")
    for a, b in zip(kept(expected), kept(result.pairs), strict=True):
        torch.testing.assert_close(a, b)
    assert searches == [True, False, False] * (backend == "triton")


def test_a_sample_that_misleads_is_noticed(
    backend: Backend, device: torch.device, searches: list[bool]
) -> None:
    """On row n it has the n-th run of 16 latents in 256: here those of the largest scores."""
    problem = random_problem(3, 24, 1024, 1)
    problem.x.clamp_(-1, 1)
    for n in range(3):
        problem.weight[16 * n : 16 * n + 16] = problem.x[n] + 0.1 * torch.randn(16, 24)
    problem = problem.to(device)
    assert_keeps_largest(problem, 60, find(problem, 60, backend))
    assert searches == [False, True] * (backend == "triton")


@pytest.mark.parametrize("is_certain", [False, True], ids=["most probably", "for certain"])
def test_candidates_are_few(is_certain: bool, device: torch.device, target: Target) -> None:
    if target.backend != "triton":
        pytest.skip("of the kernels")
    problem = plain(24, 24, 800, 1).to(device)
    _, found, _ = import_module(MODULE).find_largest(
        problem.x, problem.weight, problem.bias, problem.norms, 480, 2**20, is_certain=is_certain
    )
    n_candidates, is_reached = found.tolist()
    assert is_reached
    assert 480 <= n_candidates < (1.1 if is_certain else 2.0) * 480


def test_the_same_pairs_by_kernels_and_by_pytorch(device: torch.device, target: Target) -> None:
    if target.backend != "triton":
        pytest.skip("of the kernels")
    for distribution in (plain, no_norms, outlier_inputs, uneven):
        problem = distribution(7, 24, 170, 1).to(device)
        by_kernels, by_pytorch = (find(problem, 45, backend) for backend in ("triton", "torch"))
        for a, b in zip(kept(by_kernels)[:2], kept(by_pytorch)[:2], strict=True):
            assert torch.equal(a, b)


@pytest.mark.default_algorithms
def test_repeats_bit_for_bit_and_leaves_its_inputs_alone(
    backend: Backend, device: torch.device
) -> None:
    problem = random_problem(5, 24, 100, 1).to(device)
    assert problem.norms is not None
    inputs = [problem.x, problem.weight, problem.bias, problem.norms]
    before = [tensor.clone() for tensor in inputs]
    first, second = (kept(find(problem, 37, backend)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_takes_a_non_contiguous_input(backend: Backend, device: torch.device) -> None:
    problem = random_problem(4, 20, 100, 1).to(device)
    problem.x = problem.x.T.contiguous().T
    assert_keeps_largest(problem, 15, find(problem, 15, backend))


def scores_of(problem: Problem, pairs: Any) -> torch.Tensor:
    """Of the kept pairs, from largest to smallest."""
    _, latents, pre_acts = kept(pairs)
    scores = pre_acts if problem.norms is None else pre_acts * problem.norms[latents]
    return scores.sort(descending=True).values


@pytest.mark.pairwise
@pytest.mark.parametrize("count", [20, 100, 400])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", ["x", "weight", "bias", "norms"])
def test_what_is_not_finite_is_as_in_pytorch(
    argument: str, value: float, count: int, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(6, 20, 170, 1).to(device)
    bad = getattr(problem, argument)
    bad[3] = value
    if bad.ndim == 1:
        bad[100] = value
    pairs = find(problem, count, backend)
    assert_well_formed(pairs, 6, 170)
    expected = problem.dense()[1].relu().flatten().topk(count).values
    expected = expected[expected != 0]
    torch.testing.assert_close(
        scores_of(problem, pairs), expected, rtol=1e-4, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("with_norms", [False, True])
def test_under_autocast_it_is_the_dense_encoder_under_autocast(
    with_norms: bool, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(9, 48, 400, 1, with_norms=with_norms).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        pairs = find(problem, 55, backend)
        pre_acts, scores = problem.dense()
    assert_well_formed(pairs, 9, 400)
    rows, latents, found = kept(pairs)
    assert found.dtype == pre_acts.dtype == torch.float32
    # One bfloat16 rounding of the product, where another kernel's sum rounds the other way.
    rtol, atol = (0.0, 0.0) if backend == "torch" else (8e-3, 1e-4)
    torch.testing.assert_close(found, pre_acts[rows, latents], rtol=rtol, atol=atol)
    expected = scores.flatten().topk(55).values
    torch.testing.assert_close(scores_of(problem, pairs), expected, rtol=rtol, atol=atol)
    exact = problem.dense()[0][rows, latents]
    assert (found - exact).abs().max() > 1e-4  # or it would not be bfloat16


def test_rows_too_wide_for_a_program_are_computed_in_full(
    backend: Backend, device: torch.device, searches: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        monkeypatch.setattr("saelens_sparse.ops.search.mark_kernels.MAX_D_IN", 20)
    for d_in in (20, 21):
        problem = random_problem(3, d_in, 40, 1).to(device)
        assert_keeps_largest(problem, 9, find(problem, 9, backend), clear=0.9)
    assert searches == [True] * (backend == "triton")


def test_no_tensor_has_an_element_for_each_latent_of_each_row(
    backend: Backend, device: torch.device, target: Target
) -> None:
    if target.interpreted:
        pytest.skip("a minute in Triton's interpreter")
    problem = random_problem(1500, 4, 800, 1).to(device)
    with LargestTensor() as largest:
        pairs = find(problem, 3000, backend, 20 * 800 * 4)
    assert_keeps_largest(problem, 3000, pairs)
    # The kernels' two histograms have as many bins whatever the size.
    assert largest.numel <= (2 * 2**18 if backend == "triton" else 20 * 800 + 2 * 3000)


@pytest.mark.parametrize("count", [-1, 3 * 600 + 1])
def test_names_a_count_out_of_range(count: int, backend: Backend, device: torch.device) -> None:
    problem = random_problem(3, 20, 600, 1).to(device)
    with pytest.raises(ValueError, match=f"count must be between 0 and 3 rows .* got {count}"):
        find(problem, count, backend)


@pytest.mark.parametrize("shape", [(3, 19), (20,), (1, 3, 20)])
def test_names_an_input_of_a_wrong_shape(
    shape: tuple[int, ...], backend: Backend, device: torch.device
) -> None:
    problem = random_problem(3, 20, 600, 1).to(device)
    problem.x = torch.zeros(shape, device=device)
    with pytest.raises(ValueError, match=r"x must have shape \[n_rows, 20\]; got \["):
        find(problem, 5, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("buffer_mib", [16, 1024])
@pytest.mark.parametrize("distribution", ALL_DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_matches_float64_at_a_training_shape(
    distribution: Callable[[int, int, int, int], Problem], buffer_mib: int, autocast: bool
) -> None:
    problem = distribution(2048, 768, 24_576, 32).to("cuda")
    count = 32 * 2048 + 7
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        found = search(problem, count, "triton", buffer_mib * 2**20)
        if distribution not in (equal_large_biases, wide_row_scales, huge_weights):
            assert found.complete() is found
        pairs = found.complete().pairs
        scores = problem.dense()[1].relu().flatten().topk(count).values
    if autocast:
        assert_well_formed(pairs, 2048, 24_576)
        expected = scores[scores != 0]
        torch.testing.assert_close(scores_of(problem, pairs), expected, rtol=8e-3, atol=1e-4)
    else:
        assert_keeps_largest(problem, count, pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_gib", [0.25, 24])
def test_addresses_scores_beyond_32_bits(buffer_gib: float) -> None:
    """More than 2^31 scores in all, in small chunks and in a single one."""
    require_gpu_memory(20)
    n_rows, d_sae, d_in, count = 2100, 2**20 + 8, 64, 20_000
    problem = Problem(
        x=torch.randn(n_rows, d_in, device="cuda"),
        weight=torch.randn(d_sae, d_in, device="cuda"),
        bias=torch.zeros(d_sae, device="cuda"),
        norms=None,
        k=1,
    )
    problem.weight[-5] *= 10  # so that one of the last latents is kept on the last rows
    found = search(problem, count, "triton", int(buffer_gib * 2**30))
    assert found.complete() is found
    rows, latents, pre_acts = kept(found.pairs)
    assert rows.numel() == count
    assert (latents[rows >= n_rows - 50] == d_sae - 5).any()
    exact = (problem.x[rows].double() * problem.weight[latents].double()).sum(1)
    torch.testing.assert_close(pre_acts.double(), exact, rtol=1e-4, atol=1e-4)
    limit, n_above = pre_acts.min(), 0
    for part in problem.x.split(50):
        n_above += int((part @ problem.weight.T > limit * (1 + 1e-5)).sum())
    assert count - 20 <= n_above <= count
