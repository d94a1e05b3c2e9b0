"""A runner config that cannot be trained is refused at once, not after minutes of loading."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    DTYPE_MAP,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from transformer_lens.loading_from_pretrained import get_official_model_name

from saelens_sparse.config.messages import named_sae, named_values, shown
from saelens_sparse.config.require import require_allowed

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


def check_training(cfg: _RunConfig) -> None:
    """
    Check that a training can begin, as far as that shows without loading a model or data.

    Args:
        cfg: A config of one SAE or of several, whose fields have been checked one by one.

    Raises:
        ValueError: with the first setting that cannot work, and what can.
    """
    require_allowed(cfg.dtype in DTYPE_MAP, "dtype", cfg.dtype, " | ".join(DTYPE_MAP))
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


def _check_schedule(cfg: _RunConfig) -> None:
    scheduler, steps = cfg.lr_scheduler_name, cfg.total_training_steps
    allowed = " | ".join(SCHEDULERS)
    require_allowed(scheduler.lower() in SCHEDULERS, "lr_scheduler_name", scheduler, allowed)
    batch, tokens = cfg.train_batch_size_tokens, cfg.training_tokens
    require_allowed(
        tokens >= batch, "training_tokens", tokens, f"{batch} or more, which is one batch"
    )
    scheduled = cfg.lr_warm_up_steps + cfg.lr_decay_steps
    if scheduled and scheduled >= steps:
        raise ValueError(
            f"lr_warm_up_steps + lr_decay_steps: {cfg.lr_warm_up_steps} + {cfg.lr_decay_steps} "
            f"leaves nothing of the {steps} training steps"
        )
    if scheduler.lower() == "cosineannealingwarmrestarts":
        allowed = f"at most {steps - scheduled}, the steps between warm-up and decay"
        cycles = cfg.n_restart_cycles
        require_allowed(cycles <= steps - scheduled, "n_restart_cycles", cycles, allowed)
    if scheduler.lower() != "constant" and cfg.lr_decay_steps:
        require_allowed(cfg.lr_end != 0, "lr_end", cfg.lr_end, "above 0 where lr_decay_steps is")


def _check_batches(cfg: _RunConfig) -> None:
    context_size = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    check_buffer(cfg.n_batches_in_buffer, context_size, cfg.train_batch_size_tokens)
    separator = cfg.sequence_separator_token
    if isinstance(separator, int):
        require_allowed(separator >= 0, "sequence_separator_token", separator, "0 or more")


def _check_model(cfg: _RunConfig) -> None:
    model_class = cfg.model_class_name
    require_allowed(
        model_class in MODEL_CLASSES, "model_class_name", model_class, " | ".join(MODEL_CLASSES)
    )
    for part in ("llm", "sae"):
        mode = getattr(cfg, f"{part}_compilation_mode", None)
        if mode is not None and getattr(cfg, f"compile_{part}"):
            allowed = " | ".join(COMPILATION_MODES)
            require_allowed(mode in COMPILATION_MODES, f"{part}_compilation_mode", mode, allowed)
    if model_class != "HookedTransformer":
        return
    try:
        get_official_model_name(cfg.model_name)
    except ValueError:
        allowed = "a model of TransformerLens; other models have another model_class_name"
        require_allowed(False, "model_name", cfg.model_name, allowed)
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
        require_allowed(_exists(Path(path)), name, path, "a path that exists")
    require_allowed(
        cfg.dataset_path != "", "dataset_path", cfg.dataset_path, "a data set's name or path"
    )
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        return  # its checkpoints have a folder for each SAE; the runner looks into them
    for name, files in (
        ("from_pretrained_path", PRETRAINED_FILES),
        ("resume_from_checkpoint", CHECKPOINT_FILES),
    ):
        path = getattr(cfg, name)
        if path is None:
            continue
        require_allowed(_exists(Path(path)), name, path, "a path that exists")
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
        require_allowed(k <= sae.d_sae, "sae.k", k, f"at most sae.d_sae, {sae.d_sae}")
    require_allowed(sae.dtype in DTYPE_MAP, "sae.dtype", sae.dtype, " | ".join(DTYPE_MAP))
    _check_device("sae.device", sae.device)
    values = {**sae.to_dict(), "device": "meta"}
    del values["metadata"]
    try:
        TrainingSAE.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sae: {error}{named_values(error, values)}") from error
    except RuntimeError:
        pass  # an architecture that cannot be made there


def _check_device(name: str, device: str | None) -> None:
    if (problem := device_problem(device)) is not None:
        raise ValueError(f"{name}: {problem}")
