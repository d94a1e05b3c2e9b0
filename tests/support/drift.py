"""How far a training may drift from stock's: as far as rounding makes stock drift from itself.

Now and then rounding decides a gate, or a rank, otherwise. Until then two runs agree to rounding;
some steps later they are as far apart as any two. When that happens depends on the processor, so
no tolerance that was found on one holds on the next. Controls hold on each: runs of stock on the
same batches, nudged.

Nudges are a hundred times what a float32 sum rounds, so that the controls part from stock before
rounding alone would; how far apart runs get does not depend on what parted them. They come in
pairs of opposite sign: where a pre-activation is as good as on its threshold, one of the pair is
on the other side.
"""

from collections.abc import Iterator, Sequence, Set
from math import dist, inf, isnan, sqrt
from statistics import fmean
from sys import float_info

import torch

# Quantities of a training, one value a step.
Curve = dict[str, list[float]]

NUDGE_ULPS = 128
# Curves are judged in parts of so many steps.
PART = 20
# The largest of four controls is what a fifth exceeds by this in hardly any part.
FACTOR = 3.0
# What a gate or two of a batch, decided otherwise, change of a quantity at once.
FLOOR = 1e-4


def nudges(batches: Sequence[torch.Tensor], n_pairs: int) -> Iterator[list[torch.Tensor]]:
    """The batches with every value moved by up to `NUDGE_ULPS` units in the last place."""
    for pair in range(n_pairs):
        generator = torch.Generator().manual_seed(pair)
        relative = [
            torch.randint(-NUDGE_ULPS, NUDGE_ULPS + 1, batch.shape, generator=generator)
            * torch.finfo(batch.dtype).eps
            for batch in batches
        ]
        for sign in (1, -1):
            yield [
                batch * (1 + sign * nudge.to(batch))
                for batch, nudge in zip(batches, relative, strict=True)
            ]


def require_drift_of_rounding(
    actual: Curve, expected: Curve, controls: Sequence[Curve], counts: Set[str] = frozenset()
) -> None:
    """Each quantity stays as near to stock's as the controls do, in every part of the run.

    The distance of two curves in a part is the root mean square of their differences. It may be
    `FACTOR` times the largest that a control had so far, and `FLOOR` of the quantity, or one where
    the quantity is a count of latents.
    """
    assert actual.keys() == expected.keys()
    judged: list[tuple[float, str]] = []
    for name, values in expected.items():
        spread = 0.0
        for start in range(0, len(values), PART):
            part = slice(start, start + PART)
            stock = values[part]
            spread = max(spread, *(_distance(control[name][part], stock) for control in controls))
            floor = 1.0 if name in counts else FLOOR * fmean(map(abs, stock))
            allowed = FACTOR * spread + floor
            distance = _distance(actual[name][part], stock)
            share = inf if isnan(distance) else distance / max(allowed, float_info.min)
            line = (
                f"{name}, steps {start} to {start + len(stock) - 1}: {distance:.2e} from stock, "
                f"{share:.0%} of the {allowed:.2e} allowed "
                f"(controls within {spread:.2e}, mean of stock {fmean(stock):.2e})"
            )
            judged.append((share, line))
    report = "\n".join(line for _, line in sorted(judged, reverse=True)[:5])
    print(report)
    assert all(share <= 1 for share, _ in judged), report


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return dist(a, b) / sqrt(len(b))
