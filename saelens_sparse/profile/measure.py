"""Time and memory of training steps and other calls."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from saelens_sparse.profile.trainers import Inputs, Trainer, hold_dead, take_step, train_step

UNTIMED_STEPS = 3
GIB = 2**30
Mark = Any


class Stopwatch:
    """Marks points in a device's work, and tells the milliseconds between them."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"

    def mark(self) -> Mark:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Mark, end: Mark) -> float:
        if not self.on_cuda:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)


@dataclass
class Timed:
    """
    Steps or calls, timed.

    Attributes:
        ms: milliseconds of each.
        before_bytes: allocated on the GPU before them; None on a CPU.
        peak_bytes: most that was allocated there during them.
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
    """
    Training steps, timed.

    Attributes:
        firing: `[d_sae]`, share of the rows on which each latent fired, on the CPU.
        metrics: of the last step, by SAELens's names.
    """

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
    marks: list[tuple[Mark, Mark]] = []
    for _ in range(repeats):
        before()
        start = watch.mark()
        call()
        marks.append((start, watch.mark()))
    ms = [watch.milliseconds(*pair) for pair in marks]
    return Timed(ms, before_bytes, torch.cuda.max_memory_allocated() if watch.on_cuda else None)


def time_steps(
    trainer: Trainer,
    inputs: Inputs,
    steps: int,
    done: Callable[[], object] = lambda: None,
    untimed: int = UNTIMED_STEPS,
) -> TimedSteps:
    """
    Take steps as `SAETrainer.fit` does, with the output of one alive during the next.

    Args:
        trainer: its first steps, which are not timed, are taken here.
        inputs: what it is trained on.
        steps: number of timed steps.
        done: called at each of them.
        untimed: number of steps before them.
    """
    output, batch = None, torch.empty(0)

    def prepare() -> None:
        nonlocal batch
        hold_dead(trainer, inputs.dead_latents)
        batch = next(trainer.data_provider)
        done()

    def step() -> None:
        nonlocal output
        output = train_step(trainer, batch)

    for _ in range(untimed):
        output = take_step(trainer, inputs)
    fired_before = trainer.act_freq_scores.clone()
    timed = time_calls(step, trainer.cfg.device, steps, 0, prepare)
    assert output is not None
    rows = steps * trainer.cfg.train_batch_size_samples
    firing = ((trainer.act_freq_scores - fired_before) / rows).cpu()
    values = {name: value() if callable(value) else value for name, value in output.metrics.items()}
    metrics = {name: float(value) for name, value in values.items()}
    return TimedSteps(**vars(timed), firing=firing, metrics=metrics)


def count_waits(trainer: Trainer, inputs: Inputs) -> dict[str, int] | None:
    """
    Operations of one step in which the host waits for the device, by the line that asks for them;
    None on a CPU. PyTorch counts its own: no waits for events, no copies in the background.
    """
    if trainer.cfg.device != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step(trainer, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    to_package = re.compile(r"^.*/(?:site-packages|dist-packages)/|^.*/(?=saelens_sparse/)")
    return dict(Counter(f"{to_package.sub('', w.filename)}:{w.lineno}" for w in found))
