"""How many latents two dictionaries share: decoder vectors matched by their cosine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file
from torch.nn.functional import normalize
from tqdm import tqdm

from saelens_sparse.compare.state import FINAL, INITIAL_DECODER, SAE

THRESHOLDS = (0.7, 0.9, 0.99)
SIMILARITIES_AT_ONCE = 2**26
"""Cosines held at a time: 256 MiB of float32, whatever the number of latents."""
HISTOGRAM_BINS = 40


def compare_dictionaries(folders: Sequence[Path], device: str) -> dict[str, Any]:
    """`share` of two trained sides."""
    return share(
        [load_file(folder / SAE / SAE_WEIGHTS_FILENAME)["W_dec"] for folder in folders],
        [load_file(folder / FINAL)["alive"] for folder in folders],
        [load_file(folder / INITIAL_DECODER)["W_dec"] for folder in folders],
        device,
    )


@torch.no_grad()
def share(
    decoders: Sequence[torch.Tensor],
    alive: Sequence[torch.Tensor],
    initial: Sequence[torch.Tensor],
    device: str = "cpu",
) -> dict[str, Any]:
    """
    Say how much of two dictionaries is the same, with a progress bar.

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

    a, b = (units(decoder, mask) for decoder, mask in zip(decoders, alive, strict=True))
    if min(len(a), len(b)) == 0:
        return {"alive": [len(a), len(b)], "thresholds": {}}
    (of_a, nearest_of_a), (of_b, nearest_of_b) = nearest(a, b)
    mutual = nearest_of_b[nearest_of_a] == torch.arange(len(a), device=device)
    same = torch.empty(0, device=device)
    if len(decoders[0]) == len(decoders[1]):
        both = alive[0] & alive[1]
        same = (units(decoders[0], both) * units(decoders[1], both)).sum(1)
    moved = [
        (units(start, mask) * unit).sum(1)
        for start, mask, unit in zip(initial, alive, (a, b), strict=True)
    ]
    return {
        "alive": [len(a), len(b)],
        "alive_in_both": len(same),
        "thresholds": {
            str(threshold): {
                "a_in_b": int((of_a >= threshold).sum()),
                "b_in_a": int((of_b >= threshold).sum()),
                "one_to_one": int((mutual & (of_a >= threshold)).sum()),
                "same_index": int((same >= threshold).sum()),
                "near_start": [int((cosine >= threshold).sum()) for cosine in moved],
            }
            for threshold in THRESHOLDS
        },
        "histogram": [int(count) for count in torch.histc(of_a, HISTOGRAM_BINS, min=0, max=1)],
    }


def nearest(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    Find the nearest vectors of `b` for those of `a`, and the other way round, in one pass.

    Args:
        a: Unit vectors, `[n_a, d_in]`.
        b: Unit vectors, `[n_b, d_in]`, on the same device.

    Returns:
        For the rows of `a` and for those of `b`: the cosine with the nearest of the other, and
        which it is, `[n]` each; of equally near ones the first.
    """
    of_a: list[tuple[torch.Tensor, torch.Tensor]] = []
    of_b = b.new_full((len(b),), -torch.inf)
    index_of_b = torch.zeros(len(b), dtype=torch.long, device=b.device)
    start = 0
    with tqdm(total=len(a), desc="Matching", unit="latent", dynamic_ncols=True) as bar:
        for rows in a.split(max(1, SIMILARITIES_AT_ONCE // len(b))):
            cosines = rows @ b.T
            of_a.append(tuple(cosines.max(1)))
            best, row = cosines.max(0)
            better = best > of_b
            of_b = torch.where(better, best, of_b)
            index_of_b = torch.where(better, row + start, index_of_b)
            start += len(rows)
            bar.update(len(rows))
    cosine_of_a, index_of_a = (torch.cat(parts) for parts in zip(*of_a, strict=True))
    return (cosine_of_a, index_of_a), (of_b, index_of_b)
