"""Training steps as a profile takes them: traced, and watched for waits of the host."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from saelens_sparse.profile.cases import Arm
from saelens_sparse.profile.ranges import named_parts, named_step
from saelens_sparse.profile.settings import Settings
from saelens_sparse.profile.trainers import Inputs, Trainer, build_trainer, take_step

# In these, kernels are compiled, a JumpReLU finds out how many latents are active, and a CUDA
# graph is recorded.
FIRST_STEPS = 8
TRACED_STEPS = {"cuda": 5, "cpu": 2}
SYNC_WARNING = "called a synchronizing CUDA operation"


def prepared_trainer(arm: Arm, settings: Settings, inputs: Inputs) -> Trainer:
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
