"""A comparison: what is trained, and the names of what it leaves in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

# In the output folder; the last of the reports was written by earlier versions.
STATE_FILE = "state.json"
REPORT_FILES = ("results.json", "report.html", "dictionaries.json")
# In the folder of each side: its runner config, what its process prints, and a `Step` a line,
CONFIG, LOG, STEPS = "config.json", "log.txt", "steps.jsonl"
# the decoder before the first step, the state after the last one, what SAELens's evals say,
INITIAL_DECODER, FINAL = "initial_decoder.safetensors", "final.safetensors"
EVALUATION = "evaluation.json"
# its whole runs as `RunRecord`s and their first rows by runner,
RUNS, RUN_SAMPLES = "runs.json", "runs.safetensors"
# and in folders the trained SAE and SAELens's checkpoints, named by their number of tokens.
SAE, CHECKPOINTS = "sae", "checkpoints"


def _architecture(name: str) -> str:
    if name not in SAE_TRAINING_CLASS_REGISTRY or Path(name).name != name:
        raise ValueError(f"{name!r} is not an architecture")
    return name


class Settings(BaseModel):
    """What must be the same for results to be those of a comparison."""

    # The runner config of each side by architecture, in the form of
    # `LanguageModelSAERunnerConfig.to_dict`; the second side is held against the first.
    arms: dict[Annotated[str, AfterValidator(_architecture)], dict[str, Any]]
    runners: dict[str, str]  # SAELens's, "stock", or "own", `SparseTrainingRunner`
    text_tokens: int | None  # how much of the embedded text to use; None is all of it


@dataclass(frozen=True)
class Comparison:
    """All that decides what is trained, and where its results go."""

    name: str  # of the config
    output: Path  # folder of the results
    settings: Settings
    embedded: bool  # whether the inputs are those that `embedded_inputs` makes
    overwrite: bool  # whether results of another comparison in `output` may go
    windows: int  # how many windows of each side's whole run are timed after its training
    notes: list[str]  # what a reader must know of how the sides' configs were made

    @property
    def folders(self) -> list[Path]:
        """Where each side keeps what it makes, named by its architecture."""
        return [self.output / architecture for architecture in self.settings.arms]

    @property
    def config(self) -> dict[str, Any]:
        """The first side's config, for what both have in common."""
        return next(iter(self.settings.arms.values()))

    @property
    def n_steps(self) -> int:
        """Training steps of each side."""
        return -(-self.config["training_tokens"] // self.config["train_batch_size_tokens"])
