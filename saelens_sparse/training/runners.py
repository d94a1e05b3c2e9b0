"""SAELens's training runners with the trainers of this package.

Checks come before anything is loaded, and nothing that was trained is lost. The rest is SAELens's:
configs, language models, evals.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    logger,
)
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from typing_extensions import override

from saelens_sparse.activations.before_loading import check_activations
from saelens_sparse.activations.shards.manifest import is_sharded
from saelens_sparse.activations.store import FastActivationsStore
from saelens_sparse.activations.swap import replace_store
from saelens_sparse.architectures.fields import SparseTrainingSAEConfigMixin
from saelens_sparse.choice.availability import require_float8
from saelens_sparse.config.outputs import check_multi_runner_outputs, check_runner_outputs
from saelens_sparse.config.several import SparseMultiSAETrainingRunnerConfig
from saelens_sparse.language_model import Option, check_option
from saelens_sparse.training.checkpoints import whole_checkpoint
from saelens_sparse.training.interruption import StopSignals
from saelens_sparse.training.multi_trainer import SparseMultiSAETrainer
from saelens_sparse.training.pretrained import check_pretrained, concerns_sparse, load_pretrained
from saelens_sparse.training.resuming import LaterResume
from saelens_sparse.training.trainer import SparseSAETrainer
from saelens_sparse.training.whole_folders import save_somewhere

_Config = TypeVar("_Config", bound=LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig)
_MultiConfig = TypeVar("_MultiConfig", bound=MultiSAETrainingRunnerConfig)


class SparseTrainingRunner(LanguageModelSAETrainingRunner):
    """
    SAELens's `LanguageModelSAETrainingRunner` with the step of `SparseSAETrainer`.

    Takes the same configs, and trains architectures that are not sparse as stock does. What
    differs:

    - SIGINT and SIGTERM stop the training between two steps, with a whole checkpoint where
      `checkpoint_path` says, and raise KeyboardInterrupt. See `StopSignals`.
    - A checkpoint that cannot be written costs a warning. A trained SAE that cannot be written to
      `output_path` is written elsewhere; a warning says where.
    - If `resume_from_checkpoint` is damaged, the newest whole checkpoint beside it is taken.
    - Activations come from a `FastActivationsStore`: the same batches, faster. Its state belongs to
      the checkpoint, so that a resumed run goes on bit for bit.
    - `cached_activations_path` may name a cache that `saelens-sparse cache` has written.
    - `from_pretrained_path` may name an SAE of the counterpart architecture. What is trained is
      what `sae` says, from the weights in that folder. See `load_pretrained`.

    Args:
        save_buffer: Whether checkpoints hold the activations that are being shuffled. They take up
            to 4 bytes an activation, 1.5 GB for 164k x 2,304. Without them, a resumed run begins
            with an empty buffer and the tokens that follow, and says so.
        language_model: What computes the activations. "auto" is fast, and gives SAELens's values
            up to rounding; what has no fast equivalent runs as in SAELens, with a warning.
            "saelens" gives its bits. See `choose_model_path`.

    Raises:
        ValueError: an output has no place to go, there is nothing whole to resume from, the
            activations cannot be had as the config says, or the weights to start from do not fit.
            Nothing has been loaded then.
    """

    trainer: SparseSAETrainer | None = None

    @override
    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
        *,
        save_buffer: bool = True,
        language_model: Option = "auto",
    ) -> None:
        check_option(language_model, "language_model")
        self._store_options: dict[str, Any] = {
            "save_buffer": save_buffer,
            "language_model": language_model,
        }
        if override_sae is not None:
            cfg = copy.copy(cfg)
            cfg.from_pretrained_path = None  # SAELens does not look at it then
        cfg = checked(cfg, override_dataset, override_model, save_buffer=save_buffer)
        path = cfg.from_pretrained_path
        if path is not None and concerns_sparse(path, cfg.sae):
            override_sae = load_pretrained(path, cfg.sae)
        shards = cfg.cached_activations_path if cfg.use_cached_activations else None
        if is_sharded(shards):
            self._store_options["shards"] = shards
            super().__init__(_without_cache(cfg), override_dataset, override_model, override_sae)
            self.cfg = cfg
        else:
            super().__init__(cfg, override_dataset, override_model, override_sae)
        self._stop_signals = StopSignals()
        self._resume = LaterResume(self)
        self.prepare_store()

    def prepare_store(self) -> None:
        """Take activations from a `FastActivationsStore`; called when all has been loaded."""
        _use_fast_store(self, self._store_options)

    @override
    def run(self) -> TrainingSAE[Any]:
        with (
            StopSignals() as self._stop_signals,
            _reading_ahead(self),
            LaterResume(self) as self._resume,
        ):
            return super().run()

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.trainer = SparseSAETrainer.taking_over(trainer)
        self._resume.load(self.trainer)
        store = self.activations_store
        if isinstance(store, FastActivationsStore) and store.reads_ahead:
            self.trainer.data_provider = store
        self.trainer.stop_signals = self._stop_signals
        self.trainer.write_runner_files = super().save_checkpoint
        return _fit(self.trainer)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Save a whole checkpoint. For overrides, the trainer calls it after each of its own."""
        if self.trainer is None:
            super().save_checkpoint(checkpoint_path)
        elif checkpoint_path is not None and not self.trainer.is_reporting_checkpoint:
            self.trainer.save_checkpoint(checkpoint_path.name, checkpoint_path.parent)

    @override
    def save_final_sae(
        self, sae: Any, output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        def write(folder: Path) -> None:
            _write_sae(folder, sae, log_feature_sparsity)
            _write_config(folder, self.cfg)

        with self._stop_signals.held():
            folder = save_somewhere(write, "the trained SAE", output_path, _spare(self.cfg))
        if self.cfg.logger.log_to_wandb:
            _log_final(self, folder, log_feature_sparsity is not None)


class SparseMultiSAETrainingRunner(MultiSAETrainingRunner):
    """
    SAELens's `MultiSAETrainingRunner` with the step of `SparseSAETrainer` for each SAE.

    Signals, activations, checkpoints, outputs, `save_buffer` and `language_model` are as in
    `SparseTrainingRunner`. A batch of each hook is made once for all SAEs. With a
    `SparseMultiSAETrainingRunnerConfig`, activations may come from a cache: one of
    `saelens-sparse cache`, or for SAEs on a single hook one of SAELens's.

    SAELens's config has no `from_pretrained_path` for several SAEs: give what `load_pretrained`
    returns as `override_saes`.

    Raises:
        ValueError: an output has no place to go, there is nothing whole to resume from, or the
            activations cannot be had as the config says. Nothing has been loaded then.
    """

    trainer: SparseMultiSAETrainer | None = None

    @override
    def __init__(
        self,
        cfg: MultiSAETrainingRunnerConfig,
        override_dataset: Any = None,
        override_model: Any = None,
        override_saes: dict[str, TrainingSAE[Any]] | None = None,
        *,
        save_buffer: bool = True,
        language_model: Option = "auto",
    ) -> None:
        check_option(language_model, "language_model")
        self._store_options: dict[str, Any] = {
            "save_buffer": save_buffer,
            "language_model": language_model,
        }
        cfg = checked_multi(cfg, override_dataset, override_model, save_buffer=save_buffer)
        super().__init__(cfg, override_dataset, override_model, override_saes)
        if (path := _cache_of(cfg)) is not None and is_sharded(path):
            self._store_options["shards"] = path
        elif path is not None:
            store = self.activations_store
            store.cached_activations_path = path
            store.cached_activation_dataset = store.load_cached_activation_dataset()
        self._stop_signals = StopSignals()
        self._resume = LaterResume(self)
        self.prepare_store()

    def prepare_store(self) -> None:
        """Take activations from a `FastActivationsStore`; called when all has been loaded."""
        _use_fast_store(self, self._store_options)

    @override
    def run(self) -> dict[str, TrainingSAE[Any]]:
        with (
            StopSignals() as self._stop_signals,
            _reading_ahead(self),
            LaterResume(self) as self._resume,
        ):
            return super().run()

    @override
    def _run_with_interruption_handling(
        self, trainer: MultiSAETrainer
    ) -> dict[str, TrainingSAE[Any]]:
        self.trainer = SparseMultiSAETrainer.taking_over(trainer, self._stop_signals)
        self._resume.load(self.trainer)
        store = self.activations_store
        if isinstance(store, FastActivationsStore) and store.reads_ahead:
            self.trainer.data_provider = store.hook_batches()
        return _fit(self.trainer)

    @override
    def _save_final_outputs(
        self, saes: dict[str, TrainingSAE[Any]], trainer: MultiSAETrainer
    ) -> None:
        assert self.cfg.output_path is not None

        def write(folder: Path) -> None:
            for name, sae in saes.items():
                _write_sae(folder / name, sae, trainer.trainers[name].log_feature_sparsity)
            _write_config(folder, self.cfg)

        with self._stop_signals.held():
            folder = save_somewhere(
                write, "the trained SAEs", self.cfg.output_path, _spare(self.cfg)
            )
        if self.cfg.logger.log_to_wandb:
            for name, sae in saes.items():
                logged = SimpleNamespace(sae=sae, cfg=self.cfg.to_sae_trainer_config())
                _log_final(logged, folder / name, has_sparsity=True)


def _without_cache(cfg: LanguageModelSAERunnerConfig[Any]) -> LanguageModelSAERunnerConfig[Any]:
    """The config for SAELens's store, which knows one format of caches only."""
    cfg = copy.copy(cfg)
    cfg.use_cached_activations = False
    return cfg


def _use_fast_store(
    runner: SparseTrainingRunner | SparseMultiSAETrainingRunner, options: dict[str, Any]
) -> None:
    """Give a runner a `FastActivationsStore`, unless somebody has given it another one."""
    if type(runner.activations_store) is ActivationsStore:
        replace_store(runner, **options)


@contextmanager
def _reading_ahead(runner: SparseTrainingRunner | SparseMultiSAETrainingRunner) -> Generator[None]:
    """Within, the runner's store reads ahead by itself if `prefetch_llm_batches` asks for it."""
    store = runner.activations_store
    if not isinstance(store, FastActivationsStore):
        yield
        return
    store.reads_ahead = bool(runner.cfg.prefetch_llm_batches)
    try:
        yield
    finally:
        store.reads_ahead = False


def checked(
    cfg: LanguageModelSAERunnerConfig[Any],
    dataset: Any = None,
    model: Any = None,
    *,
    save_buffer: bool = True,
) -> LanguageModelSAERunnerConfig[Any]:
    """
    The config of a run that can begin, as far as that shows before anything is loaded.

    Args:
        cfg: The config.
        dataset: The runner's `override_dataset`.
        model: The runner's `override_model`.
        save_buffer: As the runner's.

    Returns:
        The config itself, or a copy that names another checkpoint to resume from: see
        `SparseTrainingRunner`.

    Raises:
        ValueError: as `SparseTrainingRunner`.
    """
    check_runner_outputs(cfg, save_buffer=save_buffer)
    _check_screen(cfg.sae)
    check_activations(cfg, dataset, model)
    path = cfg.from_pretrained_path
    if path is not None and concerns_sparse(path, cfg.sae):
        check_pretrained(path, cfg.sae)
    return _checked(cfg, names_of_saes=())


def checked_multi(
    cfg: _MultiConfig, dataset: Any = None, model: Any = None, *, save_buffer: bool = True
) -> _MultiConfig:
    """`checked` for several SAEs."""
    check_multi_runner_outputs(cfg, save_buffer=save_buffer)
    path, hooks = _cache_of(cfg), {*cfg.hook_names_per_sae.values()}
    if path is not None and not is_sharded(path) and len(hooks) > 1:
        raise ValueError(
            f"cached_activations_path: a cache in SAELens's format is of one hook, and the SAEs "
            f"are of {len(hooks)}; `saelens-sparse cache` writes one of several"
        )
    for sae in cfg.saes.values():
        _check_screen(sae)
    check_activations(cfg, dataset, model)
    return _checked(cfg, names_of_saes=[*cfg.saes])


def _check_screen(sae: TrainingSAEConfig) -> None:
    if isinstance(sae, SparseTrainingSAEConfigMixin) and sae.screen_dtype == "float8":
        require_float8(torch.device(sae.device))


def _cache_of(cfg: MultiSAETrainingRunnerConfig) -> str | None:
    """Where activations are cached; None if they are computed."""
    if isinstance(cfg, SparseMultiSAETrainingRunnerConfig) and cfg.use_cached_activations:
        return cfg.cached_activations_path
    return None


def _checked(cfg: _Config, names_of_saes: Sequence[str]) -> _Config:
    """The config, naming a whole checkpoint to resume from; checked for what fails at the end."""
    if cfg.output_path is not None or cfg.checkpoint_path is not None:
        try:
            json.dumps(cfg.to_dict())
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the config is saved as JSON beside every SAE, and cannot be: {error}"
            ) from error
    if cfg.resume_from_checkpoint is not None:
        whole = whole_checkpoint(cfg.resume_from_checkpoint, names_of_saes)
        if whole != cfg.resume_from_checkpoint:
            cfg = copy.copy(cfg)
            cfg.resume_from_checkpoint = whole
    return cfg


def _fit(trainer: SparseSAETrainer | SparseMultiSAETrainer) -> Any:
    """`trainer.fit()`, which leaves a checkpoint if it is stopped between two steps."""
    signals = trainer.stop_signals
    # What a resumed trainer has passed, SAELens would save again with each of its steps.
    passed = trainer.n_training_samples
    trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= passed]
    if trainer.evaluator is not None:
        trainer.evaluator = _stoppable_evals(trainer, trainer.evaluator)
    try:
        return trainer.fit()
    except KeyboardInterrupt:
        if trainer.cfg.checkpoint_path is not None and signals.between_steps:
            checkpoint = Path(trainer.cfg.checkpoint_path) / str(trainer.n_training_samples)
            if checkpoint != trainer.last_checkpoint:
                logger.warning("interrupted, saving progress to %s", checkpoint)
                trainer.save_checkpoint(checkpoint.name)
        raise


def _stoppable_evals(
    trainer: SparseSAETrainer | SparseMultiSAETrainer, evaluator: Callable[..., Any]
) -> Callable[..., Any]:
    """An evaluator that a signal stops at once. SAELens would count the step after its evals."""
    is_single = isinstance(trainer, SparseSAETrainer)
    counted = [trainer] if is_single else [*trainer.trainers.values()]
    evaluate = trainer.stop_signals.allowed_during(evaluator)

    def stoppable(*args: Any, **kwargs: Any) -> Any:
        try:
            return evaluate(*args, **kwargs)
        except KeyboardInterrupt:
            for each in counted:
                each.n_training_steps += 1
            raise

    return stoppable


def _spare(cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig) -> list[Path]:
    """Where a trained SAE may go if `output_path` cannot be written to."""
    return [] if cfg.checkpoint_path is None else [Path(cfg.checkpoint_path) / "output"]


def _write_sae(folder: Path, sae: TrainingSAE[Any], sparsity: torch.Tensor | None) -> None:
    sae.save_inference_model(folder)
    if sparsity is not None:
        save_file({"sparsity": sparsity}, folder / SPARSITY_FILENAME)


def _write_config(
    folder: Path, cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig
) -> None:
    (folder / RUNNER_CFG_FILENAME).write_text(json.dumps(cfg.to_dict()))


def _log_final(logged: Any, folder: Path, has_sparsity: bool) -> None:
    logged.cfg.logger.log(
        logged,
        folder / SAE_WEIGHTS_FILENAME,
        folder / SAE_CFG_FILENAME,
        sparsity_path=folder / SPARSITY_FILENAME if has_sparsity else None,
        wandb_aliases=["final_model"],
    )
