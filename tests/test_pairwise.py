"""The choice of combinations that CI runs instead of all of them."""

from itertools import combinations, product

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
