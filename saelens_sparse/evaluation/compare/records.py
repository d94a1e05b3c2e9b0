"""What is known about an arm's training steps, and the folder that it is kept in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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


def load_steps(path: Path) -> list[Step]:
    """The steps of a file; a last line cut short, by a machine that went down, is left out."""
    steps: list[Step] = []
    if not path.exists():
        return steps
    for line in path.read_text().splitlines():
        try:
            values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:
            break
        values.pop("threads", None)  # which earlier versions wrote
        steps.append(Step(**values))
    return steps
