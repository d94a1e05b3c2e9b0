"""
Times training steps of the checkout that is imported, as its parent process asks (see `pair.py`).

    PYTHONPATH=CHECKOUT python benchmarks/timed_steps.py CHECKOUT INPUTS sparse|stock

It uses only what every version of the package has, and nothing of the package for its inputs.
INPUTS is a file of `torch.save` that holds the fields of `Request`; the last argument names the
runner whose steps are timed. The losses of its first steps are the first line of the standard
output. Each line of the standard input is then a number of steps, answered by their milliseconds,
or "implementation", answered by its name. Answers are JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import saelens_sparse
from saelens_sparse.training import SparseSAETrainer

FIRST_STEPS = 8
"""In these kernels are compiled, a JumpReLU measures its density and a CUDA graph is recorded."""
UNTIMED_STEPS = 2


class Request(TypedDict):
    """What to train; tensors are on the CPU, and latents with indices `dead_latents` held dead."""

    sae: dict[str, Any]
    trainer: dict[str, Any]
    batches: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    dead_latents: torch.Tensor | None


def build(request: Request, runner: str) -> Any:
    """SAELens's trainer, or the package's, with the request's weights."""
    sae = TrainingSAE.from_dict(request["sae"])
    device = request["sae"]["device"]
    sae.load_state_dict({name: value.to(device) for name, value in request["weights"].items()})
    cfg = SAETrainerConfig(**request["trainer"], logger=LoggingConfig(log_to_wandb=False))
    batches = [batch.to(device) for batch in request["batches"]]
    trainer: Any = SAETrainer(cfg, sae, itertools.cycle(batches))
    return SparseSAETrainer.taking_over(trainer) if runner == "sparse" else trainer


def step(trainer: Any, dead_latents: torch.Tensor | None) -> torch.Tensor:
    """One step as `SAETrainer.fit` takes it; gives its loss."""
    if dead_latents is not None:
        window = trainer.cfg.dead_feature_window
        trainer.n_forward_passes_since_fired[dead_latents] = window + 1
    loss = trainer.step(next(trainer.data_provider)).loss.detach()
    trainer.n_training_steps += 1
    return loss


def time_steps(trainer: Any, dead_latents: torch.Tensor | None, steps: int) -> list[float]:
    """Milliseconds of each of `steps` steps, by the device's clock."""
    for _ in range(UNTIMED_STEPS):
        step(trainer, dead_latents)
    if trainer.cfg.device == "cpu":
        marks = [time.perf_counter()]
        for _ in range(steps):
            step(trainer, dead_latents)
            marks.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step(trainer, dead_latents)
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def main(checkout: Path, inputs: Path, runner: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    if not Path(saelens_sparse.__file__).is_relative_to(checkout):
        raise RuntimeError(f"{checkout} is not what was imported: {saelens_sparse.__file__}")
    request: Request = torch.load(inputs, weights_only=True)
    trainer = build(request, runner)
    dead_latents = request["dead_latents"]
    if dead_latents is not None:
        dead_latents = dead_latents.to(trainer.cfg.device)
    first = {"losses": [step(trainer, dead_latents).item() for _ in range(FIRST_STEPS)]}
    print(json.dumps(first), file=answers, flush=True)
    for line in sys.stdin:
        if line == "implementation\n":
            with trainer.autocast_if_enabled:
                answer: Any = trainer.sae.implementation.name
        else:
            answer = time_steps(trainer, dead_latents, int(line))
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
