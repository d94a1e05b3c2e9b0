"""Attempts to break the bounds of the screens, which `ops/screen/BOUND.md` proves."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from saelens_sparse.ops.screen import bound
from saelens_sparse.ops.screen import cpu as screen_cpu
from tests.support.screen_bound import (
    BIASES,
    KINDS,
    MIDPOINT,
    NORMS,
    Operands,
    adversarial,
    lane_sum,
    tensor_core_sum,
)

pytest.importorskip("triton")

from tests.support.screen_checks import (
    CANDIDATES,
    GPU,
    MARKS,
    ROUND,
    ROWS,
    THRESHOLD,
    below_on_a_cpu,
    missed,
    outside,
    recomputed_scores,
    unmarked,
)

U = bound.FLOAT32
DERANDOMIZED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="constants are compiled into the kernels of a GPU"
)


@contextmanager
def changed(*names: str, to: Callable[[float], float]) -> Generator[None]:
    """The constants with other values, wherever they are used."""
    modules = (bound, screen_cpu, GPU, CANDIDATES, MARKS)
    with pytest.MonkeyPatch.context() as patch:
        for module, name in product(modules, names):
            if hasattr(module, name):
                value = getattr(module, name)
                is_plain = isinstance(value, float)
                new = to(value if is_plain else value.value)
                patch.setattr(module, name, new if is_plain else type(value)(new))
        yield


def half(value: float) -> float:
    return value / 2


def nothing(_: float) -> float:
    return 0.0


@st.composite
def drawn(draw: st.DrawFn, n_rows: int, d_sae: int) -> Operands:
    """Adversarial operands."""
    kinds = draw(st.tuples(st.sampled_from([*KINDS]), st.sampled_from([*KINDS])))
    shape = n_rows, draw(st.sampled_from([1, 2, 3, 17, 64, 257, 400])), d_sae
    exponents = draw(st.sampled_from([(0, 0), (-60, 40), (60, -50), (-118, 60), (-90, -50)]))
    bias, norms = draw(st.sampled_from(BIASES)), draw(st.sampled_from(NORMS))
    chance = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return adversarial(shape, kinds, exponents, bias, norms, chance)


@interpreted
@settings(DERANDOMIZED, max_examples=12)
@given(drawn(n_rows=2, d_sae=40), st.integers(1, 4))
def test_no_score_is_outside_its_bound_and_no_latent_is_missed(operands: Operands, k: int) -> None:
    """Edges of the pattern are at scores, to the last bit."""
    recomputed = recomputed_scores(operands)
    assert outside(operands, recomputed) == 0
    assert missed(operands, recomputed, k) == 0
    for one in (operands, replace(operands, norms=None)):
        recomputed = recomputed_scores(one)
        assert unmarked(one, recomputed, edge=recomputed[k % 2].contiguous()) == 0


@settings(DERANDOMIZED, max_examples=150)
@given(drawn(n_rows=9, d_sae=300))
def test_scores_are_below_the_bounds_of_a_cpu(operands: Operands) -> None:
    assert below_on_a_cpu(operands) == 0


def test_stored_norms_are_within_their_slack() -> None:
    """Of rows of any size; without the slack they are not."""
    rows = adversarial((9, 300, 9), ("normal", "outliers"), (-90, 90), "zero", "none",
                       torch.Generator().manual_seed(0)).x  # fmt: skip
    rounded, errors = ROUND.round_rows(rows, torch.float16)
    residuals = rows.double() - rounded.double() * errors[0].double()[:, None]
    for stored, true in (
        (errors[1], rows.double().norm(dim=1)),
        (errors[2], residuals.norm(dim=1)),
    ):
        assert (true <= stored * bound.NORM_SLACK).all()
        assert (true > stored.double()).any()


# Block and guard bits of a T4, an A100 and an H100; one by one, as a processor adds.
TENSOR_CORES = {(7, 5): (4, 1), (8, 0): (8, 1), (9, 0): (16, 2), None: (1, 20)}


@pytest.mark.parametrize("capability", TENSOR_CORES, ids=str)
@pytest.mark.parametrize("d_in", [64, 1024])
def test_sums_of_a_tensor_core_are_within_their_bound(
    d_in: int, capability: tuple[int, int] | None
) -> None:
    """A large product, then small ones of which as much as can be is cut off, in the largest
    blocks in which the sum is cut too.
    """
    (block, guard), worst = TENSOR_CORES[capability], 0.0
    for quanta, used in product((1, 2, 3), range(max(1, block - 2), block + 1)):
        small = 2.0 ** -(23 + guard) * (quanta - 2.0**-9)
        products = [1.0] + [small if i % block < used else 0.0 for i in range(1, d_in)]
        true = sum(products)  # float64
        worst = max(worst, (true - tensor_core_sum(products, block, guard)) / true)
    most = d_in * bound.summed_product(capability)
    assert worst <= most
    if capability in ((7, 5), (9, 0)):
        assert worst > most / 2


@pytest.mark.parametrize("tile", [1, 16, 256, 1024])
@pytest.mark.parametrize("d_in", [40, 1000])
def test_recomputed_sums_are_within_the_bound_of_their_tile(d_in: int, tile: int) -> None:
    """A one, and what each addition to it loses, in its lane and then of the other lanes."""
    products = torch.zeros(d_in)
    products[:tile] = products[::tile] = 0.999 * U
    products[0] = 1.0
    error = float(products.double().sum()) - lane_sum(products, tile)
    assert bound.recomputed_sum(d_in, tile) / 2 < error <= bound.recomputed_sum(d_in, tile)
    if tile == 1:
        assert bound.cpu_accumulation(d_in) / 2 < 2 * error <= bound.cpu_accumulation(d_in)


@pytest.mark.parametrize("tile", [16, 256])
def test_screens_are_told_the_tiles_of_what_recomputes(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both searches, whatever the tiles are."""
    select = import_module("saelens_sparse.ops.search.topk_kernels")
    monkeypatch.setattr(select, "LAUNCH", select.SelectLaunch(RESCORE_COLS=tile))
    for module in (THRESHOLD, ROWS):
        monkeypatch.setattr(module, "GATHER_DOT", ROWS.GatherDotLaunch(BLOCK_D=tile))
    launched: list[dict[str, Any]] = []
    told: list[Any] = []
    original = import_module("triton").runtime.interpreter.GridExecutor.__call__

    def record(self: Any, *args: Any, **options: Any) -> None:
        launched.append(options)
        original(self, *args, **options)

    x, weight = torch.randn(2, 600), torch.randn(64, 600)
    bias = torch.zeros(64)
    with (
        mock.patch("triton.runtime.interpreter.GridExecutor.__call__", record),
        mock.patch.object(GPU.Screen, "of", side_effect=GPU.Screen.of) as of,
    ):
        select.select_topk(x, weight, bias, None, 2, 2**20)
        THRESHOLD.find_pattern(x, weight, bias, bias + 1, 0.1, 200, 2**20)
        told += [call.kwargs["tile"] for call in of.call_args_list]
    recomputations = [o for o in launched if {"BLOCK_D", "D"} <= o.keys() and "R" not in o]
    used = {options["BLOCK_D"] for options in launched if "BLOCK_K" in options}
    assert told == [tile, tile]
    assert {options["BLOCK_D"] for options in recomputations} | used == {tile}
    accumulation = {o["chunk"].accumulation for o in launched if "chunk" in o}
    assert accumulation == {bound.accumulation(600, tile, None)}


@pytest.mark.parametrize(("d_in", "tile"), [(bound.MAX_D_IN + 1, 256), (64, 0)])
def test_no_bound_is_given_where_none_is_proven(d_in: int, tile: int) -> None:
    with pytest.raises(AssertionError):
        bound.accumulation(d_in, tile, None)


# Roundings of a float32, as BOUND.md counts them; and what else a constant has to cover.
NEEDED = {
    "NORM_SLACK": 1 + 2.0**-12,
    "ROUNDED_NORMS": (1 + bound.FLOAT16) ** 2 * (1 + 2.0**-12) ** 2,
    "PRODUCT_SLACK": (1 + bound.FLOAT16) * (1 + bound.accumulation(bound.MAX_D_IN, 256, None))
    / bound.NORM_SLACK,
    "ROUNDING": bound.FLOAT16 + 5 * U,
    "BIAS_ROUNDING": 5 * U,
    "GROUP_BIAS_ROUNDING": 2 * U,
    "GROUP_SCORE_ROUNDING": 3 * U,
    "MARK_SLACK": 1 / (1 - bound.FLOAT16 - 5 * U),
    "MARK_BIAS_ROUNDING": 4 * U,
    "MARK_EDGE_ROUNDING": (bound.FLOAT16 + 5 * U) / (1 - bound.FLOAT16 - 5 * U) + 7 * U,
    "CPU_SLACK": (1 + bound.BFLOAT16) ** 2 * (1 + bound.CPU_MAX_D_IN * U) * (1 + 2.0**-11) ** 2
    + 5 * U / bound.BFLOAT16,
    "CPU_BIAS_ROUNDING": 5 * U,
    "CPU_TINY_NORM": bound.CPU_MAX_D_IN**0.5 * 2.0**-63 / bound.BFLOAT16,
}  # fmt: skip


@pytest.mark.parametrize("name", NEEDED)
def test_constants_cover_what_is_counted(name: str) -> None:
    value = getattr(bound, name)
    assert value >= NEEDED[name]
    # Slacks are of a one, which is no slack.
    assert NEEDED[name] > 1.0 or value - 1 < NEEDED[name]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def swapped(shift: float) -> Operands:
    """The largest of three scores is screened as the smallest one, for products are rounded.

    Its product is just below the middle between two numbers of float16, those of the other two,
    which are equal, just above it. Biases make up for more than that.
    """
    weight, bias = torch.zeros(64, 2), torch.full((64,), -1e9)
    weight[[0, 9, 17], 0] = 1.0
    weight[[0, 9, 17], 1] = 2.0**-4 + 2.0**-8 * torch.tensor([-1.0, 1.0, 1.0])
    bias[[0, 9, 17]] = shift - 1.25 * 2.0**-14 * torch.tensor([0.0, 1.0, 1.0])
    return Operands(vector(1.0, 2.0**-7), weight, bias, None)


def residual_operands(swap: bool) -> Operands:
    """All of an operand's residuals count, and the product, which cancels, is not rounded."""
    rounded = torch.full((17,), 1 + 0.99 * MIDPOINT)
    rounded[16] = 16.0
    exact = torch.ones(17)
    exact[16] = -1.0
    x, weight = (exact, rounded) if swap else (rounded, exact)
    return Operands(x[None], weight.repeat(64, 1), torch.zeros(64), None)


def grid_products() -> Operands:
    """Products of numbers of float16, in the middle between two."""
    x = torch.tensor([[1 + 16 / 1024], [1 + 48 / 1024]])
    return Operands(x, 1 + torch.arange(64.0)[:, None] / 1024, torch.zeros(64), None)


def biases(n: int) -> Operands:
    """Biases beside which products are next to nothing, and norms."""
    chance = torch.Generator().manual_seed(1)
    bias = 1 + 0.05 * torch.rand(n, generator=chance)
    norms = 1 + 0.05 * torch.rand(n, generator=chance)
    return Operands(torch.ones(1, 1), 1e-9 * torch.rand(n, 1, generator=chance), bias, norms)


def near_ties() -> Operands:
    """Scores that differ by what a float32 rounds, of which the order of operations decides."""
    chance = torch.Generator().manual_seed(4)
    norms = 1 + 0.3 * torch.rand(64, generator=chance)
    weight = 2.0**-22 * (torch.rand(64, 1, generator=chance) - 0.5)
    return Operands(torch.tensor([[0.7], [1.0], [1.9]]), weight, 1.5 / norms, norms)


def tiny_products() -> Operands:
    """Numbers of float16 once scaled, whose products are subnormal in float32."""
    x = torch.ldexp(torch.tensor([[1040.0], [1061.0]]), torch.tensor(-130))
    weight = torch.ldexp(1 + torch.arange(64.0)[:, None] / 1024, torch.tensor(-26))
    return Operands(x, weight, torch.zeros(64), None)


def bfloat16_products() -> Operands:
    """An operand and the product are both rounded down by nearly half of bfloat16's distance."""
    x, weight = vector(1 + 7 / 128 + 0.99 / 256), torch.full((64, 1), 1 + 9 / 128)
    return Operands(x, weight, torch.zeros(64), None)


def tiny_rows() -> Operands:
    chance = torch.Generator().manual_seed(3)
    x, weight = (torch.rand(n, 8, generator=chance) for n in (3, 64))
    return Operands(x * 1e-30, weight, torch.zeros(64), None)


def bias_at_the_edge() -> int:
    """A pre-activation that reaches its edge only by the rounding of an addition."""
    operands = Operands(
        torch.ones(1, 1), torch.full((64, 1), 0.51 * 2.0**-23), torch.ones(64), None
    )
    return unmarked(operands, recomputed_scores(operands), torch.full((64,), 1 + 2.0**-23))


def outside_of(operands: Operands) -> int:
    return outside(operands, recomputed_scores(operands))


def missed_of(operands: Operands) -> int:
    return missed(operands, recomputed_scores(operands), 1)


def unmarked_at_first_row(operands: Operands) -> int:
    recomputed = recomputed_scores(operands)
    return unmarked(operands, recomputed, recomputed[0].contiguous())


BROKEN: list[tuple[tuple[str, ...], Callable[[float], float], Callable[[], int]]] = [
    (("ROUNDING",), half, lambda: outside_of(grid_products())),
    (("ROUNDING",), half, lambda: missed_of(swapped(0.0))),
    (("NORM_SLACK",), half, lambda: outside_of(residual_operands(False))),
    (("NORM_SLACK",), half, lambda: outside_of(residual_operands(True))),
    (("UNDERFLOW",), nothing, lambda: outside_of(tiny_products())),
    (("BIAS_ROUNDING",), nothing, lambda: outside_of(biases(200))),
    (("PRODUCT_SLACK",), half, lambda: missed_of(swapped(-8.0))),
    (("GROUP_BIAS_ROUNDING", "GROUP_SCORE_ROUNDING"), nothing, lambda: missed_of(near_ties())),
    (("MARK_EDGE_ROUNDING",), half, lambda: unmarked_at_first_row(grid_products())),
    (("MARK_BIAS_ROUNDING",), nothing, bias_at_the_edge),
    (("MARK_SLACK",), half, lambda: unmarked_at_first_row(residual_operands(False))),
    (("MARK_SLACK",), half, lambda: unmarked_at_first_row(residual_operands(True))),
    (("CPU_SLACK",), half, lambda: below_on_a_cpu(bfloat16_products())),
    (("BFLOAT16",), half, lambda: below_on_a_cpu(bfloat16_products())),
    (("CPU_TINY_NORM",), nothing, lambda: below_on_a_cpu(tiny_rows())),
    (("CPU_BIAS_ROUNDING",), nothing, lambda: below_on_a_cpu(biases(200))),
]


@interpreted
@pytest.mark.parametrize(
    ("names", "to", "wrong"), BROKEN, ids=[f"{n[0]} {to.__name__}" for n, to, _ in BROKEN]
)
def test_bounds_break_without_each_of_their_constants(
    names: tuple[str, ...], to: Callable[[float], float], wrong: Callable[[], int]
) -> None:
    assert wrong() == 0
    with changed(*names, to=to):
        assert wrong() > 0
