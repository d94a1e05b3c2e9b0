"""The store in SAELens's own runners, and checkpoints that go from one runner to the other."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse import FastActivationsStore, use_fast_activations_store
from tests.support.activation_runs import (
    SCENARIOS,
    Run,
    Scenario,
    assert_same_run,
    make_runner,
    n_steps,
)
from tests.support.activations import CASES, HOOK, POST, Models, make_store
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
Train = Callable[..., Run]


@pytest.mark.parametrize(
    ("name", "prefetch"),
    [
        ("normalized", False),
        ("hooks with evals", False),
        ("text, streaming", 2),
        ("hooks", True),
    ],
)
def test_a_runner_trains_as_before(train: Train, name: str, prefetch: bool | int) -> None:
    stock, swapped = (
        train(SCENARIOS[name], kind=kind, architecture="topk", prefetch_llm_batches=prefetch)
        for kind in ("stock", "swapped")
    )
    assert_same_run(swapped, stock)


@pytest.mark.parametrize("name", ["text, streaming", "whitened", "hooks"])
def test_a_runner_resumes(train: Train, name: str) -> None:
    scenario, options = SCENARIOS[name], {"architecture": "topk"}
    expected = train(scenario, kind="stock", **options)
    run = train(scenario, kind="swapped", n_checkpoints=2, **options)
    assert_same_run(run, expected)
    for checkpoint in run.checkpoints:
        resumed = train(scenario, kind="swapped", resume_from_checkpoint=str(checkpoint), **options)
        assert_same_run(resumed, expected, n_steps(checkpoint))


@pytest.mark.parametrize("name", ["tokens", "text, streaming", "hooks"])
def test_stocks_runner_resumes_from_a_checkpoint_of_this_package(train: Train, name: str) -> None:
    """At the same place, with the shuffle of its random state, as from its own."""
    scenario, options = SCENARIOS[name], {"architecture": "topk"}
    stock, own = (
        train(scenario, kind=kind, n_checkpoints=1, **options).checkpoints[0]
        for kind in ("stock", "own")
    )
    assert stock.name == own.name
    resumed = []
    for checkpoint in (stock, own):
        runner_options = options | {"resume_from_checkpoint": str(checkpoint)}
        resumed.append(train(scenario, kind="stock", seed=5, **runner_options))
    assert_same_run(resumed[1], resumed[0])


@pytest.mark.parametrize("name", ["tokens", "text, streaming", "hooks"])
def test_a_checkpoint_of_stock_is_resumed_from(train: Train, name: str) -> None:
    """As SAELens's runner does: at its place, with an empty buffer, which is said."""
    scenario, options = SCENARIOS[name], {"architecture": "topk"}
    (checkpoint,) = train(scenario, kind="stock", n_checkpoints=1, **options).checkpoints
    options |= {"resume_from_checkpoint": str(checkpoint)}
    stock = train(scenario, kind="stock", seed=5, **options)
    with pytest.warns(UserWarning, match="the buffer starts empty"):
        own = train(scenario, seed=5, **options)
    for batch, other in zip(own.batches, stock.batches, strict=True):
        assert torch.equal(batch, other)


@pytest.mark.parametrize("data", ["int64", "streaming", "text"])
@pytest.mark.parametrize("n_prompts", [1, 2, 9])
def test_a_store_that_was_read_from_stays(
    models: Models, data: str, n_prompts: int, tmp_path: Path
) -> None:
    runner = make_runner(Scenario(data), models["float32"], tmp_path / "run", kind="stock")
    runner.activations_store.get_batch_tokens(n_prompts)
    with pytest.raises(ValueError, match="read from") as raised:
        use_fast_activations_store(runner)
    assert "\n" not in str(raised.value)
    assert type(runner.activations_store) is ActivationsStore


@pytest.mark.parametrize("hooks", [(), (HOOK, POST)], ids=["a hook", "hooks"])
def test_a_store_that_has_served_stays(
    models: Models, hooks: tuple[str, ...], tmp_path: Path
) -> None:
    scenario = Scenario("int64", hooks=hooks)
    runner = make_runner(scenario, models["float32"], tmp_path / "run", kind="stock")
    store = runner.activations_store
    next(store.get_multi_hook_data_loader() if hooks else store)
    with pytest.raises(ValueError, match="read from"):
        use_fast_activations_store(runner)
    assert runner.evaluator.activations_store is runner.activations_store is store


def test_a_cache_that_was_read_from_stays(models: Models, tmp_path: Path) -> None:
    store = make_store(ActivationsStore, CASES["cached"], models["float32"], tmp_path / "store")
    store.get_raw_llm_batch()
    with pytest.raises(ValueError, match="read from"):
        FastActivationsStore.taking_over(store)


def test_a_store_of_another_class_stays(models: Models, tmp_path: Path) -> None:
    class Own(ActivationsStore):
        pass

    runner = make_runner(SCENARIOS["tokens"], models["float32"], tmp_path / "run", kind="stock")
    runner.activations_store = make_store(Own, CASES["int64"], models["float32"], tmp_path / "own")
    with pytest.raises(TypeError, match="Own"):
        use_fast_activations_store(runner)


def test_twice_is_once(models: Models, tmp_path: Path) -> None:
    runner = make_runner(SCENARIOS["tokens"], models["float32"], tmp_path / "run", kind="stock")
    store = use_fast_activations_store(runner)
    assert use_fast_activations_store(runner) is store


def test_a_runner_of_this_package_uses_it(models: Models, tmp_path: Path) -> None:
    for name in ("tokens", "hooks"):
        runner = make_runner(SCENARIOS[name], models["float32"], tmp_path / name)
        assert type(runner.activations_store) is FastActivationsStore
        assert runner.evaluator.activations_store is runner.activations_store
