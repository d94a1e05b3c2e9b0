"""The search for the k largest scores of each row."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.common.host_copy import HostCount
from tests.conftest import Target
from tests.support.ops import assert_within_budget, require_gpu_memory
from tests.support.topk_search import (
    DISTRIBUTIONS,
    Problem,
    Selection,
    all_negative,
    assert_distinct_latents,
    assert_keys,
    assert_same_scores,
    assert_selects_topk,
    equal_large_biases,
    no_norms,
    outlier_inputs,
    plain,
    random_problem,
)


@pytest.fixture
def screened(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each call that Triton's screen took."""
    rows: list[int] = []
    if target.backend == "triton":
        select_triton = import_module("saelens_sparse.ops.search.topk_kernels")
        original = select_triton.select_topk

        def spy(x: torch.Tensor, *args: Any) -> Any:
            rows.append(x.shape[0])
            return original(x, *args)

        monkeypatch.setattr(select_triton, "select_topk", spy)
    return rows


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_select_topk_matches_float64(
    distribution: Callable[[int, int, int, int], Problem],
    backend: Backend,
    device: torch.device,
    screened: list[int],
) -> None:
    problem = distribution(5, 24, 170, 5).to(device)
    # Next to a large bias float32 keeps few digits of a score: the set is often unclear.
    distinct = 0.3 if distribution is equal_large_biases else 0.8
    selection = problem.select(backend)
    assert_selects_topk(problem, selection, distinct)
    if distribution is not equal_large_biases:
        assert selection.rows_recomputed == 0
    assert screened == ([5] if backend == "triton" else [])


@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae", "k"),
    [
        pytest.param(3, 16, 100, 1, id="k=1"),
        pytest.param(3, 1, 100, 3, id="d_in=1"),
        pytest.param(1, 33, 353, 11, id="one row, prime d_sae"),
        pytest.param(2, 24, 400, 12, id="k=12"),
        pytest.param(2, 1100, 200, 5, id="wide"),
        pytest.param(2, 20, 400, 1, id="400 latents per k"),
        pytest.param(3, 20, 256, 8, id="32 latents per k"),
        pytest.param(3, 20, 255, 8, id="just under 32 latents per k"),
        pytest.param(5, 12, 37, 36, id="k=d_sae-1"),
        pytest.param(5, 12, 37, 37, id="k=d_sae"),
        pytest.param(5, 12, 1, 1, id="one latent"),
    ],
)
def test_select_topk_takes_any_size(
    n_rows: int, d_in: int, d_sae: int, k: int, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(n_rows, d_in, d_sae, k).to(device)
    assert_selects_topk(problem, problem.select(backend))


def test_select_topk_on_an_empty_batch(backend: Backend, device: torch.device) -> None:
    problem = random_problem(0, 12, 600, 4).to(device)
    selection = problem.select(backend)
    assert selection.latents.shape == selection.pre_acts.shape == selection.scores.shape == (0, 4)
    assert selection.latents.dtype == torch.int64
    assert selection.rows_recomputed == 0


def test_select_topk_takes_a_non_contiguous_input(backend: Backend, device: torch.device) -> None:
    problem = random_problem(4, 20, 100, 3).to(device)
    problem.x = problem.x.T.contiguous().T
    assert_selects_topk(problem, problem.select(backend))
    problem.x = problem.x[:1].expand(4, 20)
    assert_selects_topk(problem, problem.select(backend))


@pytest.mark.parametrize("bias", [-1e3, float("-inf")])
def test_select_topk_recomputes_no_row_for_latents_that_a_bias_switches_off(
    bias: float, backend: Backend, device: torch.device
) -> None:
    """One in sixteen, so that most of the groups that the screen compares have one."""
    problem = random_problem(4, 64, 512, 4, with_norms=False)
    problem.bias[torch.rand(512) < 1 / 16] = bias
    problem = problem.to(device)
    selection = problem.select(backend)
    expected = problem.dense()[1].topk(problem.k, sorted=True).values
    torch.testing.assert_close(selection.scores.sort(descending=True).values, expected)
    assert selection.rows_recomputed == 0


def test_select_topk_screens_ordinary_rows_without_recomputing_any(
    backend: Backend, device: torch.device, screened: list[int]
) -> None:
    problem = random_problem(8, 96, 130, 4).to(device)
    selection = problem.select(backend)
    assert selection.rows_recomputed == 0
    if backend == "triton":
        select_triton = import_module("saelens_sparse.ops.search.topk_kernels")
        assert select_triton.can_screen(problem.x, problem.weight, problem.k)
        assert screened == [8]


@pytest.mark.default_algorithms
def test_select_topk_repeats_bit_for_bit_and_leaves_its_inputs_alone(
    backend: Backend, device: torch.device
) -> None:
    problem = random_problem(4, 24, 100, 3).to(device)
    assert problem.norms is not None
    inputs = [problem.x, problem.weight, problem.bias, problem.norms]
    before = [tensor.clone() for tensor in inputs]
    first, second = problem.select(backend), problem.select(backend)
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.pre_acts, second.pre_acts)
    assert torch.equal(first.scores, second.scores)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 8])
def test_select_topk_by_chunks_of_rows_gives_the_same_bits(
    rows_per_chunk: int, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small whole numbers: exact in any order of additions, so that chunks cannot matter."""
    n_rows, d_sae = 8, 107
    problem = Problem(
        x=torch.randint(-8, 9, (n_rows, 16)).float(),
        weight=torch.randint(-8, 9, (d_sae, 16)).float(),
        bias=torch.randperm(d_sae) * 2.0**-10,
        norms=None,
        k=3,
    ).to(device)
    whole = problem.select(backend)
    chunks: list[int] = []
    owner: object = torch.Tensor
    name = "topk"
    if backend == "triton":
        owner, name = import_module("saelens_sparse.ops.screen.gpu"), "multiply_float16"
    original = getattr(owner, name)

    def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        chunks.append(tensor.shape[0])
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    # The screen holds two bytes a score, the full computation four.
    score_bytes = 2 if backend == "triton" else 4
    chunked = problem.select(backend, rows_per_chunk * d_sae * score_bytes)
    monkeypatch.undo()
    assert chunks == {1: [1] * 8, 3: [3, 3, 2], 8: [8]}[rows_per_chunk]
    assert torch.equal(whole.latents.sort().values, chunked.latents.sort().values)
    assert torch.equal(whole.scores.sort().values, chunked.scores.sort().values)
    assert torch.equal(
        whole.pre_acts.gather(1, whole.latents.argsort()),
        chunked.pre_acts.gather(1, chunked.latents.argsort()),
    )
    # The sums are exact, hence the float64 ones.
    expected = problem.to(device, torch.float64).dense()[1].topk(3).values.float()
    assert torch.equal(whole.scores.sort(descending=True).values, expected)


@pytest.mark.parametrize("buffer_bytes", [1, 500])
def test_select_topk_by_chunks_of_rows_matches_float64(
    buffer_bytes: int, backend: Backend, device: torch.device
) -> None:
    """Also with a buffer smaller than a single row, which then holds one row at a time."""
    problem = random_problem(7, 24, 100, 3).to(device)
    selection = problem.select(backend, buffer_bytes)
    assert_selects_topk(problem, selection)
    assert selection.rows_recomputed == 0
    if backend == "triton":
        whole = problem.select(backend)
        assert torch.equal(whole.latents, selection.latents)
        assert torch.equal(whole.pre_acts, selection.pre_acts)
        assert torch.equal(whole.scores, selection.scores)


def test_select_topk_of_rows_that_tie_everywhere(backend: Backend, device: torch.device) -> None:
    problem = random_problem(6, 20, 170, 5).to(device)
    problem.x[[0, 3]] = 0
    problem.bias.zero_()
    selection = problem.select(backend)
    assert_same_scores(problem, selection)
    assert not selection.scores[[0, 3]].any()
    assert selection.scores[[1, 2, 4, 5]].all()


def test_select_topk_of_latents_that_come_four_times(
    backend: Backend, device: torch.device
) -> None:
    problem = random_problem(6, 20, 200, 6).to(device)
    for tensor in (problem.weight, problem.bias, problem.norms):
        assert tensor is not None
        tensor.copy_(tensor[:50].repeat(4, *[1] * (tensor.ndim - 1)))
    assert_same_scores(problem, problem.select(backend))


def test_select_topk_recomputes_rows_that_outgrow_the_candidate_list(
    backend: Backend, device: torch.device, screened: list[int]
) -> None:
    """Hundreds of latents that low precision cannot tell apart, for some of the rows."""
    problem = random_problem(6, 32, 300, 5, with_norms=False)
    direction = torch.randn(32)
    problem.weight[:200] = direction + 1e-5 * torch.randn(200, 32)
    problem.bias.zero_()
    problem.x[1] = 2 * direction
    problem.x[4] = direction + 0.1 * torch.randn(32)
    for row in (0, 2, 3, 5):
        problem.x[row] -= (1 + (problem.x[row] @ direction) / (direction @ direction)) * direction
    problem = problem.to(device)
    selection = problem.select(backend)
    assert_selects_topk(problem, selection)
    assert screened == ([6] if backend == "triton" else [])
    assert selection.rows_recomputed == (2 if backend == "triton" else 0)

    found = problem.search(backend)
    before = found.pairs.pre_acts.clone()
    result = found.complete().pairs
    assert_selects_topk(problem, Selection.of(result, None))
    # What was handed out before the check stays as it was.
    assert torch.equal(found.pairs.pre_acts, before)
    assert (result is found.pairs) == (backend == "torch")


def test_search_topk_hands_out_the_pairs_before_it_is_checked(
    backend: Backend, device: torch.device
) -> None:
    problem = random_problem(6, 20, 170, 5).to(device)
    found = problem.search(backend)
    assert found.complete() is found
    assert_selects_topk(problem, Selection.of(found.pairs, problem.norms))


def test_select_topk_where_the_screen_is_at_the_edge_of_half_precision(
    backend: Backend, device: torch.device
) -> None:
    """An input along one latent's vector, both of norms just under a power of two."""
    problem = random_problem(4, 64, 130, 1, with_norms=False)
    problem.bias.zero_()
    direction = torch.nn.functional.normalize(torch.randn(64), dim=0)
    problem.weight[17] = 1.9999 * direction
    problem.weight[100] = 50 * torch.nn.functional.normalize(
        direction + 0.5 * torch.nn.functional.normalize(torch.randn(64), dim=0), dim=0
    )
    problem.x[:] = torch.tensor([1.9999, 1.9995, 1.0, 3.9999]).unsqueeze(1) * direction
    problem = problem.to(device)
    for k in (1, 2, 3):
        problem.k = k
        assert_selects_topk(problem, problem.select(backend))


@pytest.mark.parametrize("scale", [1.0, 64.0])
@pytest.mark.parametrize("rounded", ["x", "weight"])
def test_select_topk_where_low_precision_loses_the_largest_score(
    rounded: str, scale: float, backend: Backend, device: torch.device
) -> None:
    """One operand's roundings all lower the score of a latent that is the largest by little.

    Its terms nearly cancel, so that this is far more than a rounding of the score itself.
    """
    half, ulp = 32, 2.0**-10
    ones = torch.ones(half)
    just_above = (1 + 0.49 * ulp) * ones  # one, in float16
    problem = Problem(
        x=torch.cat([just_above if rounded == "x" else ones, ones]).repeat(3, 1),
        weight=torch.zeros(40, 2 * half),
        bias=torch.zeros(40),
        norms=None if scale == 1.0 else torch.full((40,), scale),
        k=1,
    )
    problem.weight[:, half:] = 1e-2 * ulp * torch.rand(40, half)
    largest = [just_above if rounded == "weight" else ones, -(1 - ulp) * ones]
    problem.weight[21] = torch.cat(largest)
    problem.weight[7] = torch.cat([0 * ones, 1.25 * ulp * ones])
    problem = problem.to(device)
    assert (problem.dense()[1].argmax(1) == 21).all()
    assert ((problem.x.half() @ problem.weight.half().T).argmax(1) == 7).all()
    selection = problem.select(backend)
    assert (selection.latents == 21).all()
    assert selection.rows_recomputed == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_select_topk_keeps_a_bad_input_in_its_own_row(
    value: float, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(6, 20, 170, 5).to(device)
    clean = problem.select(backend)
    problem.x[2, 7] = value
    problem.x[4] = value
    selection = problem.select(backend)
    assert_same_scores(problem, selection)
    assert not selection.scores[[2, 4]].isfinite().any()
    for row in (0, 1, 3, 5):
        assert torch.equal(selection.latents[row], clean.latents[row])
        assert torch.equal(selection.scores[row], clean.scores[row])


@pytest.mark.parametrize("n_bad", [1, 3, 8])
@pytest.mark.parametrize("argument", ["weight", "bias", "norms"])
def test_select_topk_takes_a_latent_with_nan_on_every_row(
    argument: str, n_bad: int, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(6, 20, 170, 5).to(device)
    bad = torch.tensor([0, 13, 14, 15, 90, 130, 131, 169][:n_bad], device=device)
    # With either sign bit: hardware makes both.
    signs = torch.tensor([-1.0, 1.0] * 4, device=device)[:n_bad]
    getattr(problem, argument)[bad] = (
        torch.full_like(signs, torch.nan)
        .copysign(signs)
        .view(-1, *[1] * (getattr(problem, argument).ndim - 1))
    )
    selection = problem.select(backend)
    assert_same_scores(problem, selection)
    assert (selection.scores.isnan().sum(1) == min(n_bad, 5)).all()
    assert torch.equal(
        selection.scores.isnan(), torch.isin(selection.latents, bad.to(selection.latents))
    )


def test_select_topk_with_infinite_biases(backend: Backend, device: torch.device) -> None:
    problem = random_problem(6, 20, 170, 5).to(device)
    problem.bias[[3, 77]] = torch.inf
    problem.bias[::2] = -torch.inf
    problem.bias[101] = torch.inf
    selection = problem.select(backend)
    assert_same_scores(problem, selection)
    assert (selection.scores.isposinf().sum(1) == 3).all()
    problem.bias[:] = -torch.inf
    problem.bias[[5, 6]] = 0.5
    selection = problem.select(backend)
    assert_same_scores(problem, selection)
    assert (selection.scores.isneginf().sum(1) == 3).all()


def test_select_topk_with_zero_norms(backend: Backend, device: torch.device) -> None:
    """Decoder rows of zero scale a pre-activation to a score of zero."""
    problem = all_negative(6, 20, 170, 5).to(device)
    assert problem.norms is not None
    problem.norms[::3] = 0
    selection = problem.select(backend)
    assert_same_scores(problem, selection)
    assert not selection.scores.any()
    assert (selection.pre_acts < 0).all()


def test_select_topk_attaches_no_graph(backend: Backend, device: torch.device) -> None:
    problem = random_problem(3, 10, 300, 4).to(device)
    problem.x.requires_grad_()
    problem.weight.requires_grad_()
    problem.bias.requires_grad_()
    selection = problem.select(backend)
    assert not selection.pre_acts.requires_grad
    assert not selection.scores.requires_grad


@pytest.mark.parametrize("with_norms", [False, True])
def test_select_topk_under_autocast_is_the_dense_encoder_under_autocast(
    with_norms: bool, backend: Backend, device: torch.device
) -> None:
    """A bfloat16 product, to which the float32 bias is added in float32."""
    problem = random_problem(9, 48, 400, 6, with_norms=with_norms).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        selection = problem.select(backend)
        pre_acts, scores = problem.dense()
    assert pre_acts.dtype == selection.pre_acts.dtype == torch.float32
    assert scores.dtype == selection.scores.dtype == torch.float32
    assert_distinct_latents(selection, 400)
    # One bfloat16 rounding of the product, where another kernel's sum rounds the other way.
    rtol, atol = (0.0, 0.0) if backend == "torch" else (8e-3, 1e-4)
    expected = pre_acts.gather(1, selection.latents)
    torch.testing.assert_close(selection.pre_acts, expected, rtol=rtol, atol=atol)
    actual, expected = selection.scores.topk(6).values, scores.topk(6).values
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    exact = problem.dense()[0].gather(1, selection.latents)
    assert (selection.pre_acts - exact).abs().max() > 1e-4  # or it would not be bfloat16


def test_select_topk_under_autocast_keeps_nan_and_ties_as_the_dense_encoder_does(
    backend: Backend, device: torch.device
) -> None:
    problem = random_problem(6, 24, 200, 5).to(device)
    problem.x[1] = 0
    problem.x[3, 2] = torch.nan
    problem.weight[[17, 18, 150]] = torch.nan
    problem.bias[40], problem.bias[41] = torch.inf, -torch.inf
    with torch.autocast(device.type, torch.bfloat16):
        selection = problem.select(backend)
        pre_acts, scores = problem.dense()
    assert_distinct_latents(selection, 200)
    assert_keys(selection, 200)
    expected = scores.topk(5).values
    actual = selection.scores.topk(5).values
    torch.testing.assert_close(actual, expected, rtol=8e-3, atol=1e-4, equal_nan=True)
    expected = pre_acts.gather(1, selection.latents)
    torch.testing.assert_close(selection.pre_acts, expected, rtol=8e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("with_norms", [False, True])
def test_select_topk_of_bfloat16_weights_is_the_dense_encoder_in_bfloat16(
    with_norms: bool, backend: Backend, device: torch.device
) -> None:
    problem = random_problem(9, 48, 400, 6, with_norms=with_norms).to(device, torch.bfloat16)
    selection = problem.select(backend)
    pre_acts, scores = problem.dense()
    assert selection.pre_acts.dtype == selection.scores.dtype == torch.bfloat16
    assert_distinct_latents(selection, 400)
    exact_pre_acts, exact_scores = problem.to(device, torch.float64).dense()
    latents = selection.latents
    assert_within_budget(
        selection.pre_acts, pre_acts.gather(1, latents), exact_pre_acts.gather(1, latents)
    )
    assert_within_budget(
        selection.scores.sort(descending=True).values,
        scores.topk(6).values,
        exact_scores.topk(6).values,
    )


def test_select_topk_in_torch_takes_float64() -> None:
    problem = random_problem(6, 20, 300, 5).to("cpu", torch.float64)
    selection = problem.select("torch")
    assert selection.scores.dtype == torch.float64
    expected = problem.dense()[1].topk(5)
    torch.testing.assert_close(selection.scores.sort(descending=True).values, expected.values)
    assert torch.equal(selection.latents.sort().values, expected.indices.sort().values)


@pytest.mark.parametrize("k", [0, -1, 601])
def test_select_topk_names_a_k_out_of_range(k: int, backend: Backend, device: torch.device) -> None:
    problem = random_problem(3, 20, 600, 5).to(device)
    problem.k = k
    with pytest.raises(ValueError, match=f"k must be between 1 and d_sae=600; got {k}"):
        problem.select(backend)


@pytest.mark.parametrize("shape", [(3, 19), (20,), (1, 3, 20)])
def test_select_topk_names_an_input_of_a_wrong_shape(
    shape: tuple[int, ...], backend: Backend, device: torch.device
) -> None:
    problem = random_problem(3, 20, 600, 5).to(device)
    problem.x = torch.zeros(shape, device=device)
    with pytest.raises(ValueError, match=r"x must have shape \[n_rows, 20\]; got \["):
        problem.select(backend)


@pytest.mark.parametrize("stride", [1, 256])
def test_select_topk_screens_live_latents_in_any_pattern_without_recomputing_any(
    stride: int, backend: Backend, device: torch.device
) -> None:
    """A dictionary that was sorted by frequency keeps its live latents side by side; one that was
    doubled again and again has copies at a stride of a power of two.
    """
    n_live = min(64, 1024 // stride)
    problem = random_problem(8, 48, 1024, 2)
    problem.bias[: n_live * stride : stride] += 10
    selection = problem.to(device).select(backend)
    assert_selects_topk(problem.to(device), selection)
    assert ((selection.latents % stride == 0) & (selection.latents < n_live * stride)).all()
    assert selection.rows_recomputed == 0


@pytest.mark.parametrize("n", [0, 1, 5])
def test_host_count_counts_what_is_true(n: int, device: torch.device) -> None:
    mask = torch.zeros(9, dtype=torch.bool, device=device)
    mask[:n] = True
    count = HostCount(mask)
    mask.fill_(True)  # a later change of the mask comes too late
    assert count.wait() == n
    assert count.wait() == n
    assert isinstance(count.wait(), int)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 32, 64])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_select_topk_matches_float64_at_a_training_shape(
    distribution: Callable[[int, int, int, int], Problem], k: int
) -> None:
    problem = distribution(512, 768, 24_576, k).to("cuda")
    distinct = 0.1 if distribution is equal_large_biases else 0.7
    assert_selects_topk(problem, problem.select("triton"), distinct)


@pytest.mark.gpu
def test_select_topk_recomputes_no_ordinary_row_at_a_training_shape() -> None:
    for distribution in (plain, no_norms, outlier_inputs, all_negative):
        assert distribution(2048, 768, 24_576, 32).to("cuda").select("triton").rows_recomputed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("buffer_gib", [0.25, 24])
@pytest.mark.parametrize("autocast", [False, True])
def test_select_topk_addresses_scores_beyond_32_bits(buffer_gib: float, autocast: bool) -> None:
    """More than 2^31 scores in all, in small chunks and in a single one."""
    require_gpu_memory(20)
    n_rows, d_sae, d_in, k, tail = 2100, 2**20 + 8, 64, 16, 30
    assert (n_rows - tail) * d_sae > 2**31
    problem = Problem(
        x=torch.randn(n_rows, d_in, device="cuda"),
        weight=torch.randn(d_sae, d_in, device="cuda"),
        bias=torch.zeros(d_sae, device="cuda"),
        norms=None,
        k=k,
    )
    problem.weight[-5] *= 10  # so that one of the last latents is among the selected ones
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        whole = problem.select("triton", int(buffer_gib * 2**30))
    assert whole.rows_recomputed == 0
    last = Selection(
        whole.latents[-tail:], whole.pre_acts[-tail:], whole.scores[-tail:], whole.keys[-tail:]
    )
    assert (last.latents == d_sae - 5).any()
    problem.x = problem.x[-tail:]
    if autocast:
        with torch.autocast("cuda", torch.bfloat16):
            expected = problem.dense()[1].topk(k).values
        torch.testing.assert_close(last.scores.topk(k).values, expected, rtol=1e-2, atol=1e-2)
    else:
        assert_selects_topk(problem, last)


@pytest.mark.parametrize("k", [1, 32, 512])
@pytest.mark.parametrize("d_sae", [2048, 65_536, 100_000, 2**19, 2**22])
def test_groups_are_many_and_small(d_sae: int, k: int) -> None:
    candidates = import_module("saelens_sparse.ops.search.candidate_kernels")
    run = candidates.RUN
    n_groups = candidates.group_count(d_sae, k)
    n_runs = -(-d_sae // run)
    assert min(16 * k - 1, n_runs) <= n_groups <= n_runs
    n_slabs = -(-n_runs // n_groups)
    assert n_slabs * run <= 64 + run or n_groups >= 8191
    assert n_groups <= max(32 * k, 8191)
