"""Files of results: whole or absent, in a folder that is the command's own."""

from __future__ import annotations

import json
import os
import platform
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from saelens_sparse.config.files import UsageError
from saelens_sparse.training.checkpoints import problem_of_file

LOCK_FILE, HOLDER_FILE = ".lock", ".lock-holder"


def damage(path: Path, *keys: str) -> str | None:
    """
    What is wrong with a file, such as "/out/cfg.json is missing"; None if it is whole.

    Args:
        path: JSON, safetensors, or what `torch.save` writes.
        keys: What the JSON object must hold.
    """
    problem = problem_of_file(path)  # begins with the file's name
    if problem is None:
        content = json.loads(path.read_text()) if keys else {}
        problem = next((f"{path.name} has no {key!r}" for key in keys if key not in content), None)
    return problem and f"{path.parent}{os.sep}{problem}"


def enter_output_folder(folder: Path, mark: str) -> AbstractContextManager[object]:
    """
    Make a folder for results, and keep other runs out of it until the returned context ends.

    Args:
        folder: Is new, is empty, or holds results of the same command.
        mark: Name of the file by which the command knows its own results.

    Raises:
        UsageError: the folder holds other files, or another run is in it.
        OSError: it cannot be made or written to.
    """
    if not (folder / mark).exists() and has_files(folder, except_for=mark + ".partial"):
        raise UsageError(
            f"--output: {folder} is not empty, and no {mark} says that its files are of this "
            "command; name another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return lock_folder(folder)


def lock_folder(folder: Path) -> AbstractContextManager[object]:
    """
    Lock a folder until the returned context ends, or the process, however it does.

    Raises:
        UsageError: another process has locked it.
        OSError: it cannot be written to.
    """
    holder = folder / HOLDER_FILE
    try:
        lock = FileLock(folder / LOCK_FILE).acquire(timeout=0)
    except Timeout:
        who = holder.read_text() if holder.exists() else "another process"
        raise UsageError(
            f"--output: {folder} is in use by {who}; name another folder, or wait for its end"
        ) from None
    holder.write_text(f"process {os.getpid()} on {platform.node()}")
    return lock


def has_files(folder: Path, except_for: str = "") -> bool:
    """Whether there is anything in a folder but locks and a file of that name."""
    allowed = {LOCK_FILE, HOLDER_FILE, except_for}
    return folder.is_dir() and any(path.name not in allowed for path in folder.iterdir())
