"""What can be known of a run's activations before its language model is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.load_model import HookedProxyLM
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_pretrained_model_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from saelens_sparse.activations.checks import check_cache_size, check_dataset_size, check_hooks
from saelens_sparse.activations.shards.manifest import is_sharded
from saelens_sparse.activations.shards.match import check_shards
from saelens_sparse.config.checks import check_buffer

_Config = LanguageModelSAERunnerConfig[Any] | MultiSAETrainingRunnerConfig


def check_activations(cfg: _Config, dataset: object = None, model: object = None) -> None:
    """
    Check that a run's buffer, dataset and hooks can work together.

    Args:
        cfg: Of the run.
        dataset: Its `override_dataset`.
        model: Its `override_model`. Without one, the hooks of the model that the config names are
            looked up, if its architecture can be known without its weights.

    Raises:
        ValueError: the buffer holds less than a batch, the dataset less than the buffer, the model
            has no such hook, or a cache of activations is not whole or not of this run's.
    """
    context_size = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    prompts = cfg.n_batches_in_buffer
    check_buffer(prompts, context_size, cfg.train_batch_size_tokens)
    if getattr(cfg, "use_cached_activations", False):
        _check_cache(cfg)
        return
    tokenized = {"tokens", "input_ids"} if not cfg.use_chat_formatting else set[str]()
    if isinstance(dataset, Dataset) and tokenized & {*dataset.column_names}:
        check_dataset_size(len(dataset), prompts, "override_dataset")
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        names = [cfg.hook_name]
    else:
        names = [*cfg.hook_names_per_sae.values()]
    known = hooks_of(model) if model is not None else hooks_of(_without_weights(cfg))
    if known is not None:
        check_hooks(names, known)


def hooks_of(model: object) -> Iterable[str] | None:
    """The names of a model's hooks; None if they are not known."""
    if isinstance(model, HookedTransformer | HookedProxyLM):
        return model.hook_dict
    if isinstance(model, PreTrainedModel):
        return [name for name, _ in model.named_modules()]
    return None


def _check_cache(cfg: Any) -> None:
    if is_sharded(cfg.cached_activations_path):
        check_shards(cfg)
        return
    try:
        rows = load_from_disk(cfg.cached_activations_path)
    except (OSError, ValueError, TypeError):
        return  # SAELens says why
    check_cache_size(len(rows), cfg.store_batch_size_prompts)


def _without_weights(cfg: _Config) -> object:
    """The model that a config names, on the meta device; None if that cannot be made."""
    options = cfg.model_from_pretrained_kwargs or {}
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            if cfg.model_class_name == "HookedTransformer":
                layers = options.get("first_n_layers")
                config = get_pretrained_model_config(cfg.model_name, first_n_layers=layers)
                config.tokenizer_name = None  # its size is known
                return HookedTransformer(config, move_to_device=False)
            if cfg.model_class_name == "AutoModelForCausalLM":
                shared = {n: options[n] for n in ("revision", "trust_remote_code") if n in options}
                config = AutoConfig.from_pretrained(cfg.model_name, **shared)
                trusted = bool(options.get("trust_remote_code"))
                return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        except Exception:  # of many libraries; loading the model says what is wrong
            return None
    return None
