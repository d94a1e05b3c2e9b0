"""What would fail, or silently mean something else, after minutes of loading is refused at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import DTYPE_MAP
from sae_lens.registry import get_sae_training_class

from saelens_sparse.evaluation.command_line import device_problem
from saelens_sparse.runner_config import UsageError

SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
# The least that a field may be.
LEAST = {
    "context_size": 1,
    "training_tokens": 1,
    "train_batch_size_tokens": 1,
    "store_batch_size_prompts": 1,
    "n_batches_in_buffer": 1,
    "n_batches_for_norm_estimate": 1,
    "feature_sampling_window": 1,
    "n_restart_cycles": 1,
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
    "dead_feature_window": 0,
    "n_checkpoints": 0,
    "n_eval_batches": 0,
}


def check_fields(values: Mapping[str, Any], architectures: Iterable[str]) -> None:
    """
    Check that a runner config in its JSON form names fields that exist, with values of their types.

    Args:
        values: The config, in the form of `LanguageModelSAERunnerConfig.to_dict`.
        architectures: The SAE's fields may be those of any of these.

    Raises:
        UsageError: with the first field that does not fit.
    """
    for name in ("sae", "logger"):
        if not isinstance(values.get(name), dict):
            raise UsageError(f"{name}: {values.get(name)!r} is not an object with settings")
    hints = typing.get_type_hints(LanguageModelSAERunnerConfig)
    _check_types({k: v for k, v in values.items() if k != "sae"}, hints, "")
    _check_types(values["logger"], typing.get_type_hints(hints["logger"]), "logger.")
    sae_hints: dict[str, Any] = {"architecture": str, "sae_lens_training_version": str | None}
    sae_hints["sae_lens_version"] = str
    for architecture in architectures:
        sae_hints |= typing.get_type_hints(get_sae_training_class(architecture)[1])
    _check_types(values["sae"], sae_hints, "sae.")
    for name in ("d_in", "d_sae"):
        if name not in values["sae"]:
            raise UsageError(f"sae.{name}: missing")


def check_values(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """
    Check that a training by this config can begin, as far as that shows without loading anything.

    Raises:
        UsageError: with the first field whose value cannot work, and what can.
    """
    for name, least in LEAST.items():
        _require(getattr(cfg, name) >= least, name, getattr(cfg, name), f"{least} or more")
    for name in ("d_in", "d_sae"):
        _require(getattr(cfg.sae, name) >= 1, f"sae.{name}", getattr(cfg.sae, name), "1 or more")
    _require(cfg.lr > 0, "lr", cfg.lr, "above 0")
    k = getattr(cfg.sae, "k", None)
    if k is not None:
        allowed = f"above 0 and at most sae.d_sae, {cfg.sae.d_sae}"
        _require(0 < k <= cfg.sae.d_sae, "sae.k", k, allowed)
    scheduler = cfg.lr_scheduler_name
    _require(
        scheduler.lower() in SCHEDULERS, "lr_scheduler_name", scheduler, " | ".join(SCHEDULERS)
    )
    for name, dtype in (("dtype", cfg.dtype), ("sae.dtype", cfg.sae.dtype)):
        _require(dtype in DTYPE_MAP, name, dtype, " | ".join(DTYPE_MAP))
    for name in ("device", "llm_device", "act_store_device"):
        _check_device(name, getattr(cfg, name))
    _check_device("sae.device", cfg.sae.device)
    _check_lengths(cfg)
    _check_paths(cfg)


def _check_lengths(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    batch = cfg.train_batch_size_tokens
    tokens = cfg.training_tokens
    _require(tokens >= batch, "training_tokens", tokens, f"{batch} or more, which is one batch")
    scheduled = cfg.lr_warm_up_steps + cfg.lr_decay_steps
    if scheduled and scheduled >= cfg.total_training_steps:
        raise UsageError(
            f"lr_warm_up_steps + lr_decay_steps: {cfg.lr_warm_up_steps} + {cfg.lr_decay_steps} "
            f"leaves nothing of the {cfg.total_training_steps} training steps"
        )
    mixed = cfg.activations_mixing_fraction
    _require(0 <= mixed <= 1, "activations_mixing_fraction", mixed, "from 0 to 1")
    context = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    buffer = cfg.n_batches_in_buffer * context
    if batch > buffer:
        raise UsageError(
            f"train_batch_size_tokens: {batch} is more than the buffer holds that activations are "
            f"shuffled in, {buffer} (n_batches_in_buffer times the context length)"
        )


def _check_paths(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    names = ["from_pretrained_path", "resume_from_checkpoint"]
    if cfg.use_cached_activations:
        names.append("cached_activations_path")
    # Other names may be those of a hub.
    local = (".", "/", "~")
    names += [n for n in ("dataset_path", "model_name") if getattr(cfg, n).startswith(local)]
    for name in names:
        path = getattr(cfg, name)
        _require(path is None or Path(path).exists(), name, path, "a path that exists")
    _require(cfg.dataset_path != "", "dataset_path", cfg.dataset_path, "a data set's name or path")


def _check_device(name: str, device: str | None) -> None:
    if (problem := device_problem(device)) is not None:
        raise UsageError(f"{name}: {problem}")


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UsageError(f"{name}: {value!r} cannot be used; allowed: {allowed}")


def _check_types(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> None:
    for name, value in values.items():
        if name not in hints:
            raise UsageError(f"{prefix}{name}: there is no such field")
        hint = hints[name]
        if not dataclasses.is_dataclass(hint) and not _fits(value, hint):
            raise UsageError(f"{prefix}{name}: {value!r} is not {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON can stand for the type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _describe(hint: Any) -> str:
    """The type in the words of JSON."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_describe, arguments))
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (list, tuple):
        return f"a list of which each is {_describe(arguments[0])}"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        type(None): "null",
    }
    return names.get(hint, "an object" if origin is dict else str(hint))
