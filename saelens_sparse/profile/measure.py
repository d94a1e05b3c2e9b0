"""Time and memory of training steps and other calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput

from saelens_sparse.ops.common.cuda_graph import kept_by_graphs
from saelens_sparse.profile.trainers import Inputs, Trainer, hold_dead, take_step, train_step
from saelens_sparse.whole_run.clock import Mark, Stopwatch

UNTIMED_STEPS = 3
GIB = 2**30


@dataclass
class Timed:
    """Milliseconds of calls; bytes allocated on the GPU before them and at most, or None.

    The most counts what CUDA graphs keep for themselves.
    """

    ms: list[float]
    before_bytes: int | None
    peak_bytes: int | None

    def to_row(self) -> dict[str, Any]:
        """As the rows of a benchmark have it."""
        return {
            "steps": len(self.ms),
            "ms": median(self.ms),
            "ms_min": min(self.ms),
            "ms_max": max(self.ms),
            "peak_gib": self.peak_bytes and self.peak_bytes / GIB,
            "before_gib": self.before_bytes and self.before_bytes / GIB,
        }


@dataclass
class TimedSteps(Timed):
    """Of steps: `[d_sae]` shares of rows on which latents fired; SAELens's metrics of the last."""

    firing: torch.Tensor
    metrics: dict[str, float]


def time_calls(
    call: Callable[[], object],
    device: str,
    repeats: int,
    untimed: int = UNTIMED_STEPS,
    before: Callable[[], object] = lambda: None,
) -> Timed:
    """Time `repeats` calls after some `untimed` ones; `before` is called before each, untimed."""
    watch = Stopwatch(device)
    for _ in range(untimed):
        before()
        call()
    if watch.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated() if watch.on_cuda else None
    # A graph that is recorded from now on counts as it is recorded.
    of_graphs = kept_by_graphs() if watch.on_cuda else 0
    marks: list[tuple[Mark, Mark]] = []
    for _ in range(repeats):
        before()
        start = watch.mark()
        call()
        marks.append((start, watch.mark()))
    ms = [watch.milliseconds(*pair) for pair in marks]
    peak_bytes = torch.cuda.max_memory_allocated() + of_graphs if watch.on_cuda else None
    return Timed(ms, before_bytes, peak_bytes)


def time_steps(
    trainer: Trainer, inputs: Inputs, steps: int, untimed: int = UNTIMED_STEPS
) -> TimedSteps:
    """
    Time steps after some `untimed` ones, as `SAETrainer.fit` takes them: with the output of one
    alive during the next.
    """
    output: TrainStepOutput | None = None

    def step() -> None:
        nonlocal output
        output = train_step(trainer, next(trainer.data_provider))

    for _ in range(untimed):
        output = take_step(trainer, inputs)
    fired_before = trainer.act_freq_scores.clone()
    timed = time_calls(
        step, trainer.cfg.device, steps, 0, lambda: hold_dead(trainer, inputs.dead_latents)
    )
    rows = steps * trainer.cfg.train_batch_size_samples
    firing = ((trainer.act_freq_scores - fired_before) / rows).cpu()
    assert output is not None
    metrics = {n: float(v() if callable(v) else v) for n, v in output.metrics.items()}
    return TimedSteps(**vars(timed), firing=firing, metrics=metrics)
