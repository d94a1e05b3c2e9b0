"""Marks of a training run: when its steps and evals begin and end, and what they take."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any
from unittest.mock import patch

import torch
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

from benchmarks.wall_clock import peak_gib, start_peak
from saelens_sparse.reports.results import describe_failure
from saelens_sparse.whole_run.clock import busy_ms, device_profile, now


class EndOfRun(Exception):
    """What a run is stopped with. It is no error."""


@dataclass
class Marks:
    """
    What a run left.

    Attributes:
        spans: begin and end of each call of the evaluator, in seconds, up to the last timed window.
        first_step: end of the first step, in seconds.
        eval_seconds: how long the eval at the end took; None if it failed.
        eval_failure: why: too little memory, or a loss that the hook's activations do not change.
        busy_ms: milliseconds that the device is busy in a window after the timed ones; None if
            that was not measured.
        step_peaks: GiB allocated at most before each call, since the one before it; None on a CPU.
        eval_peaks: GiB allocated at most during each call.
    """

    spans: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    first_step: float | None = None
    eval_seconds: float | None = None
    eval_failure: str | None = None
    busy_ms: float | None = None
    step_peaks: list[float | None] = field(default_factory=list[float | None])
    eval_peaks: list[float | None] = field(default_factory=list[float | None])

    @property
    def windows(self) -> list[float]:
        """Seconds between one call and the next."""
        return [after[0] - before[1] for before, after in itertools.pairwise(self.spans)]


class MarkingEvaluator(LLMSaeEvaluator[Any]):
    """
    SAELens's evaluator, which marks the time of its calls and ends the run after the last.

    The first call evaluates one batch, for a warm-up. Each of the next `windows` ends a timed
    window. If `profiles`, one more window follows under PyTorch's profiler. Then comes the eval.

    Args:
        evaluator: The runner's.
        windows: How many windows are timed.
        device: "cuda" or "cpu".
        profiles: Whether the device's work is recorded.
    """

    @override
    def __init__(
        self, evaluator: LLMSaeEvaluator[Any], windows: int, device: str, *, profiles: bool
    ):
        super().__init__(**{one.name: getattr(evaluator, one.name) for one in fields(evaluator)})
        self.windows = windows
        self.device = device
        self.profile: Any = device_profile() if profiles else None
        self.marks = Marks()
        self._calls = 0

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        marks, begin = self.marks, now(self.device)
        if self._calls > self.windows:
            self.profile.stop()
            marks.busy_ms = busy_ms(self.profile)
            begin = now(self.device)
        marks.step_peaks.append(peak_gib(self.device))
        start_peak(self.device)
        if self._calls == 0:
            with patch.object(self, "n_eval_batches", 1):
                self._evaluate(*args, **kwargs)
        is_last = self._calls == self.windows + (self.profile is not None)
        if is_last:
            marks.eval_seconds = self._evaluate(*args, **kwargs)
        marks.eval_peaks.append(peak_gib(self.device))
        start_peak(self.device)
        if self._calls <= self.windows:
            marks.spans.append((begin, now(self.device)))
        if is_last:
            raise EndOfRun
        if self._calls == self.windows:
            self.profile.start()
        self._calls += 1
        return {}

    def _evaluate(self, *args: Any, **kwargs: Any) -> float | None:
        """Evaluate, unless that has failed before; gives the seconds."""
        if self.marks.eval_failure is not None:
            return None
        begin = now(self.device)
        try:
            super().__call__(*args, **kwargs)
        except (torch.OutOfMemoryError, ZeroDivisionError) as error:
            self.marks.eval_failure = describe_failure(error)["message"]
            return None
        return now(self.device) - begin


@contextmanager
def marked_first_step(marks: Marks, device: str) -> Generator[None]:
    """Let trainers mark the end of the first step that one of them takes."""
    go_on: Any = getattr(SAETrainer, _AFTER_A_STEP)

    def mark(trainer: SAETrainer[Any, Any]) -> None:
        if marks.first_step is None:
            marks.first_step = now(device)
        go_on(trainer)

    with patch.object(SAETrainer, _AFTER_A_STEP, mark):
        yield


_AFTER_A_STEP = "_run_and_log_evals"
