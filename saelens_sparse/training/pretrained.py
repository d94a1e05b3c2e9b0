"""Saved weights in a training SAE of the counterpart architecture: stock's in a sparse one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.util import temporary_seed

from saelens_sparse.architectures.fields import SparseTrainingSAEConfigMixin
from saelens_sparse.training.checkpoints import problem_of_file

_SPARSE = "_sparse"
# With another value of these, the same weights compute something else.
_MUST_AGREE = (
    "d_in",
    "d_sae",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "rescale_acts_by_decoder_norm",
)


def load_pretrained(path: str | Path, cfg: TrainingSAEConfig) -> TrainingSAE[Any]:
    """
    A training SAE of `cfg`'s architecture and fields with the weights of a saved SAE.

    SAELens's runners train it if it is their `override_sae`, or one of their `override_saes`.
    Their `from_pretrained_path` takes the architecture from the saved SAE instead.

    Args:
        path: A folder with a checkpoint of a training, or with an SAE for inference: of the same
            architecture, or of its stock or sparse counterpart.
        cfg: Of the SAE to train. Fields that decide what the weights compute must be those of the
            saved SAE.

    Raises:
        ValueError: the folder holds no whole SAE, or one that does not fit; the message says why.
    """
    check_pretrained(path, cfg)
    with temporary_seed(cfg.d_sae):  # weights that are replaced use up nobody's random numbers
        sae = TrainingSAE.from_dict(cfg.to_dict())
    try:
        sae.load_weights_from_checkpoint(path)
    except RuntimeError as error:
        raise ValueError(
            f"from_pretrained_path: the weights in {str(path)!r} are not those of its "
            f"{SAE_CFG_FILENAME}: {' '.join(str(error).split())}"
        ) from error
    return sae


def check_pretrained(path: str | Path, cfg: TrainingSAEConfig) -> None:
    """
    Check that `load_pretrained` can load a saved SAE, by its configuration.

    Raises:
        ValueError: the folder holds no whole SAE, or one that does not fit; the message says why.
    """
    saved = _saved_config(path)
    architecture = str(saved.get("architecture"))
    if architecture.removesuffix(_SPARSE) != cfg.architecture().removesuffix(_SPARSE):
        raise ValueError(
            f"from_pretrained_path: {str(path)!r} holds an SAE of architecture {architecture!r}, "
            f"whose weights do not fit sae.architecture={cfg.architecture()!r}"
        )
    for name in _MUST_AGREE:
        value = getattr(cfg, name, None)
        if name in saved and value is not None and saved[name] != value:
            raise ValueError(
                f"from_pretrained_path: the SAE in {str(path)!r} has {name}={saved[name]!r}, "
                f"sae.{name} must be the same; got {value!r}"
            )


def concerns_sparse(path: str | Path, cfg: TrainingSAEConfig) -> bool:
    """Whether the SAE to train, or the saved one whose weights it starts from, is sparse.

    Raises:
        ValueError: the folder holds no whole SAE.
    """
    is_saved_sparse = str(_saved_config(path).get("architecture")).endswith(_SPARSE)
    return is_saved_sparse or isinstance(cfg, SparseTrainingSAEConfigMixin)


def _saved_config(path: str | Path) -> dict[str, Any]:
    """The configuration of a saved SAE, as of today's SAELens."""
    for name in (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME):
        problem = problem_of_file(Path(path) / name)
        if problem is not None:
            raise ValueError(f"from_pretrained_path: {str(path)!r} holds no whole SAE: {problem}")
    try:
        return handle_config_defaulting(json.loads((Path(path) / SAE_CFG_FILENAME).read_text()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"from_pretrained_path: {SAE_CFG_FILENAME} in {str(path)!r} is no SAE's: {error!r}"
        ) from error
