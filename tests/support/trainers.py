"""SAELens's trainer and the package's own on a schedule of 200 steps, and what a step changes."""

from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.training.trainer import SparseSAETrainer

N_ROWS = 32
Trainer = SAETrainer[Any, Any]


def stock_trainer(sae: TrainingSAE[Any], **settings: Any) -> Trainer:
    settings = {
        "total_training_samples": 200 * N_ROWS,
        "train_batch_size_samples": N_ROWS,
        "device": str(sae.device),
        "lr": 1e-3,
        "lr_end": 1e-5,
        "lr_warm_up_steps": 20,
        "lr_decay_steps": 60,
        "dead_feature_window": 15,
        "logger": LoggingConfig(log_to_wandb=False),
        **settings,
    }
    return SAETrainer(SAETrainerConfig(**settings), sae, iter(()))


def own_trainer(sae: TrainingSAE[Any], **settings: Any) -> SparseSAETrainer:
    return SparseSAETrainer.taking_over(stock_trainer(sae, **settings))


def train(trainer: Trainer, batches: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in batches:
        losses.append(trainer.step(batch.to(trainer.sae.dtype)).loss.item())
        trainer.n_training_steps += 1
    return losses


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step changes."""
    state = {name: value.detach() for name, value in trainer.sae.named_parameters()}
    for parameter, moments in zip(
        state, trainer.optimizer.state_dict()["state"].values(), strict=True
    ):
        state = state | {f"{parameter} {name}": value for name, value in moments.items()}
    counts = ("act_freq_scores", "n_forward_passes_since_fired")
    state |= {name: getattr(trainer, name) for name in counts}
    state["samples"] = torch.tensor([trainer.n_training_samples, trainer.n_frac_active_samples])
    return {name: value.double().cpu() for name, value in state.items()}
