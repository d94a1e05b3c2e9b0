"""SAELens's trainers with a step of their own for sparse SAEs, and checkpoints that are whole.

The rest is SAELens's: schedules, what checkpoints hold, logging, evals.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch.autograd.graph import increment_version
from typing_extensions import override

from saelens_sparse.architectures.base import Pending, SparseTrainingSAEMixin
from saelens_sparse.architectures.topk import SparseTopKTrainingSAE
from saelens_sparse.ops import HostCount, RowGradient, WeightCopy, rounded_dtype
from saelens_sparse.ops.common.ranges import profiler_range
from saelens_sparse.training.checkpoints import write_checkpoint
from saelens_sparse.training.graphs import (
    STEPS_BEFORE,
    GraphedPass,
    can_record,
    conditions,
    gains,
    try_to_record,
)
from saelens_sparse.training.interruption import StopSignals
from saelens_sparse.training.optimizer import ClippingAdam

RowGradients = dict[str, list[RowGradient]]

# As in SAELens, which does not make it an option.
MAX_GRADIENT_NORM = 1.0
_OWN_PASS = SparseTrainingSAEMixin.training_forward_pass


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

    stop_signals: StopSignals  # a runner sets its own
    write_runner_files: Callable[[Path], None] | None = None  # what a runner adds to a checkpoint
    last_checkpoint: Path | None = None
    is_reporting_checkpoint = False  # while `save_checkpoint_fn` is told of one

    @classmethod
    def taking_over(cls, trainer: SAETrainer[Any, Any]) -> SparseSAETrainer:
        """
        A trainer that goes on where `trainer`, new or resumed, stands.

        Both share all attributes from then on: what SAELens's runner asks of the one that it
        made is what this one has trained.
        """
        if isinstance(trainer, cls):
            return trainer
        own = cls.__new__(cls)
        own.__dict__ = trainer.__dict__
        own._prepare()
        return own

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        self.stop_signals = StopSignals()
        if not isinstance(self.sae, SparseTrainingSAEMixin):
            return
        cfg = self.cfg
        assert cfg.lr_end is not None  # set by SAELens's config
        plain, schedule = self.optimizer, self.lr_scheduler
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
        self.optimizer.load_state_dict(plain.state_dict())
        self.lr_scheduler.load_state_dict(schedule.state_dict())

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        self.stop_signals.begin_step()
        sae = self.sae
        if not isinstance(sae, SparseTrainingSAEMixin):
            return super().step(batch)
        sae.train()
        batch = batch.to(sae.device)
        output, row_gradients = self.forward_and_backward(sae, self.activation_scaler(batch))
        if not self._replays_rest(sae):
            self._count_firings(output)
            self._update(sae, row_gradients)
            if self._replayed is None:
                for parts in row_gradients.values():
                    parts.clear()  # autograd's nodes hold these lists as long as the output lives
        else:
            self._replay_rest(sae, output)
        self.n_training_samples += batch.shape[0]
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        self.stop_signals.end_step()
        sparsity_log = super().maybe_reset_sparsity()
        self.stop_signals.end_step()
        return sparsity_log

    @override
    def full_sparsity_window_log(self) -> dict[str, Any]:
        # What follows must not be stopped: a reset, or after the last step what ends a training.
        self.stop_signals.begin_step()
        if self.n_frac_active_samples == 0:  # a run that was stopped at a window's beginning
            return {}
        return super().full_sparsity_window_log()

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        """
        Save a checkpoint, as SAELens does. Its folder appears when all of it is written.

        If it cannot be written to the `checkpoint_path` of the run, a warning says so.

        Raises:
            OSError, RuntimeError, SafetensorError: it cannot be written to `base_path`.
        """
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None:
            super().save_checkpoint(checkpoint_name, wandb_aliases=wandb_aliases)
            return
        checkpoint = Path(base) / checkpoint_name

        def write(folder: Path) -> None:
            self.write_files(folder)
            if self.write_runner_files is not None:
                self.write_runner_files(folder)

        with self.stop_signals.held():
            if not write_checkpoint(checkpoint, write, warns=base_path is None):
                return
            self.last_checkpoint = checkpoint
        if self.cfg.logger.log_to_wandb:
            self.log_files(checkpoint, wandb_aliases)
        if self.save_checkpoint_fn is not None:
            self.is_reporting_checkpoint = True
            try:
                self.save_checkpoint_fn(checkpoint_path=checkpoint)
            finally:
                self.is_reporting_checkpoint = False

    def write_files(self, folder: Path) -> None:
        """Write what a checkpoint holds of the SAE and of its training."""
        self.sae.save_model(folder)
        save_file({"sparsity": self.log_feature_sparsity}, folder / SPARSITY_FILENAME)
        self.save_trainer_state(folder)

    def log_files(self, folder: Path, wandb_aliases: list[str] | None) -> None:
        """Log to Weights & Biases what `write_files` wrote."""
        self.cfg.logger.log(
            self,
            folder / SAE_WEIGHTS_FILENAME,
            folder / SAE_CFG_FILENAME,
            sparsity_path=folder / SPARSITY_FILENAME,
            wandb_aliases=wandb_aliases,
        )

    def forward_and_backward(
        self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor
    ) -> tuple[TrainStepOutput, RowGradients]:
        """The output, and the gradients that no parameter holds."""
        sae.copies, self._replayed = self._copies, None
        try:
            graph = self._usable_graph(sae, sae_in)
            if graph is None:
                output, pending = self._take_passes(sae, sae_in, sae.asks_at_once)
                row_gradients = sae.row_gradients or {}
            else:
                output, pending = graph.replay(sae_in)
                row_gradients = graph.row_gradients
            if all(part.holds() for part in pending):
                self._replayed = graph
                return output, row_gradients
            self.optimizer.zero_grad()
            output, _ = self._take_passes(sae, sae_in, asks_at_once=True)
            return output, sae.row_gradients or {}
        finally:
            sae.copies = sae.row_gradients = None

    def _take_passes(
        self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor, asks_at_once: bool
    ) -> tuple[TrainStepOutput, Sequence[Pending]]:
        """The output, and what it relies on: nothing if that was asked at once."""
        logger, n_steps = self.cfg.logger, self.n_training_steps
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=n_steps,
            is_logging_step=logger.log_to_wandb and (n_steps + 1) % logger.wandb_log_frequency == 0,
        )
        sae.row_gradients = None if sae.cfg.gradient_buffers else {}
        pending: Sequence[Pending] = ()
        with self.autocast_if_enabled:
            if not _has_own_pass(sae):
                output = sae.training_forward_pass(step_input=step_input)
            elif asks_at_once:
                output = sae.checked_training_forward_pass(step_input)
            else:
                output, pending = sae.start_training_forward_pass(step_input)
        output.loss.backward()
        return output, pending

    def _usable_graph(
        self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor
    ) -> GraphedPass | None:
        """The step's passes as a CUDA graph, recorded where there is none yet; None if they are
        not one.
        """
        if not _has_own_pass(sae) or sae.asks_at_once:
            return None
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
            self._steps_before_graph = STEPS_BEFORE if self._graph is not None else sys.maxsize
        return self._graph

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
        with profiler_range("saelens_sparse::statistics"):
            firing_counts = output.feature_acts.bool().float().sum(0).to_dense()
            self.n_forward_passes_since_fired += 1
            self.n_forward_passes_since_fired.masked_fill_(firing_counts > 0, 0)
            self.act_freq_scores += firing_counts
        if gains(self.sae):
            # On its way to the host while the weights are updated.
            passes = self.n_forward_passes_since_fired
            self._dead_count = HostCount(self.dead_neurons), passes, passes._version


class SparseMultiSAETrainer(MultiSAETrainer):
    """SAELens's `MultiSAETrainer` with a `SparseSAETrainer` for each SAE."""

    trainers: dict[str, SparseSAETrainer]  # pyright: ignore[reportIncompatibleVariableOverride]
    stop_signals: StopSignals
    last_checkpoint: Path | None = None

    @classmethod
    def taking_over(
        cls, trainer: MultiSAETrainer, stop_signals: StopSignals
    ) -> SparseMultiSAETrainer:
        """A trainer that goes on where `trainer` stands, and shares all attributes with it."""
        own = cls.__new__(cls)
        own.__dict__ = trainer.__dict__
        own.stop_signals = stop_signals
        for name, single in own.trainers.items():
            own.trainers[name] = SparseSAETrainer.taking_over(single)
            own.trainers[name].stop_signals = stop_signals
        return own

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


def _has_own_pass(sae: SparseTrainingSAEMixin) -> bool:
    """Whether the training forward pass is this package's, so that parts of it may stand for it."""
    own = type(sae).training_forward_pass is _OWN_PASS
    return own and "training_forward_pass" not in vars(sae)
