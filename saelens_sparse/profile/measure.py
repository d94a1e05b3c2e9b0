"""Time, memory and phases of a training step, taken at SAELens's and PyTorch's public seams."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.profile.trainers import (
    Inputs,
    Trainer,
    hold_dead,
    implementation_of,
    train_step,
)
from saelens_sparse.training.graphs import gains
from saelens_sparse.training.trainer import SparseSAETrainer

UNTIMED_STEPS = 3
PHASE_STEPS = 5
PHASES = ("forward", "statistics", "backward", "clip", "optimizer")
GIB = 2**30

Mark = Any


class Stopwatch:
    """Marks points in a device's work and tells the milliseconds between them."""

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


class PeakMemory:
    """Bytes allocated on the GPU when it is made, and the most since; None on a CPU."""

    def __init__(self, device: str):
        self.before_bytes: int | None = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before_bytes = torch.cuda.memory_allocated()

    @property
    def peak_bytes(self) -> int | None:
        return None if self.before_bytes is None else torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Timed:
    """
    Steps or calls, timed.

    Attributes:
        ms: milliseconds of each.
        peak_bytes: most that was allocated during them; None on a CPU.
        before_bytes: allocated before them; None on a CPU.
    """

    ms: list[float]
    peak_bytes: int | None
    before_bytes: int | None

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


@dataclass(frozen=True)
class TimedSteps(Timed):
    """
    Training steps, timed.

    Attributes:
        firing: `[d_sae]`, share of the rows on which each latent fired, on the CPU.
        metrics: of the last step, by SAELens's names.
    """

    firing: torch.Tensor
    metrics: dict[str, float]


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
        done: called after each.
        untimed: number of steps before them.
    """
    watch = Stopwatch(trainer.cfg.device)
    output = None
    for _ in range(untimed):
        _, _, output = _timed_step(trainer, inputs, watch)
    memory = PeakMemory(trainer.cfg.device)
    fired_before = trainer.act_freq_scores.clone()
    marks: list[tuple[Mark, Mark]] = []
    for _ in range(steps):
        start, end, output = _timed_step(trainer, inputs, watch)
        marks.append((start, end))
        done()
    assert output is not None
    timed = _timed(watch, marks, memory)
    rows = steps * trainer.cfg.train_batch_size_samples
    return TimedSteps(
        **vars(timed),
        firing=((trainer.act_freq_scores - fired_before) / rows).cpu(),
        metrics={name: _as_float(value) for name, value in output.metrics.items()},
    )


def measure_steps(trainer: Trainer, inputs: Inputs, steps: int) -> dict[str, Any]:
    """Time whole steps, then the phases of other steps, and say how latents fired."""
    timed = time_steps(trainer, inputs, steps)
    row, firing = timed.to_row(), timed.firing
    return {
        "implementation": implementation_of(trainer.sae, trainer.autocast_if_enabled),
        **row,
        "tokens_per_second": 1e3 * trainer.cfg.train_batch_size_samples / row["ms"],
        "metrics": timed.metrics,
        "firing": {
            "l0": firing.sum().item(),
            "max_fraction": firing.max().item(),
            "never": (firing == 0).float().mean().item(),
        },
        "phases_ms": measure_phases(trainer, inputs),
    }


def measure_phases(trainer: Trainer, inputs: Inputs) -> dict[str, float]:
    """
    Median milliseconds by phase; the phases follow each other without gaps.

    "forward" ends where the forward pass returns, "statistics" where the gradient reaches the
    loss, "backward" at the last accumulated gradient, "clip" where the optimizer's step begins;
    "optimizer" lasts until the trainer's step returns. `SparseSAETrainer` takes its statistics
    after the backward pass and clips in the optimizer; where passes are one CUDA graph, they are
    "backward", and all else is "optimizer".
    """
    watch = Stopwatch(trainer.cfg.device)
    ends: dict[str, Mark] = {}

    def end_phase(name: str) -> None:
        ends[name] = watch.mark()

    wrapped = _wrap_own(trainer, end_phase) or _wrap_stock(trainer, end_phase)
    times: dict[str, list[float]] = defaultdict(list)
    try:
        for _ in range(PHASE_STEPS):
            ends.clear()
            start, ends["optimizer"], _ = _timed_step(trainer, inputs, watch)
            for phase in [phase for phase in wrapped.phases if phase in ends]:
                times[phase].append(watch.milliseconds(start, ends[phase]))
                start = ends[phase]
    finally:
        wrapped.undo()
    return {phase: median(times[phase]) if times[phase] else 0.0 for phase in PHASES}


@dataclass(frozen=True)
class _Wrapped:
    """Phases in the order in which they end, and how to take the marks away again."""

    phases: Sequence[str]
    undo: Callable[[], None]


def _wrap_stock(trainer: Trainer, end_phase: Callable[[str], None]) -> _Wrapped:
    sae = trainer.sae
    forward = sae.training_forward_pass

    def marked_forward(step_input: TrainStepInput) -> TrainStepOutput:
        output = forward(step_input=step_input)
        end_phase("forward")
        output.loss.register_hook(lambda _: end_phase("statistics"))
        return output

    restore = _replace_attribute(sae, "training_forward_pass", marked_forward)
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _: end_phase("backward"))
        for parameter in sae.parameters()
    ]
    hooks.append(trainer.optimizer.register_step_pre_hook(lambda *_: end_phase("clip")))

    def undo() -> None:
        restore()
        for hook in hooks:
            hook.remove()

    return _Wrapped(PHASES, undo)


def _wrap_own(trainer: Trainer, end_phase: Callable[[str], None]) -> _Wrapped | None:
    """None for a trainer that is not the package's own, or trains an SAE as stock does.

    No hook is on a parameter, for which the trainer would hold gradients in buffers, and none on
    the forward pass of an SAE whose passes are a graph, which would end that.
    """
    sae = trainer.sae
    if not isinstance(trainer, SparseSAETrainer) or not isinstance(sae, SparseTrainingSAEMixin):
        return None
    passes = trainer.forward_and_backward

    def marked_passes(*args: Any) -> Any:
        result = passes(*args)
        end_phase("backward")
        return result

    restore = [_replace_attribute(trainer, "forward_and_backward", marked_passes)]
    if not gains(sae):
        forward = sae.start_training_forward_pass

        def marked_forward(step_input: TrainStepInput) -> Any:
            result = forward(step_input)
            end_phase("forward")
            return result

        restore.append(_replace_attribute(sae, "start_training_forward_pass", marked_forward))
        hook = trainer.optimizer.register_step_pre_hook(lambda *_: end_phase("clip"))
        restore.append(hook.remove)

    def undo() -> None:
        for part in restore:
            part()

    return _Wrapped(("forward", "backward", "clip", "optimizer"), undo)


def _replace_attribute(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of an object; returns what puts the old one back."""
    was_own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old) if was_own else delattr(owner, name)


def measure_calls(call: Callable[[], object], device: str, repeats: int) -> dict[str, Any]:
    """Time and memory of a call that leaves nothing behind, as rows have them."""
    watch = Stopwatch(device)
    for _ in range(UNTIMED_STEPS):
        call()
    memory = PeakMemory(device)
    marks: list[tuple[Mark, Mark]] = []
    for _ in range(repeats):
        start = watch.mark()
        call()
        marks.append((start, watch.mark()))
    return _timed(watch, marks, memory).to_row()


def _timed_step(
    trainer: Trainer, inputs: Inputs, watch: Stopwatch
) -> tuple[Mark, Mark, TrainStepOutput]:
    hold_dead(trainer, inputs.dead_latents)
    batch = next(trainer.data_provider)
    start = watch.mark()
    output = train_step(trainer, batch)
    return start, watch.mark(), output


def _timed(watch: Stopwatch, marks: Sequence[tuple[Mark, Mark]], memory: PeakMemory) -> Timed:
    ms = [watch.milliseconds(start, end) for start, end in marks]
    return Timed(ms, memory.peak_bytes, memory.before_bytes)


def _as_float(value: Any) -> float:
    value = value() if callable(value) else value
    return float(value)
