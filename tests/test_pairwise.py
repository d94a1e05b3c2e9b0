"""The choice of combinations that CI runs instead of all of them."""

from itertools import combinations, product
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import leave_the_rest_of_the_product
from tests.support.pairwise import Combination, covering

AXES = {"precision": 4, "dead": 4, "mode": 3, "ste": 2, "centre": 2}
PRODUCT: list[Combination] = [
    dict(zip(AXES, values, strict=True)) for values in product(*map(range, AXES.values()))
]


def pairs_in(chosen: list[Combination]) -> set[tuple[object, ...]]:
    return {
        (first, second, one[first], one[second])
        for one in chosen
        for first, second in combinations(sorted(one), 2)
    }


def test_every_pair_is_covered_by_few() -> None:
    chosen = covering(PRODUCT)
    assert pairs_in([PRODUCT[index] for index in chosen]) == pairs_in(PRODUCT)
    # No fewer than 4 * 4 can.
    assert 16 <= len(chosen) <= 20
    assert covering(PRODUCT) == chosen


def test_combinations_that_do_not_exist_are_not_missed() -> None:
    some = [one for one in PRODUCT if not (one["precision"] == 1 and one["mode"] == 2)]
    chosen = [some[index] for index in covering(some)]
    assert pairs_in(chosen) == pairs_in(some)


def test_two_options_are_a_full_product_and_one_is_itself() -> None:
    two: list[Combination] = [{"a": a, "b": b} for a in range(3) for b in range(2)]
    assert covering(two) == list(range(6))
    assert covering([{"a": 0}, {"a": 1}]) == [0, 1]
    assert covering([{}]) == [0]
    assert covering([]) == []


class Item:
    """A collected test as far as the choice looks at it."""

    def __init__(self, markers: set[str], **params: Any) -> None:
        self.nodeid = f"test.py::test_step[{params}]"
        self.callspec = SimpleNamespace(params=params)
        self.markers = markers

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.markers else None

    def add_marker(self, marker: pytest.MarkDecorator) -> None:
        self.markers.add(marker.name)


@pytest.mark.parametrize("marked", [True, False])
def test_each_path_gets_pairs_of_its_own_and_only_where_asked(marked: bool) -> None:
    items: list[Any] = [
        Item({"pairwise"} if marked else set(), target=target, dead=dead, options=one)
        for target in ("torch", "triton")
        for dead in range(4)
        for one in ({"ste": ste, "centre": centre} for ste in (0, 1) for centre in (0, 1))
    ]
    leave_the_rest_of_the_product(items)
    kept = [item.callspec.params for item in items if "exhaustive" not in item.markers]
    assert (len(kept) < len(items)) == marked
    for target in ("torch", "triton"):
        for field in ("ste", "centre"):
            of_target = [one for one in kept if one["target"] == target]
            assert {(one["dead"], one["options"][field]) for one in of_target} == set(
                product(range(4), (0, 1))
            )
