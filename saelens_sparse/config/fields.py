"""Which fields a config has, and what each may be."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.config.messages import shown, suggestion
from saelens_sparse.config.require import require_allowed

MAX_STRING, MAX_DEPTH = 4096, 20

# What a field may be, beyond its type.
RANGES: dict[str, Any] = {
    name: allowed
    for allowed, names in (
        (
            Field(ge=1),
            [
                "context_size",
                "eval_batch_size_prompts",
                "feature_sampling_window",
                "n_batches_for_norm_estimate",
                "n_batches_in_buffer",
                "n_restart_cycles",
                "store_batch_size_prompts",
                "train_batch_size_tokens",
                "training_tokens",
                "logger.eval_every_n_wandb_logs",
                "logger.wandb_log_frequency",
                "sae.d_in",
                "sae.d_sae",
                "sae.max_iterations",
            ],
        ),
        (
            Field(ge=0),
            [
                "dead_feature_threshold",
                "dead_feature_window",
                "lr_decay_steps",
                "lr_end",
                "lr_warm_up_steps",
                "n_checkpoints",
                "n_eval_batches",
                "prefetch_llm_batches",
                "sae.l0_coefficient",
                "sae.l0_warm_up_steps",
                "sae.l1_warm_up_steps",
            ],
        ),
        (Field(gt=0), ["lr", "sae.k"]),
        (Field(ge=0, lt=1), ["adam_beta1", "adam_beta2"]),
        (Field(ge=0, le=1), ["activations_mixing_fraction"]),
        (
            Field(min_length=1),
            [
                "cached_activations_path",
                "checkpoint_path",
                "hook_name",
                "model_name",
                "output_path",
            ],
        ),
        (Field(min_length=1, max_length=3), ["seqpos_slice"]),
    )
    for name in names
}
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
# How a message says what pydantic calls these.
_BOUNDS = {
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "above {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "below {lt:g}",
}
# Fields whose annotation is not what SAELens reads and writes.
_HINTS: dict[str, Any] = {
    "sae.architecture": str,
    "sae.metadata": dict[str, Any],
    "sae.sae_lens_version": str,
    "sae.sae_lens_training_version": str | None,
    "sae.normalize_activations": Literal[
        "none",
        "expected_average_only_in",
        "constant_norm_rescale",
        "layer_norm",
        "covariance_whitening",
    ],
}


def check_groups(values: Mapping[str, Any]) -> None:
    """
    Check that there are an SAE of a known architecture and a logger.

    Args:
        values: The config, in the form of `LanguageModelSAERunnerConfig.to_dict`.

    Raises:
        ValueError: there are not; the message says what is there instead, if it is known.
    """
    if "sae" not in values and "d_sae" in values:
        raise ValueError(
            "it is the config of an SAE, not of a runner; a run leaves its own beside the SAE, "
            "as runner_cfg.json"
        )
    if "saes" in values:
        raise ValueError(
            "it is the config of a run of several SAEs, which this command cannot take"
        )
    for name in ("sae", "logger"):
        if name not in values:
            raise ValueError(f"{name}: missing; it is an object with settings")
        check_group(name, values[name])
    check_architecture(values["sae"])


def check_group(name: str, value: object) -> None:
    """
    Check that a part of a config is an object with settings.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {shown(value)} is not an object with settings")


def check_architecture(sae: Mapping[str, Any]) -> None:
    """
    Check that the config of an SAE names a known architecture.

    Raises:
        ValueError: it does not.
    """
    architecture, known = sae.get("architecture"), list(SAE_TRAINING_CLASS_REGISTRY)
    require_allowed(architecture in known, "sae.architecture", architecture, " | ".join(known))


def check_fields(values: Mapping[str, Any], architectures: Iterable[str]) -> None:
    """
    Check that a config has fields that exist, each with a value of its type and range.

    Args:
        values: The config, in the form of `LanguageModelSAERunnerConfig.to_dict`.
        architectures: The SAE's fields may be those of any of these.

    Raises:
        ValueError: with the first field that does not fit, its value, and what is allowed.
    """
    check_groups(values)
    hints = field_hints(architectures)
    check_run_fields(values, hints)
    check_sae_fields(values["sae"], hints)


def check_run_fields(values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """`check_fields` for what is not an SAE's."""
    for name, value in values.items():
        if name not in ("sae", "saes", "logger"):
            check_field(name, value, hints)
    for name, value in values["logger"].items():
        check_field(f"logger.{name}", value, hints)
    if "seqpos_slice" in values:
        _check_positions(values["seqpos_slice"], values.get("context_size"))


def check_sae_fields(sae: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """`check_fields` for an SAE's fields."""
    for name, value in sae.items():
        check_field(f"sae.{name}", value, hints)
    for name in ("d_in", "d_sae"):
        if name not in sae:
            raise ValueError(f"sae.{name}: missing")


def field_hints(
    architectures: Iterable[str], config: type[object] = LanguageModelSAERunnerConfig
) -> dict[str, Any]:
    """The types of all fields of a config by name, such as "lr", "logger.run_name" or "sae.k".

    Args:
        architectures: The SAE's fields are those of any of these.
        config: The class of the config.
    """
    hints = typing.get_type_hints(config)
    groups = {"": hints, "logger.": typing.get_type_hints(hints["logger"])}
    for architecture in architectures:
        config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
        groups["sae."] = groups.get("sae.", {}) | typing.get_type_hints(config_class)
    named = {f"{group}{name}": hint for group, of in groups.items() for name, hint in of.items()}
    return named | _HINTS


def check_field(name: str, value: Any, hints: Mapping[str, Any]) -> None:
    """
    Check one field of a config.

    Args:
        name: Of the field, as in `hints`.
        value: Its value, as read from JSON.
        hints: What `field_hints` gives.

    Raises:
        ValueError: there is no such field, or its value does not fit.
    """
    if name not in hints:
        raise ValueError(f"{name}: there is no such field{suggestion(name, hints)}")
    _check_plain(name, value)
    hint: Any = Annotated[hints[name], RANGES[name]] if name in RANGES else hints[name]
    adapter: TypeAdapter[Any] = TypeAdapter(hint, config=_STRICT)
    # JSON has lists only.
    as_hinted = tuple(value) if isinstance(value, list) and name == "seqpos_slice" else value
    try:
        adapter.validate_python(as_hinted)
    except ValidationError as error:
        allowed = " or ".join(map(_allowed, error.errors()))
        null = " or null" if type(None) in typing.get_args(hints[name]) else ""
        require_allowed(False, name, value, allowed + null)


def _check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Numbers are finite and fit 64 bits, texts are short, and nothing is nested deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: is nested too deeply; allowed: {MAX_DEPTH} levels")
    if isinstance(value, int):
        require_allowed(-(2**63) <= value < 2**63, name, value, "an integer of at most 64 bits")
    elif isinstance(value, float):
        require_allowed(math.isfinite(value), name, value, "a finite number")
    elif isinstance(value, str):
        fits = len(value) <= MAX_STRING and "\0" not in value
        require_allowed(fits, name, value, f"at most {MAX_STRING:,} characters, none of them null")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(f"{name}.{shown(key)[1:-1]}", item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(name, item, depth + 1)


def _allowed(error: Mapping[str, Any]) -> str:
    """What pydantic would have taken."""
    of_item = any(isinstance(part, int) for part in error["loc"])
    if error["type"] in _BOUNDS:
        what = _BOUNDS[error["type"]].format(**error["ctx"])
    else:
        what = re.sub(r"^\w+ should (be|have) ", "", error["msg"])
    return f"each item {what}" if of_item else what


def _check_positions(seqpos_slice: Sequence[int | None], context_size: int | None) -> None:
    """As SAELens does, which then does not name the field."""
    if len(seqpos_slice) == 3:
        step = seqpos_slice[2]
        allowed = "a start and an end, or these and a step above 1"
        require_allowed(step is not None and step > 1, "seqpos_slice", seqpos_slice, allowed)
    context = LanguageModelSAERunnerConfig.context_size if context_size is None else context_size
    selected = range(context)[slice(*seqpos_slice)]
    allowed = f"what selects some of the {context} positions of context_size"
    require_allowed(len(selected) > 0, "seqpos_slice", seqpos_slice, allowed)
