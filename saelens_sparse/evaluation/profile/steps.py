"""Training steps as they are measured: timed, traced, and watched for waits of the host."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch.profiler import ProfilerActivity, profile

from saelens_sparse.evaluation.measure import Mark, PeakMemory, Stopwatch
from saelens_sparse.evaluation.profile.ranges import named_parts, named_step
from saelens_sparse.evaluation.profile.settings import Settings
from saelens_sparse.evaluation.training import (
    Inputs,
    Trainer,
    build_trainer,
    hold_dead,
    train_step,
)

# In these, kernels are compiled, a JumpReLU finds out how many latents are active, and a CUDA
# graph is recorded.
UNTIMED_STEPS = 8
TRACED_STEPS = {"cuda": 5, "cpu": 2}
SYNC_WARNING = "called a synchronizing CUDA operation"


@dataclass(frozen=True)
class Timed:
    """
    Attributes:
        ms: milliseconds of each step.
        peak_bytes: most that was allocated during them; None on a CPU.
        before_bytes: allocated before them; None on a CPU.
        firing: `[d_sae]`, share of the rows on which each latent fired, on the CPU.
    """

    ms: list[float]
    peak_bytes: float | None
    before_bytes: float | None
    firing: torch.Tensor

    @property
    def median_ms(self) -> float:
        """The median step."""
        return median(self.ms)


def prepared_trainer(arm: Any, settings: Settings, inputs: Inputs) -> Trainer:
    """The arm's trainer with the trained-like weights."""
    case = settings.case
    return build_trainer(
        arm,
        case,
        settings.precision,
        settings.device,
        inputs.batches,
        inputs.weights,
        case.learning_rate,
    )


def take_step(trainer: Trainer, inputs: Inputs) -> TrainStepOutput:
    """One step on the next batch, with the case's dead latents held dead."""
    hold_dead(trainer, inputs.dead_latents)
    return train_step(trainer, next(trainer.data_provider))


def time_steps(trainer: Trainer, inputs: Inputs, steps: int, done: Callable[[], object]) -> Timed:
    """
    Take steps as in a training, one after the other with the output of one alive during the next.

    Args:
        trainer: its first steps, which are not timed, are taken here.
        inputs: what it is trained on.
        steps: number of timed steps.
        done: called after each.
    """
    watch = Stopwatch(trainer.cfg.device)
    output = None
    for _ in range(UNTIMED_STEPS):
        output = take_step(trainer, inputs)
    memory = PeakMemory(trainer.cfg.device)
    fired_before = trainer.act_freq_scores.clone()
    marks: list[tuple[Mark, Mark]] = []
    for _ in range(steps):
        hold_dead(trainer, inputs.dead_latents)
        batch = next(trainer.data_provider)
        start = watch.mark()
        output = train_step(trainer, batch)
        marks.append((start, watch.mark()))
        done()
    ms = [watch.milliseconds(start, end) for start, end in marks]
    del output
    rows = steps * trainer.cfg.train_batch_size_samples
    gib = 2.0**30
    return Timed(
        ms,
        None if memory.peak_gib is None else gib * memory.peak_gib,
        None if memory.before_gib is None else gib * memory.before_gib,
        ((trainer.act_freq_scores - fired_before) / rows).cpu(),
    )


def trace_steps(
    trainer: Trainer, inputs: Inputs, path: Path, *, with_memory: bool
) -> dict[str, int]:
    """
    Record steps with PyTorch's profiler.

    Args:
        trainer: warm already.
        inputs: what it is trained on.
        path: where the trace goes, `.json` or `.json.gz`.
        with_memory: whether allocations are recorded too, of one step: that takes time itself.

    Returns:
        With memory, addresses of the gradients when the optimizer's step began, by parameter.
    """
    device = trainer.cfg.device
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    gradients: dict[str, int] = {}

    def note_gradients(*_: Any) -> None:
        for name, parameter in trainer.sae.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.untyped_storage().data_ptr()

    hook = trainer.optimizer.register_step_pre_hook(note_gradients) if with_memory else None
    output = take_step(trainer, inputs)
    _synchronize(device)
    try:
        with (
            named_parts(trainer),
            profile(
                activities=activities, record_shapes=True, profile_memory=with_memory
            ) as profiler,
        ):
            # The first step under the profiler pays for its start.
            for index in range(1 if with_memory else 1 + TRACED_STEPS[device]):
                if index == 0 and not with_memory:
                    output = take_step(trainer, inputs)
                    continue
                with named_step():
                    output = take_step(trainer, inputs)
            _synchronize(device)
    finally:
        if hook is not None:
            hook.remove()
    del output
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    return gradients


def count_waits(trainer: Trainer, inputs: Inputs) -> dict[str, int] | None:
    """
    Operations of one step in which the host waits for the device, by the line that asks for them;
    None on a CPU.

    PyTorch counts those of its own operations. Waiting for an event, or a copy in the background,
    is not among them.
    """
    if trainer.cfg.device != "cuda":
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            output = take_step(trainer, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    del output
    lines = [
        f"{_short_path(warning.filename)}:{warning.lineno}"
        for warning in caught
        if SYNC_WARNING in str(warning.message)
    ]
    return dict(Counter(lines))


def _short_path(path: str) -> str:
    """A file's path from its package on."""
    return re.sub(r"^.*/(?:site-packages|dist-packages)/|^.*/(?=saelens_sparse/)", "", path)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
