"""Recording training steps with PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from saelens_sparse.ops.common.ranges import PREFIX
from saelens_sparse.profile.trace import PHASES, StepTrace
from saelens_sparse.profile.trainers import Inputs, Trainer, implementation_of, take_step

# What SAELens's forward pass calls, and the phase that begins there.
_BEGINS = {
    "hook_sae_input": "encode",
    "hook_sae_acts_pre": "search",
    "hook_sae_acts_post": "decode",
    "hook_sae_recons": None,
}


def record_steps(trainer: Trainer, inputs: Inputs, path: Path, steps: int) -> StepTrace:
    """
    Record steps of a warm trainer, after one that pays for the profiler's start, in `path`, a
    `.json.gz`. None is a CUDA graph: its kernels are the same, but lie in no range.
    """
    activities = {ProfilerActivity.CPU}
    if trainer.cfg.device == "cuda":
        activities.add(ProfilerActivity.CUDA)
    with (
        _marked_phases(trainer),
        profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=steps, repeat=1),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
            record_shapes=True,
            profile_memory=True,
        ) as profiler,
    ):
        output = None  # that of one step is alive during the next, as in training
        for _ in range(1 + steps):
            output = take_step(trainer, inputs)
            profiler.step()
        del output
    return StepTrace.load(path)


def phase_ms(trainer: Trainer, inputs: Inputs, steps: int = 5) -> dict[str, float]:
    """Milliseconds of a step's kernels, on a CPU of its operations, by phase."""
    with TemporaryDirectory() as folder:
        found = record_steps(trainer, inputs, Path(folder, "trace.json.gz"), steps).ms_by("phase")
    return {phase: found.get(phase, 0.0) for phase in PHASES}


@contextmanager
def _marked_phases(trainer: Trainer) -> Generator[None]:
    """Ranges of the forward pass: a sparse SAE sets its own, one that is dense gets hooks."""
    sae: Any = trainer.sae
    is_dense = implementation_of(sae, trainer.autocast_if_enabled) in (None, "dense")
    graphs = getattr(sae.cfg, "cuda_graph", False)
    inside: list[record_function] = []

    def begin(phase: str | None, *_: Any) -> None:
        if inside:
            inside.pop().__exit__(None, None, None)
        if phase is not None:
            inside.append(record_function(PREFIX + phase))
            inside[0].__enter__()

    # Hooks after these points would make sparse activations dense.
    hooks = [
        getattr(sae, point).register_forward_pre_hook(partial(begin, phase))
        for point, phase in (_BEGINS.items() if is_dense else ())
    ]
    try:
        if graphs:
            sae.cfg.cuda_graph = False
        yield
    finally:
        begin(None)
        for hook in hooks:
            hook.remove()
        if graphs:
            sae.cfg.cuda_graph = True
