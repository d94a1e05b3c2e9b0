"""Checkpoints that are written whole, and the one from which a run resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import safe_open

from saelens_sparse.choice.policy import STATE_FILENAME
from saelens_sparse.training.whole_folders import WRITE_ERRORS, is_write_error, new_folder, reason
from saelens_sparse.warn import warn_caller

# What a run reads when it resumes: of each SAE, and of the run.
_NEEDED_OF_SAE = (SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME, ACTIVATION_SCALER_CFG_FILENAME)
_NEEDED_OF_RUN = (ACTIVATIONS_STORE_STATE_FILENAME,)
# What is written besides.
_OTHERS = (
    STATE_FILENAME,
    SAE_CFG_FILENAME,
    SPARSITY_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    RUNNER_CFG_FILENAME,
)


def write_checkpoint(checkpoint: Path, write: Callable[[Path], None], *, warns: bool) -> bool:
    """
    Write a checkpoint, whose folder appears when all of it is written.

    Args:
        checkpoint: Its folder.
        write: Writes the files to the folder that it is given, another one.
        warns: If the checkpoint cannot be written, warn instead of raising the error.

    Returns:
        Whether it was written.
    """
    try:
        with new_folder(checkpoint) as folder:
            write(folder)
    except WRITE_ERRORS as error:
        if not warns or not is_write_error(error):
            raise
        warn_caller(f"the checkpoint {str(checkpoint)!r} could not be written: {reason(error)}")
        return False
    return True


def whole_checkpoint(named: str, names_of_saes: Sequence[str] = ()) -> str:
    """
    The checkpoint to resume from: the one that is named, if it is whole.

    Otherwise it is the one of those in or beside that folder whose training went farthest, but not
    farther than the named one, and a warning says so. Only folders that have the name of a regular
    checkpoint count.

    Args:
        named: `resume_from_checkpoint` of the run.
        names_of_saes: of a run of several SAEs, each of which has a folder in the checkpoint.

    Raises:
        ValueError: there is no such folder, or no whole checkpoint.
    """
    folder = Path(named)
    if not folder.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {named!r}")
    problem = problem_of(folder, names_of_saes)
    if problem is None:
        return named
    found = [*_regular(folder, names_of_saes)] or [
        *_regular(folder.absolute().parent, names_of_saes)
    ]
    if folder.name.isdecimal():
        found = [other for other in found if int(other.name) < int(folder.name)]
    if not found:
        raise ValueError(
            f"resume_from_checkpoint: {named!r} is no whole checkpoint ({problem}), and there is "
            "no earlier one in it or beside it"
        )
    newest = max(found, key=lambda checkpoint: int(checkpoint.name))
    warn_caller(
        f"resume_from_checkpoint: {named!r} is no whole checkpoint ({problem}). The run resumes "
        f"from {str(newest)!r} instead."
    )
    return str(newest)


def problem_of(checkpoint: Path, names_of_saes: Sequence[str] = ()) -> str | None:
    """What keeps a run from resuming from a folder, by what its files hold; None if nothing."""
    for folder in [checkpoint / name for name in names_of_saes] or [checkpoint]:
        problem = _problem_of_files(folder, _NEEDED_OF_SAE)
        if problem is not None:
            return problem
    return _problem_of_files(checkpoint, _NEEDED_OF_RUN)


def problem_of_file(path: Path) -> str | None:
    """Why a file that SAELens has written cannot be read; None if it can."""
    if not path.exists():
        return f"{path.name} is missing"
    try:
        _read(path)
    except Exception as error:
        return f"{path.name} cannot be read: {str(error).partition(chr(10))[0]}"
    return None


def _problem_of_files(folder: Path, needed: Sequence[str]) -> str | None:
    others = [name for name in _OTHERS if (folder / name).exists()]
    for name in (*needed, *others):
        problem = problem_of_file(folder / name)
        if problem is not None:
            return problem
    scaler = folder / ACTIVATION_SCALER_CFG_FILENAME
    if ACTIVATION_SCALER_CFG_FILENAME in needed and _read(scaler).get("has_whitening"):
        return problem_of_file(folder / ACTIVATION_WHITENING_FILENAME)
    return None


def _read(path: Path) -> Any:
    """Read as much of a file as tells whether it is whole.

    Raises:
        Exception: one of many, if it is not.
    """
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no settings")
        return content
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:  # compares the file's length with its header
            return tensors.keys()
    return torch.load(str(path), map_location="meta", mmap=True)


def _regular(folder: Path, names_of_saes: Sequence[str]) -> Iterator[Path]:
    """The whole checkpoints in a folder whose name is their number of samples.

    In others, "final_..." for example, the activations' scaling may be part of the weights.
    """
    for path in folder.iterdir():
        if path.name.isdecimal() and path.is_dir() and problem_of(path, names_of_saes) is None:
            yield path
