"""Windows of a run: where they begin and end, and what is counted in them."""

from collections.abc import Container
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from saelens_sparse.whole_run import windows as module
from saelens_sparse.whole_run.record import record_of
from saelens_sparse.whole_run.windows import (
    EVALS,
    LOGGING,
    MODEL,
    REST,
    STEP,
    STORE,
    EndOfWindows,
    Windows,
)

CFG: dict[str, Any] = {
    "train_batch_size_tokens": 1024,
    "logger": {"wandb_log_frequency": 10, "eval_every_n_wandb_logs": 100},
}


class Run:
    """A loop like SAELens's, whose buffer is filled every `served` batches; clocks are made up."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        count: int,
        served: int = 3,
        logs_at: Container[int] = range(10**6),
    ) -> None:
        self.logs_at = logs_at
        self.seconds, self.served, self.n_batches, self.betweens = 0.0, served, 0, list[int]()
        monkeypatch.setattr(
            "saelens_sparse.whole_run.clock.time.perf_counter", lambda: self.seconds
        )
        self.windows = Windows("cpu", count, lambda: self.betweens.append(self.n_batches))
        self.trainer: Any = SimpleNamespace(
            step=self.step, build_train_step_log_dict=self.log, evaluator=self.evaluate
        )
        self.windows.attach(self.trainer)

    def step(self, batch: torch.Tensor) -> Any:
        self.seconds += 4
        return SimpleNamespace(feature_acts=torch.eye(4), batch=batch)

    def log(self) -> dict[str, Any]:
        self.seconds += 0.5
        return {}

    def evaluate(self) -> dict[str, Any]:
        self.seconds += 100
        return {}

    def next_batch(self) -> torch.Tensor:
        with self.windows.clock.part(STORE):
            self.windows.before_batch()
            if self.n_batches % self.served == 0:
                for _ in range(2):
                    self.windows.before_source_batch()
                    with self.windows.clock.part(MODEL):
                        self.seconds += 8
            self.seconds += 1
            self.n_batches += 1
            batch = torch.full((4, 2), float(self.n_batches))
            self.windows.after_batch(batch)
            return batch

    def fit(self, evaluates: bool = False) -> None:
        while True:
            try:
                batch = self.next_batch()
            except EndOfWindows:
                return
            self.trainer.step(batch)
            if self.n_batches in self.logs_at:
                self.trainer.build_train_step_log_dict()
                self.seconds += 0.25  # wandb's own
            if evaluates:
                self.trainer.evaluator()
            self.seconds += 0.125


def test_windows_hold_whole_fillings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.MIN_STEPS, "cpu", 4)
    run = Run(monkeypatch, count=2)
    run.fit()
    # The first filling is warm-up; a window of four steps or more holds two.
    assert run.betweens == [3, 9]
    (first, steps), second = run.windows.times
    assert (steps, second) == (6, (first, 6))
    assert first == {
        STORE: 6_000,
        MODEL: 2 * 16_000,
        STEP: 6 * 4_000,
        LOGGING: 6 * 875,
        REST: 0,
    }
    assert run.windows.whole_fillings
    assert run.windows.l0 == 1
    assert run.windows.sample is not None
    assert run.windows.sample.tolist() == [[1.0, 1.0]] * 4


def test_a_buffer_that_serves_for_long_ends_a_window_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.MAX_STEPS, "cpu", 10)
    run = Run(monkeypatch, count=1, served=1000)
    run.fit()
    assert [steps for _, steps in run.windows.times] == [10]
    assert not run.windows.whole_fillings
    run.next_batch()  # what comes later is not disturbed


def test_evals_are_spread_over_the_steps_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, count=1, served=10)
    run.fit(evaluates=True)
    run.windows.busy_ms = 3237.5  # of 1,600 for the language model, 4,000, 1,000 and 875
    found = record_of(run.windows, "topk", "a runner", CFG, eval_seconds=50.0)
    assert found.steps == 10
    # 4,096 tokens are four steps.
    assert found.parts_ms[EVALS] == pytest.approx(4 * 50_000 / 1000)
    assert found.parts_ms[MODEL] == pytest.approx(4 * 16_000 / 10)
    assert found.parts_ms[STEP] == pytest.approx(4 * 4_000)
    assert found.parts_ms[LOGGING] + found.parts_ms[REST] == pytest.approx(4 * 875 / 10)
    assert found.ms == pytest.approx(found.ms_min) == pytest.approx(found.ms_max)
    assert found.tokens_per_second == pytest.approx(4096e3 / found.ms)
    assert found.steps_between_evals == 1000
    # Evals are no part of a profiled window.
    assert found.busy_share == pytest.approx(3237.5 / 7475)


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_logs_are_spread_over_the_steps_between_them(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    run = Run(monkeypatch, count=2, served=10, logs_at=[14])
    run.fit()
    assert run.windows.logs == 1
    cfg = {**CFG, "logger": {**CFG["logger"], "wandb_log_frequency": every}}
    found = record_of(run.windows, "topk", "a runner", cfg)
    assert found.parts_ms[LOGGING] == pytest.approx(4 * 875 / every)
    # The progress bar after the log counts as logging; elsewhere it is the rest of the loop.
    assert found.ms_max - found.ms_min == pytest.approx(4 * 125 / 10)
    unseen = Run(monkeypatch, count=2, served=10, logs_at=[4, 35])  # in the warm-up, and after all
    unseen.fit()
    found = record_of(unseen.windows, "topk", "a runner", cfg, logging_ms=3.0)
    assert (unseen.windows.logs, found.parts_ms[LOGGING]) == (0, 4 * 3.0)


def test_a_run_that_ends_before_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="training_tokens is too small"):
        record_of(Windows("cpu", 1), "topk", "a runner", CFG)
