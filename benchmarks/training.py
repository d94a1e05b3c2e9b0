"""Driving SAELens's trainer: building it for an arm, trained-like weights, one step."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.cases import SPARSE, Arm, Case, Precision
from benchmarks.data import MAX_FEATURES, ActivationStream
from saelens_sparse import SparseTopKTrainingSAE  # the import also registers topk_sparse

Trainer = SAETrainer[TrainingSAE[Any], Any]

TIMED_BATCHES = 4
LEARNING_RATE = 3e-4


@dataclass
class Inputs:
    """What every arm of a case starts from."""

    batches: list[torch.Tensor]
    """Distinct batches, `[batch, d_in]` on the device, used in rotation."""
    weights: dict[str, torch.Tensor]
    """Trained-like parameters by name, on the CPU so that they add nothing to an arm's memory."""
    dead_latents: torch.Tensor | None
    """Indices of the latents held dead in every step: those that fire least."""


def build_sae(
    arm: Arm,
    case: Case,
    precision: Precision,
    device: str,
    weights: dict[str, torch.Tensor] | None = None,
) -> TrainingSAE[Any]:
    """The arm's SAE, with SAELens's defaults but for the sizes; with `weights` if given."""
    sae = TrainingSAE.from_dict(
        {
            "architecture": arm.architecture,
            "d_in": case.d_in,
            "d_sae": case.d_sae,
            "k": case.k,
            "dtype": str(precision.dtype).removeprefix("torch."),
            "device": device,
        }
    )
    if weights is not None:
        sae.load_state_dict({name: value.to(device) for name, value in weights.items()})
    return sae


def build_trainer(
    arm: Arm,
    case: Case,
    precision: Precision,
    device: str,
    batches: Sequence[torch.Tensor],
    weights: dict[str, torch.Tensor] | None = None,
) -> Trainer:
    """SAELens's trainer around the arm's SAE, put together as its runner does."""
    sae = build_sae(arm, case, precision, device, weights)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=1_000_000 * case.batch,
            train_batch_size_samples=case.batch,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
            device=device,
            autocast=precision.autocast,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=itertools.cycle(batches),
    )
    if arm.prepare is not None:
        arm.prepare(sae)
    return trainer


def implementation_of(sae: TrainingSAE[Any]) -> str | None:
    """What a sparse SAE's next call runs on; None for a stock SAE."""
    return sae.implementation.name if isinstance(sae, SparseTopKTrainingSAE) else None


def hold_dead(trainer: Trainer, dead_latents: torch.Tensor | None) -> None:
    """Make the trainer see exactly these latents as dead in the next step, fired or not."""
    if dead_latents is not None:
        window = trainer.cfg.dead_feature_window
        trainer.n_forward_passes_since_fired[dead_latents] = window + 1


def train_step(trainer: Trainer, batch: torch.Tensor) -> TrainStepOutput:
    """One step, counted as `SAETrainer.fit` counts it."""
    output = trainer.step(batch.to(trainer.sae.dtype))
    trainer.n_training_steps += 1
    return output


def prepare_inputs(case: Case, precision: Precision, device: str, warmup_train: int) -> Inputs:
    """Make the case's batches, and weights by planting the true features and a short training."""
    stream = ActivationStream(
        case.d_in,
        n_features=min(case.d_sae, MAX_FEATURES),
        features_per_row=case.k,
        device=device,
    )
    torch.manual_seed(0)
    trainer = build_trainer(SPARSE, case, precision, device, batches=())
    plant_features(trainer.sae, stream)
    for index in range(warmup_train):
        train_step(trainer, stream.batch(case.batch, index).to(precision.dtype))

    dead_latents = None
    if case.dead_fraction:
        n_dead = round(case.dead_fraction * case.d_sae)
        dead_latents = trainer.act_freq_scores.topk(n_dead, largest=False).indices
    return Inputs(
        batches=[
            stream.batch(case.batch, index).to(precision.dtype)
            for index in range(warmup_train, warmup_train + TIMED_BATCHES)
        ],
        weights={
            name: value.contiguous().cpu() for name, value in trainer.sae.state_dict().items()
        },
        dead_latents=dead_latents,
    )


@torch.no_grad()
def plant_features(sae: TrainingSAE[Any], stream: ActivationStream) -> None:
    """
    Point one latent at each feature of the stream, with noise, so that latents fire about as
    often as its features, as they do after a real training run and not before: from initial
    weights, a hundred steps leave nine latents in ten never firing.
    """
    sae.b_dec.copy_(stream.scale * stream.mean)
    n_features, d_in = stream.directions.shape
    latents = stream.spread * stream.directions
    latents += 0.3 / math.sqrt(d_in) * torch.randn_like(latents)
    latents = torch.nn.functional.normalize(latents, dim=-1)
    sae.W_dec[:n_features].copy_(latents)
    # Other features in a row add to a latent's pre-activation: half the gain offsets that.
    sae.W_enc[:, :n_features].copy_(0.5 * latents.T)


def release_memory(device: str) -> None:
    """Give back what dropped trainers hold on a GPU: in compiled code, cycles and the allocator."""
    torch.compiler.reset()
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
