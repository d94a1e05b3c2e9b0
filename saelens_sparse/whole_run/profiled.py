"""A run of this package's runner, timed from its beginning and tried with other settings."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import wandb
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from saelens_sparse.reports.results import describe_failure
from saelens_sparse.training.runners import SparseTrainingRunner
from saelens_sparse.training.trainer import SparseSAETrainer
from saelens_sparse.whole_run.clock import PER_TOKENS, now
from saelens_sparse.whole_run.record import SPARSE_RUNNER, RunRecord, record_of
from saelens_sparse.whole_run.stores import TimedFastStore
from saelens_sparse.whole_run.suggestions import Trial
from saelens_sparse.whole_run.windows import MODEL, STEP, EndOfWindows, Windows

NORM_BATCHES = 2
"""Batches that the scale of activations is estimated from. It does not change the pace."""
MIN_RUN_STEPS = 1000
"""A config of fewer steps is measured as one of so many."""
MORE_PROMPTS, MAX_TRIED_TOKENS = 4, 2**16
TRIED_STEPS = 5


class TimedRunner(SparseTrainingRunner):
    """`SparseTrainingRunner`, timed by `windows`, which are there before anything is loaded."""

    windows: Windows
    timed_store: TimedFastStore

    @override
    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], windows: Windows) -> None:
        self.windows = windows
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, save_buffer=False)

    @override
    def prepare_store(self) -> None:
        super().prepare_store()
        store = TimedFastStore.taking_over(self.activations_store)
        assert isinstance(store, TimedFastStore)
        store.windows = self.windows
        self.timed_store = self.activations_store = self.evaluator.activations_store = store

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        own = SparseSAETrainer.taking_over(trainer)
        self.windows.attach(own)
        return super().run_trainer_with_interruption_handling(own)


@dataclass
class ProfiledRun:
    """
    Attributes:
        record: what was measured.
        trials: parts that were tried with other settings.
        eval_failure: why evals could not be timed; None if they were, or the run has none.
    """

    record: RunRecord
    trials: list[Trial]
    eval_failure: str | None


def profile_run(cfg: LanguageModelSAERunnerConfig[Any], count: int) -> ProfiledRun:
    """
    Begin the run of a config, and time windows of it.

    The run writes no files but offline logs of Weights & Biases, which are deleted.

    Args:
        cfg: Of the run.
        count: Timed windows.

    Raises:
        ValueError: the config cannot be used.
    """
    cfg = copy.copy(cfg)
    cfg.checkpoint_path = cfg.output_path = cfg.resume_from_checkpoint = None
    cfg.n_checkpoints, cfg.save_final_checkpoint = 0, False
    cfg.n_batches_for_norm_estimate = min(cfg.n_batches_for_norm_estimate, NORM_BATCHES)
    cfg.training_tokens = max(cfg.training_tokens, MIN_RUN_STEPS * cfg.train_batch_size_tokens)
    windows = Windows(cfg.device, count)
    runner = TimedRunner(cfg, windows)
    with wandb_offline():
        try:
            runner.run()
        except EndOfWindows:
            pass
        finally:
            wandb.finish()
    seconds, failure = _eval_seconds(runner) if cfg.logger.log_to_wandb else (None, None)
    record = record_of(
        windows,
        cfg.sae.architecture(),
        SPARSE_RUNNER,
        cfg.to_dict(),
        eval_seconds=seconds,
        choice=runner.timed_store.model_choice,
    )
    return ProfiledRun(record, [*_trials(runner)], failure)


@contextmanager
def wandb_offline() -> Generator[None]:
    """Within, Weights & Biases logs into a folder that is deleted, unless the user says where."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": folder}
        before = {name: os.environ.get(name) for name in settings}
        os.environ |= {name: value for name, value in settings.items() if before[name] is None}
        try:
            yield
        finally:
            wandb.teardown()  # or a later run in this process would log into the deleted folder
            for name in settings:
                if before[name] is None:
                    del os.environ[name]


def _eval_seconds(runner: TimedRunner) -> tuple[float | None, str | None]:
    """How long an eval takes, and why that is not known."""
    assert runner.trainer is not None
    begin = now(runner.cfg.device)
    runner.sae.eval()
    try:
        runner.evaluator(runner.sae, runner.activations_store, runner.trainer.activation_scaler)
    except (RuntimeError, ValueError, ArithmeticError, LookupError) as error:
        return None, describe_failure(error)["message"]
    finally:
        runner.sae.train()
    return now(runner.cfg.device) - begin, None


def _trials(runner: TimedRunner) -> Iterator[Trial]:
    """Settings that change nothing but the pace, or the precision on a GPU, tried alone."""
    cfg, store = runner.cfg, runner.timed_store
    on_gpu = cfg.device.startswith("cuda")
    if store.model_choice is not None:
        prompts = store.store_batch_size_prompts
        before = store.time_model(prompts, autocast=cfg.autocast_lm)
        if on_gpu and not cfg.autocast_lm and _is_float32(runner.model):
            after = store.time_model(prompts, autocast=True)
            yield Trial("autocast_lm=true", MODEL, before, after)
        more = MORE_PROMPTS * prompts
        if more * store.context_size <= MAX_TRIED_TOKENS:
            try:
                after = store.time_model(more, autocast=cfg.autocast_lm)
                yield Trial(f"store_batch_size_prompts={more}", MODEL, before, after)
            except torch.OutOfMemoryError:
                pass
    if on_gpu and not cfg.autocast and cfg.sae.dtype == "float32":
        assert runner.trainer is not None
        before = _step_ms(runner.trainer, store)
        runner.trainer.autocast_if_enabled = torch.autocast("cuda", torch.bfloat16)
        yield Trial("autocast=true", STEP, before, _step_ms(runner.trainer, store))


def _is_float32(model: torch.nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.float32


def _step_ms(trainer: SparseSAETrainer, store: TimedFastStore) -> float:
    """Milliseconds of a step alone by 4,096 tokens."""
    device = trainer.cfg.device
    batch = next(store).clone()

    def steps() -> None:
        for _ in range(TRIED_STEPS):
            trainer.step(batch)

    return _timed(steps, device) * PER_TOKENS / (TRIED_STEPS * len(batch))


def _timed(work: Callable[[], object], device: str) -> float:
    """Milliseconds of the second time that it is done."""
    work()
    begin = now(device)
    work()
    return 1e3 * (now(device) - begin)
