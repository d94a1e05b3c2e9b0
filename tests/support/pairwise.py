"""Which of many combinations of options are enough to see every pair of values together."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

# Values by the name of the option.
Combination = Mapping[str, Hashable]


def covering(options: Sequence[Combination]) -> list[int]:
    """
    Indices of a few combinations in which each pair of values occurs that occurs in any.

    The greedy algorithm takes the combination with the most pairs still missing, the first of
    several. Combinations need not be a full product, nor name the same options. A combination of
    fewer than two options is a pair of its own.
    """
    pairs = [_pairs(combination) for combination in options]
    missing = set[Hashable]().union(*pairs)
    chosen: list[int] = []
    while missing:
        best = max(range(len(pairs)), key=lambda index: (len(pairs[index] & missing), -index))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)


def _pairs(combination: Combination) -> set[Hashable]:
    values = sorted(combination.items(), key=lambda item: item[0])
    return set[Hashable](combinations(values, 2)) or {tuple(values)}
