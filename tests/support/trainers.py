"""Trainers, SAELens's and the package's own, and what their steps change and report."""

from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.training.trainer import SparseSAETrainer
from tests.support.saes import Values, gradients, on_cpu

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
    state |= dict(trainer.sae.named_buffers())
    counts = ("act_freq_scores", "n_forward_passes_since_fired")
    state |= {name: getattr(trainer, name) for name in counts}
    state["samples"] = torch.tensor([trainer.n_training_samples, trainer.n_frac_active_samples])
    return {name: value.to("cpu", torch.float64, copy=True) for name, value in state.items()}


def make_trainer(sae: TrainingSAE[Any], batches: Any = None, **cfg: Any) -> SAETrainer[Any, Any]:
    """SAELens's own trainer, logging nothing."""
    settings: dict[str, Any] = {
        "total_training_samples": 10_000_000,
        "train_batch_size_samples": 32,
        "device": str(sae.device),
        "lr": 1e-3,
        "lr_end": 1e-4,
        "logger": LoggingConfig(log_to_wandb=False),
        **cfg,
    }
    return SAETrainer(SAETrainerConfig(**settings), sae, iter(batches or ()))


def trajectory(sae: TrainingSAE[Any], batches: list[torch.Tensor], **options: Any) -> Values:
    """Losses, statistics and final parameters of steps of SAELens's trainer."""
    trainer = make_trainer(sae, **{"dead_feature_window": 3, "lr": 3e-3, **options})
    steps: list[Values] = []
    for batch in batches:
        n_dead = trainer.dead_neurons.sum()
        output = trainer.step(batch.to(sae.dtype))
        trainer.n_training_steps += 1
        log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        step = {"loss": output.loss, **output.losses, "n_dead": n_dead}
        step["l0"] = torch.tensor(log["metrics/l0"])
        threshold = getattr(sae, "threshold", None)
        if threshold is not None:
            step["lowest threshold"] = threshold.min()
        steps.append(on_cpu(step))
    stacked = {name: torch.stack([step[name] for step in steps]) for name in steps[0]}
    final = {
        **{f"final {name}": value for name, value in sae.state_dict().items()},
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
        "act_freq_scores": trainer.act_freq_scores,
    }
    return {**stacked, **on_cpu(final)}


def structured_batches(
    n_steps: int, n_rows: int, d_in: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Sparse sums of 64 random directions with Zipf-like frequencies, and a little noise."""
    directions = torch.nn.functional.normalize(torch.randn(64, d_in), dim=-1)
    presence = (torch.arange(1, 65) ** -0.7).clamp(max=0.9)
    batches = []
    for _ in range(n_steps):
        strengths = (torch.rand(n_rows, 64) < presence) * (0.5 * torch.randn(n_rows, 64)).exp()
        batches.append((strengths @ directions + 0.02 * torch.randn(n_rows, d_in)).to(dtype))
    return batches


def training_curve(
    sae: TrainingSAE[Any], batches: list[torch.Tensor], **options: Any
) -> list[dict[str, Any]]:
    """What SAELens logs at each step of a whole training, and more.

    That is the mean "threshold", what the step "ran on", and the norm of each "gradient of"
    a parameter that the optimizer got, thus after clipping.
    """
    n_steps, n_rows = len(batches), len(batches[0])
    settings = {
        "total_training_samples": n_steps * n_rows,
        "train_batch_size_samples": n_rows,
        "dead_feature_window": 30,
    }
    trainer = make_trainer(sae, **{**settings, **options})
    norms: dict[str, float] = {}

    def measure_gradients(*_: Any) -> None:
        norms.update({name: value.norm().item() for name, value in gradients(sae).items()})

    trainer.optimizer.register_step_pre_hook(measure_gradients)
    logs: list[dict[str, Any]] = []
    for x in batches:
        implementation = getattr(sae, "implementation", None)
        output = trainer.step(x)
        trainer.n_training_steps += 1
        log = trainer.build_train_step_log_dict(output, trainer.n_training_samples) | norms
        if implementation is not None:
            log["ran on"] = implementation.name
        threshold = getattr(sae, "threshold", None)
        if threshold is not None:
            log["threshold"] = threshold.mean().item()
        logs.append(log)
    return logs
