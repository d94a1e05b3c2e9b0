"""Sharing sparse SAEs with people who do not have this package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sae_lens
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import (
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSITY_FILENAME,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.architectures.base import SparseTrainingSAEMixin


def upload_saes_to_huggingface(
    saes_dict: Mapping[str, SAE[Any] | Path | str],
    hf_repo_id: str,
    hf_revision: str = "main",
    show_progress: bool = True,
    add_default_readme: bool = True,
) -> None:
    """
    SAELens's `upload_saes_to_huggingface`, with sparse SAEs and their checkpoints in the form that
    stock SAELens opens.

    SAELens's own function uploads a training SAE as it is, and only those who have this package
    can open that.

    Args:
        saes_dict: SAEs, or folders with saved ones, by the name that each gets in the repository.
        hf_repo_id: the repository; made if there is none.
        hf_revision: its branch.
        show_progress: whether to show a progress bar.
        add_default_readme: whether to add SAELens's README where there is none.

    Raises:
        ValueError: a folder holds no SAE; the message names it. Nothing has been uploaded.
    """
    with TemporaryDirectory() as folder:
        sae_lens.upload_saes_to_huggingface(
            in_stock_form(saes_dict, Path(folder)),
            hf_repo_id,
            hf_revision=hf_revision,
            show_progress=show_progress,
            add_default_readme=add_default_readme,
        )


def in_stock_form(
    saes_dict: Mapping[str, SAE[Any] | Path | str], folder: Path
) -> dict[str, SAE[Any] | Path | str]:
    """
    The same SAEs, each sparse one replaced by a folder with the inference SAE that it saves.

    Args:
        saes_dict: SAEs, or folders with saved ones, by name.
        folder: where to write; it is made.

    Raises:
        ValueError: a folder holds no SAE; the message names it. Nothing has been written.
    """
    architectures = {
        name: _architecture(name, Path(sae))
        for name, sae in saes_dict.items()
        if not isinstance(sae, SAE)
    }
    result: dict[str, SAE[Any] | Path | str] = {}
    for index, (name, sae) in enumerate(saes_dict.items()):
        result[name] = sae
        target = folder / str(index)
        if isinstance(sae, SparseTrainingSAEMixin):
            sae.save_inference_model(target)
            result[name] = target
        elif not isinstance(sae, SAE) and _is_sparse(architectures[name]):
            TrainingSAE.load_from_disk(sae).save_inference_model(target)
            for file in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME):
                if (Path(sae) / file).exists():
                    shutil.copy(Path(sae) / file, target / file)
            result[name] = target
    return result


def _architecture(name: str, path: Path) -> str | None:
    """What a folder with a saved SAE says that it is."""
    for file in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        if not (path / file).is_file():
            raise ValueError(f"saes_dict[{name!r}]={str(path)!r} has no {file}: it is no saved SAE")
    return json.loads((path / SAE_CFG_FILENAME).read_text(encoding="utf-8")).get("architecture")


def _is_sparse(architecture: str | None) -> bool:
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return False
    return issubclass(SAE_TRAINING_CLASS_REGISTRY[architecture][0], SparseTrainingSAEMixin)
