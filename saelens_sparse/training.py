"""SAELens's training runners with a step of their own for sparse SAEs.

Everything but the step is SAELens's: activation store, schedules, checkpoints, logging, evals.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch.autograd.graph import increment_version
from typing_extensions import override

from saelens_sparse.graph import (
    STEPS_BEFORE,
    GraphedPass,
    can_record,
    conditions,
    gains,
    try_to_record,
)
from saelens_sparse.ops import HostCount, RowGradient, WeightCopy, rounded_dtype
from saelens_sparse.optim import ClippingAdam
from saelens_sparse.saes.base import SparseTrainingSAEMixin
from saelens_sparse.saes.topk_sparse_sae import SparseTopKTrainingSAE

RowGradients = dict[str, list[RowGradient]]

# As in SAELens, which does not make it an option.
MAX_GRADIENT_NORM = 1.0


class SparseSAETrainer(SAETrainer[Any, Any]):
    """
    SAELens's trainer, whose step keeps the device busy and passes over the parameters once.

    The host asks whether the sparse code was complete only when the whole step but the update is
    queued; a step for which it was not is taken again. Gradients are clipped inside the update.
    The state that it saves is SAELens's, and loads in SAELens's trainer; SAEs that are not sparse
    are trained as there.
    """

    optimizer: ClippingAdam
    _copies: Mapping[str, WeightCopy] = MappingProxyType({})  # by name of the parameter
    _graph: GraphedPass | None = None
    _replayed: GraphedPass | None = None  # what the passes of this step were, if a graph
    _steps_before_graph = STEPS_BEFORE
    _dead_count: tuple[HostCount, torch.Tensor, int] | None = None

    @classmethod
    def taking_over(cls, trainer: SAETrainer[Any, Any]) -> SparseSAETrainer:
        """A trainer that goes on where `trainer`, new or resumed, stands; which is then done."""
        own = cls(
            cfg=trainer.cfg,
            sae=trainer.sae,
            data_provider=trainer.data_provider,
            evaluator=trainer.evaluator,
            save_checkpoint_fn=trainer.save_checkpoint_fn,
        )
        own.optimizer.load_state_dict(trainer.optimizer.state_dict())
        trainer.optimizer.state.clear()  # SAELens's runner keeps that trainer to its end
        own.lr_scheduler.load_state_dict(trainer.lr_scheduler.state_dict())
        for name in (
            "activation_scaler",
            "n_training_steps",
            "n_training_samples",
            "started_fine_tuning",
            "act_freq_scores",
            "n_forward_passes_since_fired",
            "n_frac_active_samples",
            "coefficient_schedulers",
            "checkpoint_thresholds",
        ):
            setattr(own, name, getattr(trainer, name))
        return own

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.sae, SparseTrainingSAEMixin):
            return
        cfg = self.cfg
        assert cfg.lr_end is not None  # set by SAELens's config
        self.optimizer = ClippingAdam(
            self.sae.parameters(),
            max_norm=MAX_GRADIENT_NORM,
            lr=cfg.lr,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
        )
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    @override
    def _train_step(self, sae: TrainingSAE[Any], sae_in: torch.Tensor) -> TrainStepOutput:
        if not isinstance(sae, SparseTrainingSAEMixin):
            return super()._train_step(sae, sae_in)
        sae.train()
        output, row_gradients = self.forward_and_backward(sae, sae_in)
        if not self._replays_rest(sae):
            self._count_firings(output)
            self._update(sae, row_gradients)
            if self._replayed is None:
                for parts in row_gradients.values():
                    parts.clear()  # autograd's nodes hold these lists as long as the output lives
        else:
            self._replay_rest(sae, output)
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def forward_and_backward(
        self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor
    ) -> tuple[TrainStepOutput, RowGradients]:
        """The output, and the gradients that no parameter holds."""
        sae.copies, self._replayed = self._copies, None
        try:
            return self._replay(sae, sae_in) or self._take_passes(sae, sae_in)
        finally:
            sae.copies = sae.row_gradients = None

    def _take_passes(
        self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor
    ) -> tuple[TrainStepOutput, RowGradients]:
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )
        sae.row_gradients = None if sae.cfg.gradient_buffers else {}
        with self.autocast_if_enabled:
            output, pending = sae.start_training_forward_pass(step_input)
        output.loss.backward()
        if not all(part.holds() for part in pending):
            self.optimizer.zero_grad()
            sae.row_gradients = None if sae.cfg.gradient_buffers else {}
            with self.autocast_if_enabled:
                output = sae.training_forward_pass(step_input)
            output.loss.backward()
        return output, sae.row_gradients or {}

    def _replay(
        self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor
    ) -> tuple[TrainStepOutput, RowGradients] | None:
        """The step's passes as a CUDA graph; None if they are not one, or must be taken again."""
        if not gains(sae) or not isinstance(sae, SparseTopKTrainingSAE):
            return None
        with self.autocast_if_enabled:  # what runs depends on it
            recordable = can_record(sae, sae_in)
        if not recordable or not self._knows_that_none_is_dead():
            return None
        if self._graph is None or self._graph.conditions != conditions(sae, sae_in):
            self._graph = None
            if self._steps_before_graph > 0:
                self._steps_before_graph -= 1
                return None
            self._graph = try_to_record(sae, sae_in, self.autocast_if_enabled)
            self._steps_before_graph = STEPS_BEFORE
            if self._graph is None:
                self._steps_before_graph = sys.maxsize
                return None
        output, pending = self._graph.replay(sae_in)
        if not all(part.holds() for part in pending):
            self.optimizer.zero_grad()
            return None
        self._replayed = self._graph
        return output, self._graph.row_gradients

    def _replays_rest(self, sae: SparseTrainingSAEMixin) -> bool:
        """Whether counting and the update can be graphs in this step, as its passes were.

        They are recorded once an ordinary step has left everything where it was: the optimizer
        puts state that was loaded in order at its next step. If something takes another place in
        memory later, all that was recorded is given up, and made anew after ordinary steps.
        """
        optimizer = self.optimizer
        if self._replayed is None or optimizer.has_hooks_of_others:
            return False
        counts = [self.n_forward_passes_since_fired, self.act_freq_scores]
        state = [optimizer.state[p].values() for p in sae.parameters() if p in optimizer.state]
        rates = optimizer.send_learning_rates()
        addresses = [part.data_ptr() for part in itertools.chain(counts, *state, rates)]
        groups = [(g["betas"], g["eps"], g["fused"]) for g in optimizer.param_groups]
        depends_on = (addresses, groups, optimizer.max_norm, self.cfg.dead_feature_window)
        rest = self._replayed.rest
        if rest.depends_on != depends_on:
            rest.depends_on = depends_on
            if rest.are_recorded:
                self._graph = None
            return False
        return True

    def _replay_rest(self, sae: SparseTrainingSAEMixin, output: TrainStepOutput) -> None:
        """Count firings and update the weights, as CUDA graphs."""
        assert self._replayed is not None
        rest, row_gradients = self._replayed.rest, self._replayed.row_gradients
        copies = [copy for copy in self.optimizer.copies.values() if copy.is_current]
        passes, scores = self.n_forward_passes_since_fired, self.act_freq_scores
        if rest.run("count", lambda: self._count_firings(output)):
            increment_version([passes, scores])
        assert self._dead_count is not None
        self._dead_count = self._dead_count[0].again(), passes, passes._version
        if rest.run("update", lambda: self._update(sae, row_gradients)):
            increment_version(list(sae.parameters()))
            for copy in copies:
                copy.version = copy.source._version

    def _update(self, sae: SparseTrainingSAEMixin, row_gradients: RowGradients) -> None:
        self.optimizer.row_gradients = {
            getattr(sae, name): parts for name, parts in row_gradients.items() if parts
        }
        self._make_room_for_copies(sae)
        self.optimizer.step()

    def _knows_that_none_is_dead(self) -> bool:
        """Whether the last step found no dead latents, and nobody has changed that since."""
        if self._dead_count is None:
            return False
        count, passes, version = self._dead_count
        if passes is not self.n_forward_passes_since_fired or passes._version != version:
            return False
        return count.wait() == 0

    def _make_room_for_copies(self, sae: SparseTrainingSAEMixin) -> None:
        """Let the update write what the next step makes of the weights: under autocast a
        low-precision `W_enc`, for Top-K the norms of `W_dec`.
        """
        copies: dict[str, WeightCopy] = {}
        with self.autocast_if_enabled:
            dtype = rounded_dtype(sae.W_enc)
        taken = self.optimizer.row_gradients
        if sae.W_enc in taken and dtype is not None:
            rows, copy = sae.W_enc.T, self._copies.get("W_enc")
            if copy is None or copy.values.dtype != dtype or not copy.is_for(rows):
                copy = WeightCopy.of_rows(rows, dtype)
            copies["W_enc"] = copy
        if sae.W_dec in taken and getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            copy = self._copies.get("W_dec")
            if copy is None or not copy.is_for(sae.W_dec):
                copy = WeightCopy.of_norms(sae.W_dec)
            copies["W_dec"] = copy
        self._copies = copies
        self.optimizer.copies = {getattr(sae, name): copy for name, copy in copies.items()}

    @torch.no_grad()
    def _count_firings(self, output: TrainStepOutput) -> None:
        firing_counts = output.feature_acts.bool().float().sum(0)
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(firing_counts > 0, 0)
        self.act_freq_scores += firing_counts
        if gains(self.sae):
            # On its way to the host while the weights are updated.
            passes = self.n_forward_passes_since_fired
            self._dead_count = HostCount(self.dead_neurons), passes, passes._version


class SparseTrainingRunner(LanguageModelSAETrainingRunner):
    """
    SAELens's `LanguageModelSAETrainingRunner` with the step of `SparseSAETrainer`.

    Takes the same configs, and trains architectures that are not sparse as stock does. An
    interrupted run leaves a whole checkpoint where `checkpoint_path` says.
    """

    trainer: SparseSAETrainer

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.trainer = SparseSAETrainer.taking_over(trainer)
        return super().run_trainer_with_interruption_handling(self.trainer)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None and not checkpoint_path.exists():
            # An interruption: SAELens names a folder that nobody has made or written weights to.
            # The trainer does, and comes back here for the rest.
            self.trainer.save_checkpoint(checkpoint_path.name, checkpoint_path.parent)
        else:
            super().save_checkpoint(checkpoint_path)

    @override
    def save_final_sae(
        self, sae: Any, output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        # The trainer that SAELens's runner asks for its statistics is not the one that trained.
        if log_feature_sparsity is not None:
            log_feature_sparsity = self.trainer.log_feature_sparsity
        super().save_final_sae(sae, output_path, log_feature_sparsity)


class SparseMultiSAETrainingRunner(MultiSAETrainingRunner):
    """SAELens's `MultiSAETrainingRunner` with the step of `SparseSAETrainer` for each SAE."""

    @override
    def _run_with_interruption_handling(
        self, trainer: MultiSAETrainer
    ) -> dict[str, TrainingSAE[Any]]:
        trainer.trainers = {
            name: SparseSAETrainer.taking_over(single) for name, single in trainer.trainers.items()
        }
        return super()._run_with_interruption_handling(trainer)
