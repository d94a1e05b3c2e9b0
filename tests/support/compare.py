"""A language model, a text and a runner config so small that comparing two sides takes seconds."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(60)]
D_IN = 16


def make_model(folder: Path) -> None:
    """A Llama of random weights, with a tokenizer of whole words."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=D_IN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(folder)


def make_text(folder: Path) -> None:
    folder.mkdir()
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=200))}) for _ in range(300)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")


def make_config(folder: Path, **changes: Any) -> Path:
    """A runner config whose inputs lie in `folder`, as a file there."""
    if not (folder / "model").exists():
        make_model(folder / "model")
        make_text(folder / "text")
    config = {
        "sae": {
            "architecture": "topk_sparse",
            "d_in": D_IN,
            "d_sae": 64,
            "k": 4,
            "normalize_activations": "expected_average_only_in",
        },
        "model_name": str(folder / "model"),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.0",
        "dataset_path": str(folder / "text"),
        "dataset_trust_remote_code": False,
        "is_dataset_tokenized": False,
        "context_size": 32,
        "n_batches_in_buffer": 16,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": 128,
        "training_tokens": 128 * 30,
        "n_batches_for_norm_estimate": 2,
        "dead_feature_window": 10,
        "n_eval_batches": 2,
        "lr": 0.01,
        "exclude_special_tokens": True,
        "logger": {"log_to_wandb": False},
    } | changes
    path = folder / "tiny.json"
    path.write_text(json.dumps(config))
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """What every file in a folder holds, by its path; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
