"""SAELens's trainer of several SAEs, whose steps share their batch and never wait one by one."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from typing_extensions import override

from saelens_sparse.training.checkpoints import write_checkpoint
from saelens_sparse.training.graph_memory import GraphMemory
from saelens_sparse.training.interruption import StopSignals
from saelens_sparse.training.progress import RecentPace
from saelens_sparse.training.shared import SharedBatch, logs_at_once
from saelens_sparse.training.trainer import SparseSAETrainer, counted_step


class SparseMultiSAETrainer(MultiSAETrainer):
    """
    SAELens's `MultiSAETrainer` with a `SparseSAETrainer` for each SAE.

    SAEs on the same hook share the batch on their device, and its scaling where their factors are
    equal. Graphs of all SAEs share the memory that a step needs for a while. The numbers of a log
    are copied from the device together.
    """

    trainers: dict[str, SparseSAETrainer]  # pyright: ignore[reportIncompatibleVariableOverride]
    stop_signals: StopSignals
    last_checkpoint: Path | None = None
    _pace: RecentPace | None = None  # from the first step on

    @classmethod
    def taking_over(
        cls, trainer: MultiSAETrainer, stop_signals: StopSignals
    ) -> SparseMultiSAETrainer:
        """A trainer that goes on where `trainer` stands, and shares all attributes with it."""
        own = cls.__new__(cls)
        own.__dict__ = trainer.__dict__
        own.stop_signals = stop_signals
        n_users = Counter(own.hook_names.values())
        batches = {hook: SharedBatch(n) for hook, n in n_users.items()}
        graph_memory = GraphMemory()
        for name, single in own.trainers.items():
            own.trainers[name] = SparseSAETrainer.taking_over(single)
            own.trainers[name].stop_signals = stop_signals
            own.trainers[name].share(batches[own.hook_names[name]], graph_memory)
        return own

    @override
    def _estimate_scaling_factors(self) -> None:
        """SAELens's estimates. SAEs that need the same one share it, and no batch is kept for it.

        SAELens keeps all batches: 38 GB for 1,000 batches of 4,096 x 2,304. It still does for SAEs
        on several hooks, or of different kinds of normalization.
        """
        estimated: dict[tuple[str, str], list[str]] = {}
        for name, sae in self.saes.items():
            kind, scaler = sae.cfg.normalize_activations, self.trainers[name].activation_scaler
            if (kind == "expected_average_only_in" and scaler.scaling_factor is None) or (
                kind == "covariance_whitening" and scaler.whitening is None
            ):
                estimated.setdefault((self.hook_names[name], kind), []).append(name)
        if len(estimated) != 1:
            super()._estimate_scaling_factors()
            return
        [((hook, kind), names)] = estimated.items()
        first, *others = (self.trainers[name].activation_scaler for name in names)
        is_scale = kind == "expected_average_only_in"
        estimate = first.estimate_scaling_factor if is_scale else first.estimate_whitening
        estimate(
            d_in=self.saes[names[0]].cfg.d_in,
            data_provider=(batch[hook] for batch in self.data_provider),
            n_batches_for_norm_estimate=self.cfg.n_batches_for_norm_estimate,
        )
        for scaler in others:
            scaler.scaling_factor, scaler.whitening = first.scaling_factor, first.whitening

    @override
    def _update_pbar(
        self, step_outputs: dict[str, TrainStepOutput], pbar: Any, update_interval: int = 100
    ) -> None:
        super()._update_pbar(step_outputs, pbar, update_interval)
        self._pace = self._pace or RecentPace()
        self._pace.show(pbar, self.n_training_samples)

    @override
    @torch.no_grad()
    def _log_train_step(self, step_outputs: dict[str, TrainStepOutput]) -> None:
        """What SAELens logs, of all SAEs at once: the host waits for the device once."""
        if not self._is_logging_step():
            return
        makers = {
            name: partial(
                trainer.build_train_step_log_dict, step_outputs[name], self.n_training_samples
            )
            for name, trainer in self.trainers.items()
        }
        log: dict[str, Any] = {"details/n_training_samples": self.n_training_samples}
        wandb.log(log | logs_at_once(makers), step=self.n_training_steps)

    @override
    def _checkpoint_if_needed(self) -> None:
        with counted_step(self.trainers.values()):
            super()._checkpoint_if_needed()

    @override
    def save_checkpoint(self, checkpoint_name: str, wandb_aliases: list[str] | None = None) -> None:
        """
        Save a checkpoint, as SAELens does. Its folder appears when all of it is written.

        If it cannot be written, a warning says so.
        """
        base = self.cfg.checkpoint_path
        if base is None:
            super().save_checkpoint(checkpoint_name, wandb_aliases)
            return
        checkpoint = Path(base) / checkpoint_name

        def write(folder: Path) -> None:
            for name, trainer in self.trainers.items():
                trainer.write_files(folder / name)
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=folder)

        with self.stop_signals.held():
            if not write_checkpoint(checkpoint, write, warns=True):
                return
            self.last_checkpoint = checkpoint
        if self.cfg.logger.log_to_wandb:
            for name, trainer in self.trainers.items():
                trainer.log_files(checkpoint / name, wandb_aliases)
