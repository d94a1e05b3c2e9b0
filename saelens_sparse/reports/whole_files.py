"""Files that appear only once they are whole and on the disk, and how damaged ones are told."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

from safetensors import safe_open


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """
    A path to write to; what is there at the end takes the place of `path`.

    A process or a machine that goes down leaves the old file or the new one. The folder is made if
    there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    try:
        yield scratch
        _sync(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by `whole_file`."""
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Return once everything in a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def damage(path: Path, *names: str) -> str | None:
    """
    What is wrong with a file, such as "is missing"; None if it is whole.

    Args:
        path: JSON, safetensors, or what `torch.save` writes (.pt). Others must have content.
        names: Keys of the JSON object, or tensors, that it must hold.
    """
    found: set[str] = set()
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found = set(file.keys())
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            found = set(content) if isinstance(content, dict) else set()
        elif path.suffix == ".pt":
            with ZipFile(path) as archive:
                if (member := archive.testzip()) is not None:
                    return f"is damaged ({member})"
        elif not path.stat().st_size:
            return "is empty"
    except FileNotFoundError:
        return "is missing"
    except Exception as error:
        # Readers have many names for what is not theirs.
        return f"is damaged ({type(error).__name__})"
    lacking = [name for name in names if name not in found]
    return f"is damaged (it has no {lacking[0]!r})" if lacking else None


def _sync(path: Path) -> None:
    if os.name == "nt":
        return  # Windows opens no folder, and syncs no file that is open for reading
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
