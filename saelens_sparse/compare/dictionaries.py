"""How many latents two dictionaries share: decoder vectors matched by their cosine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file
from tqdm import tqdm

from saelens_sparse.compare.records import ArmFolder
from saelens_sparse.reports.whole_files import damage

THRESHOLDS = (0.7, 0.9, 0.99)
SIMILARITIES_AT_ONCE = 2**26
"""Cosines held at a time: 256 MiB of float32, whatever the number of latents."""
HISTOGRAM_BINS = 40


@dataclass(frozen=True)
class Nearest:
    """
    The nearest vector of the other dictionary for each vector of one.

    Args:
        cosine: Their cosine, `[n]`.
        index: Which it is, `[n]`.
    """

    cosine: torch.Tensor
    index: torch.Tensor


@torch.no_grad()
def match(
    a: torch.Tensor,
    b: torch.Tensor,
    on_rows: Callable[[int], object] = lambda n_rows: None,  # noqa: ARG005
) -> tuple[Nearest, Nearest]:
    """
    Find the nearest vectors of `b` for those of `a`, and the other way round, in one pass.

    Args:
        a: Unit vectors, `[n_a, d_in]`.
        b: Unit vectors, `[n_b, d_in]`, on the same device.
        on_rows: Told how many rows of `a` have been compared since the last call.

    Returns:
        For each row of `a` and for each row of `b` the nearest of the other; of equally near ones
        the first.
    """
    chunk = max(1, SIMILARITIES_AT_ONCE // max(1, len(b)))
    of_a: list[tuple[torch.Tensor, torch.Tensor]] = []
    of_b = b.new_full((len(b),), -torch.inf)
    index_of_b = torch.zeros(len(b), dtype=torch.long, device=b.device)
    for start in range(0, len(a), chunk):
        cosines = a[start : start + chunk] @ b.T
        values, indices = cosines.max(1)
        of_a.append((values, indices))
        best, row = cosines.max(0)
        better = best > of_b
        of_b = torch.where(better, best, of_b)
        index_of_b = torch.where(better, row + start, index_of_b)
        on_rows(len(cosines))
    of_a_values, of_a_indices = (torch.cat(parts) for parts in zip(*of_a, strict=True))
    return Nearest(of_a_values, of_a_indices), Nearest(of_b, index_of_b)


def share(
    decoders: Sequence[torch.Tensor],
    alive: Sequence[torch.Tensor],
    initial: Sequence[torch.Tensor | None] = (None, None),
    device: str = "cpu",
    on_rows: Callable[[int], object] = lambda n_rows: None,  # noqa: ARG005
) -> dict[str, Any]:
    """
    Say how much of two dictionaries is the same.

    Only latents that are alive take part: one that never moved would match by its initial value.

    Args:
        decoders: Of both SAEs, `[d_sae, d_in]`.
        alive: Which latents of each take part, `[d_sae]`, bool.
        initial: The decoders before training, if known, to tell learned from inherited likeness.
        device: Where to compute.
        on_rows: Told of progress, as in `match`.

    Returns:
        Counts, by threshold and in both directions, ready for JSON.
    """
    units = [_unit(decoder, mask, device) for decoder, mask in zip(decoders, alive, strict=True)]
    n_alive = [len(unit) for unit in units]
    if min(n_alive) == 0:
        return {"alive": n_alive, "thresholds": {}}
    of_a, of_b = match(*units, on_rows=on_rows)
    mutual = of_b.index[of_a.index] == torch.arange(n_alive[0], device=device)
    same = _same_index(decoders, alive, device)
    moved = [
        None if start is None else _unit(start, mask, device).mul_(unit).sum(1)
        for start, mask, unit in zip(initial, alive, units, strict=True)
    ]

    def counts(threshold: float) -> dict[str, Any]:
        return {
            "a_in_b": _count(of_a.cosine >= threshold),
            "b_in_a": _count(of_b.cosine >= threshold),
            "one_to_one": _count(mutual & (of_a.cosine >= threshold)),
            "same_index": _count(same >= threshold),
            "near_start": [None if m is None else _count(m >= threshold) for m in moved],
        }

    histogram = torch.histc(of_a.cosine.float(), HISTOGRAM_BINS, min=0, max=1)
    return {
        "alive": n_alive,
        "alive_in_both": len(same),
        "thresholds": {str(threshold): counts(threshold) for threshold in THRESHOLDS},
        "histogram": [int(count) for count in histogram],
    }


def compare_dictionaries(folders: Sequence[ArmFolder], device: str) -> dict[str, Any]:
    """`share` of two trained arms, with a progress bar."""
    decoders = [load_file(folder.sae / SAE_WEIGHTS_FILENAME)["W_dec"] for folder in folders]
    alive = [load_file(folder.latents)["alive"] for folder in folders]
    initial = [load_file(folder.initial_decoder)["W_dec"] for folder in folders]
    total = int(alive[0].sum())
    with tqdm(total=total, desc="Matching", unit="latent", dynamic_ncols=True) as bar:
        return share(decoders, alive, initial, device, on_rows=bar.update)


def has_dictionary(folder: ArmFolder) -> bool:
    """Whether the arm's saved SAE has a decoder to be matched."""
    return damage(folder.sae / SAE_WEIGHTS_FILENAME, "W_dec") is None


def _unit(decoder: torch.Tensor, alive: torch.Tensor, device: str) -> torch.Tensor:
    return torch.nn.functional.normalize(decoder[alive].to(device, torch.float32), dim=1)


def _same_index(
    decoders: Sequence[torch.Tensor], alive: Sequence[torch.Tensor], device: str
) -> torch.Tensor:
    """Cosine of the latents with the same index, of those alive in both."""
    if len(alive[0]) != len(alive[1]):
        return torch.empty(0, device=device)
    both = alive[0] & alive[1]
    a, b = (_unit(decoder, both, device) for decoder in decoders)
    return (a * b).sum(1)


def _count(mask: torch.Tensor) -> int:
    return int(mask.sum())
