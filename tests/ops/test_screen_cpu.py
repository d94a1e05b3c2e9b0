"""The bfloat16 screen of a CPU: its bound, and what is selected and trained through it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from saelens_sparse.ops.screen import cpu as screen_cpu
from tests.conftest import TARGETS
from tests.support import threshold_search as gate_helpers
from tests.support import topk_search as select_helpers
from tests.support.architectures import ALL_OR_NO_OPTIONS
from tests.support.jumprelu import (
    SIX_OPTIONS,
    compare_jumprelu_steps,
    make_case,
    make_jumprelu,
    sparse_jumprelu,
)
from tests.support.saes import (
    FLOAT32,
    compare_steps,
    dead_mask,
    make_stock,
    sparse_like,
    stock_like,
    zipf_inputs,
)
from tests.support.trainers import trajectory

BUFFER_BYTES = 2**26
SHAPE = (9, 24, 1500)  # rows, d_in, d_sae
CPU = TARGETS["torch-cpu"]

multiplies_bfloat16 = screen_cpu._multiplies_bfloat16.__wrapped__


@pytest.fixture(autouse=True)
def screened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Screens on any CPU, however little there is to compute; numbers of rows screened."""
    monkeypatch.setattr(screen_cpu, "MIN_SCREENED_PRODUCT", 0)
    monkeypatch.setattr(screen_cpu, "_multiplies_bfloat16", lambda: True)
    rows: list[int] = []
    original = screen_cpu.upper_bounds

    def spy(x: torch.Tensor, *args: Any) -> Any:
        rows.append(x.shape[0])
        return original(x, *args)

    monkeypatch.setattr(screen_cpu, "upper_bounds", spy)
    return rows


topk_distributions = pytest.mark.parametrize(
    "distribution", select_helpers.DISTRIBUTIONS, ids=lambda f: f.__name__
)


@topk_distributions
@pytest.mark.parametrize("d_in", [1, 24, 1100])
def test_bounds_are_above_the_scores_and_near_them(
    distribution: Callable[..., select_helpers.Problem], d_in: int
) -> None:
    problem = distribution(9, max(d_in, 2), 1500, 7)
    arguments = (problem.x, problem.weight, problem.bias, problem.norms)
    bounds = torch.cat([b.clone() for _, b in screen_cpu.upper_bounds(*arguments, BUFFER_BYTES)])
    _, float32 = problem.dense()
    exact_problem = problem.to("cpu", torch.float64)
    _, exact = exact_problem.dense()
    below = ~(bounds >= torch.maximum(float32, exact))
    assert not (below & bounds.isfinite()).any()
    assert not bounds.isneginf().any()

    # By norms in float64, with the largest that rounding to bfloat16 can take from an operand.
    sizes = exact_problem.x.norm(dim=1)[:, None] * exact_problem.weight.norm(dim=1)
    slack = 8 * 2.0**-8 * (sizes + 1e-13) + 1e-6 * exact_problem.bias.abs()
    if exact_problem.norms is not None:
        slack = slack * exact_problem.norms
    finite = bounds.isfinite()
    assert ((bounds - exact) <= slack)[finite].all()
    if distribution not in (select_helpers.wide_row_scales, select_helpers.huge_weights):
        assert finite.all()


def test_bounds_come_in_order_whatever_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = select_helpers.plain(37, 24, 1500, 7)
    arguments = (problem.x, problem.weight, problem.bias, problem.norms)

    def bounds(buffer_bytes: int) -> tuple[list[int], torch.Tensor]:
        found = [(i, b.clone()) for i, b in screen_cpu.upper_bounds(*arguments, buffer_bytes)]
        return [i for i, _ in found], torch.cat([b for _, b in found])

    starts, whole = bounds(BUFFER_BYTES)
    assert starts == [0]
    monkeypatch.setattr(screen_cpu, "SCORE_BYTES", 4 * 1500 * 4)
    starts, parts = bounds(10 * 1500 * 2)
    assert starts == [0, 4, 8, 12, 14, 18, 22, 24, 28, 32, 34]
    # Products of other numbers of rows may add in another order, and then round to the next
    # bfloat16, which is 2^-7 of the product away, however little a bias leaves of the bound.
    assert problem.norms is not None
    x, weight = problem.x.double(), problem.weight.double()
    sizes = (x @ weight.T).abs() * problem.norms
    terms = (x.abs() @ weight.abs().T) * problem.norms + problem.bias.abs()
    assert ((parts - whole).abs() <= 2**-7 * sizes + 1e-5 * terms).all()


@topk_distributions
def test_topk_through_the_screen_matches_float64(
    distribution: Callable[..., select_helpers.Problem], screened: list[int]
) -> None:
    problem = distribution(*SHAPE, 7)
    distinct = 0.3 if distribution is select_helpers.equal_large_biases else 0.6
    selection = problem.select("torch")
    select_helpers.assert_selects_topk(problem, selection, distinct)
    assert screened == [9]
    if distribution in (select_helpers.plain, select_helpers.no_norms):
        assert selection.rows_recomputed == 0


def test_rows_that_the_screen_cannot_decide_are_computed_in_full(screened: list[int]) -> None:
    """On some rows hundreds of latents score the same up to bfloat16's rounding."""
    problem = select_helpers.plain(*SHAPE, 7)
    problem.x[::3] = torch.nn.functional.normalize(problem.x[0], dim=0) * 40
    problem.weight[:400] = problem.x[0] / 40 + 1e-4 * torch.randn(400, 24)
    assert problem.norms is not None
    problem.norms[:400] = 1.0
    problem.bias[:400] = 0.0
    selection = problem.select("torch")
    assert selection.rows_recomputed == 3
    select_helpers.assert_selects_topk(problem, selection, distinct=0.6)
    assert screened == [9]


def test_a_screen_that_cannot_decide_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first rows; else all that it leaves open would be computed twice."""
    monkeypatch.setattr(screen_cpu, "SCORE_BYTES", 4 * 1500 * 2)
    problem = select_helpers.plain(*SHAPE, 7)
    # Far apart for float32, and far below what bfloat16 tells apart.
    problem.weight[:400] = problem.weight[0] + 1e-4 * torch.randn(400, 24)
    problem.bias[:400] = 5.0
    assert problem.norms is not None
    problem.norms[:400] = 1.0
    parts: list[int] = []
    original = screen_cpu.upper_bounds

    def spy(*args: Any) -> Any:
        for start, bounds in original(*args):
            parts.append(start)
            yield start, bounds

    monkeypatch.setattr(screen_cpu, "upper_bounds", spy)
    selection = problem.select("torch")
    assert parts == [0]
    assert selection.rows_recomputed == 0
    select_helpers.assert_selects_topk(problem, selection, distinct=0.6)


def test_a_screen_that_leaves_many_pairs_open_is_given_up(
    monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    """The bound grows with inputs that are large in a direction that biases take away again."""
    problem = gate_helpers.plain(6, 25, 75)
    shift = 300 * torch.randn(25)
    problem = replace(
        problem, x=problem.x + shift, bias=problem.bias - problem.weight @ shift,
        threshold=problem.threshold + 3.0,
    )  # fmt: skip
    through = problem.start("torch").result()
    assert screened == [6]
    monkeypatch.setattr(screen_cpu, "can_screen", lambda *_: False)
    gate_helpers.assert_same_bits(through, problem.start("torch").result())


def test_latents_that_a_bias_of_minus_infinity_switches_off_are_no_candidates() -> None:
    problem = select_helpers.plain(*SHAPE, 7)
    problem.bias[::3] = float("-inf")
    selection = problem.select("torch")
    assert selection.rows_recomputed == 0
    assert not (selection.latents % 3 == 0).any()
    select_helpers.assert_same_scores(problem, selection)


@pytest.mark.parametrize("where", ["x", "weight", "bias", "norms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_topk_through_the_screen_keeps_what_is_not_finite(
    where: str, value: float, screened: list[int]
) -> None:
    problem = select_helpers.plain(*SHAPE, 7)
    tensor = getattr(problem, where)
    if where == "norms":
        value = abs(value)
    tensor.view(-1)[5] = value
    select_helpers.assert_same_scores(problem, problem.select("torch"))
    assert screened == [9]


def test_a_row_that_is_not_finite_leaves_the_others_to_the_screen() -> None:
    problem = select_helpers.plain(*SHAPE, 7)
    problem.x[2, 3] = float("nan")
    assert problem.select("torch").rows_recomputed == 1


@pytest.mark.parametrize("distribution", gate_helpers.DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_pattern_through_the_screen_matches_float64(
    distribution: Callable[..., gate_helpers.Problem], screened: list[int]
) -> None:
    problem = distribution(6, 25, 75)
    gate_helpers.assert_pattern(problem, problem.start("torch").result())
    assert screened == [6]


@pytest.mark.parametrize("where", ["x", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_pattern_through_the_screen_is_that_of_all_products(
    where: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = gate_helpers.heavy_tails(6, 25, 75)
    getattr(problem, where).view(-1)[30] = value
    through = problem.start("torch").result()
    monkeypatch.setattr(screen_cpu, "can_screen", lambda *_: False)
    expected = problem.start("torch").result()
    assert torch.equal(through.keys, expected.keys)
    assert torch.equal(through.offsets, expected.offsets)
    assert torch.equal(through.row_counts, expected.row_counts)
    torch.testing.assert_close(
        through.pre_acts, expected.pre_acts, rtol=1e-5, atol=1e-5, equal_nan=True
    )


@pytest.mark.parametrize("options", ALL_OR_NO_OPTIONS.values(), ids=ALL_OR_NO_OPTIONS)
def test_step_of_topk_through_the_screen(options: dict[str, Any], screened: list[int]) -> None:
    stock = make_stock(d_in=24, d_sae=400, k=9, **options)
    sparse = sparse_like(stock)
    dead = dead_mask(stock, 60)
    x = zipf_inputs(stock, 40, dead)
    compare_steps(stock, sparse, x, dead, FLOAT32, input_gradient=True)
    assert screened == [40]


@pytest.mark.parametrize("options", SIX_OPTIONS.values(), ids=SIX_OPTIONS)
def test_step_of_jumprelu_through_the_screen(options: dict[str, Any], screened: list[int]) -> None:
    stock, x = make_case(CPU, pre_act_loss_coefficient=0.3, **options)
    dead = dead_mask(stock, 9)
    compare_jumprelu_steps(stock, CPU, x, dead, FLOAT32)
    assert screened == [x.shape[0]]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_nothing_is_screened_in_other_precisions(architecture: str, screened: list[int]) -> None:
    for dtype, autocast in (
        (torch.float64, False),
        (torch.bfloat16, False),
        (torch.float32, True),
    ):
        if architecture == "topk":
            stock: Any = make_stock(d_in=24, d_sae=400, k=9, dtype=dtype)
            sparse: Any = sparse_like(stock)
        else:
            stock = make_jumprelu(dtype=dtype, d_sae=400)
            sparse = sparse_jumprelu(stock, "torch")
        x = torch.randn(8, stock.cfg.d_in, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sparse(x)
        assert screened == []


def test_small_products_are_not_screened(
    monkeypatch: pytest.MonkeyPatch, screened: list[int]
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(screen_cpu, "_multiplies_bfloat16", lambda: True)
    problem = select_helpers.plain(*SHAPE, 7)
    assert not screen_cpu.can_screen(problem.x, problem.weight)
    big = torch.empty(1, 1).expand(2**14, 2**10)
    assert screen_cpu.can_screen(big, torch.empty(1, 1).expand(2**16, 2**10))
    assert not screened


def test_too_many_active_latents_are_not_screened(screened: list[int]) -> None:
    problem = select_helpers.plain(*SHAPE, 172)
    select_helpers.assert_selects_topk(problem, problem.select("torch"))
    assert screened == []


@pytest.mark.parametrize(
    ("capabilities", "screens"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_processors_that_multiply_bfloat16_faster_screen(
    capabilities: dict[str, Any],
    screens: bool,
    monkeypatch: pytest.MonkeyPatch,
    screened: list[int],
) -> None:
    monkeypatch.setattr(screen_cpu, "_multiplies_bfloat16", multiplies_bfloat16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    select_helpers.plain(*SHAPE, 7).select("torch")
    assert screened == ([SHAPE[0]] if screens else [])


def test_without_onednn_everything_is_computed_in_full(screened: list[int]) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        select_helpers.plain(*SHAPE, 7).select("torch")
    assert screened == []


def test_steps_through_the_screen_stay_beside_stock(screened: list[int]) -> None:
    stock = make_stock(d_in=24, d_sae=400, k=9)
    batches = [zipf_inputs(stock, 32) for _ in range(8)]
    sparse = trajectory(sparse_like(stock), batches)
    oracle = trajectory(stock_like(stock), batches)
    assert len(screened) == 8
    for name in ("l0", "n_dead", "n_forward_passes_since_fired", "act_freq_scores"):
        assert torch.equal(sparse[name], oracle[name]), name
    torch.testing.assert_close(
        sparse["mse_loss"], oracle["mse_loss"].to(sparse["mse_loss"].dtype), rtol=1e-5, atol=0
    )


def test_the_selection_attaches_no_graph_and_leaves_its_inputs_alone() -> None:
    problem = select_helpers.plain(*SHAPE, 7)
    before = [t.clone() for t in (problem.x, problem.weight, problem.bias)]
    weight = problem.weight.requires_grad_()
    selection = problem.select("torch")
    assert not selection.pre_acts.requires_grad
    assert all(map(torch.equal, before, (problem.x, weight, problem.bias)))
