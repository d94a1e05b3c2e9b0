"""What a run and a cache must agree about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.constants import DTYPE_MAP

from saelens_sparse.activations.shards.check import check_files
from saelens_sparse.activations.shards.manifest import (
    DTYPE_NAMES,
    Hook,
    Manifest,
    read_manifest,
)
from saelens_sparse.config.messages import one_line, shown
from saelens_sparse.warn import warn_caller

Config = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig

# A cache of other values of these is refused.
_DECISIVE = ("model_name", "context_size", "seqpos_slice")
# Other values of these make other activations, perhaps on purpose.
_NOTED = (
    "dataset_path",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "disable_concat_sequences",
    "sequence_separator_token",
    "use_chat_formatting",
)
# These move activations within rounding, and batches of the language model.
_OF_WRITING = ("autocast_lm", "model_kwargs", "store_batch_size_prompts")


def settings_of(cfg: Config) -> dict[str, Any]:
    """The fields of a config that decide what activations are, as JSON has them."""
    values = cfg.to_dict()
    found = {name: values[name] for name in (*_DECISIVE, *_NOTED, *_OF_WRITING)}
    found["seqpos_slice"] = slice(*cfg.seqpos_slice).indices(cfg.context_size)
    return json.loads(json.dumps(found, default=str))


def hooks_of_config(cfg: Config) -> list[Hook]:
    """Whose activations a run of one SAE or of several is trained on, each hook once."""
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        return [Hook(cfg.hook_name, cfg.hook_head_index, cfg.sae.d_in)]
    heads, saes = cfg.hook_head_indices_per_sae, cfg.saes
    hooks = {hook: Hook(hook, heads[n], saes[n].d_in) for n, hook in cfg.hook_names_per_sae.items()}
    return list(hooks.values())


def check_shards(cfg: Config, folder: str | Path | None = None) -> Manifest:
    """
    Check that a cache is whole, and is of this run's activations.

    Files that were touched since they were hashed are hashed again.

    Args:
        cfg: Of the run.
        folder: Of the cache; None for that of `cached_activations_path`.

    Returns:
        The cache's manifest.

    Raises:
        ValueError: it is not; the message is one line.
    """
    path = Path(str(folder or getattr(cfg, "cached_activations_path", "")))
    try:
        manifest = read_manifest(path)
        _check_settings(manifest, settings_of(cfg))
        _check_dtype(manifest, cfg.dtype)
        manifest.positions_of(hooks_of_config(cfg))
        if not manifest.is_complete:
            raise ValueError(
                f"it has {manifest.rows_written:,} of {manifest.rows:,} tokens; the command that "
                "writes it goes on with the rest"
            )
        if manifest.rows == 0:
            raise ValueError("it holds no tokens; the dataset had fewer than a batch")
        check_files(path, manifest)
    except ValueError as error:
        message = f"cached_activations_path: {shown(str(path))} cannot be used: {error}"
        raise ValueError(one_line(message)) from error
    return manifest


def differing(settings: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """The names of `settings` that have another value in `others`."""
    return [name for name in settings if settings[name] != others.get(name)]


def _check_settings(manifest: Manifest, settings: Mapping[str, Any]) -> None:
    other = differing(settings, manifest.settings)
    for name in _DECISIVE:
        if name in other:
            its, wanted = shown(manifest.settings.get(name)), shown(settings[name])
            raise ValueError(f"it is of {name} {its}; this run's is {wanted}")
    noted = [f"{name} ({shown(manifest.settings.get(name))})" for name in _NOTED if name in other]
    if noted:
        warn_caller(
            f"cached_activations_path: the cache was written with another {', '.join(noted)}"
        )


def _check_dtype(manifest: Manifest, wanted: str | torch.dtype) -> None:
    dtype, of_run = DTYPE_NAMES[manifest.dtype], DTYPE_MAP[str(wanted)]
    if torch.promote_types(dtype, of_run) != of_run:
        raise ValueError(
            f"its activations are {manifest.dtype}, which dtype, {str(wanted)!r}, cannot hold"
        )
