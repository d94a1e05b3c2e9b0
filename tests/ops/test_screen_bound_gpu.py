"""Attempts to break the bounds of the screens on a GPU, by thousands of rows at a time."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from saelens_sparse.ops.screen import bound
from tests.support.screen_bound import BIASES, KINDS, NORMS, adversarial, cut_sums

pytest.importorskip("triton")

from tests.support.screen_checks import ROUND, missed, outside, recomputed_scores, unmarked

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("d_in", [1, 64, 765, 2304, 16_384])
@pytest.mark.parametrize("exponents", [(0, 0), (-90, 40), (60, -100)])
def test_no_bound_is_broken(d_in: int, exponents: tuple[int, int]) -> None:
    """Every kind of rows of x with every kind of rows of the weight."""
    chance = torch.Generator("cuda").manual_seed(d_in)
    n_scores = 0
    for i, kinds in enumerate(product(KINDS, KINDS)):
        bias, norms = BIASES[i % len(BIASES)], NORMS[i % len(NORMS)]
        shape = 2048, d_in, 1024
        operands = adversarial(shape, kinds, exponents, bias, norms, chance)
        recomputed = recomputed_scores(operands)
        assert outside(operands, recomputed) == 0, kinds
        assert missed(operands, recomputed, k=1 + i % 16) == 0, kinds
        for one in (operands, replace(operands, norms=None)):
            recomputed = recomputed_scores(one)
            for row in (0, 999):
                assert unmarked(one, recomputed, recomputed[row].contiguous()) == 0, kinds
        n_scores += recomputed.numel()
    assert n_scores > 2e8


@pytest.mark.parametrize("d_in", [768, 2304, 16_384])
def test_sums_that_are_cut_most_are_within_their_bound(d_in: int) -> None:
    """For each number of guard bits that this card may have."""
    worst = 0.0
    for guard, used in product(range(4), (15, 16)):
        operands = cut_sums(d_in, guard, used, "cuda")
        assert outside(operands, recomputed_scores(operands)) == 0
        x, weight = operands.x.half(), operands.weight.half()
        assert torch.equal(x.float(), operands.x) and torch.equal(weight.float(), operands.weight)
        sums = torch.mm(x, weight.T, out_dtype=torch.float32).double()
        sizes = operands.x.double().norm(dim=1)[:, None] * operands.weight.double().norm(dim=1)
        worst = max(worst, float(((sums - operands.scores()).abs() / sizes).max()))
    most = d_in * bound.summed_product(torch.cuda.get_device_capability())
    assert worst <= most
    # Or else the operands are not those that are cut most.
    assert worst > most / 4


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128, device="cuda", dtype=torch.float64)
    rows = (1.5 * torch.exp2(exponents)).float()[:, None]
    rounded, errors = ROUND.round_rows(rows, torch.float16)
    assert torch.equal(rounded.double()[:, 0] * errors[0].double(), rows.double()[:, 0])
    assert torch.equal(errors[1], rows[:, 0])
    assert not errors[2].any()
