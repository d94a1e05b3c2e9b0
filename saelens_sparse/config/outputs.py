"""Whether what a training writes has a place to go: asked before the training, not after it."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.saes.sae import TrainingSAEConfig

from saelens_sparse.config.messages import shown

# A checkpoint holds the weights and Adam's two moments of each.
CHECKPOINT_SIZE_IN_WEIGHTS = 3


def check_runner_outputs(
    cfg: LanguageModelSAERunnerConfig[Any], *, save_buffer: bool = False
) -> None:
    """
    Check that the outputs of a run can be written, and that there is room for them.

    Args:
        cfg: Of the run. Without checkpoints, room for one is asked for: an interrupted run
            leaves one. A path that is None is not checked, for nothing is written there.
        save_buffer: Whether checkpoints hold the buffer of activations.

    Raises:
        ValueError: `output_path` or `checkpoint_path` cannot be used; the message says why.
    """
    buffer = 0 if not save_buffer else _buffer_bytes(cfg, cfg.sae.d_in)
    _check_outputs(cfg, [cfg.sae], buffer)


def check_multi_runner_outputs(
    cfg: MultiSAETrainingRunnerConfig, *, save_buffer: bool = False
) -> None:
    """`check_runner_outputs` for a run of several SAEs, whose outputs share the folders."""
    widths = {hook: cfg.saes[name].d_in for name, hook in cfg.hook_names_per_sae.items()}
    buffer = 0 if not save_buffer else _buffer_bytes(cfg, sum(widths.values()))
    _check_outputs(cfg, cfg.saes.values(), buffer)


def check_writable(field_name: str, path: str | Path, n_bytes_needed: int) -> None:
    """
    Check that a folder exists or can be made, can be written to, and has room.

    Nothing is left behind: a temporary file in the folder, or in the nearest one above it that
    exists, stands for what will be written.

    Args:
        field_name: The setting that the path comes from, for the message.
        path: Of the folder.
        n_bytes_needed: Number of bytes that will be written there.

    Raises:
        ValueError: with the field, the path, and what is in the way.
    """
    folder = _nearest_folder(field_name, path)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        n_bytes_free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _unwritable(field_name, path, error) from error
    if n_bytes_free < n_bytes_needed:
        raise ValueError(
            f"{field_name}: {shown(str(path))} has room for {_in_megabytes(n_bytes_free)}; "
            f"this training needs {_in_megabytes(n_bytes_needed)} there"
        )


def _check_outputs(
    cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig,
    saes: Iterable[TrainingSAEConfig],
    buffer: int,
) -> None:
    weights = sum(map(_weight_bytes, saes))
    n_checkpoints = max(1, cfg.n_checkpoints + cfg.save_final_checkpoint)
    if cfg.resume_from_checkpoint is not None:
        n_checkpoints = 1  # how many of them are there already is not known
    needed_on_disk: Counter[int] = Counter()
    for name, n_bytes in (
        ("output_path", weights),
        (
            "checkpoint_path",
            n_checkpoints * (CHECKPOINT_SIZE_IN_WEIGHTS * weights + buffer),
        ),
    ):
        path = getattr(cfg, name)
        if path is not None:
            disk = _nearest_folder(name, path).stat().st_dev
            needed_on_disk[disk] += n_bytes
            check_writable(name, path, needed_on_disk[disk])


def _buffer_bytes(
    cfg: LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig, width: int
) -> int:
    """Size of a full buffer of float32 activations."""
    context_size = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    return cfg.n_batches_in_buffer * context_size * width * torch.float32.itemsize


def _weight_bytes(cfg: TrainingSAEConfig) -> int:
    """Size of the encoder and the decoder; the biases are a thousandth of it."""
    dtype = DTYPE_MAP.get(str(cfg.dtype), torch.float32)
    return 2 * cfg.d_in * cfg.d_sae * dtype.itemsize


def _nearest_folder(field_name: str, path: str | Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    whole = Path(path).absolute()
    folder = whole
    try:
        while not _is_there(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise ValueError("it is not a folder" if folder == whole else f"{folder} is no folder")
    except (OSError, ValueError) as error:
        raise _unwritable(field_name, path, error) from error
    return folder


def _is_there(path: Path) -> bool:
    """Whether there is anything, if only a link to nothing. Unlike `Path.exists`, it raises."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _unwritable(field_name: str, path: str | Path, error: OSError | ValueError) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) else error
    return ValueError(f"{field_name}: {shown(str(path))} cannot be written to: {reason}")


def _in_megabytes(n_bytes: int) -> str:
    return f"{n_bytes // 10**6:,} MB"
