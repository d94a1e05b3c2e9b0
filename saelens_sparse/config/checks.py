"""A runner config that cannot be trained is refused at once, not after minutes of loading."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import wandb
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    DTYPE_MAP,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_sparse.config.messages import shown, suggestion

_RunConfig = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig

SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
MODEL_CLASSES = ("HookedTransformer", "HookedMamba", "AutoModelForCausalLM")
COMPILATION_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
# Last parts of the names of TransformerLens's hooks whose activations have a head index.
HOOKS_WITH_HEADS = {
    *(f"hook_{name}" for name in ("q", "k", "v", "z", "result", "rot_q", "rot_k")),
    *(f"hook_{name}" for name in ("q_input", "k_input", "v_input", "attn_in")),
}
PRETRAINED_FILES = (SAE_WEIGHTS_FILENAME, SAE_CFG_FILENAME)
CHECKPOINT_FILES = (
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
)
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
        (Field(min_length=1), ["checkpoint_path", "hook_name", "model_name", "output_path"]),
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
    _require(architecture in known, "sae.architecture", architecture, " | ".join(known))


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
        _require(False, name, value, allowed + null)


def check_training(cfg: _RunConfig) -> None:
    """
    Check that a training can begin, as far as that shows without loading a model or data.

    Args:
        cfg: A config of one SAE or of several, whose fields have been checked one by one.

    Raises:
        ValueError: with the first setting that cannot work, and what can.
    """
    _require(cfg.dtype in DTYPE_MAP, "dtype", cfg.dtype, " | ".join(DTYPE_MAP))
    for name in ("device", "llm_device", "act_store_device"):
        _check_device(name, getattr(cfg, name))
    _check_schedule(cfg)
    _check_batches(cfg)
    _check_model(cfg)
    _check_paths(cfg)
    if cfg.logger.log_to_wandb:
        _check_wandb(cfg)
    if not isinstance(cfg, MultiSAETrainingRunnerConfig):
        _check_sae(cfg.sae)
        return
    for name, sae in cfg.saes.items():
        with named_sae(name):
            _check_sae(sae)


@contextmanager
def named_sae(name: str) -> Generator[None]:
    """Within, messages that speak of `sae` speak of one of several by its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"\bsae(?=[.:])", lambda _: f"saes.{name}", str(error))) from error


def check_buffer(n_batches_in_buffer: int, context_size: int, batch_size: int) -> None:
    """
    Check that a batch fits into the buffer.

    Args:
        n_batches_in_buffer: SAELens's option: how many prompts the buffer holds.
        context_size: Tokens of a prompt that activations are taken of.
        batch_size: `train_batch_size_tokens`.

    Raises:
        ValueError: it does not; the message says what to set.
    """
    rows = n_batches_in_buffer * context_size
    if rows < batch_size:
        least = -(-batch_size // context_size)
        raise ValueError(
            f"n_batches_in_buffer: {n_batches_in_buffer} prompts of {context_size} tokens are "
            f"{rows} activations, fewer than train_batch_size_tokens, {batch_size}; allowed: "
            f"{least} or more, and {8 * least} mix well"
        )


def device_problem(device: str | None) -> str | None:
    """Why a device cannot be used here; None where it can."""
    try:
        if torch.empty(0, device=device).is_meta:
            return f"{shown(device)} cannot be used here: its tensors have no values"
    except (RuntimeError, AssertionError) as error:
        return f"{shown(device)} cannot be used here: {str(error).splitlines()[0]}"
    return None


def _check_plain(name: str, value: Any, depth: int = 0) -> None:
    """Numbers are finite and fit 64 bits, texts are short, and nothing is nested deeply."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: is nested too deeply; allowed: {MAX_DEPTH} levels")
    if isinstance(value, int):
        _require(-(2**63) <= value < 2**63, name, value, "an integer of at most 64 bits")
    elif isinstance(value, float):
        _require(math.isfinite(value), name, value, "a finite number")
    elif isinstance(value, str):
        fits = len(value) <= MAX_STRING and "\0" not in value
        _require(fits, name, value, f"at most {MAX_STRING:,} characters, none of them null")
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
        _require(step is not None and step > 1, "seqpos_slice", seqpos_slice, allowed)
    context = LanguageModelSAERunnerConfig.context_size if context_size is None else context_size
    selected = range(context)[slice(*seqpos_slice)]
    allowed = f"what selects some of the {context} positions of context_size"
    _require(len(selected) > 0, "seqpos_slice", seqpos_slice, allowed)


def _check_schedule(cfg: _RunConfig) -> None:
    scheduler, steps = cfg.lr_scheduler_name, cfg.total_training_steps
    allowed = " | ".join(SCHEDULERS)
    _require(scheduler.lower() in SCHEDULERS, "lr_scheduler_name", scheduler, allowed)
    batch, tokens = cfg.train_batch_size_tokens, cfg.training_tokens
    _require(tokens >= batch, "training_tokens", tokens, f"{batch} or more, which is one batch")
    scheduled = cfg.lr_warm_up_steps + cfg.lr_decay_steps
    if scheduled and scheduled >= steps:
        raise ValueError(
            f"lr_warm_up_steps + lr_decay_steps: {cfg.lr_warm_up_steps} + {cfg.lr_decay_steps} "
            f"leaves nothing of the {steps} training steps"
        )
    if scheduler.lower() == "cosineannealingwarmrestarts":
        allowed = f"at most {steps - scheduled}, the steps between warm-up and decay"
        cycles = cfg.n_restart_cycles
        _require(cycles <= steps - scheduled, "n_restart_cycles", cycles, allowed)
    if scheduler.lower() != "constant" and cfg.lr_decay_steps:
        _require(cfg.lr_end != 0, "lr_end", cfg.lr_end, "above 0 where lr_decay_steps is")


def _check_batches(cfg: _RunConfig) -> None:
    context_size = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    check_buffer(cfg.n_batches_in_buffer, context_size, cfg.train_batch_size_tokens)
    separator = cfg.sequence_separator_token
    if isinstance(separator, int):
        _require(separator >= 0, "sequence_separator_token", separator, "0 or more")


def _check_model(cfg: _RunConfig) -> None:
    model_class = cfg.model_class_name
    _require(
        model_class in MODEL_CLASSES, "model_class_name", model_class, " | ".join(MODEL_CLASSES)
    )
    for part in ("llm", "sae"):
        mode = getattr(cfg, f"{part}_compilation_mode", None)
        if mode is not None and getattr(cfg, f"compile_{part}"):
            allowed = " | ".join(COMPILATION_MODES)
            _require(mode in COMPILATION_MODES, f"{part}_compilation_mode", mode, allowed)
    if model_class != "HookedTransformer":
        return
    try:
        get_official_model_name(cfg.model_name)
    except ValueError:
        allowed = "a model of TransformerLens; other models have another model_class_name"
        _require(False, "model_name", cfg.model_name, allowed)
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        for name, head in cfg.hook_head_indices_per_sae.items():
            _check_head(f"hook_head_indices.{name}", head, cfg.hook_names_per_sae[name])
    else:
        _check_head("hook_head_index", cfg.hook_head_index, cfg.hook_name)


def _check_head(name: str, head: int | None, hook: str) -> None:
    if head is not None and hook.rpartition(".")[2] not in HOOKS_WITH_HEADS:
        raise ValueError(
            f"{name}: {head} cannot be used, for the activations of hook_name, "
            f"{shown(hook)}, have no heads; allowed: null"
        )


def _check_paths(cfg: _RunConfig) -> None:
    names = ["cached_activations_path"] if getattr(cfg, "use_cached_activations", False) else []
    # Other names may be those of a hub.
    local = (".", "/", "~")
    names += [n for n in ("dataset_path", "model_name") if getattr(cfg, n).startswith(local)]
    for name in names:
        path = getattr(cfg, name)
        _require(_exists(Path(path)), name, path, "a path that exists")
    _require(cfg.dataset_path != "", "dataset_path", cfg.dataset_path, "a data set's name or path")
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        return  # its checkpoints have a folder for each SAE; the runner looks into them
    for name, files in (
        ("from_pretrained_path", PRETRAINED_FILES),
        ("resume_from_checkpoint", CHECKPOINT_FILES),
    ):
        path = getattr(cfg, name)
        if path is None:
            continue
        _require(_exists(Path(path)), name, path, "a path that exists")
        missing = _missing(Path(path), files)
        if missing and not (files is CHECKPOINT_FILES and _has_whole_one_near(Path(path))):
            raise ValueError(
                f"{name}: {shown(path)} cannot be used, for it has no {', '.join(missing)}; "
                "allowed: the folder of a checkpoint"
            )


def _missing(folder: Path, files: Iterable[str]) -> list[str]:
    return [file for file in files if not _exists(folder / file)]


def _has_whole_one_near(folder: Path) -> bool:
    """Whether a whole checkpoint is in or beside a folder: the runner can resume from that."""
    near = [*folder.iterdir(), *folder.absolute().parent.iterdir()] if folder.is_dir() else []
    return any(not _missing(other, CHECKPOINT_FILES) for other in near)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that cannot be looked into
        return False


def _check_wandb(cfg: _RunConfig) -> None:
    for name, setting in (
        ("wandb_project", "project"),
        ("wandb_id", "run_id"),
        ("wandb_entity", "entity"),
        ("run_name", "run_name"),
    ):
        value = getattr(cfg.logger, name)
        try:
            wandb.Settings(**{setting: value})
        except (wandb.Error, ValueError) as error:
            raise ValueError(f"logger.{name}: {shown(value)} cannot be used: {error}") from error


def _check_sae(sae: TrainingSAEConfig) -> None:
    """Also what the SAE itself refuses: it is made on the meta device, where it takes no memory."""
    k = getattr(sae, "k", None)
    if k is not None:
        _require(k <= sae.d_sae, "sae.k", k, f"at most sae.d_sae, {sae.d_sae}")
    _require(sae.dtype in DTYPE_MAP, "sae.dtype", sae.dtype, " | ".join(DTYPE_MAP))
    _check_device("sae.device", sae.device)
    values = {**sae.to_dict(), "device": "meta"}
    del values["metadata"]
    try:
        TrainingSAE.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sae: {error}{named_values(error, values)}") from error
    except RuntimeError:
        pass  # an architecture that cannot be made there


def named_values(error: Exception, values: Mapping[str, Any]) -> str:
    """The values of the settings that an error speaks of and does not show, in parentheses."""
    words = set(re.findall(r"[\w.]+", str(error)))
    named = [
        f"{name}: {shown(value)}"
        for name, value in values.items()
        if not words.isdisjoint({name, f"cfg.{name}"}) and shown(value) not in words
    ]
    return f" ({', '.join(named)})" if named else ""


def _check_device(name: str, device: str | None) -> None:
    if (problem := device_problem(device)) is not None:
        raise ValueError(f"{name}: {problem}")


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}: {shown(value)} cannot be used; allowed: {allowed}")
