"""How far a comparison has come, so that a rerun goes on from there or says that it cannot."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saelens_sparse.evaluation.compare.options import Comparison
from saelens_sparse.evaluation.compare.records import ArmFolder, load_steps
from saelens_sparse.evaluation.results import write_whole
from saelens_sparse.runner_config import UsageError

STATE_FILE = "state.json"


@dataclass
class State:
    """
    What `state.json` holds, beside the results that it is about.

    Args:
        settings: Of the comparison; results of other settings are not those.
        run: Names this training, also as the group of its Weights & Biases runs.
        checkpoint_step: Steps after which both arms have a checkpoint, the latest such number.
        checkpoints: The checkpoint of each arm after so many steps, by architecture.
        resumed_at: The steps at which this training was resumed.
        trained: Whether both arms are trained, saved and evaluated.
    """

    settings: dict[str, Any]
    run: str
    checkpoint_step: int = 0
    checkpoints: dict[str, str] = field(default_factory=dict[str, str])
    resumed_at: list[int] = field(default_factory=list[int])
    trained: bool = False

    def save(self, output: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(output / STATE_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def record_checkpoint(self, step: int, architectures: Sequence[str], paths: list[str]) -> None:
        """Both arms have a checkpoint after `step` steps."""
        self.checkpoint_step = step
        self.checkpoints = dict(zip(architectures, paths, strict=True))


def open_output(comparison: Comparison) -> tuple[State, str]:
    """
    Make the output folder ready for the comparison.

    Returns:
        The state to go on from, and a sentence for the user on what is taken from the folder; it
        is empty where nothing was there.

    Raises:
        UsageError: the folder holds results of other settings.
    """
    state = _load(comparison.output)
    arms_before = [] if state is None else list(state.settings["arms"])
    steps = min(len(load_steps(folder.steps)) for folder in comparison.folders)
    message = ""
    if state is not None and state.settings != _as_json(comparison.settings):
        if not comparison.overwrite and _has_results(comparison.output, state):
            change = first_difference(state.settings, _as_json(comparison.settings))
            raise UsageError(
                f"--output: {comparison.output} holds a comparison with other settings: {change}; "
                "name another folder, or give --overwrite to discard it"
            )
        state = None
    elif state is not None and state.trained:
        return state, "Both arms are already trained with these settings: reporting them again"
    elif state is not None and state.checkpoint_step and _all_exist(state.checkpoints):
        state.resumed_at.append(state.checkpoint_step)
        message = (
            f"Resuming both arms from their checkpoints after step {state.checkpoint_step} "
            f"of the {steps} that they had taken"
        )
    elif state is not None:
        if steps:
            message = (
                f"Starting anew: an earlier training ended after step {steps} without a "
                "checkpoint (n_checkpoints, or --checkpoints, makes some)"
            )
        state = None
    if state is None:
        state = State(
            settings=_as_json(comparison.settings),
            run=f"compare-{comparison.name}-{uuid.uuid4().hex[:8]}",
        )
        _clear(comparison.output, {*comparison.configs, *arms_before})
    for folder in comparison.folders:
        folder.path.mkdir(parents=True, exist_ok=True)
        config = json.dumps(comparison.configs[folder.architecture], indent=2)
        folder.config.write_text(config + "\n")
    state.save(comparison.output)
    return state, message


def first_difference(before: Any, after: Any, name: str = "") -> str:
    """The first field in which two settings differ, with both values."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                inner = f"{name}.{key}" if name else str(key)
                return first_difference(before.get(key), after.get(key), inner)
    return f"{name} is {json.dumps(before)} there and {json.dumps(after)} here"


def _load(output: Path) -> State | None:
    try:
        return State(**json.loads((output / STATE_FILE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they come back from a file."""
    return json.loads(json.dumps(settings))


def _has_results(output: Path, state: State) -> bool:
    return any(load_steps(ArmFolder(output / name).steps) for name in state.settings["arms"])


def _all_exist(checkpoints: Mapping[str, str]) -> bool:
    return all(Path(path).is_dir() for path in checkpoints.values())


def _clear(output: Path, architectures: Iterable[str]) -> None:
    """Remove what an earlier training left for these arms, and nothing else."""
    for architecture in architectures:
        for path in ArmFolder(output / architecture).made_by_training:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    for name in ("dictionaries.json", "results.json", "report.html"):
        (output / name).unlink(missing_ok=True)
