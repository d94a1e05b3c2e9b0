"""Files that are whole or absent, and on the disk when a call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """
    Write a file, which takes the place of `path` once all of it is on the disk.

    A process or a machine that goes down leaves the old file or the new one. The folder is made if
    there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".partial")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(scratch)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


def sync(*paths: Path) -> None:
    """Return once files, and the entries of folders, are on the disk."""
    for path in paths if os.name != "nt" else ():  # Windows opens no folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
