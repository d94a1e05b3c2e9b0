"""Orders that are drawn in advance are those that PyTorch draws when they are wanted."""

from pathlib import Path

import pytest
import torch

from saelens_sparse import FastActivationsStore
from saelens_sparse.activations import permutations
from saelens_sparse.activations.permutations import Permutations
from tests.support.activations import (
    CASES,
    WITH_EVALS,
    Models,
    PlayStock,
    assert_same_events,
    play,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
N = 20_000
HOST = torch.device("cpu")


@pytest.fixture
def drawn_in_advance(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """However few elements there are; the numbers of those that are."""
    numbers: list[int] = []
    draw = Permutations._draw

    def noting(
        self: Permutations, n: int, before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        numbers.append(n)
        return draw(self, n, before)

    monkeypatch.setattr(permutations, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(Permutations, "_draw", noting)
    return numbers


@pytest.mark.parametrize("n_prepared", [N, N + 1, 10, None])
@pytest.mark.parametrize("others_draw", [False, True])
def test_an_order_is_that_of_randperm(n_prepared: int | None, others_draw: bool) -> None:
    drawn: list[torch.Tensor] = []
    for in_advance in (False, True):
        torch.manual_seed(3)
        orders = Permutations(HOST)
        for _ in range(2):
            if in_advance and n_prepared is not None:
                orders.prepare(n_prepared)
            if others_draw:
                torch.rand(5)
            drawn += [orders.draw(N) if in_advance else torch.randperm(N), torch.get_rng_state()]
    for plain, own in zip(drawn[:4], drawn[4:], strict=True):
        assert torch.equal(own, plain)


def test_an_order_that_was_drawn_is_taken(
    drawn_in_advance: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = Permutations(HOST)
    orders.prepare(100)
    expected = torch.randperm(100, generator=torch.Generator().set_state(torch.get_rng_state()))
    drawing = orders._drawing
    assert drawing is not None
    drawing.result.result()
    monkeypatch.setattr(torch, "randperm", None)
    assert torch.equal(orders.draw(100), expected)
    assert drawn_in_advance == [100]


@pytest.mark.parametrize(
    "name",
    ["int64", "text", "special tokens excluded", "all is kept", "model batch of one", "hooks"],
)
def test_a_store_gives_the_same(
    models: Models, play_stock: PlayStock, drawn_in_advance: list[int], name: str, tmp_path: Path
) -> None:
    actions = [*WITH_EVALS, "draw", *["batch"] * 4, "draw", *["batch"] * 4]
    _, stock = play_stock(name, actions)
    case = CASES[name]
    _, own = play(FastActivationsStore, case, actions, models[case.model], tmp_path / "own")
    assert_same_events(own, stock)
    assert drawn_in_advance
