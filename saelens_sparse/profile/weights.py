"""Weights under which latents fire as they do after training, without the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE

from saelens_sparse.profile.data import ActivationStream

CALIBRATION_ROWS = 1024
"""Their pre-activations are held at once: 256 MiB of float32 for 65,536 latents."""


@torch.no_grad()
def plant_features(sae: TrainingSAE[Any], stream: ActivationStream) -> None:
    """
    Point one latent, drawn by seed from all of them, at each feature of the stream, with noise, so
    that latents fire about as often as its features, as they do after a real training run and not
    before: from initial weights, a hundred steps leave nine latents in ten never firing.
    """
    sae.b_dec.copy_(stream.scale * stream.mean)
    n_features, d_in = stream.directions.shape
    chosen = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(0))
    chosen = chosen[:n_features].to(sae.device)
    latents = stream.spread * stream.directions
    latents += 0.3 / math.sqrt(d_in) * torch.randn_like(latents)
    latents = torch.nn.functional.normalize(latents, dim=-1)
    sae.W_dec[chosen] = latents.to(sae.dtype)
    if hasattr(sae, "threshold"):
        # With nothing to bound their number, hundreds of latents would follow the outlier
        # dimensions at once: each counts for as little as its variance makes it tell.
        latents = latents / stream.spread.square()
    # Other features in a row add to a latent's pre-activation: half the gain offsets that.
    sae.W_enc[:, chosen] = 0.5 * latents.T.to(sae.dtype)


@torch.no_grad()
def calibrate(sae: Any, batches: Sequence[torch.Tensor], l0: float) -> None:
    """
    Move all thresholds by one amount, such that `l0` latents are active on the average row, then
    scale the encoder and the thresholds by one factor, which leaves the same latents active, such
    that the reconstruction has the least squared error.

    Args:
        sae: has a `threshold`, which stays non-negative, as in training.
        batches: inputs `[batch, d_in]`, of which the first rows are looked at.
        l0: mean number of active latents per row.
    """
    rows = torch.cat([batch[: CALIBRATION_ROWS // len(batches)] for batch in batches])
    hidden_pre = sae.process_sae_in(rows) @ sae.W_enc + sae.b_enc
    excess = hidden_pre - sae.threshold
    n_inactive = excess.numel() - round(l0 * len(rows))
    sae.threshold.add_(excess.flatten().kthvalue(n_inactive).values).clamp_(min=0.0)

    recons = (hidden_pre * (hidden_pre > sae.threshold)) @ sae.W_dec
    factor = (recons * (rows - sae.b_dec)).sum() / recons.square().sum()
    for parameter in (sae.W_enc, sae.b_enc, sae.threshold):
        parameter.mul_(factor)
