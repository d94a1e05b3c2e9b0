"""A store that computes activations before they are wanted gives what it would give without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_sparse import FastActivationsStore
from tests.support.activation_runs import SCENARIOS, Run, assert_same_run, n_steps
from tests.support.activations import (
    CASES,
    WITH_EVALS,
    Models,
    Player,
    PlayStock,
    assert_same_events,
    make_store,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
NAMES = (
    "int64", "long rows", "selected", "streaming", "text", "not concatenated", "chat",
    "special tokens excluded", "all tokens excluded", "positions with a step", "no mixing",
    "little mixing", "all is kept", "all is kept, large batches", "batch of the buffer",
    "batch does not divide the buffer", "model batch larger than the buffer",
    "model batch larger than the dataset", "model batch of one", "bfloat16", "hooks",
    "hooks, text", "cached",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_stock_gives_the_same(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    case, model = CASES[name], models[CASES[name].model]
    _, stock = play_stock(name, WITH_EVALS)
    torch.manual_seed(0)
    store = make_store(FastActivationsStore, case, model, tmp_path / "own")
    store.reads_ahead = True
    # Positions are those of tokens that were read; what is saved is another matter.
    assert_same_events(Player(store).play(WITH_EVALS), stock, positions=False)


@pytest.mark.parametrize("name", ["int64", "streaming", "text", "hooks, text"])
def test_a_state_is_that_of_what_was_served(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    case, model = CASES[name], models[CASES[name].model]
    _, stock = play_stock(name, WITH_EVALS)
    own, state = [], tmp_path / "state"
    for part, start in enumerate(range(0, len(WITH_EVALS), 7)):
        torch.manual_seed(part)
        store = make_store(FastActivationsStore, case, model, tmp_path / str(part))
        store.reads_ahead = part % 3 != 2
        player = Player(store)
        if part > 0:
            store.load(str(state))
        own += player.play(WITH_EVALS[start : start + 7])
        store.save(str(state))
        assert store.state_dict()["n_dataset_processed"] == stock[len(own) - 1].n_dataset_processed
    assert_same_events(own, stock, positions=False)


def test_the_model_runs_while_batches_are_left(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case, model = CASES["int64"], models["float32"]
    original, calls_after = model.run_with_cache, []
    n_calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "run_with_cache", counting)
    for reads_ahead in (False, True):
        store = make_store(FastActivationsStore, case, model, tmp_path / str(reads_ahead))
        store.reads_ahead = reads_ahead
        n_calls = 0
        Player(store).play(["batch"] * 3)  # all that the first shuffle serves
        calls_after.append(n_calls)
    assert calls_after[1] > calls_after[0]


@pytest.mark.parametrize("name", ["text with evals", "hooks with evals", "normalized"])
def test_a_run_that_prefetches_is_one_that_does_not(train: Callable[..., Run], name: str) -> None:
    """With evals too, which take tokens between."""
    scenario = SCENARIOS[name]
    expected = train(scenario)
    run = train(scenario, n_checkpoints=1, prefetch_llm_batches=2)
    assert_same_run(run, expected)
    (checkpoint,) = run.checkpoints
    resumed = train(scenario, resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=True)
    assert_same_run(resumed, expected, n_steps(checkpoint))
