"""Driving SAELens's trainer: building it, one step, and what all trainings of a case start from."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.profile.cases import LEARNING_RATE, Case, Precision
from saelens_sparse.profile.data import MAX_FEATURES, ActivationStream
from saelens_sparse.profile.weights import calibrate, plant_features
from saelens_sparse.training.trainer import SparseSAETrainer

Trainer = SAETrainer[TrainingSAE[Any], Any]
TIMED_BATCHES = 4


@dataclass
class Inputs:
    """
    What every training of a case starts from: batches `[batch, d_in]` on the device, trained-like
    weights on the CPU, and indices of the latents that fire least, if some are held dead.
    """

    batches: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    dead_latents: torch.Tensor | None


def build_sae(
    architecture: str,
    case: Case,
    precision: Precision,
    device: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> TrainingSAE[Any]:
    """An SAE of SAELens's name, with its defaults but for the case's; with `weights` if given."""
    sizes = {"architecture": architecture, "d_in": case.d_in, "d_sae": case.d_sae}
    dtype = str(precision.dtype).removeprefix("torch.")
    sae = TrainingSAE.from_dict({**sizes, **case.sae_options, "dtype": dtype, "device": device})
    if weights is not None:
        sae.load_state_dict({name: value.to(device) for name, value in weights.items()})
    return sae


def build_trainer(
    architecture: str,
    case: Case,
    precision: Precision,
    device: str,
    batches: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    sparse_runner: bool = False,
    learning_rate: float | None = None,
) -> Trainer:
    """The trainer of SAELens's runner or of `SparseTrainingRunner`, put together as there."""
    learning_rate = learning_rate or case.learning_rate
    cfg = SAETrainerConfig(
        total_training_samples=1_000_000 * case.batch,
        train_batch_size_samples=case.batch,
        lr=learning_rate,
        lr_end=learning_rate / 10,
        device=device,
        autocast=precision.autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = build_sae(architecture, case, precision, device, weights)
    trainer = SAETrainer(cfg=cfg, sae=sae, data_provider=itertools.cycle(batches))
    return SparseSAETrainer.taking_over(trainer) if sparse_runner else trainer


def implementation_of(sae: TrainingSAE[Any], autocast: AbstractContextManager[Any]) -> str | None:
    """What a sparse SAE's next call under this autocast runs on; None for a stock SAE."""
    with autocast:
        choice = getattr(sae, "implementation", None)
    return None if choice is None else choice.name


def hold_dead(trainer: Trainer, dead_latents: torch.Tensor | None) -> None:
    """Make the trainer see these latents as dead in the next step, fired or not."""
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

    Thresholds are calibrated before the training and again after it, on the batches that are
    timed, so that every training begins at the L0 asked for.
    """
    n_features = min(case.d_sae, MAX_FEATURES)
    stream = ActivationStream(case.d_in, n_features, case.features_per_row, device)

    def batch(index: int) -> torch.Tensor:
        return stream.batch(case.batch, index).to(precision.dtype)

    batches = [batch(warmup_train + index) for index in range(TIMED_BATCHES)]
    torch.manual_seed(0)
    trainer = build_trainer(
        case.architecture, case, precision, device, (), learning_rate=LEARNING_RATE
    )
    plant_features(trainer.sae, stream)
    has_thresholds = case.registered.sparsity_field is None
    if has_thresholds:
        calibrate(trainer.sae, batches, case.sparsity)
    for index in range(warmup_train):
        train_step(trainer, batch(index))
    if has_thresholds:
        calibrate(trainer.sae, batches, case.sparsity)
    dead_latents = None
    if case.dead_fraction:
        n_dead = round(case.dead_fraction * case.d_sae)
        dead_latents = trainer.act_freq_scores.topk(n_dead, largest=False).indices
    state = trainer.sae.state_dict().items()
    weights = {name: value.contiguous().cpu() for name, value in state}
    return Inputs(batches, weights, dead_latents)


def release_memory(device: str) -> None:
    """Give back what dropped trainers hold on a GPU: in compiled code, cycles and the allocator."""
    torch.compiler.reset()
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
