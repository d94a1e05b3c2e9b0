"""Runners with the store train as SAELens's runners with theirs, bit for bit."""

from collections.abc import Callable

import pytest

from tests.support.activation_runs import SCENARIOS, Run, assert_same_run
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
Train = Callable[..., Run]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_is_one_of_stock(train: Train, name: str) -> None:
    """With SAEs of SAELens's, which both runners train alike."""
    stock, own = (
        train(SCENARIOS[name], architecture="topk", stock=stock) for stock in (True, False)
    )
    assert_same_run(own, stock)


@pytest.mark.parametrize("name", ["text, streaming", "hooks"])
def test_a_prefetching_run_is_one_of_stock(train: Train, name: str) -> None:
    stock, own = (
        train(SCENARIOS[name], architecture="topk", stock=stock, prefetch_llm_batches=2)
        for stock in (True, False)
    )
    assert_same_run(own, stock)
