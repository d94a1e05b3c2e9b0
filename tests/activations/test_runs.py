"""Runners with the store train as SAELens's runners with theirs, bit for bit."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support.activation_runs import SCENARIOS, Run, assert_same_run
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
Train = Callable[..., Run]


@pytest.mark.parametrize(
    "name",
    ["streaming with evals", "text with evals", "normalized", "whitened", "hooks with evals"],
)
def test_a_run_is_one_of_stock(train: Train, name: str) -> None:
    """With SAEs of SAELens's, which both runners train alike."""
    stock, own = (
        train(SCENARIOS[name], architecture="topk", kind=kind) for kind in ("stock", "own")
    )
    assert_same_run(own, stock)


@pytest.mark.parametrize("name", ["text, streaming", "hooks"])
def test_a_prefetching_run_is_one_of_stock(train: Train, name: str) -> None:
    stock, own = (
        train(SCENARIOS[name], architecture="topk", kind=kind, prefetch_llm_batches=2)
        for kind in ("stock", "own")
    )
    assert_same_run(own, stock)


def test_an_evaluator_may_take_batches(train: Train) -> None:
    """As one of several SAEs may, from what they are trained on."""
    taken: list[torch.Tensor] = []

    def evaluator(_sae: Any, batches: Iterator[torch.Tensor], _scaler: Any) -> dict[str, float]:
        taken.extend(next(batches).clone() for _ in range(3))
        return {"mean": taken[-1].mean().item()}

    scenario = SCENARIOS["hooks with evals"]
    stock, own = (
        train(
            scenario, kind=kind, architecture="topk", evaluator=evaluator,
            prefetch_llm_batches=kind == "own",
        )
        for kind in ("stock", "own")
    )  # fmt: skip
    assert_same_run(own, stock)
    first, second = taken[: len(taken) // 2], taken[len(taken) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
