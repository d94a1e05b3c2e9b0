"""How many latents two dictionaries share: decoder vectors matched by their cosine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import normalize
from tqdm import tqdm

THRESHOLDS = (0.7, 0.9, 0.99)
SIMILARITIES_AT_ONCE = 2**26
"""Cosines held at a time: 256 MiB of float32, whatever the number of latents."""
HISTOGRAM_BINS = 40


@torch.no_grad()
def share(
    decoders: Sequence[torch.Tensor],
    alive: Sequence[torch.Tensor],
    initial: Sequence[torch.Tensor],
    device: str = "cpu",
) -> dict[str, Any]:
    """
    Say how much of two dictionaries is the same.

    Only latents that are alive take part: one that never moved would match by its initial value.

    Args:
        decoders: Of both SAEs, `[d_sae, d_in]`.
        alive: Which latents of each take part, `[d_sae]`, bool.
        initial: The decoders before training, to tell learned from inherited likeness.
        device: Where to compute.

    Returns:
        Counts, by threshold and in both directions, ready for JSON.
    """

    def units(decoder: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return normalize(decoder[mask].to(device, torch.float32), dim=1)

    a, b = map(units, decoders, alive)
    found: dict[str, Any] = {"alive": [len(a), len(b)], "thresholds": {}}
    if min(found["alive"]) == 0:
        return found
    (of_a, nearest_of_a), (of_b, nearest_of_b) = nearest(a, b), nearest(b, a)
    mutual = nearest_of_b[nearest_of_a] == torch.arange(len(a), device=device)
    same = of_a[:0]
    if len(alive[0]) == len(alive[1]):
        both = alive[0] & alive[1]
        same = (units(decoders[0], both) * units(decoders[1], both)).sum(1)
    moved = [(s * u).sum(1) for s, u in zip(map(units, initial, alive), (a, b), strict=True)]
    for threshold in THRESHOLDS:
        found["thresholds"][str(threshold)] = {
            "a_in_b": int((of_a >= threshold).sum()),
            "b_in_a": int((of_b >= threshold).sum()),
            "one_to_one": int((mutual & (of_a >= threshold)).sum()),
            "same_index": int((same >= threshold).sum()),
            "near_start": [int((cosine >= threshold).sum()) for cosine in moved],
        }
    histogram = torch.histc(of_a.clamp(max=1), HISTOGRAM_BINS, min=0, max=1).int().tolist()
    return {**found, "alive_in_both": len(same), "histogram": histogram}


def nearest(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest unit vector of `b`, `[n_b, d_in]`, for each of `a`, `[n_a, d_in]`.

    Returns:
        Their cosine and the vector's index, `[n_a]` each; of equally near ones the first.
    """
    chunks = a.split(max(1, SIMILARITIES_AT_ONCE // len(b)))
    parts = [(rows @ b.T).max(1) for rows in tqdm(chunks, desc="Matching", dynamic_ncols=True)]
    cosine, index = map(torch.cat, zip(*parts, strict=True))
    return cosine, index
