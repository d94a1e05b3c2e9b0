"""How far a comparison has come, so that a rerun goes on from there or says that it cannot."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sae_lens import constants

from saelens_sparse.choice.policy import STATE_FILENAME
from saelens_sparse.compare.comparison import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    FINAL,
    INITIAL_DECODER,
    LOG,
    REPORT_FILES,
    SAE,
    STATE_FILE,
    STEPS,
    Comparison,
    Settings,
)
from saelens_sparse.compare.steps import load_steps
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.files import damage, has_files
from saelens_sparse.training.checkpoints import problem_of
from saelens_sparse.whole_files import write_whole

OF_SAE = [getattr(constants, f"{name}_FILENAME") for name in ("SAE_WEIGHTS", "SAE_CFG", "SPARSITY")]
OF_SAELENS = [STATE_FILENAME, *(v for k, v in vars(constants).items() if k.endswith("_FILENAME"))]


class State(BaseModel):
    """What `state.json` holds, beside the results that it is about."""

    model_config = ConfigDict(strict=True)

    # By these the command knows its own state; early versions wrote neither.
    made_by: Literal["saelens-sparse compare"] = "saelens-sparse compare"
    format: Literal[1] = 1
    settings: Settings
    run: str  # names this training, also as the group of its Weights & Biases runs
    checkpoint_step: int = 0  # from whose checkpoints the sides went on last; 0 if from none
    resumed_at: list[int] = Field(default_factory=list[int])  # steps
    trained: bool = False  # and saved, and evaluated: both sides

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
        what = "is damaged, or not of this command and version"
        message = f"{path} {what} ({error.errors()[0]['msg']}); name another folder"
        raise UsageError(f"--output: {message}") from None
    for folder in (output / "figures", *(output / name for name in state.settings.arms)):
        for inner in (folder, *folder.rglob("*")):
            if inner.is_symlink():
                raise UsageError(f"--output: {inner} is a link; remove it, or name another folder")
    return state


def open_output(comparison: Comparison) -> tuple[State, str]:
    """
    Make the output folder ready; returns the state to go on from, and what to tell the user of it.

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
    for folder in comparison.folders:
        path = folder / CONFIG
        text = json.dumps(comparison.settings.arms[folder.name], indent=2) + "\n"
        if not path.is_file() or path.read_bytes() != text.encode():
            write_whole(path, text)
            message += f". Written again: {path}" if state.trained else ""
    return state, message


def _go_on(state: State, comparison: Comparison) -> tuple[State | None, str]:
    """The state to go on from, None for a training from the beginning, and a sentence on it."""
    folders, n_steps = comparison.folders, comparison.n_steps
    taken = min(len(load_steps(folder / STEPS)) for folder in folders)
    problem, message = None, ""
    if state.settings != comparison.settings:
        if _has_results(comparison.output, state):
            there, here = state.settings.model_dump(), comparison.settings.model_dump()
            change = first_difference(there, here)
            problem = f"{comparison.output} holds a comparison with other settings: {change}"
    elif state.trained:
        problem = damage_of_results(comparison)
        if problem is None:
            return state, "Both sides are already trained with these settings: reporting them again"
    else:
        step, problem = _last_whole_checkpoint(comparison)
        if step:
            state.checkpoint_step = step
            state.resumed_at.append(step)
            return state, (f"{problem}. " if problem else "") + (
                f"Resuming both sides from their checkpoints after step {step} of the {taken} that "
                "they had taken"
            )
        ended = f"an earlier training ended after step {taken} without a checkpoint"
        if problem is None and (taken == n_steps or any((f / SAE).exists() for f in folders)):
            problem = f"{comparison.output}: {ended} or a report"
        elif taken:
            message = f"Starting anew: {ended} (n_checkpoints, or --checkpoints, makes some)"
    if problem and not comparison.overwrite:
        way_out = "restore it, name another folder, or give --overwrite to train anew"
        raise UsageError(f"--output: {problem}; {way_out}")
    return None, f"Starting anew: {problem}" if problem else message


def damage_of_results(comparison: Comparison) -> str | None:
    """What is wrong with the results of two trained sides; None if they are whole."""
    for folder in comparison.folders:
        files = [folder / SAE / name for name in OF_SAE]
        files += [folder / FINAL, folder / INITIAL_DECODER]
        problem = next(filter(None, map(damage, files)), damage(folder / EVALUATION, "skipped"))
        taken = len(load_steps(folder / STEPS))
        if problem is None and taken != comparison.n_steps:
            problem = f"{folder / STEPS} has {taken} of the {comparison.n_steps} steps"
        if problem is not None:
            return problem
    return None


def first_difference(before: Any, after: Any, name: str = "") -> str:
    """The first field in which two settings differ, with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        changed = (k for k in {**before, **after} if before.get(k) != after.get(k))
        if (key := next(changed, None)) is not None:
            return first_difference(before.get(key), after.get(key), f"{name}.{key}".lstrip("."))
    return f"{name} is {json.dumps(before)} there and {json.dumps(after)} here"


def _has_results(output: Path, state: State) -> bool:
    """Whether there is more than the log of a training that took no step."""
    paths = [
        output / side / name for side in state.settings.arms for name in (SAE, CHECKPOINTS, STEPS)
    ]
    left = any(path.exists() and path.stat().st_size for path in paths)
    return left or bool(state.trained or state.checkpoint_step)


def _last_whole_checkpoint(comparison: Comparison) -> tuple[int, str | None]:
    """The last step of which both sides have one, else 0; and what is wrong with the latest."""
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
        named = [p for p in (side / CHECKPOINTS).glob("*") if re.fullmatch(r"(final_)?\d+", p.name)]
        folders += [side / SAE, *filter(Path.is_dir, named), side / CHECKPOINTS]
        made += [side / n for n in (CONFIG, LOG, STEPS, INITIAL_DECODER, FINAL, EVALUATION)]
    for path in (*made, *(folder / name for folder in folders for name in OF_SAELENS)):
        path.unlink(missing_ok=True)
    for folder in folders:
        with suppress(OSError):  # it is not there, or not empty
            folder.rmdir()
