"""What to change in a config, from what was measured."""

from typing import Any

import pytest

from saelens_sparse.whole_run.record import SAELENS_RUNNER
from saelens_sparse.whole_run.suggestions import Trial, of_runner, suggestions
from saelens_sparse.whole_run.windows import MODEL, STEP
from tests.support.whole_runs import CONFIG, record


def said(*args: Any, **kwargs: Any) -> dict[str, float]:
    """The gain of each suggestion by what it says to change."""
    return {one.change: one.gain for one in suggestions(*args, **kwargs)}


def test_a_run_in_which_nothing_stands_out_is_left_as_it_is() -> None:
    assert said(record(evals=2.0, logging=2.0), CONFIG) == {}


def test_a_trial_counts_by_the_share_of_its_part() -> None:
    trials = [
        Trial("autocast_lm=true", MODEL, before_ms=10.0, after_ms=5.0),
        Trial("autocast=true", STEP, before_ms=140.0, after_ms=35.0),
        Trial("store_batch_size_prompts=64", MODEL, before_ms=10.0, after_ms=11.0),
    ]
    gains = said(record(model=40.0, step=50.0), CONFIG, trials)
    assert list(gains) == ["autocast=true", "autocast_lm=true"]
    assert gains["autocast_lm=true"] == pytest.approx(100 / 80)
    assert gains["autocast=true"] == pytest.approx(100 / 62.5)


def test_what_was_measured_is_told() -> None:
    trial = Trial("autocast_lm=true", MODEL, before_ms=40.25, after_ms=20.0)
    (found,) = suggestions(record(model=40.0, step=50.0), CONFIG, [trial])
    assert str(found) == (
        "autocast_lm=true: the run would be 1.25x as fast. Tried alone, the language model took "
        "20.0 instead of 40.2 ms per 4,096 tokens."
    )


def test_evals_that_take_long_become_rarer() -> None:
    run = record(evals=25.0)  # of 125
    (found,) = suggestions(run, CONFIG)
    assert found.change == "logger.eval_every_n_wandb_logs=2000"
    assert found.gain == pytest.approx(125 / (125 - 25 * 19 / 20))
    assert "Evals every 1,000 steps take 20% of the run." in str(found)


def test_logs_that_take_long_become_rarer_and_evals_stay() -> None:
    run = record(logging=11.0)  # of 111: 10%, to be 1%
    (found,) = suggestions(run, CONFIG)
    assert found.change == "logger.wandb_log_frequency=100, logger.eval_every_n_wandb_logs=10"
    assert found.gain == pytest.approx(111 / (111 - 11 * 9 / 10))


def test_a_model_that_dominates_is_cached_for_further_runs() -> None:
    run = record(model=60.0, step=30.0)
    (found,) = suggestions(run, CONFIG)
    assert (found.change, found.is_bound) == ("saelens-sparse cache CONFIG", True)
    assert found.gain == pytest.approx(100 / 40)
    assert "at most 2.50x as fast" in str(found)
    assert said(run, {**CONFIG, "use_cached_activations": True}) == {}
    assert said(record(model=40.0, step=50.0), CONFIG) == {}


def test_a_model_on_a_device_of_its_own_is_hidden_by_prefetching() -> None:
    apart = {**CONFIG, "llm_device": "cuda:1"}
    assert said(record(model=30.0, step=60.0), apart) == {
        "prefetch_llm_batches=true": pytest.approx(100 / 70)
    }
    assert said(record(model=30.0, step=60.0), {**apart, "prefetch_llm_batches": True}) == {}


def test_the_other_runner_counts_by_what_it_took() -> None:
    stock, own = record(runner=SAELENS_RUNNER), record(model=5.0, step=35.0)
    (found,) = of_runner(stock, own)
    assert found.gain == pytest.approx(100 / 50)
    assert "81,920 instead of 40,960 tokens/s" in str(found)
    assert of_runner(stock, record(step=69.0)) == []


def test_three_at_most_and_bounds_last() -> None:
    trials = [Trial(f"change {n}", STEP, 10.0, 10.0 - n) for n in (1, 3, 2)]
    found = suggestions(record(model=60.0, step=30.0), CONFIG, trials)
    assert [one.change for one in found] == ["change 3", "change 2", "change 1"]
    found = suggestions(record(model=60.0, step=30.0), CONFIG, trials[:1])
    assert [one.is_bound for one in found] == [False, True]
