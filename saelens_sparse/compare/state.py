"""How far a comparison has come, so that a rerun goes on from there or says that it cannot."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from sae_lens import constants
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.architectures.base import STATE_FILENAME
from saelens_sparse.compare.steps import load_steps
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.files import damage, has_files, write_whole
from saelens_sparse.training.checkpoints import problem_of

if TYPE_CHECKING:
    from saelens_sparse.compare.options import Comparison

STATE_FILE = "state.json"
REPORT_FILES = ("results.json", "report.html", "dictionaries.json")  # the last by earlier versions
# What each side's folder holds: its runner config, what its process prints, a `Step` a line, the
# trained SAE and SAELens's checkpoints, the decoder before the first step, what the SAE left.
CONFIG, LOG, STEPS, SAE, CHECKPOINTS = "config.json", "log.txt", "steps.jsonl", "sae", "checkpoints"
INITIAL_DECODER, FINAL, EVALUATION = (
    "initial_decoder.safetensors",
    "final.safetensors",
    "evaluation.json",
)
SAELENS_FILES = [
    STATE_FILENAME,
    *(v for k, v in vars(constants).items() if k.endswith("_FILENAME")),
]


def _architecture(name: str) -> str:
    if name not in SAE_TRAINING_CLASS_REGISTRY or Path(name).name != name:
        raise ValueError(f"{name!r} is not an architecture")
    return name


class Settings(BaseModel):
    """
    What must be the same for results to be those of a comparison.

    Args:
        arms: The runner config of each side by architecture, in the form of
            `LanguageModelSAERunnerConfig.to_dict`; the second side is held against the first.
        runners: "stock" or "own" for each: SAELens's runner or `SparseTrainingRunner`.
        text_tokens: How much of the embedded text to use; None is all of it.
    """

    arms: dict[Annotated[str, AfterValidator(_architecture)], dict[str, Any]]
    runners: dict[str, str]
    text_tokens: int | None


class State(BaseModel):
    """
    What `state.json` holds, beside the results that it is about.

    Args:
        made_by: By which the command knows its own state; early versions wrote none.
        format: Of this file.
        settings: Results of other settings are not those of the comparison.
        run: Names this training, also as the group of its Weights & Biases runs.
        checkpoint_step: The step from whose checkpoints the sides went on last; 0 if from none.
        resumed_at: The steps at which this training was resumed.
        trained: Whether both sides are trained, saved and evaluated.
    """

    model_config = ConfigDict(strict=True)

    made_by: Literal["saelens-sparse compare"] = "saelens-sparse compare"
    format: Literal[1] = 1
    settings: Settings
    run: str
    checkpoint_step: int = 0
    resumed_at: list[int] = Field(default_factory=list[int])
    trained: bool = False

    def save(self, output: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(output / STATE_FILE, self.model_dump_json(indent=2) + "\n")


def read_state(output: Path) -> State | None:
    """
    The state in a folder; None where there is none.

    Raises:
        UsageError: the state is damaged or not of this command, or a link leads out of the folder.
    """
    path = output / STATE_FILE
    if not path.exists():
        return None
    try:
        state = State.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UsageError(
            f"--output: {path} is damaged, or not of this command and version "
            f"({error.errors()[0]['msg']}); name another folder"
        ) from None
    for folder in (output / "figures", *(output / name for name in state.settings.arms)):
        for inner in (folder, *folder.rglob("*")):
            if inner.is_symlink():
                raise UsageError(f"--output: {inner} is a link; remove it, or name another folder")
    return state


def open_output(comparison: Comparison) -> tuple[State, str]:
    """
    Make the output folder ready for the comparison.

    Returns:
        The state to go on from, and a sentence for the user on what is taken from the folder; it
        is empty where nothing was there.

    Raises:
        UsageError: the folder holds results of other settings, or damaged ones.
        OSError: it cannot be written to.
    """
    before = read_state(comparison.output)
    sides_before = [] if before is None else [*before.settings.arms]
    for folder in comparison.folders:
        if folder.name not in sides_before and has_files(folder):
            raise UsageError(
                f"--output: {folder} is not empty, and {STATE_FILE} does not name it as made by "
                "this command; name another folder"
            )
    state, message = (None, "") if before is None else _go_on(before, comparison)
    if state is None:
        run = f"compare-{comparison.name}-{uuid.uuid4().hex[:8]}"
        state = State(settings=comparison.settings, run=run)
        _clear(comparison.output, sides_before)
    state.save(comparison.output)
    for folder, config in zip(comparison.folders, comparison.settings.arms.values(), strict=True):
        text = json.dumps(config, indent=2) + "\n"
        if not (folder / CONFIG).is_file() or (folder / CONFIG).read_bytes() != text.encode():
            write_whole(folder / CONFIG, text)
            message += f". Written again: {folder / CONFIG}" if state.trained else ""
    return state, message


def _go_on(state: State, comparison: Comparison) -> tuple[State | None, str]:
    """The state to go on from, None for a training from the beginning, and a sentence on it."""
    if state.settings != comparison.settings:
        if not comparison.overwrite and _has_results(comparison.output, state):
            change = first_difference(state.settings, comparison.settings)
            raise UsageError(
                f"--output: {comparison.output} holds a comparison with other settings: {change}; "
                "name another folder, or give --overwrite to discard it"
            )
        return None, ""
    steps = min(len(load_steps(folder / STEPS)) for folder in comparison.folders)
    if state.trained:
        problem = damage_of_results(comparison)
        if problem is None:
            return state, "Both sides are already trained with these settings: reporting them again"
    else:
        step, problem = _last_whole_checkpoint(comparison)
        if step:
            state.checkpoint_step = step
            state.resumed_at.append(step)
            return state, (f"{problem}. " if problem else "") + (
                f"Resuming both sides from their checkpoints after step {step} of the {steps} that "
                "they had taken"
            )
        if problem is None:
            saved = any((folder / SAE).exists() for folder in comparison.folders)
            if not comparison.overwrite and (saved or steps == comparison.n_steps):
                raise UsageError(
                    f"--output: {comparison.output} holds a training that ended after step {steps} "
                    "without a report and has no checkpoint to go on from; name another folder, or "
                    "give --overwrite to discard it"
                )
            message = (
                f"Starting anew: an earlier training ended after step {steps} without a "
                "checkpoint (n_checkpoints, or --checkpoints, makes some)"
            )
            return None, message if steps else ""
    if not comparison.overwrite:
        raise UsageError(
            f"--output: {problem}; restore it, name another folder, or give --overwrite to train "
            "anew"
        )
    return None, f"Starting anew: {problem}"


def damage_of_results(comparison: Comparison) -> str | None:
    """What is wrong with the results of two trained sides; None if they are whole."""
    for folder in comparison.folders:
        sae = [
            folder / SAE / name
            for name in (
                constants.SAE_WEIGHTS_FILENAME,
                constants.SAE_CFG_FILENAME,
                constants.SPARSITY_FILENAME,
            )
        ]
        for path in (*sae, folder / FINAL, folder / INITIAL_DECODER):
            if (problem := damage(path)) is not None:
                return problem
        if (problem := damage(folder / EVALUATION, "skipped")) is not None:
            return problem
        if (taken := len(load_steps(folder / STEPS))) != comparison.n_steps:
            return f"{folder / STEPS} has {taken} of the {comparison.n_steps} steps"
    return None


def first_difference(before: Settings, after: Settings) -> str:
    """The first field in which two settings differ, with both values."""
    flat = [pd.json_normalize(settings.model_dump()).iloc[0] for settings in (before, after)]
    there, here = (fields.to_dict() for fields in flat)
    name = next(name for name in {**there, **here} if there.get(name) != here.get(name))
    return f"{name} is {json.dumps(there.get(name))} there and {json.dumps(here.get(name))} here"


def _has_results(output: Path, state: State) -> bool:
    """Whether there is more than the log of a training that took no step."""
    folders = [output / name for name in state.settings.arms]
    return bool(state.trained or state.checkpoint_step) or any(
        (folder / SAE).exists()
        or (folder / CHECKPOINTS).exists()
        or ((folder / STEPS).exists() and (folder / STEPS).stat().st_size)
        for folder in folders
    )


def _last_whole_checkpoint(comparison: Comparison) -> tuple[int, str | None]:
    """
    The last step after which both sides have a whole checkpoint; 0 if there is none.

    Also says what is wrong with the latest, if anything is.
    """
    batch = comparison.config["train_batch_size_tokens"]
    found = [path for folder in comparison.folders for path in (folder / CHECKPOINTS).glob("*")]
    steps = {int(path.name) // batch for path in found if path.name.isdecimal()}
    first_problem = None
    for step in sorted(steps, reverse=True):
        problem = _damage_at(comparison.folders, step, batch)
        if problem is None:
            return step, first_problem
        first_problem = first_problem or problem
    return 0, first_problem


def _damage_at(folders: Sequence[Path], step: int, batch: int) -> str | None:
    """What keeps the sides from going on after so many steps."""
    for folder in folders:
        if (taken := len(load_steps(folder / STEPS))) < step:
            return f"{folder / STEPS} has {taken} of the {step} steps before the checkpoint"
        checkpoint = folder / CHECKPOINTS / str(step * batch)
        if (problem := problem_of(checkpoint)) is not None:
            return f"{checkpoint}{os.sep}{problem}"  # it begins with the file's name
    return None


def _clear(output: Path, architectures: Iterable[str]) -> None:
    """Remove what an earlier training of these sides has left, and nothing else."""
    made = [output / name for name in REPORT_FILES]
    folders: list[Path] = []
    for side in (output / name for name in architectures):
        checkpoints = [
            path
            for path in (side / CHECKPOINTS).glob("*")
            if re.fullmatch(r"(final_)?\d+", path.name) and path.is_dir()
        ]
        folders += [side / SAE, *checkpoints, side / CHECKPOINTS]
        made += [side / n for n in (CONFIG, LOG, STEPS, INITIAL_DECODER, FINAL, EVALUATION)]
    made += [folder / name for folder in folders for name in SAELENS_FILES]
    for path in made:
        path.unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # it is not there, or not empty
            folder.rmdir()
