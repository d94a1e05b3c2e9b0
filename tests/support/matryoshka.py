"""Stock Matryoshka BatchTopK SAEs, and inputs that decide what each level's AuxK takes."""

from typing import Any

import torch
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)

from tests.support.saes import randomize, rows_for_batch_topk

WIDTHS = (4, 16)


def make_matryoshka(
    *, dtype: torch.dtype = torch.float32, device: str = "cpu", **cfg: Any
) -> MatryoshkaBatchTopKTrainingSAE:
    """A stock SAE with random weights from the global generator, and d_sae as its last width."""
    cfg = {"d_in": 12, "d_sae": 48, "k": 5, "matryoshka_widths": WIDTHS, **cfg}
    inner = [width for width in cfg["matryoshka_widths"] if width != cfg["d_sae"]]
    cfg["matryoshka_widths"] = [*inner, cfg["d_sae"]]
    sae = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            **cfg, dtype=str(dtype).removeprefix("torch."), device=device
        )
    )
    randomize(sae)
    return sae


def levels_of(sae: MatryoshkaBatchTopKTrainingSAE) -> list[slice]:
    """The latents of each level."""
    widths = sae.cfg.matryoshka_widths
    return [slice(*ends) for ends in zip([0, *widths], widths, strict=False)]


def matryoshka_inputs(
    sae: MatryoshkaBatchTopKTrainingSAE, n_rows: int, dead: torch.Tensor | None = None
) -> torch.Tensor:
    """As `rows_for_batch_topk`, with the top dead latents of each level decided too."""
    if dead is None or not sae.cfg.use_matryoshka_aux_loss:
        return rows_for_batch_topk(sae, n_rows, dead)
    of_levels = [torch.zeros_like(dead) for _ in sae.cfg.matryoshka_widths]
    for mask, level in zip(of_levels, levels_of(sae), strict=True):
        mask[level] = dead[level]
    return rows_for_batch_topk(sae, n_rows, *of_levels)
