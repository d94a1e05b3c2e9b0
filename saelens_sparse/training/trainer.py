"""SAELens's trainers with a step of their own for sparse SAEs, and checkpoints that are whole.

The rest is SAELens's: schedules, what checkpoints hold, logging, evals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch.autograd.graph import increment_version
from typing_extensions import override

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.codes.on_demand import SparseFeatureActs
from saelens_sparse.codes.step import Offer, RowGradients, StepContext, offered
from saelens_sparse.ops.common.host_copy import HostCount
from saelens_sparse.ops.common.precision import FLOAT8, matmul_dtype
from saelens_sparse.ops.common.ranges import profiler_range
from saelens_sparse.ops.update.weight_cache import WeightView
from saelens_sparse.training.checkpoints import write_checkpoint
from saelens_sparse.training.graph_memory import GraphMemory
from saelens_sparse.training.graphs import StepGraphs, TakenPass, is_faster_as_graph
from saelens_sparse.training.interruption import StopSignals
from saelens_sparse.training.optimizer import ClippingAdam
from saelens_sparse.training.progress import RecentPace
from saelens_sparse.training.shared import SharedBatch

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
    _graphs: StepGraphs
    _shared_batch: SharedBatch
    # How many latents were dead after the last step, by counts of which nobody has changed since.
    _dead_count: tuple[HostCount, torch.Tensor, int] | None = None

    stop_signals: StopSignals  # a runner sets its own
    write_runner_files: Callable[[Path], None] | None = None  # what a runner adds to a checkpoint
    last_checkpoint: Path | None = None
    is_reporting_checkpoint = False  # while `save_checkpoint_fn` is told of one
    _pace: RecentPace | None = None  # from the first step on

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

    def share(self, batch: SharedBatch, graph_memory: GraphMemory) -> None:
        """Take batches and record graphs together with others that are trained in turn."""
        self._shared_batch = batch
        self._graphs = StepGraphs(graph_memory)

    def _prepare(self) -> None:
        self.stop_signals = StopSignals()
        self.share(SharedBatch(), GraphMemory())
        if not isinstance(self.sae, SparseTrainingSAEMixin):
            return
        cfg = self.cfg
        assert cfg.lr_end is not None  # set by SAELens's config
        plain, schedule = self.optimizer, self.lr_scheduler
        if self.sae.cfg.moments is not None:
            self.sae.mark_parameters()  # what the optimizer makes of the plain one's state
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
            return super().step(self._shared_batch.take(batch, sae.device))
        sae.train()
        sae_in = self._shared_batch.take(batch, sae.device, self.activation_scaler)
        taken = self._take_passes(sae, sae_in)
        if taken.step is not None:
            sae.commit(taken.step, taken.output)
        if taken.replays_followups:
            self._replay_followups(sae, taken)
        else:
            with profiler_range("saelens_sparse::statistics"):
                self._remember_dead(self._count_firings(taken))
            with profiler_range("saelens_sparse::optimizer"):
                self._update(sae, taken)
            if taken.graph is None and taken.row_gradients is not None:
                taken.row_gradients.clear()
        if taken.step is not None:
            taken.step.offer = Offer()  # an output that is kept holds no copies of weights
        self.n_training_samples += batch.shape[0]
        self.n_frac_active_samples += self.cfg.train_batch_size_samples
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return taken.output

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
    def _checkpoint_if_needed(self) -> None:
        with counted_step([self]):
            super()._checkpoint_if_needed()

    @override
    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 100
    ) -> None:
        super()._update_pbar(step_output, pbar, update_interval)
        self._pace = self._pace or RecentPace()
        self._pace.show(pbar, self.n_training_samples)

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

    def _take_passes(self, sae: SparseTrainingSAEMixin, sae_in: torch.Tensor) -> TakenPass:
        """The step's forward and backward pass, taken again if they missed something."""
        graph = None
        measures = sae.measures_recall(self.n_training_steps, self._logs_this_step)
        if _has_own_pass(sae) and not measures:
            graph = self._graphs.usable(
                sae,
                sae_in,
                self.autocast_if_enabled,
                self.optimizer.weights,
                self._knows_that_none_is_dead,
            )
        if graph is None:
            taken = self._take_eagerly(sae, sae_in)
        else:
            taken = graph.replay(sae_in, self.n_training_steps)
            # Found out before the host waits: the device has nothing to do after that.
            taken.replays_followups = self._graphs.can_replay_followups(
                taken, lambda: self._followups_depend_on(sae)
            )
        if taken.step is None or taken.step.is_complete():
            return taken
        self.optimizer.zero_grad()
        return self._take_eagerly(sae, sae_in, instead_of=taken.step)

    @property
    def _logs_this_step(self) -> bool:
        logger = self.cfg.logger
        return logger.log_to_wandb and (self.n_training_steps + 1) % logger.wandb_log_frequency == 0

    def _take_eagerly(
        self,
        sae: SparseTrainingSAEMixin,
        sae_in: torch.Tensor,
        instead_of: StepContext | None = None,
    ) -> TakenPass:
        step_input = TrainStepInput(
            sae_in=sae_in,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._logs_this_step,
        )
        row_gradients = None if sae.cfg.gradient_buffers else RowGradients()
        step = None
        with offered(sae, Offer(row_gradients, self.optimizer.weights)):
            with self.autocast_if_enabled:
                if _has_own_pass(sae):
                    step = sae.start_step(step_input, instead_of)
                    output = sae.propose(step_input, step)
                else:  # which takes its steps by itself
                    output = sae.training_forward_pass(step_input=step_input)
            with profiler_range("saelens_sparse::backward"):
                output.loss.backward()
        return TakenPass(output, row_gradients, step)

    def _followups_depend_on(self, sae: SparseTrainingSAEMixin) -> object:
        """What recordings of counting and the update depend on, to be compared; None if they must
        not stand for a step.
        """
        optimizer = self.optimizer
        if optimizer.has_hooks_of_others:
            return None
        counts = [self.n_forward_passes_since_fired, self.act_freq_scores]
        state = [optimizer.state[p].values() for p in sae.parameters() if p in optimizer.state]
        rates = optimizer.send_learning_rates()
        addresses = [part.data_ptr() for part in itertools.chain(counts, *state, rates)]
        groups = [(g["betas"], g["eps"], g["fused"]) for g in optimizer.param_groups]
        return addresses, groups, optimizer.max_norm, self.cfg.dead_feature_window

    def _replay_followups(self, sae: SparseTrainingSAEMixin, taken: TakenPass) -> None:
        """Count firings and update the weights, as CUDA graphs."""
        assert taken.graph is not None
        followups = taken.graph.followups
        count, was_replayed = followups.run("count", lambda: self._count_firings(taken))
        if was_replayed:
            increment_version([self.n_forward_passes_since_fired, self.act_freq_scores])
        assert count is not None
        self._remember_dead(count.renewed())
        _, was_replayed = followups.run("update", lambda: self._update(sae, taken))
        if was_replayed:
            self.optimizer.count_replay()

    def _update(self, sae: SparseTrainingSAEMixin, taken: TakenPass) -> None:
        parts = {} if taken.row_gradients is None else taken.row_gradients.parts
        views: dict[torch.nn.Parameter, tuple[WeightView, torch.dtype]] = {}
        with self.autocast_if_enabled:
            for name, view in sae.weight_views.items():
                parameter = getattr(sae, name)
                dtype = FLOAT8 if view == "scaled" else matmul_dtype(parameter)
                if view != "rounded" or dtype != parameter.dtype:
                    views[parameter] = view, dtype
        self.optimizer.step(
            row_gradients={getattr(sae, name): part for name, part in parts.items() if part},
            views=views,
        )

    def _knows_that_none_is_dead(self) -> bool:
        """Whether the last step found no dead latents, and nobody has changed that since."""
        if self._dead_count is None:
            return False
        count, passes, version = self._dead_count
        if passes is not self.n_forward_passes_since_fired or passes._version != version:
            return False
        return count.wait() == 0

    def _remember_dead(self, count: HostCount | None) -> None:
        passes = self.n_forward_passes_since_fired
        self._dead_count = None if count is None else (count, passes, passes._version)

    @torch.no_grad()
    def _count_firings(self, taken: TakenPass) -> HostCount | None:
        """Update SAELens's counts. Gives how many are dead now, if the next step asks for that."""
        acts = taken.output.feature_acts
        if isinstance(acts, SparseFeatureActs) and acts.is_untouched and acts.ndim == 2:
            firing_counts = acts.code.latent_counts().float()
        else:
            firing_counts = acts.bool().float().sum(0).to_dense()
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(firing_counts > 0, 0)
        self.act_freq_scores += firing_counts
        # It is on its way to the host while the weights are updated.
        return HostCount(self.dead_neurons) if is_faster_as_graph(self.sae) else None


@contextmanager
def counted_step(trainers: Iterable[SparseSAETrainer]) -> Generator[None]:
    """Within, the step just taken is counted: SAELens counts it after a checkpoint, not before.

    A resumed training would log and evaluate a step late.
    """
    trainers = [*trainers]
    for trainer in trainers:
        trainer.n_training_steps += 1
    try:
        yield
    finally:
        for trainer in trainers:
            trainer.n_training_steps -= 1


def _has_own_pass(sae: SparseTrainingSAEMixin) -> bool:
    """Whether the training forward pass is this package's, so that parts of it may stand for it."""
    own = type(sae).training_forward_pass is _OWN_PASS
    return own and "training_forward_pass" not in vars(sae)
