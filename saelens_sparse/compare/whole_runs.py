"""The pace of a side's whole run with the language model, measured after its training."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.training.sae_trainer import SAETrainer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.optim.lr_scheduler import ConstantLR

from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare.comparison import RUN_SAMPLES, RUNS
from saelens_sparse.language_model import PathChoice
from saelens_sparse.training import SparseSAETrainer
from saelens_sparse.whole_files import write_whole
from saelens_sparse.whole_run.record import (
    SAELENS_RUNNER,
    SPARSE_RUNNER,
    RunRecord,
    record_of,
)
from saelens_sparse.whole_run.stores import TimedFastStore, TimedStore
from saelens_sparse.whole_run.windows import EndOfWindows, Windows

MAX_DISTANCE = 0.1
"""Of a first batch from the first side's, relative to it. Rounding of bfloat16 is below it."""


def time_runs(
    runner: LanguageModelSAETrainingRunner,
    trainer: SAETrainer[Any, Any],
    count: int,
    wait: Callable[[], object],
    folder: Path,
    *,
    with_own: bool,
    eval_seconds: float | None,
    logging_ms: float,
) -> None:
    """
    Time windows of the run that a side has ended, with SAELens's runner, this package's or both.

    Both read the text from its beginning, from one seed. The SAE keeps its weights: its learning
    rate is 0. A run that fails leaves no record; the log says why.

    Args:
        runner: The side's.
        trainer: It has trained.
        count: Timed windows of each run.
        wait: Returns when the side may run the next window.
        folder: Gets `RUNS` and `RUN_SAMPLES`.
        with_own: Whether `trainer` is this package's.
        eval_seconds: Of one eval.
        logging_ms: Of a step, on average.
    """
    architecture = runner.cfg.sae.architecture()
    runners = [SPARSE_RUNNER] if with_own else [SAELENS_RUNNER]
    if architecture in ARCHITECTURES and not with_own:
        runners.append(SPARSE_RUNNER)
    cfg = copy.copy(runner.cfg)
    cfg.use_cached_activations = False
    records: list[RunRecord] = []
    samples: dict[str, torch.Tensor] = {}
    for name in runners:
        try:
            windows, choice = _time(runner, trainer, cfg, Windows(cfg.device, count, wait), name)
            record = record_of(
                windows,
                architecture,
                name,
                cfg.to_dict(),
                eval_seconds=eval_seconds,
                logging_ms=logging_ms,
                choice=choice,
            )
        except (RuntimeError, ValueError, OSError) as error:
            print(f"the whole run with {name} was not timed: {error}", file=sys.stderr)
            continue
        records.append(record)
        assert windows.sample is not None
        samples[name] = windows.sample
    write_whole(folder / RUN_SAMPLES, save(samples))
    content = [record.model_dump() for record in records]
    write_whole(folder / RUNS, json.dumps(content, indent=2) + "\n")


def _time(
    runner: LanguageModelSAETrainingRunner,
    trainer: SAETrainer[Any, Any],
    cfg: LanguageModelSAERunnerConfig[Any],
    windows: Windows,
    name: str,
) -> tuple[Windows, PathChoice | None]:
    """The windows of a run, timed, and what computed the activations."""
    own = name == SPARSE_RUNNER
    store = _store(runner, cfg, windows, own=own)
    used = SparseSAETrainer.taking_over(trainer) if own else trainer
    with _held(used, store), suppress(EndOfWindows):
        windows.attach(used)
        used.fit()
    return windows, store.model_choice if isinstance(store, TimedFastStore) else None


def _store(
    runner: LanguageModelSAETrainingRunner,
    cfg: LanguageModelSAERunnerConfig[Any],
    windows: Windows,
    *,
    own: bool,
) -> TimedStore | TimedFastStore:
    """A new store, as the runner of a user makes it."""
    torch.manual_seed(cfg.seed)
    store = (TimedFastStore if own else TimedStore).from_config(runner.model, cfg)
    assert isinstance(store, TimedStore | TimedFastStore)
    if isinstance(store, TimedFastStore):
        store.language_model = "auto"
    store.windows = windows
    return store


@contextmanager
def _held(trainer: SAETrainer[Any, Any], store: Any) -> Generator[None]:
    """Within, the trainer goes on from the store without an end, and changes no weight."""
    groups, before = trainer.optimizer.param_groups, dict(vars(trainer))
    rates = [(group["lr"], group["initial_lr"]) for group in groups]
    trainer.cfg = replace(
        trainer.cfg,
        total_training_samples=sys.maxsize,
        logger=replace(trainer.cfg.logger, log_to_wandb=False),
    )
    trainer.data_provider, trainer.evaluator = store, None
    trainer.checkpoint_thresholds = []
    for group in groups:
        group["lr"] = group["initial_lr"] = 0.0
    trainer.lr_scheduler = ConstantLR(trainer.optimizer, factor=1.0, total_iters=0)
    try:
        yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(before)
        for group, (rate, initial) in zip(groups, rates, strict=True):
            group["lr"], group["initial_lr"] = rate, initial


def load_runs(folders: Sequence[Path]) -> tuple[list[RunRecord], str | None]:
    """
    The runs of all sides, the first side's first, and what is wrong with them or None.

    They are left out unless every side has one, and all had the same first batch up to rounding.
    """
    records: list[RunRecord] = []
    first: torch.Tensor | None = None
    for folder in folders:
        if not (folder / RUNS).exists():
            return [], None
        try:
            content = json.loads((folder / RUNS).read_text())
            found = [RunRecord.model_validate(one) for one in content]
            samples: Mapping[str, torch.Tensor] = load_file(folder / RUN_SAMPLES)
        except (OSError, ValueError, ValidationError, SafetensorError):
            found, samples = [], {}
        if not found:
            return [], f"The whole run of {folder.name} was not timed; its log says why."
        for record in found:
            sample = samples[record.runner]
            first = sample if first is None else first
            if sample.shape != first.shape or not _is_close(sample, first):
                return [], "The timed runs were given different batches: they are left out."
        records += found
    return records, None


def _is_close(sample: torch.Tensor, first: torch.Tensor) -> bool:
    return bool((sample - first).norm() <= MAX_DISTANCE * first.norm())
