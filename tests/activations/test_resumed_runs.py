"""A run that is stopped and resumed trains as one that is not, bit for bit."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saelens_sparse import FastActivationsStore
from tests.support.activation_runs import SCENARIOS, Run, assert_same_run, n_steps
from tests.support.activations import BATCH, Models
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
Train = Callable[..., Run]
UNINTERRUPTED: dict[str, Run] = {}


@pytest.fixture
def uninterrupted(train: Train) -> Callable[[str], Run]:
    """A run without checkpoints."""

    def run(name: str) -> Run:
        if name not in UNINTERRUPTED:
            UNINTERRUPTED[name] = train(SCENARIOS[name])
        return UNINTERRUPTED[name]

    return run


Uninterrupted = Callable[[str], Run]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_is_one_that_was_never_stopped(
    train: Train, uninterrupted: Uninterrupted, name: str
) -> None:
    scenario, expected = SCENARIOS[name], uninterrupted(name)
    run = train(scenario, n_checkpoints=2)
    assert_same_run(run, expected)
    assert len(run.checkpoints) == 2
    for checkpoint in run.checkpoints:
        resumed = train(scenario, resume_from_checkpoint=str(checkpoint))
        assert_same_run(resumed, expected, n_steps(checkpoint))


@pytest.mark.parametrize("name", ["tokens", "hooks"])
def test_a_checkpoint_counts_the_steps_before_it(train: Train, name: str) -> None:
    run = train(SCENARIOS[name], n_checkpoints=3, save_final_checkpoint=True)
    assert len(run.checkpoints) == 4
    for checkpoint in run.checkpoints:
        states = [torch.load(path) for path in checkpoint.rglob("trainer_state.pt")]
        assert states
        for state in states:
            assert state["n_training_steps"] * BATCH == state["n_training_samples"]


def test_a_run_is_resumed_many_times(train: Train, uninterrupted: Uninterrupted) -> None:
    scenario, expected = SCENARIOS["text with evals"], uninterrupted("text with evals")
    run = train(scenario, n_checkpoints=6)
    for _ in range(3):
        checkpoint = run.checkpoints[1]
        run = train(scenario, n_checkpoints=6, resume_from_checkpoint=str(checkpoint))
        assert_same_run(run, expected, n_steps(checkpoint))


@pytest.mark.parametrize("name", ["tokens with evals", "hooks with evals"])
def test_a_checkpoint_of_a_run_stopped_in_evals_counts_the_step_before_them(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    original = FastActivationsStore.get_batch_tokens

    def hit(store: FastActivationsStore, *args: Any, **kwargs: Any) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return original(store, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FastActivationsStore, "get_batch_tokens", hit)
        run = train(SCENARIOS[name])
    assert isinstance(run.error, KeyboardInterrupt)
    (checkpoint,) = run.checkpoints
    states = [torch.load(path) for path in checkpoint.rglob("trainer_state.pt")]
    assert states
    for state in states:
        assert state["n_training_steps"] == n_steps(checkpoint)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("text, streaming", True, True),
        ("hooks", 3, 2),
        ("tokens", 2, False),
        ("hooks", False, 2),
    ],
)
def test_batches_that_were_prefetched_are_trained_on(
    train: Train, uninterrupted: Uninterrupted, name: str, before: bool | int, after: bool | int
) -> None:
    """Also where the resumed run prefetches more or fewer."""
    scenario, expected = SCENARIOS[name], uninterrupted(name)
    run = train(scenario, n_checkpoints=2, prefetch_llm_batches=before)
    assert_same_run(run, expected)
    for checkpoint in run.checkpoints:
        resumed = train(
            scenario, resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=after
        )
        assert_same_run(resumed, expected, n_steps(checkpoint))


@pytest.mark.parametrize(
    ("name", "moment", "call", "prefetch"),
    [
        ("tokens", "model", 2, False),
        ("hooks", "model", 9, False),
        ("text, streaming", "shuffle", 1, False),
        ("hooks", "shuffle", 3, False),
        ("tokens", "model", 9, 2),
        ("hooks", "shuffle", 3, 2),
    ],
)
def test_a_signal_while_the_buffer_is_filled_loses_nothing(
    train: Train, uninterrupted: Uninterrupted, models: Models, monkeypatch: pytest.MonkeyPatch,
    name: str, moment: str, call: int, prefetch: bool | int,
) -> None:  # fmt: skip
    scenario, expected = SCENARIOS[name], uninterrupted(name)
    owner, function = {
        "model": (models["float32"], "run_with_cache"), "shuffle": (torch, "randperm")
    }[moment]  # fmt: skip
    original, n_calls = getattr(owner, function), 0

    def hit(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, hit)
        run = train(scenario, prefetch_llm_batches=prefetch)
    assert isinstance(run.error, KeyboardInterrupt)
    (checkpoint,) = run.checkpoints
    resumed = train(scenario, resume_from_checkpoint=str(checkpoint))
    assert_same_run(resumed, expected, n_steps(checkpoint))
