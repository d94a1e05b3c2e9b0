"""Driving SAELens's trainer: building it for an arm, one step, what all arms start from."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.profile.cases import LEARNING_RATE, SPARSE, Arm, Case, Precision
from saelens_sparse.profile.data import MAX_FEATURES, ActivationStream
from saelens_sparse.profile.weights import calibrate, plant_features
from saelens_sparse.training.trainer import SparseSAETrainer

Trainer = SAETrainer[TrainingSAE[Any], Any]

TIMED_BATCHES = 4


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
    """The arm's SAE, with SAELens's defaults but for the case's; with `weights` if given."""
    sae = TrainingSAE.from_dict(
        {
            "architecture": arm.architecture(case),
            "d_in": case.d_in,
            "d_sae": case.d_sae,
            **({} if case.k is None else {"k": case.k}),
            **case.options,
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
    learning_rate: float = LEARNING_RATE,
) -> Trainer:
    """SAELens's trainer around the arm's SAE, put together as its runner does."""
    sae = build_sae(arm, case, precision, device, weights)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=1_000_000 * case.batch,
            train_batch_size_samples=case.batch,
            lr=learning_rate,
            lr_end=learning_rate / 10,
            device=device,
            autocast=precision.autocast,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=itertools.cycle(batches),
    )
    if arm.own_trainer:
        trainer = SparseSAETrainer.taking_over(trainer)
    if arm.prepare is not None:
        arm.prepare(sae)
    return trainer


def implementation_of(sae: TrainingSAE[Any], autocast: AbstractContextManager[Any]) -> str | None:
    """What a sparse SAE's next call under this autocast runs on; None for a stock SAE."""
    with autocast:
        return sae.implementation.name if isinstance(sae, SparseTrainingSAEMixin) else None


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


def take_step(trainer: Trainer, inputs: Inputs) -> TrainStepOutput:
    """One step on the next batch, with the case's dead latents held dead."""
    hold_dead(trainer, inputs.dead_latents)
    return train_step(trainer, next(trainer.data_provider))


def prepare_inputs(case: Case, precision: Precision, device: str, warmup_train: int) -> Inputs:
    """
    Make the case's batches, and weights by planting the true features and a short training.

    JumpReLU's thresholds are calibrated before the training and again after it, on the batches
    that are timed, so that every arm begins at the L0 asked for.
    """
    stream = ActivationStream(
        case.d_in,
        n_features=min(case.d_sae, MAX_FEATURES),
        features_per_row=case.features_per_row,
        device=device,
    )
    batches = [
        stream.batch(case.batch, index).to(precision.dtype)
        for index in range(warmup_train, warmup_train + TIMED_BATCHES)
    ]
    torch.manual_seed(0)
    trainer = build_trainer(SPARSE, case, precision, device, batches=())
    sae = trainer.sae
    plant_features(sae, stream)
    if case.l0 is not None:
        calibrate(cast(JumpReLUTrainingSAE, sae), batches, case.l0)
    for index in range(warmup_train):
        train_step(trainer, stream.batch(case.batch, index).to(precision.dtype))
    if case.l0 is not None:
        calibrate(cast(JumpReLUTrainingSAE, sae), batches, case.l0)

    dead_latents = None
    if case.dead_fraction:
        n_dead = round(case.dead_fraction * case.d_sae)
        dead_latents = trainer.act_freq_scores.topk(n_dead, largest=False).indices
    return Inputs(
        batches=batches,
        weights={name: value.contiguous().cpu() for name, value in sae.state_dict().items()},
        dead_latents=dead_latents,
    )


def release_memory(device: str) -> None:
    """Give back what dropped trainers hold on a GPU: in compiled code, cycles and the allocator."""
    torch.compiler.reset()
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
