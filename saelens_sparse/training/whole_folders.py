"""Folders that are whole or absent: written under another name, and moved when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError

from saelens_sparse.warn import warn_caller

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_PARTIAL = ".partial"
# In each unfinished folder of this module, and locked as long as somebody writes there.
_MARK = ".saelens_sparse_is_writing"

# What saving raises where a disk is full or a folder is not to be written to: PyTorch and
# safetensors have errors of their own for it.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
# How PyTorch's RuntimeErrors of this kind are told from others.
_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos", "file write failed")


@contextmanager
def new_folder(final: Path) -> Generator[Path]:
    """
    A folder to write into, which gets the name `final` when the block has ended without an error.

    At any moment, `final` is whole or absent. If it exists it is replaced; files in it that have
    no counterpart stay.

    Raises:
        OSError: the folder cannot be made, written to the disk or renamed.
    """
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise FileExistsError(f"{final} exists and is not a folder")
    with _partial_folder(final.parent, final.name) as partial:
        yield partial
        _finish(partial)
        replaced = partial.with_suffix(".replaced")
        if final.exists():
            final.rename(replaced)
        try:
            partial.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        if replaced.exists():
            _move_others(replaced, final)
            shutil.rmtree(replaced)
        _sync_folder(final.parent)


def save_somewhere(
    write: Callable[[Path], None], name: str, output_path: str, elsewhere: Sequence[Path]
) -> Path:
    """
    Save what was trained to a folder; if that is impossible, to another one, and warn of it.

    Args:
        write: writes to the folder that it is given.
        name: what is saved, for messages.
        output_path: where it belongs. Files of the same names, of an earlier run, stay as they
            are until all that replaces them is written.
        elsewhere: where to try next. A new folder for temporary files comes last.

    Returns:
        The folder that holds it.

    Raises:
        OSError: no folder can be written to; the message names them.
    """
    failures: list[str] = []
    cause: Exception | None = None
    for place in (Path(output_path), *elsewhere, None):  # None: a folder that is made only then
        try:
            with ExitStack() as undo:
                folder = place or Path(tempfile.mkdtemp(prefix="saelens_sparse_"))
                if place is None:
                    undo.callback(_remove_empty, folder)
                with _partial_folder(folder, "sae") as partial:
                    write(partial)
                    _finish(partial)
                    _move_into(folder, partial)
        except WRITE_ERRORS as error:
            if not is_write_error(error):
                raise
            cause = error
            failures.append(f"{str(place or 'the temporary folder')!r} ({reason(error)})")
            continue
        if failures:
            warn_caller(
                f"{name} could not be written to {', '.join(failures)}. It is in {str(folder)!r}."
            )
        return folder
    raise OSError(f"{name} could not be written to {', '.join(failures)}") from cause


def is_write_error(error: Exception) -> bool:
    """Whether an error among `WRITE_ERRORS` says that something could not be written."""
    return not isinstance(error, RuntimeError) or any(part in str(error) for part in _WRITER)


def reason(error: Exception) -> str:
    """One line that says why something could not be written."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = str(error).partition("\n")[0] or type(error).__name__
    # What PyTorch says of a full disk is a line of its source.
    return f"the disk may be full: {line}" if isinstance(error, RuntimeError) else line


@contextmanager
def _partial_folder(parent: Path, name: str) -> Generator[Path]:
    """A new folder for what is not whole yet. In the end it is removed, unless something else
    than writing has failed.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    partial = parent / f"{name}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    partial.mkdir()
    is_kept = False
    try:
        with (partial / _MARK).open("w") as mark:
            if fcntl is not None:
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
    except Exception as error:
        if isinstance(error, WRITE_ERRORS) and is_write_error(error):
            raise
        is_kept = True
        (partial / _MARK).unlink(missing_ok=True)
        error.add_note(f"What was written until then is in {partial}")
        raise
    finally:
        if not is_kept:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def _remove_abandoned(parent: Path) -> None:
    """Remove what processes that were killed have left unfinished."""
    if fcntl is None:
        return
    for partial in parent.glob(f"*{_PARTIAL}"):
        with suppress(OSError), (partial / _MARK).open("r+") as mark:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where the writer lives
            shutil.rmtree(partial)


def _finish(partial: Path) -> None:
    """Wait until the disk holds it, and say that it is whole."""
    for path in partial.rglob("*"):
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    (partial / _MARK).unlink()
    _sync_folder(partial)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system knows how to
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _move_others(replaced: Path, final: Path) -> None:
    """Move the files that `final` has no counterpart of into it."""
    for path in replaced.iterdir():
        target = final / path.name
        if not target.exists():
            path.rename(target)
        elif path.is_dir() and target.is_dir():
            _move_others(path, target)


def _move_into(folder: Path, partial: Path) -> None:
    """
    Move all files into a folder, which may hold others; of each folder, all files or none.

    Weights come last, and those that they replace go first: no other files are ever beside them.
    """
    paths = sorted(partial.iterdir(), key=lambda path: path.name == SAE_WEIGHTS_FILENAME)
    aside = partial / ".replaced"
    aside.mkdir()
    try:
        for path in reversed(paths):
            target = folder / path.name
            if path.is_dir():
                continue
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder")
            if target.exists():
                target.replace(aside / path.name)
        for path in paths:
            target = folder / path.name
            if path.is_dir():
                target.mkdir(exist_ok=True)
                _move_into(target, path)
            else:
                path.replace(target)
    except OSError:
        for path in aside.iterdir():
            path.replace(folder / path.name)
        raise
    _sync_folder(folder)
