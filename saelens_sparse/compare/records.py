"""What is known about an arm's training steps, and the folder that it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)

from saelens_sparse.reports.whole_files import damage

# The terms of SAELens's losses that the report speaks of; an architecture may have others.
MSE = "mse_loss"
AUX_LOSS = "auxiliary_reconstruction_loss"


@dataclass(frozen=True)
class Step:
    """
    One training step of one arm.

    Args:
        step: Counted from 1, as in SAELens's checkpoints.
        seconds: Of the SAE's step: forward, loss, statistics, backward, clipping, optimizer.
        data_seconds: Spent waiting for this step's batch (and, in the first one, for those that
            activations are normalized by): language model, activation store, or cache.
        loss: The sum of the terms.
        losses: The terms by SAELens's names, coefficients included.
        l0: Mean number of active latents per token.
        implementation: Of a sparse SAE: what its step ran on.
        added_memory_bytes: Most that any step so far held above what was held before the first.
        peak_memory_bytes: Most that any step so far held: language model and buffers included.
        batch_crc32: Checksum of the batch.
    """

    step: int
    seconds: float
    data_seconds: float
    loss: float
    losses: dict[str, float]
    explained_variance: float
    l0: float
    dead_latents: int
    implementation: str | None
    added_memory_bytes: int | None
    peak_memory_bytes: int | None
    batch_crc32: int

    @property
    def mse(self) -> float:
        """Squared error per token."""
        return self.losses[MSE]

    def to_json(self) -> str:
        """One line of `steps.jsonl`."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> Step:
        """
        The step of a line.

        Raises:
            ValueError: the line is no step.
        """
        try:
            values = json.loads(line)
            values.pop("threads", None)  # which earlier versions wrote
            step = Step(**values)
            losses = values.pop("losses")
            del values["implementation"]
            numbers = [losses[MSE], *losses.values()]
            numbers += (v for name, v in values.items() if v is not None or "bytes" not in name)
            if all(isinstance(value, int | float) for value in numbers):
                return step
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            pass
        raise ValueError(f"not a step: {line[:80]!r}")


@dataclass(frozen=True)
class ArmFolder:
    """Where an arm keeps what it makes; its name is the architecture's."""

    path: Path

    @property
    def architecture(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        """The runner config: with it `saelens-sparse train --config` trains this arm alone."""
        return self.path / "config.json"

    @property
    def log(self) -> Path:
        """Whatever the training process and its libraries print."""
        return self.path / "log.txt"

    @property
    def steps(self) -> Path:
        """A `Step` a line."""
        return self.path / "steps.jsonl"

    @property
    def sae(self) -> Path:
        """The trained SAE, as SAELens saves it."""
        return self.path / "sae"

    @property
    def checkpoints(self) -> Path:
        """SAELens's checkpoints, each in a folder named by the number of tokens."""
        return self.path / "checkpoints"

    def checkpoint(self, n_samples: int) -> Path:
        """The checkpoint after so many tokens."""
        return self.checkpoints / str(n_samples)

    @property
    def initial_decoder(self) -> Path:
        """The decoder before the first step, `[d_sae, d_in]` in float16."""
        return self.path / "initial_decoder.safetensors"

    @property
    def latents(self) -> Path:
        """Which latents fired of late, `[d_sae]`, and some activations `[rows, d_in]`."""
        return self.path / "final.safetensors"

    @property
    def evaluation(self) -> Path:
        """What SAELens's evals say about the trained SAE."""
        return self.path / "evaluation.json"

    @property
    def made_by_training(self) -> tuple[Path, ...]:
        """Everything but the config."""
        return (
            self.log,
            self.steps,
            self.sae,
            self.checkpoints,
            self.initial_decoder,
            self.latents,
            self.evaluation,
        )

    def damage_of_results(self, n_steps: int) -> str | None:
        """What is wrong with the results of a finished training; None if all are whole."""
        needed = {
            self.sae / SAE_WEIGHTS_FILENAME: (),
            self.sae / SAE_CFG_FILENAME: ("architecture",),
            self.sae / SPARSITY_FILENAME: ("sparsity",),
            self.latents: ("alive", "activations"),
            self.evaluation: ("skipped",),
        }
        if damage(self.sae / SAE_WEIGHTS_FILENAME, "W_dec") is None:
            needed[self.initial_decoder] = ("W_dec",)
        if (problem := _first_damage(needed)) is not None:
            return problem
        taken = len(load_steps(self.steps))
        return None if taken == n_steps else f"{self.steps} has {taken} of the {n_steps} steps"

    def damage_of_checkpoint(self, n_samples: int) -> str | None:
        """What keeps a training from going on from a checkpoint; None if nothing does."""
        checkpoint = self.checkpoint(n_samples)
        return _first_damage(
            {
                checkpoint / SAE_WEIGHTS_FILENAME: (),
                checkpoint / TRAINER_STATE_FILENAME: (),
                checkpoint / ACTIVATIONS_STORE_STATE_FILENAME: (),
                checkpoint / ACTIVATION_SCALER_CFG_FILENAME: ("scaling_factor",),
            }
        )


def load_steps(path: Path) -> list[Step]:
    """
    The steps of a file, up to the first line that is not the next step.

    A machine that goes down cuts the last line short.
    """
    steps: list[Step] = []
    if not path.is_file():
        return steps
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            step = Step.from_json(line)
        except ValueError:
            break
        if step.step != len(steps) + 1:
            break
        steps.append(step)
    return steps


def _first_damage(needed: Mapping[Path, tuple[str, ...]]) -> str | None:
    problems = ((path, damage(path, *names)) for path, names in needed.items())
    return next((f"{path} {problem}" for path, problem in problems if problem), None)
