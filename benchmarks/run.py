"""
Whole training runs: the language model, the activation store and the steps of an SAE.

Every contender runs SAELens's `runner.run()` on the same language model of random weights and the
same tokens in Arrow files on disk. Logging and evals are on, as in SAELens's defaults, with wandb
offline. Contenders take turns, `--rounds` times. Before that, the first batches of each store must
be SAELens's bit for bit.

A run calls its evaluator after every `PERIOD` steps. Its first and its last call evaluate, the
others only mark the time. Between two calls lies a window of steps with all that a step does but
evals. The first `PERIOD` steps and the first eval are warm-up. A long run with SAELens's defaults
evaluates once in 1,000 steps, and so much of the time of an eval is added to that of a step.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import wandb
from sae_lens.config import LoggingConfig
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import override

from benchmarks.harness import describe, say
from benchmarks.random_data import token_dataset
from benchmarks.rows import ResultsFile, Row
from benchmarks.run_cases import CONTENDERS, RunCase, RunContender, Runner
from benchmarks.store import CHECKED_REFILLS, first_batches, one_epoch, require_same_batches
from benchmarks.wall_clock import PER_TOKENS, busy_ms, device_profile, now, peak_gib, start_peak
from saelens_sparse.profile.cases import Precision
from saelens_sparse.profile.trainers import implementation_of, release_memory

PERIOD = {"cuda": 50, "cpu": 10}
_DEFAULTS = LoggingConfig()
STEPS_BETWEEN_EVALS = _DEFAULTS.wandb_log_frequency * _DEFAULTS.eval_every_n_wandb_logs


@dataclass
class Marks:
    """
    What a run left.

    Attributes:
        spans: begin and end of each call of the evaluator, in seconds.
        step_peaks: GiB allocated at most before each call, since the one before it; None on a CPU.
        eval_peaks: GiB allocated at most during each call.
        implementation: what a sparse SAE ran on.
    """

    spans: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    step_peaks: list[float | None] = field(default_factory=list[float | None])
    eval_peaks: list[float | None] = field(default_factory=list[float | None])
    implementation: str | None = None

    @property
    def windows(self) -> list[float]:
        """Seconds between one call and the next."""
        return [after[0] - before[1] for before, after in itertools.pairwise(self.spans)]

    @property
    def last_eval(self) -> float:
        """Seconds of the last call."""
        begin, end = self.spans[-1]
        return end - begin


class MarkingEvaluator(LLMSaeEvaluator[Any]):
    """
    SAELens's evaluator, which marks the time of its calls and evaluates at some of them only.

    Args:
        evaluator: The runner's.
        evaluates: Of each call, whether it evaluates.
        device: "cuda" or "cpu".
    """

    @override
    def __init__(self, evaluator: LLMSaeEvaluator[Any], evaluates: Sequence[bool], device: str):
        super().__init__(**{one.name: getattr(evaluator, one.name) for one in fields(evaluator)})
        self.evaluates = evaluates
        self.device = device
        self.marks = Marks()

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        marks = self.marks
        begin = now(self.device)
        marks.step_peaks.append(peak_gib(self.device))
        start_peak(self.device)
        metrics = super().__call__(*args, **kwargs) if self.evaluates[len(marks.spans)] else {}
        end = now(self.device)
        marks.eval_peaks.append(peak_gib(self.device))
        start_peak(self.device)
        marks.spans.append((begin, end))
        return metrics


class ProfilingEvaluator(MarkingEvaluator):
    """Profiles the device from its first call to its second one."""

    profile: Any = None

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        metrics = super().__call__(*args, **kwargs)
        if self.profile is None:
            self.profile = device_profile()
            self.profile.start()
        else:
            self.profile.stop()
        return metrics


@dataclass
class RunSession:
    """
    What all runs of a case share.

    Attributes:
        case: what is trained.
        precision: of SAE and language model.
        device: "cuda" or "cpu".
        model: the language model, alive between runs.
        folder: where the data set is, or is written.
        windows: timed windows of a run, of `PERIOD` steps each.
    """

    case: RunCase
    precision: Precision
    device: str
    model: HookedRootModule
    folder: Path
    windows: int

    @property
    def period(self) -> int:
        return PERIOD[self.device]

    def build(self, contender: RunContender, calls: int) -> Runner:
        """A runner whose run calls its evaluator so often."""
        cfg = self.case.runner_config(
            contender, self.precision, self.device, calls * self.period, self.period
        )
        prompts = (self.windows + 2) * self.period * self.case.batch // self.case.context
        # Each of two evals reads tokens for its reconstructions and for its statistics.
        prompts += 2 * 2 * cfg.n_eval_batches * self.case.model_prompts
        prompts += 3 * self.case.buffer_prompts
        dataset = token_dataset(self.folder, prompts, self.case.context, self.case.vocabulary)
        return contender.build(cfg, self.model, dataset)

    def first_batches(self, contender: RunContender) -> Iterator[torch.Tensor]:
        """What a run of the contender trains on, over some refills of the buffer."""
        runner = self.build(contender, calls=1)
        return first_batches(
            runner.activations_store, round(CHECKED_REFILLS * self.case.refill_steps)
        )

    def check(self, contenders: Iterable[RunContender]) -> int:
        """
        Compare first batches with those of SAELens's runner and store.

        Returns:
            How many were compared.

        Raises:
            DisagreementError: Batches differ.
        """
        expected = list(self.first_batches(CONTENDERS["stock"]))
        for contender in contenders:
            require_same_batches(expected, self.first_batches(contender))
        return len(expected)

    def timed(self, contender: RunContender) -> Marks:
        """Run once, with an eval at both ends."""
        evaluates = [True, *[False] * (self.windows - 1), True]
        return self._run(contender, MarkingEvaluator, evaluates).marks

    def busy_ms(self, contender: RunContender) -> float | None:
        """Milliseconds that the device is busy in a window; None on a CPU."""
        if self.device != "cuda":
            return None
        evaluator = self._run(contender, ProfilingEvaluator, [False, False])
        assert isinstance(evaluator, ProfilingEvaluator)
        return busy_ms(evaluator.profile)

    def _run(
        self, contender: RunContender, kind: type[MarkingEvaluator], evaluates: Sequence[bool]
    ) -> MarkingEvaluator:
        release_memory(self.device)
        start_peak(self.device)
        runner = self.build(contender, calls=len(evaluates))
        evaluator = runner.evaluator = kind(runner.evaluator, evaluates, self.device)
        try:
            runner.run()
        finally:
            wandb.finish()
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.precision.autocast)
        evaluator.marks.implementation = implementation_of(runner.sae, autocast)
        return evaluator


@contextmanager
def wandb_offline(folder: Path) -> Generator[None]:
    """Let wandb write into the folder, without a network unless the user says otherwise."""
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **os.environ}
    with patch.dict(os.environ, {**settings, "WANDB_DIR": str(folder)}):
        yield


def summary(session: RunSession, marked: Sequence[Marks]) -> Row:
    """Medians over all windows and evals of a contender's runs, per 4,096 tokens."""
    scale = 1e3 * PER_TOKENS / session.case.batch
    windows = [seconds * scale / session.period for one in marked for seconds in one.windows]
    eval_ms = median(1e3 * one.last_eval for one in marked)
    share = eval_ms / STEPS_BETWEEN_EVALS * PER_TOKENS / session.case.batch
    step_peaks = [peak for one in marked for peak in one.step_peaks if peak is not None]
    peaks = step_peaks + [peak for one in marked for peak in one.eval_peaks if peak is not None]
    return {
        "ms": median(windows) + share,
        "ms_min": min(windows) + share,
        "ms_max": max(windows) + share,
        "ms_without_evals": median(windows),
        "eval_ms": eval_ms,
        "steps_between_evals": STEPS_BETWEEN_EVALS,
        "steps": len(windows) * session.period,
        "rounds": len(marked),
        "implementation": marked[-1].implementation,
        "peak_gib": max(peaks, default=None),
        "peak_gib_without_evals": max(step_peaks, default=None),
    }


def measure(session: RunSession, contenders: Sequence[RunContender], rounds: int) -> Iterator[Row]:
    """Check the contenders, then run them in turn; a row for each."""
    checked = session.check(contenders)
    marked: dict[str, list[Marks]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            marked[contender.name].append(session.timed(contender))
    for contender in contenders:
        busy = session.busy_ms(contender)
        tokens = session.period * session.case.batch
        yield {
            "contender": contender.name,
            "status": "ok",
            "checked_batches": checked,
            **summary(session, marked[contender.name]),
            "busy_ms": busy and busy * PER_TOKENS / tokens,
        }


def sizes_of(case: RunCase) -> Row:
    """A case's keys in its rows."""
    return {
        "architecture": case.registered.stock,
        "d_in": case.d_in,
        "d_sae": case.d_sae,
        "k": case.sparsity if case.registered.sparsity_field is not None else None,
        "batch": case.batch,
        "hook_name": case.hook_name,
        "context": case.context,
        "model_prompts": case.model_prompts,
        "buffer_prompts": case.buffer_prompts,
        **case.config,
    }


def run(
    results: ResultsFile,
    measured: Iterable[tuple[RunCase, Precision]],
    contenders: Sequence[RunContender],
    args: Namespace,
) -> int:
    """
    Measure runs; returns 1 if any case could not be measured.

    Args:
        results: Where a row for each contender of each case goes.
        measured: Cases and their precisions.
        contenders: Who takes part.
        args: The options `device`, `rounds`, `windows` and `cache`.
    """

    def rows_of(case: RunCase, precision: Precision, folder: Path) -> list[Row]:
        try:
            model = case.model(args.device)
            session = RunSession(case, precision, args.device, model, folder, args.windows)
            return list(measure(session, contenders, args.rounds))
        except Exception as error:
            return [{"contender": "all", **describe(error)}]

    with tempfile.TemporaryDirectory() as temporary, one_epoch(), wandb_offline(Path(temporary)):
        for case, precision in measured:
            key = {"operation": "run", "case": case.name, "precision": precision.name}
            for row in rows_of(case, precision, args.cache or Path(temporary)):
                said = f"{row['ms']:.2f} ms" if row["status"] == "ok" else row["message"]
                say(f"{case.name} {precision.name} {row['contender']}: {said}")
                results.append({**key, **sizes_of(case), **row})
            release_memory(args.device)
    return int(any(row["status"] != "ok" for row in results.rows))
