"""The rule that holds a training run to the drift of its controls."""

import pytest
import torch

from tests.support.drift import (
    FACTOR,
    NUDGE_ULPS,
    PART,
    Curve,
    nudges,
    require_drift_of_rounding,
)

# Two parts: in the first the controls are beside stock, in the second they are apart.
STOCK = [2.0] * (2 * PART)
CONTROLS: list[Curve] = [
    {"loss": [2.0] * PART + [2.0 + distance] * PART} for distance in (0.1, -0.2)
]


def require(early: float, late: float) -> None:
    actual = {"loss": [2.0 + early] * PART + [2.0 + late] * PART}
    require_drift_of_rounding(actual, {"loss": STOCK}, CONTROLS)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_may_be_somewhat_farther_away_than_the_farthest_control(sign: int) -> None:
    require(early=0.0, late=0.99 * FACTOR * sign * 0.2)
    with pytest.raises(AssertionError, match=f"loss, steps {PART} to {2 * PART - 1}: 6.06e-01"):
        require(early=0.0, late=1.01 * FACTOR * sign * 0.2)


def test_what_controls_do_later_excuses_nothing_before() -> None:
    require(early=1e-4, late=0.0)
    with pytest.raises(AssertionError, match=f"loss, steps 0 to {PART - 1}: 1.00e-03 from stock"):
        require(early=1e-3, late=0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_named(value: float) -> None:
    with pytest.raises(AssertionError, match=r"loss, steps 20 to 39: (nan|inf) from stock, inf%"):
        require(early=0.0, late=value)


def test_a_quantity_that_is_zero_in_stock_and_its_controls_stays_zero() -> None:
    zero: Curve = {"loss": [0.0] * PART}
    require_drift_of_rounding(zero, zero, [zero])
    with pytest.raises(AssertionError, match="loss"):
        require_drift_of_rounding({"loss": [1e-9] * PART}, zero, [zero])


def test_one_latent_more_or_less_is_no_defect() -> None:
    stock: Curve = {"dead": [0.0] * PART}
    require_drift_of_rounding({"dead": [1.0] * PART}, stock, [stock], counts={"dead"})
    with pytest.raises(AssertionError, match="dead"):
        require_drift_of_rounding({"dead": [2.0] * PART}, stock, [stock], counts={"dead"})


def test_nudges_are_small_and_come_in_pairs_of_opposite_sign() -> None:
    batches = [torch.randn(5, 7) for _ in range(3)]
    before = torch.get_rng_state()
    runs = list(nudges(batches, n_pairs=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(runs) == 4
    ulp = torch.finfo(torch.float32).eps
    for up, down in (runs[:2], runs[2:]):
        for batch, above, below in zip(batches, up, down, strict=True):
            nudge = (above - batch) / (ulp * batch)
            assert NUDGE_ULPS / 2 < nudge.abs().max() <= NUDGE_ULPS + 1
            torch.testing.assert_close(below - batch, batch - above, rtol=0.1, atol=2e-6)
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(runs[0][0] - batches[0], runs[0][1] - batches[1])
