"""How far a comparison has come, so that a rerun goes on from there or says that it cannot."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sae_lens import constants
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.choice.policy import STATE_FILENAME
from saelens_sparse.compare.options import Comparison
from saelens_sparse.compare.records import ArmFolder, load_steps
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.output_folder import has_files
from saelens_sparse.reports.whole_files import damage, write_whole

STATE_FILE = "state.json"
MARK = {"made_by": "saelens-sparse compare", "format": 1}
"""By which the command knows its own state; earlier versions wrote none."""
FIELDS = {"settings": dict, "run": str, "checkpoint_step": int, "resumed_at": list, "trained": bool}
REPORT_FILES = ("results.json", "report.html", "dictionaries.json")  # the last by earlier versions
SAELENS_FILES = {
    STATE_FILENAME,
    *(value for name, value in vars(constants).items() if name.endswith("_FILENAME")),
}
"""The names of the files of checkpoints and SAEs: SAELens's, and one of this package's."""
CHECKPOINT_NAME = re.compile(r"(final_)?\d+")
"""What SAELens names the folder of a checkpoint."""


@dataclass
class State:
    """
    What `state.json` holds, beside the results that it is about.

    Args:
        settings: Of the comparison; results of other settings are not those.
        run: Names this training, also as the group of its Weights & Biases runs.
        checkpoint_step: Steps after which both arms have a checkpoint, the latest such number.
        resumed_at: The steps at which this training was resumed.
        trained: Whether both arms are trained, saved and evaluated.
    """

    settings: dict[str, Any]
    run: str
    checkpoint_step: int = 0
    resumed_at: list[int] = field(default_factory=list[int])
    trained: bool = False

    def save(self, output: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(output / STATE_FILE, json.dumps({**MARK, **asdict(self)}, indent=2) + "\n")


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
        if (problem := damage(path, "settings")) is not None:
            raise ValueError(problem)
        state = _parse(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UsageError(f"--output: {path} {error}; name another folder") from None
    for folder in (output / "figures", *(output / name for name in state.settings["arms"])):
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
    output = comparison.output
    before = read_state(output)
    arms_before = [] if before is None else list(before.settings["arms"])
    for name in comparison.configs:
        if name not in arms_before and has_files(output / name):
            raise UsageError(
                f"--output: {output / name} is not empty, and {STATE_FILE} does not name it as "
                "made by this command; name another folder"
            )
    state, message = (None, "") if before is None else _go_on(before, comparison)
    if state is None:
        state = State(
            settings=_as_json(comparison.settings),
            run=f"compare-{comparison.name}-{uuid.uuid4().hex[:8]}",
        )
        _clear(output, arms_before)
    state.save(output)
    written = _write_configs(comparison)
    if state.trained and written:
        message += f". Written again: {', '.join(map(str, written))}"
    return state, message


def _go_on(state: State, comparison: Comparison) -> tuple[State | None, str]:
    """The state to go on from, None for a training from the beginning, and a sentence on it."""
    if state.settings != _as_json(comparison.settings):
        if not comparison.overwrite and _has_results(comparison.output, state):
            change = first_difference(state.settings, _as_json(comparison.settings))
            raise UsageError(
                f"--output: {comparison.output} holds a comparison with other settings: {change}; "
                "name another folder, or give --overwrite to discard it"
            )
        return None, ""
    steps = min(len(load_steps(folder.steps)) for folder in comparison.folders)
    if not (state.trained or state.checkpoint_step):
        saved = [folder.sae for folder in comparison.folders if folder.sae.exists()]
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
    if state.trained:
        problem = damage_of_results(comparison)
        if problem is None:
            return state, "Both arms are already trained with these settings: reporting them again"
    else:
        state.checkpoint_step, problem = _last_whole_checkpoint(comparison, state.checkpoint_step)
        if state.checkpoint_step:
            state.resumed_at.append(state.checkpoint_step)
            return state, (f"{problem}. " if problem else "") + (
                f"Resuming both arms from their checkpoints after step {state.checkpoint_step} "
                f"of the {steps} that they had taken"
            )
    if not comparison.overwrite:
        raise UsageError(
            f"--output: {problem}; restore it, name another folder, or give --overwrite to train "
            "anew"
        )
    return None, f"Starting anew: {problem}"


def damage_of_results(comparison: Comparison) -> str | None:
    """What is wrong with the results of two trained arms; None if they are whole."""
    found = (folder.damage_of_results(comparison.n_steps) for folder in comparison.folders)
    return next(filter(None, found), None)


def first_difference(before: Any, after: Any, name: str = "") -> str:
    """The first field in which two settings differ, with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                inner = f"{name}.{key}" if name else str(key)
                return first_difference(before.get(key), after.get(key), inner)
    return f"{name} is {json.dumps(before)} there and {json.dumps(after)} here"


def _parse(values: dict[str, Any]) -> State:
    """
    The state of a JSON object.

    Raises:
        ValueError: it is not of this command; the message goes after the file's name.
    """
    mark = {name: values.pop(name, MARK[name]) for name in MARK}
    if mark["made_by"] != MARK["made_by"]:
        raise ValueError("is not of this command")
    if mark["format"] != MARK["format"]:
        raise ValueError(f"is of another version of this command (format {mark['format']!r})")
    values.pop("checkpoints", None)  # which earlier versions wrote
    settings = values["settings"]
    if (
        {name: type(value) for name, value in values.items()} != FIELDS
        or settings.keys() != {"arms", "runners", "text_tokens"}
        or not isinstance(settings["arms"], dict)
        or not all(type(step) is int for step in values["resumed_at"])
    ):
        raise ValueError("is not of this command")
    for name in settings["arms"]:
        if name not in SAE_TRAINING_CLASS_REGISTRY or Path(name).name != name:
            raise ValueError(f"has the arm {name!r}, which is not an architecture")
    return State(**values)


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from a file."""
    return json.loads(json.dumps(settings))


def _has_results(output: Path, state: State) -> bool:
    """Whether there is more than the log of a training that took no step."""
    folders = [ArmFolder(output / name) for name in state.settings["arms"]]
    return bool(state.trained or state.checkpoint_step) or any(
        folder.sae.exists()
        or folder.checkpoints.exists()
        or (folder.steps.exists() and folder.steps.stat().st_size)
        for folder in folders
    )


def _last_whole_checkpoint(comparison: Comparison, latest: int) -> tuple[int, str | None]:
    """
    The steps after which both arms have a whole checkpoint, at most `latest`; 0 if there is none.

    Also says what is wrong with the latest, if anything is.
    """
    folders, batch = comparison.folders, comparison.shared["train_batch_size_tokens"]
    names = [path.name for path in folders[0].checkpoints.glob("*") if path.name.isdecimal()]
    candidates = {latest, *(int(name) // batch for name in names)}
    problem = None
    for step in sorted((step for step in candidates if 0 < step <= latest), reverse=True):
        found = next(filter(None, (_damage_at(folder, step, batch) for folder in folders)), None)
        if found is None:
            return step, problem
        problem = problem or found
    return 0, problem


def _damage_at(folder: ArmFolder, step: int, batch: int) -> str | None:
    """What keeps an arm from going on after so many steps."""
    taken = len(load_steps(folder.steps))
    if taken < step:
        return f"{folder.steps} has {taken} of the {step} steps before the checkpoint"
    return folder.damage_of_checkpoint(step * batch)


def _write_configs(comparison: Comparison) -> list[Path]:
    """Write the arms' runner configs where they are not there, and say which."""
    written: list[Path] = []
    for folder in comparison.folders:
        text = json.dumps(comparison.configs[folder.architecture], indent=2) + "\n"
        if not folder.config.is_file() or folder.config.read_bytes() != text.encode():
            write_whole(folder.config, text)
            written.append(folder.config)
    return written


def _clear(output: Path, architectures: Iterable[str]) -> None:
    """Remove what an earlier training of these arms has left, and nothing else."""
    for architecture in architectures:
        folder = ArmFolder(output / architecture)
        for path in (folder.config, *folder.made_by_training):
            _remove(path)
    for name in REPORT_FILES:
        _remove(output / name)


def _remove(path: Path) -> None:
    """Remove a file; or of a folder, and of checkpoints in it, SAELens's files. A folder that holds
    others stays.
    """
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    checkpoints = [inner for inner in path.iterdir() if CHECKPOINT_NAME.fullmatch(inner.name)]
    for folder in (*checkpoints, path):
        if folder.is_dir():
            for name in SAELENS_FILES:
                if (folder / name).is_file():
                    (folder / name).unlink()
            with suppress(OSError):  # it is not empty
                folder.rmdir()
