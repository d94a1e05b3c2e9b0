"""
Several SAEs on one hook: SAELens's runner, this package's, and the parts of a step alone.

Every contender trains the same number of SAEs on the batches of one language model of random
weights, with SAELens's logging and wandb offline. A run's first batches must be those of SAELens's
store and model. The first period, a number of steps, is warm-up; the next ones are timed. Evals are
left out, for they take as long for each SAE as in a run of one.

Where the runner is this package's, the language model and the step of each SAE are timed alone, on
batches that are there. Model and steps together are the least that a step of all SAEs can take. The
row's `ratio` is the run's time to that.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import wandb
from sae_lens import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.config import LoggingConfig

from benchmarks.floors import time_model
from benchmarks.harness import describe, say
from benchmarks.model_path import no_fallback
from benchmarks.random_data import token_dataset
from benchmarks.rows import ResultsFile, Row
from benchmarks.run import sizes_of
from benchmarks.run_agreement import require_close_batches
from benchmarks.run_cases import CASES, LONG_RUN_STEPS, RunCase, RunPrecision
from benchmarks.run_marks import EndOfRun
from benchmarks.store import READY_BATCHES, one_epoch
from benchmarks.wall_clock import peak_gib, start_peak
from saelens_sparse import SparseMultiSAETrainingRunner
from saelens_sparse.activations import FastActivationsStore
from saelens_sparse.profile.trainers import release_memory, train_step
from saelens_sparse.whole_run.clock import PER_TOKENS, now
from saelens_sparse.whole_run.profiled import wandb_offline

CONTENDERS: dict[str, type[MultiSAETrainingRunner]] = {
    "stock": MultiSAETrainingRunner,
    "sparse_runner": SparseMultiSAETrainingRunner,
}
DEFAULT_CASES = {"cuda": ["llama_of_gemma2_shape"], "cpu": ["cpu"]}
MIN_PERIOD, CHECKED_BATCHES = 20, 3


@dataclass
class Clock:
    """
    Takes the place of a runner's evaluator: notes when it is called, and ends the run at last.

    Args:
        device: "cuda" or "cpu".
        windows: How many are timed between calls.
    """

    device: str
    windows: int
    calls: list[float] = field(default_factory=list[float])

    def __call__(self, **_: Any) -> dict[str, Any]:
        self.calls.append(now(self.device))
        if len(self.calls) > self.windows:
            raise EndOfRun
        return {}


@dataclass
class SeveralSession:
    """
    What all contenders of a case share.

    Attributes:
        case: what each SAE is, and the language model.
        precision: of SAEs and language model.
        library: the language model's.
        n_saes: how many there are.
        device: "cuda" or "cpu".
        model: the language model.
        folder: where the data set is, or is written.
        windows: timed windows of a run, of a period each.
        expected: first batches of SAELens's store and model, on the host.
    """

    case: RunCase
    precision: RunPrecision
    library: str
    n_saes: int
    device: str
    model: Any
    folder: Path
    windows: int
    expected: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    @property
    def period(self) -> int:
        """Steps of a window: whole refills, and whole intervals of logs."""
        return self.case.whole_period(MIN_PERIOD)

    def config(self, *, sparse: bool) -> MultiSAETrainingRunnerConfig:
        """A long run, whose evaluator is called after every period."""
        case, precision, logger = self.case, self.precision, LoggingConfig()
        logger.eval_every_n_wandb_logs = self.period // logger.wandb_log_frequency
        sae = case.sae_config
        return MultiSAETrainingRunnerConfig(
            saes={f"{i}": sae(precision, self.device, sparse=sparse) for i in range(self.n_saes)},
            hook_names=case.shape.hook_name(self.library),
            model_name=case.name,
            dataset_path="random tokens",
            streaming=False,
            context_size=case.context,
            n_batches_in_buffer=case.buffer_prompts,
            store_batch_size_prompts=case.model_prompts,
            train_batch_size_tokens=case.batch,
            training_tokens=LONG_RUN_STEPS * case.batch,
            device=self.device,
            autocast=precision.autocast,
            autocast_lm=precision.autocast_model,
            logger=logger,
            checkpoint_path=None,
            output_path=None,
        )

    def timed(self, name: str) -> Row:
        """One contender's keys of a row."""
        case, scale = self.case, PER_TOKENS / self.case.batch
        start_peak(self.device)
        refills = (self.windows + 2) * self.period / case.refill_steps + 6
        prompts = round(refills * case.buffer_prompts)
        dataset = token_dataset(self.folder, prompts, case.context, case.shape.vocabulary)
        torch.manual_seed(0)
        cfg = self.config(sparse=name != "stock")
        runner = CONTENDERS[name](cfg, override_dataset=dataset, override_model=self.model)
        model_ms = self._time_model(runner.activations_store)
        difference = self._check(runner)
        clock = Clock(self.device, self.windows)
        runner.evaluator = clock  # pyright: ignore[reportAttributeAccessIssue]
        try:
            runner.run()
        except EndOfRun:
            pass
        finally:
            wandb.finish()
        windows = [1e3 * scale * (b - a) / self.period for a, b in pairwise(clock.calls)]
        row: Row = {
            "ms": median(windows),
            "ms_min": min(windows),
            "ms_max": max(windows),
            "steps": len(windows) * self.period,
            "difference": difference,
            "peak_gib": peak_gib(self.device),
        }
        if model_ms is None:
            return row
        assert isinstance(runner, SparseMultiSAETrainingRunner)
        steps_ms = self._time_steps(runner)
        floor = model_ms + sum(steps_ms)
        row |= {"model_ms": model_ms, "step_ms": steps_ms, "floor_ms": floor}
        return {**row, "ratio": row["ms"] / floor}

    def _time_model(self, store: Any) -> float | None:
        """The language model alone; None if it is SAELens's."""
        if not isinstance(store, FastActivationsStore):
            return None
        n_tokens = self.period * self.case.batch
        vocabulary = self.case.shape.vocabulary
        return time_model(store, vocabulary, n_tokens, self.folder, self.device).model_ms

    def _check(self, runner: MultiSAETrainingRunner) -> float:
        """The largest relative distance of a batch from SAELens's, which come first."""
        batches = islice(runner.activations_store.get_multi_hook_data_loader(), CHECKED_BATCHES)
        found = [next(iter(batch.values())).cpu() for batch in batches]
        self.expected = self.expected or found
        return require_close_batches(self.expected, found, self.precision.name)

    def _time_steps(self, runner: SparseMultiSAETrainingRunner) -> list[float]:
        """Milliseconds of a step of each SAE by 4,096 tokens, the others idle."""
        assert runner.trainer is not None
        source = runner.activations_store.get_multi_hook_data_loader()
        batches = [next(iter(batch.values())).clone() for batch in islice(source, READY_BATCHES)]
        found: list[float] = []
        for trainer in runner.trainer.trainers.values():
            for batch in batches:
                train_step(trainer, batch)
            begin = now(self.device)
            for batch in islice(cycle(batches), self.period):
                train_step(trainer, batch)
            seconds = now(self.device) - begin
            found.append(1e3 * seconds * PER_TOKENS / (self.period * self.case.batch))
        return found


def run(
    results: ResultsFile,
    measured: Sequence[tuple[RunCase, RunPrecision, str]],
    contenders: Sequence[str],
    args: Namespace,
) -> int:
    """
    Measure runs of several SAEs; returns 1 if any contender could not be measured.

    Args:
        results: Where a row for each contender of each case goes.
        measured: Cases, their precisions and the language models' libraries.
        contenders: Who takes part. Stock comes first.
        args: The options `device`, `n_saes`, `windows` and `cache`.
    """
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, one_epoch(), no_fallback(), wandb_offline():
        for case, precision, library in measured:
            model = case.model(library, precision, args.device)
            place = args.cache or Path(folder)
            session = SeveralSession(
                case, precision, library, args.n_saes, args.device, model, place, args.windows
            )
            key = {"operation": "several", "case": case.name, "precision": precision.name}
            for name in contenders:
                try:
                    row = {"status": "ok", **session.timed(name)}
                except Exception as error:
                    row = describe(error)
                release_memory(args.device)
                say(f"{case.name} {precision.name} {library} {name}: {said_of(row)}")
                sizes = {**sizes_of(case, library), "n_saes": args.n_saes}
                results.append({**key, **sizes, "contender": name, **row})
    return int(any(row["status"] != "ok" for row in results.rows))


def said_of(row: Row) -> str:
    """A row in one line."""
    if row["status"] != "ok":
        return row["message"]
    line = f"{row['ms']:.2f} ms by 4,096 tokens"
    if row.get("ratio") is not None:
        line += (
            f", {row['ratio']:.3f} of the language model ({row['model_ms']:.2f}) and the "
            f"{len(row['step_ms'])} steps ({sum(row['step_ms']):.2f})"
        )
    return line


def cases_named(names: Sequence[str], *, tiny: bool) -> list[RunCase]:
    """Cases, or those of the same kind for a test on a CPU."""
    return [CASES[name].tiny if tiny else CASES[name] for name in names]
