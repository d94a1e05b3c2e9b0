"""
Whole training runs: the language model, the activation store and the steps of an SAE.

Every contender runs SAELens's `runner.run()` on the same language model of random weights and the
same tokens in Arrow files on disk. Logging is on, as in SAELens's defaults, with wandb offline. The
config is that of a run of 100,000 steps, which is stopped early.

A contender's first batches must be those that SAELens's store and model give: up to rounding where
its language model takes another path, bit for bit where not. Its run then goes on from there. The
run calls its evaluator after every period, a number of steps. Between two calls lies a window of
steps with all that a step does but evals. The first period is warm-up. An eval is timed at the end.
A long run with SAELens's defaults evaluates once in 1,000 steps, and so much of the time of an eval
is added to that of a step.

Where both the store and the steps are this package's, language model, store and steps are also
timed alone. Their sum is the floor of the run.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import wandb
from sae_lens.config import LoggingConfig
from transformer_lens.HookedRootModule import HookedRootModule

from benchmarks.floors import ModelTimes, floor_of, time_model, time_steps, time_store
from benchmarks.harness import describe, say
from benchmarks.model_path import no_fallback
from benchmarks.random_data import token_dataset
from benchmarks.rows import ResultsFile, Row
from benchmarks.run_agreement import require_close_batches
from benchmarks.run_cases import RunCase, RunContender, Runner, RunPrecision
from benchmarks.run_marks import EndOfRun, MarkingEvaluator, Marks, marked_first_step
from benchmarks.store import first_batches, one_epoch, require_same_batches
from benchmarks.wall_clock import PER_TOKENS, Clock, now, start_peak
from saelens_sparse import SparseTrainingRunner
from saelens_sparse.activations import FastActivationsStore
from saelens_sparse.profile.trainers import implementation_of, release_memory

CHECKED_REFILLS = 1.5
FLOOR_REFILLS = 2
_DEFAULTS = LoggingConfig()
STEPS_BETWEEN_EVALS = _DEFAULTS.wandb_log_frequency * _DEFAULTS.eval_every_n_wandb_logs


@dataclass
class Turn:
    """
    What one run of a contender gave.

    Attributes:
        marks: of the run.
        checked: how many batches were compared.
        difference: the largest relative distance of a batch from SAELens's.
        first_step_s: seconds from the making of the runner to the end of the first step, without
            those of the comparison.
        implementation: what a sparse SAE ran on.
        floor: keys of its row that say what each part takes alone.
    """

    marks: Marks
    checked: int
    difference: float
    first_step_s: float
    implementation: str | None
    floor: Row = field(default_factory=dict[str, Any])


@dataclass
class RunSession:
    """
    What all runs with a language model share.

    Attributes:
        case: what is trained.
        precision: of SAE and language model.
        library: the language model's.
        device: "cuda" or "cpu".
        llm_device: the language model's; the same, or another GPU.
        model: the language model, alive between runs.
        folder: where the data set is, or is written.
        windows: timed windows of a run, of a period each.
        expected: first batches of SAELens's store and model, on the host.
    """

    case: RunCase
    precision: RunPrecision
    library: str
    device: str
    llm_device: str
    model: HookedRootModule
    folder: Path
    windows: int
    expected: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    @property
    def period(self) -> int:
        return self.case.period(self.device)

    def build(self, contender: RunContender) -> Runner:
        """A runner that has read nothing."""
        case = self.case
        cfg = case.runner_config(
            contender, self.precision, self.library, self.device, self.llm_device
        )
        refills = (self.windows + 2) * self.period / case.refill_steps
        refills += CHECKED_REFILLS + 3 * FLOOR_REFILLS + 4
        prompts = round(refills * case.buffer_prompts)
        # An eval reads tokens for its reconstructions and for its statistics; one batch of each is
        # for its warm-up.
        prompts += 2 * (cfg.n_eval_batches + 1) * case.model_prompts
        dataset = token_dataset(self.folder, prompts, case.context, case.shape.vocabulary)
        return contender.build(cfg, self.model, dataset)

    def first_batches(self, runner: Runner) -> Iterator[torch.Tensor]:
        """What the run will have trained on, over some refills of the buffer."""
        n_batches = round(CHECKED_REFILLS * self.case.refill_steps)
        return first_batches(runner.activations_store, n_batches)

    def check(self, contender: RunContender, batches: Iterable[torch.Tensor]) -> float:
        """
        Compare batches with those of SAELens's, which are the first that are seen.

        Returns:
            The largest relative distance of a batch.

        Raises:
            DisagreementError: Batches differ.
        """
        found = (batch.cpu() for batch in batches)
        if not self.expected:
            self.expected = list(found)
            return 0.0
        if contender.language_model == "auto":
            return require_close_batches(self.expected, found, self.precision.name)
        require_same_batches(self.expected, found)
        return 0.0

    def timed(self, contender: RunContender) -> Turn:
        """Time the model, check the first batches, run, and time the other parts."""
        start_peak(self.device)
        clock = Clock(self.device)
        with clock:
            runner = self.build(contender)
        model = self._time_model(runner)
        batches = self.first_batches(runner)
        with clock:
            first = next(batches)
        difference = self.check(contender, itertools.chain([first], batches))
        marks, to_first_step = self._run(runner, profiles=model is not None)
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.precision.autocast)
        turn = Turn(
            marks,
            checked=len(self.expected),
            difference=difference,
            first_step_s=clock.seconds + to_first_step,
            implementation=implementation_of(runner.sae, autocast),
        )
        if model is not None:
            turn.first_step_s += model.first_model_call_s
            turn.floor = self._floor(runner, model)
        return turn

    def _time_model(self, runner: Runner) -> ModelTimes | None:
        """The language model alone, where all else is this package's too."""
        store, vocabulary = runner.activations_store, self.case.shape.vocabulary
        if isinstance(runner, SparseTrainingRunner) and isinstance(store, FastActivationsStore):
            n_tokens = self.period * self.case.batch
            return time_model(store, vocabulary, n_tokens, self.folder, self.device)
        return None

    def _run(self, runner: Runner, *, profiles: bool) -> tuple[Marks, float]:
        """Run until the evaluator ends it; gives the seconds to the end of the first step too."""
        profiles = profiles and self.device == "cuda"
        evaluator = MarkingEvaluator(runner.evaluator, self.windows, self.device, profiles=profiles)
        runner.evaluator = evaluator
        begin = now(self.device)
        try:
            with marked_first_step(evaluator.marks, self.device):
                runner.run()
        except EndOfRun:
            assert evaluator.marks.first_step is not None
            return evaluator.marks, evaluator.marks.first_step - begin
        finally:
            wandb.finish()
        raise AssertionError("the run ended before its evaluator was called often enough")

    def _floor(self, runner: Runner, model: ModelTimes) -> Row:
        assert isinstance(runner, SparseTrainingRunner)
        assert isinstance(runner.activations_store, FastActivationsStore)
        assert runner.trainer is not None
        store, n_batches = runner.activations_store, round(FLOOR_REFILLS * self.case.refill_steps)
        store_ms = time_store(store, self.case.shape.vocabulary, n_batches, self.device)
        step_ms = time_steps(runner.trainer, store, self.period, self.device)
        return floor_of(model, store_ms, step_ms)


@contextmanager
def wandb_offline(folder: Path) -> Generator[None]:
    """Let wandb write into the folder, without a network unless the user says otherwise."""
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **os.environ}
    with patch.dict(os.environ, {**settings, "WANDB_DIR": str(folder)}):
        yield


def summary(case: RunCase, period: int, turns: Sequence[Turn]) -> Row:
    """Medians over all windows and evals of a contender's runs, per 4,096 tokens."""
    scale = PER_TOKENS / case.batch
    marked = [turn.marks for turn in turns]
    windows = [1e3 * scale * one / period for marks in marked for one in marks.windows]
    evals = [1e3 * one.eval_seconds for one in marked if one.eval_seconds is not None]
    share = median(evals) * scale / STEPS_BETWEEN_EVALS if evals else 0.0
    busy = [scale * one.busy_ms / period for one in marked if one.busy_ms is not None]
    step_peaks = [peak for one in marked for peak in one.step_peaks if peak is not None]
    peaks = step_peaks + [peak for one in marked for peak in one.eval_peaks if peak is not None]
    steps_ms = median(windows)
    return {
        "ms": steps_ms + share,
        "ms_min": min(windows) + share,
        "ms_max": max(windows) + share,
        "ms_without_evals": steps_ms,
        "eval_ms": median(evals) if evals else None,
        "eval_failure": marked[-1].eval_failure,
        "steps_between_evals": STEPS_BETWEEN_EVALS,
        "steps": len(windows) * period,
        "rounds": len(turns),
        "tokens_per_second": 1e3 * PER_TOKENS / steps_ms,
        "busy_ms": median(busy) if busy else None,
        "idle": 1 - median(busy) / steps_ms if busy else None,
        "first_step_s": turns[0].first_step_s,
        "checked_batches": turns[0].checked,
        "difference": max(turn.difference for turn in turns),
        "implementation": turns[-1].implementation,
        "peak_gib": max(peaks, default=None),
        "peak_gib_without_evals": max(step_peaks, default=None),
        **turns[0].floor,
    }


def measure(session: RunSession, contenders: Sequence[RunContender], rounds: int) -> Iterator[Row]:
    """
    Let contenders run in turn; a row for each after its last turn, which says why if one failed.

    Stock comes first: its first batches are what the others' are compared with.
    """
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    failed: set[str] = set()
    for left in reversed(range(rounds)):
        for contender in contenders:
            if contender.name in failed:
                continue
            begin, row = time.perf_counter(), None
            try:
                turns[contender.name].append(session.timed(contender))
            except Exception as error:
                failed.add(contender.name)
                row = describe(error)
            release_memory(session.device)
            say(f"{contender.name} took {time.perf_counter() - begin:.0f} s")
            if row is None and not left:
                ran = turns[contender.name]
                row = {"status": "ok", **summary(session.case, session.period, ran)}
            if row is not None:
                yield {"contender": contender.name, **row}


def sizes_of(case: RunCase, library: str) -> Row:
    """A case's keys in its rows."""
    return {
        "architecture": case.registered.stock,
        "d_in": case.d_in,
        "d_sae": case.d_sae,
        "k": case.sparsity if case.registered.sparsity_field is not None else None,
        "batch": case.batch,
        "library": library,
        "hook_name": case.shape.hook_name(library),
        "vocabulary": case.shape.vocabulary,
        "context": case.context,
        "model_prompts": case.model_prompts,
        "buffer_prompts": case.buffer_prompts,
        **case.config,
    }


def run(
    results: ResultsFile,
    measured: Iterable[tuple[RunCase, RunPrecision, str]],
    contenders: Sequence[RunContender],
    args: Namespace,
) -> int:
    """
    Measure runs; returns 1 if any contender could not be measured.

    Args:
        results: Where a row for each contender of each case goes.
        measured: Cases, their precisions and the language models' libraries.
        contenders: Who takes part.
        args: The options `device`, `llm_device`, `rounds`, `windows` and `cache`.
    """
    llm_device = args.llm_device or args.device

    def rows_of(
        case: RunCase, precision: RunPrecision, library: str, folder: Path
    ) -> Iterator[Row]:
        try:
            model = case.model(library, precision, llm_device)
        except Exception as error:
            yield {"contender": "all", **describe(error)}
            return
        session = RunSession(
            case, precision, library, args.device, llm_device, model, folder, args.windows
        )
        yield from measure(session, contenders, args.rounds)

    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder, one_epoch(), no_fallback(), wandb_offline(Path(folder)):
        for case, precision, library in measured:
            name = f"{case.name} {precision.name} {library}"
            if seconds := estimate(case, precision, library, contenders, args):
                say(f"{name}: about {seconds / 60:.1f} minutes on an H100")
            where = library if llm_device == args.device else f"{library} on {llm_device}"
            key = {"operation": "run", "case": case.name, "precision": precision.name}
            for row in rows_of(case, precision, library, args.cache or Path(folder)):
                said = f"{row['ms']:.2f} ms" if row["status"] == "ok" else row["message"]
                say(f"{name} {row['contender']}: {said}")
                results.append({**key, **sizes_of(case, library), "library": where, **row})
            release_memory(args.device)
    return int(any(row["status"] != "ok" for row in results.rows))


def estimate(
    case: RunCase,
    precision: RunPrecision,
    library: str,
    contenders: Sequence[RunContender],
    args: Namespace,
) -> float | None:
    """
    Seconds that all turns take on an H100, from the time of a step of stock's; None if unknown.

    An eval of a batch counts as ten steps, and compiling as 30 s. The other numbers are each
    contender's share of stock's time, as measured.
    """
    stock_ms = case.stock_ms.get(precision.name)
    if stock_ms is None or args.device != "cuda":
        return None
    n_evals = 1 + case.config.get("n_eval_batches", 10)
    steps = (args.windows + 2) * case.period(args.device)
    steps += (1 + CHECKED_REFILLS) * case.refill_steps + 10 * n_evals
    share = {"TL": 1.0, "HF": 0.65}[library]
    seconds = 0.0
    for contender in contenders:
        own = 0.35 if contender.language_model == "auto" else 0.7 * share
        relative = own if contender.sparse else share
        seconds += args.rounds * steps * stock_ms * relative / 1e3
        seconds += 30 if contender.language_model == "auto" else 5
    return seconds
