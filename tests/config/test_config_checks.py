"""Configs and flags that cannot be trained are refused in one line, before a model is loaded."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse import cli
from saelens_sparse.config.messages import one_line
from tests.support.configs import (
    GONE,
    WEIGHTS,
    ModelIsLoaded,
    assert_one_line,
    config,
    train,
    work_in,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))

pytestmark = pytest.mark.filterwarnings("ignore:.*matryoshka level width.*:UserWarning")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


# A change to the good config, and what the message says of it: the field and the value, and what
# is allowed.
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    # Types.
    ({"lr": "fast"}, "lr: 'fast' cannot be used; allowed: a valid number"),
    ({"lr": None}, "lr: None cannot be used; allowed: a valid number"),
    ({"sae.k": "many"}, "sae.k: 'many' cannot be used; allowed: a valid integer"),
    ({"sae.k": 4.5}, "sae.k: 4.5 cannot be used; allowed: a valid integer"),
    ({"sae.d_in": "16"}, "sae.d_in: '16' cannot be used; allowed: a valid integer"),
    ({"sae.apply_b_dec_to_input": 1}, "sae.apply_b_dec_to_input: 1 cannot be used; allowed: a va"),
    ({"autocast": "yes"}, "autocast: 'yes' cannot be used; allowed: a valid boolean"),
    ({"model_name": 7}, "model_name: 7 cannot be used; allowed: a valid string"),
    ({"hook_head_index": "0"}, "hook_head_index: '0' cannot be used; allowed: a valid integer or "),
    ({"output_path": 7}, "output_path: 7 cannot be used; allowed: a valid string or null"),
    ({"training_tokens": True}, "training_tokens: True cannot be used; allowed: a valid integer"),
    ({"training_tokens": 1e6}, "training_tokens: 1000000.0 cannot be used; allowed: a valid integ"),
    ({"model_kwargs": [1]}, "model_kwargs: [1] cannot be used; allowed: a valid dictionary"),
    ({"exclude_special_tokens": ["<bos>"]}, "exclude_special_tokens: ['<bos>'] cannot be used"),
    (
        {"sequence_separator_token": "cls"},
        "sequence_separator_token: 'cls' cannot be used; ",
    ),
    ({"sae.metadata": None}, "sae.metadata: None cannot be used; allowed: a valid dictionary"),
    ({"logger.log_to_wandb": "no"}, "logger.log_to_wandb: 'no' cannot be used; allowed: a valid"),
    ({"logger.run_name": 3}, "logger.run_name: 3 cannot be used; allowed: a valid string or null"),
    ({"verbose": None}, "verbose: None cannot be used; allowed: a valid boolean"),
    # Objects.
    ({"sae": GONE}, "sae: missing"),
    ({"sae": 3}, "sae: 3 is not an object with settings"),
    ({"logger": GONE}, "logger: missing"),
    ({"logger": []}, "logger: [] is not an object with settings"),
    ({"sae.architecture": GONE}, "sae.architecture: None cannot be used; allowed: standard | "),
    ({"sae.architecture": "tokp"}, "sae.architecture: 'tokp' cannot be used; allowed: standard | "),
    ({"sae.architecture": ["topk"]}, "sae.architecture: ['topk'] cannot be used; allowed: "),
    ({"sae.d_in": GONE}, "sae.d_in: missing"),
    ({"sae.d_sae": GONE}, "sae.d_sae: missing"),
    # Names.
    ({"sae.kk": 3}, "sae.kk: there is no such field; did you mean sae.k?"),
    ({"sae.aux_loss_coeficient": 1}, "sae.aux_loss_coeficient: there is no such field; did you me"),
    ({"sae.l0_coefficient": 1.0}, "sae.l0_coefficient: there is no such field"),
    ({"lrr": 0.1}, "lrr: there is no such field; did you mean lr?"),
    ({"k": 3}, "k: there is no such field; did you mean sae.k?"),
    ({"sae.lr": 0.1}, "sae.lr: there is no such field; did you mean lr?"),
    ({"logger.wandb": True}, "logger.wandb: there is no such field; did you mean logger.wandb_id?"),
    ({"run_name": "x"}, "run_name: there is no such field; did you mean logger.run_name?"),
    ({"training_token": 10**6}, "training_token: there is no such field; did you mean training_t"),
    ({"": 1}, ": there is no such field"),
    ({"x" * 5000: 1}, "xxx... there is no such field"),
    # Ranges.
    ({"training_tokens": -1}, "training_tokens: -1 cannot be used; allowed: "),
    ({"training_tokens": 0}, "training_tokens: 0 cannot be used; allowed: "),
    ({"training_tokens": 999}, "training_tokens: 999 cannot be used; allowed: 1000 or more"),
    ({"training_tokens": 10**30}, "training_tokens: 1000000000000000000000000000000 cannot be use"),
    ({"seed": -(2**64)}, "seed: -18446744073709551616 cannot be used; allowed: an integer of at "),
    ({"train_batch_size_tokens": 0}, "train_batch_size_tokens: 0 cannot be used; allowed: "),
    ({"store_batch_size_prompts": 0}, "store_batch_size_prompts: 0 cannot be used; allowed: "),
    ({"context_size": 0}, "context_size: 0 cannot be used; allowed: "),
    ({"context_size": -128}, "context_size: -128 cannot be used; allowed: "),
    ({"n_batches_in_buffer": 0}, "n_batches_in_buffer: 0 cannot be used; allowed: "),
    ({"n_batches_in_buffer": 7}, "train_batch_size_tokens: 1000 is more than the buffer holds"),
    ({"n_batches_for_norm_estimate": 0}, "n_batches_for_norm_estimate: 0 cannot be used; allowed"),
    ({"sae.d_sae": 0}, "sae.d_sae: 0 cannot be used; allowed: 1 or more"),
    ({"sae.d_in": -16}, "sae.d_in: -16 cannot be used; allowed: 1 or more"),
    ({"sae.k": 0}, "sae.k: 0 cannot be used; allowed: above 0"),
    ({"sae.k": 65}, "k must be at most d_sae=64; got 65"),
    ({"sae.k": 65, "sae.architecture": "topk"}, "sae.k: 65 cannot be used; allowed: at most sae.d"),
    ({"sae.decoder_init_norm": -0.1}, "decoder_init_norm must be positive or None; got -0.1"),
    ({"lr": 0}, "lr: 0 cannot be used; allowed: above 0"),
    ({"lr": -3e-4}, "lr: -0.0003 cannot be used; allowed: above 0"),
    ({"lr": math.inf}, "lr: inf cannot be used; allowed: a finite number"),
    ({"lr": math.nan}, "lr: nan cannot be used; allowed: a finite number"),
    ({"lr_end": -math.inf}, "lr_end: -inf cannot be used; allowed: a finite number"),
    ({"lr_end": -1e-5}, "lr_end: -1e-05 cannot be used; allowed: 0 or more"),
    ({"sae.aux_loss_coefficient": math.nan}, "sae.aux_loss_coefficient: nan cannot be used; allow"),
    ({"sae.decoder_init_norm": math.inf}, "sae.decoder_init_norm: inf cannot be used; allowed: a"),
    ({"model_kwargs": {"a": [{"b": math.nan}]}}, "model_kwargs.a.b: nan cannot be used; allowed: "),
    ({"dead_feature_threshold": math.nan}, "dead_feature_threshold: nan cannot be used; allowed: "),
    ({"adam_beta1": 1.0}, "adam_beta1: 1.0 cannot be used; allowed: below 1"),
    ({"adam_beta2": -0.1}, "adam_beta2: -0.1 cannot be used; allowed: 0 or more"),
    ({"activations_mixing_fraction": 1.5}, "activations_mixing_fraction: 1.5 cannot be used; allo"),
    ({"dead_feature_window": -1}, "dead_feature_window: -1 cannot be used; allowed: "),
    ({"feature_sampling_window": 0}, "feature_sampling_window: 0 cannot be used; allowed: "),
    (
        {"n_checkpoints": -1},
        "n_checkpoints: -1 cannot be used; allowed: 0 or more",
    ),
    ({"n_eval_batches": -1}, "n_eval_batches: -1 cannot be used; allowed: "),
    (
        {"eval_batch_size_prompts": 0},
        "eval_batch_size_prompts: 0 cannot be used; allowed: 1 or more or null",
    ),
    ({"prefetch_llm_batches": -2}, "prefetch_llm_batches: -2 cannot be used; allowed: "),
    ({"sequence_separator_token": -1}, "sequence_separator_token: -1 cannot be used; allowed: 0 o"),
    ({"logger.wandb_log_frequency": 0}, "logger.wandb_log_frequency: 0 cannot be used; allowed: "),
    ({"logger.eval_every_n_wandb_logs": 0}, "logger.eval_every_n_wandb_logs: 0 cannot be used; "),
    # Lengths.
    ({"model_name": "x" * 5000}, "xxx' cannot be used; allowed: at most 4,096 characters"),
    ({"hook_name": "x " * 5000}, "x ' cannot be used; allowed: at most 4,096 characters"),
    ({"output_path": "deep/" * 1000}, "eep/' cannot be used; allowed: at most 4,096 characters"),
    ({"output_path": "a" * 300}, "output_path: 'aaaa"),
    ({"hook_name": "a\0b"}, "hook_name: 'a\\x00b' cannot be used; allowed: at most 4,096 characte"),
    ({"model_name": "\ud800"}, "model_name: '\\ud800' cannot be used; allowed: a valid string"),
    ({"model_name": ""}, "model_name: '' cannot be used; allowed: at least 1 character"),
    ({"output_path": ""}, "output_path: '' cannot be used; allowed: at least 1 character or null"),
    ({"seqpos_slice": []}, "seqpos_slice: [] cannot be used; allowed: at least 1 item"),
    # Names that exist, or do not.
    (
        {"lr_scheduler_name": "linear"},
        "lr_scheduler_name: 'linear' cannot be used; allowed: ",
    ),
    ({"dtype": "float31"}, "dtype: 'float31' cannot be used; allowed: float32 | "),
    ({"sae.dtype": "int8", "sae.architecture": "topk"}, "sae.dtype: 'int8' cannot be used; allowe"),
    ({"sae.dtype": "float31"}, "float31"),
    ({"sae.implementation": "fast"}, "sae.implementation: 'fast' cannot be used; allowed: 'auto',"),
    ({"sae.normalize_activations": "loud"}, "sae.normalize_activations: 'loud' cannot be used; al"),
    ({"device": "abacus"}, "device: 'abacus' cannot be used here: "),
    ({"device": "cuda:99"}, "device: 'cuda:99' cannot be used here: "),
    ({"llm_device": ""}, "llm_device: '' cannot be used here: "),
    ({"act_store_device": "nowhere"}, "act_store_device: 'nowhere' cannot be used here: "),
    ({"sae.device": "meta"}, "sae.device: 'meta' cannot be used here: its tensors have no values"),
    (
        {"model_class_name": "GPT"},
        "model_class_name: 'GPT' cannot be used; allowed: Hooked",
    ),
    (
        {"compile_sae": True, "sae_compilation_mode": "fastest"},
        "sae_compilation_mode: 'fastest'",
    ),
    (
        {"model_class_name": "HookedTransformer", "model_name": "gpt9"},
        "model_name: 'gpt9' cannot be used; allowed: a model of TransformerLens",
    ),
    # Paths.
    ({"dataset_path": ""}, "dataset_path: '' cannot be used; allowed: a data set's name or path"),
    ({"dataset_path": "./nowhere"}, "dataset_path: './nowhere' cannot be used; allowed: a path th"),
    ({"model_name": "/no/where"}, "model_name: '/no/where' cannot be used; allowed: a path that e"),
    ({"model_name": "./" + "x" * 300}, "model_name: './xxx"),
    ({"use_cached_activations": True}, "cached_activations_path: 'activations/"),
    ({"output_path": "file"}, "output_path: 'file' cannot be written to: it is not a folder"),
    ({"checkpoint_path": "file/x"}, "checkpoint_path: 'file/x' cannot be written to: Not a direc"),
    ({"output_path": "/proc/x"}, "output_path: '/proc/x' cannot be written to: "),
    ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint: 'nowhere' cannot be used; "),
    ({"resume_from_checkpoint": "file"}, f"'file' cannot be used, for it has no {WEIGHTS}, train"),
    ({"resume_from_checkpoint": "cut"}, f"'cut' cannot be used, for it has no {WEIGHTS}, train"),
    ({"resume_from_checkpoint": "cut/1"}, f"'cut/1' cannot be used, for it has no {WEIGHTS}; allo"),
    ({"from_pretrained_path": "cut/1"}, f"'cut/1' cannot be used, for it has no {WEIGHTS}; allow"),
    ({"from_pretrained_path": "file"}, "from_pretrained_path: 'file' cannot be used, for it has "),
    ({"from_pretrained_path": "x" * 300}, "from_pretrained_path: 'xxx"),
    # Settings that contradict each other.
    ({"lr_decay_steps": 100}, "lr_warm_up_steps + lr_decay_steps: 0 + 100 leaves nothing of the 1"),
    (
        {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 101},
        "n_restart_cycles: 101 cannot be used; allowed: at most 100",
    ),
    (
        {"lr_scheduler_name": "cosineannealing", "lr_end": 0.0, "lr_decay_steps": 5},
        "lr_end: 0.0 cannot be used; allowed: above 0 where lr_decay_steps is",
    ),
    ({"seqpos_slice": [5, 5]}, "seqpos_slice: [5, 5] cannot be used; allowed: what selects some"),
    ({"seqpos_slice": [0, 50, 1]}, "seqpos_slice: [0, 50, 1] cannot be used; allowed: a start and"),
    ({"seqpos_slice": [0, "end"]}, "seqpos_slice: [0, 'end'] cannot be used; allowed: each item a"),
    ({"seqpos_slice": [0, 1, 2, 3]}, "seqpos_slice: [0, 1, 2, 3] cannot be used; allowed: at most"),
    (
        {"use_chat_formatting": True},
        "use_chat_formatting and is_dataset_tokenized cannot both be True",
    ),
    (
        {
            "model_class_name": "HookedTransformer",
            "model_name": "gpt2",
            "hook_name": "blocks.0.hook_mlp_out",
            "hook_head_index": 3,
        },
        "hook_head_index: 3 cannot be used, for the activations of hook_name, 'blocks.0.hook_mlp_o",
    ),
    (
        {"sae.architecture": "matryoshka_batchtopk", "sae.matryoshka_widths": [32, 16]},
        "sae: cfg.matryoshka_widths must be strictly increasing. (matryoshka_widths: [32, 16, 64])",
    ),
    (
        {"logger": {"log_to_wandb": True, "wandb_project": "a/b"}},
        "logger.wandb_project: 'a/b' cannot be used: Invalid project name",
    ),
    (
        {"logger": {"log_to_wandb": True, "wandb_id": "a:b"}},
        "logger.wandb_id: 'a:b' cannot be used: Run ID cannot contain the characters",
    ),
]


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS, ids=[m for _, m in BAD_FIELDS])
def test_a_bad_field_is_named_with_its_value(
    changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line(train(config(changes)), capsys, message)


GOOD_FLAGS = [
    *("--architecture", "topk_sparse", "--model_class_name", "AutoModelForCausalLM"),
    *("--model_name", "./model", "--hook_name", "model.layers.0", "--dataset_path", "./text"),
    *("--train_batch_size_tokens", "1000", "--log_to_wandb", "False"),
]
BAD_FLAGS = [
    ("--lr inf", "lr: inf cannot be used; allowed: a finite number"),
    ("--lr nan", "lr: nan cannot be used; allowed: a finite number"),
    ("--lr fast", "--lr: invalid float value: 'fast'"),
    ("--lr", "--lr: expected one argument"),
    ("--training_tokens -1", "training_tokens: -1 cannot be used; allowed: "),
    (f"--training_tokens {'9' * 6000}", "--training_tokens: invalid int value: '999"),
    (f"--training_tokens {'9' * 400}", "training_tokens: 9999999999"),
    (f"--context_size={'9' * 400}", "context_size: 9999999999"),
    ("--train_batch_size_tokens 0", "train_batch_size_tokens: 0 cannot be used; allowed: "),
    ("--wandb_log_frequency 0", "logger.wandb_log_frequency: 0 cannot be used; allowed: "),
    ("--feature_sampling_window=0", "feature_sampling_window: 0 cannot be used; allowed: "),
    ("--k 0", "k must be at least 1; got 0"),
    ("--k 4.5", "-k/--k: invalid int value: '4.5'"),
    ("--d_sae -3", "d_sae must be at least 1; got -3"),
    ("--aux_loss_coefficient nan", "nan"),
    ("--adam_beta1 1", "adam_beta1: 1.0 cannot be used; allowed: below 1"),
    ("--lrr 3", "--lrr: there is no such flag; did you mean --lr?"),
    ("--l0_coeficient=3", "--l0_coeficient: there is no such flag; did you mean --l0_coefficient?"),
    ("stray", "stray: there is no such flag"),
    ("--l 3", "ambiguous option: --l could match"),
    ("--architecture tokp", "invalid choice: 'tokp' (choose from 'standard', "),
    ("--implementation fast", "--implementation: invalid choice: 'fast'"),
    ("--lr_scheduler_name linear", "lr_scheduler_name: 'linear' cannot be used; allowed: constant"),
    ("--dtype float31", "dtype: 'float31' cannot be used; allowed: float32 | "),
    ("--device abacus", "device: 'abacus' cannot be used here: "),
    ("--exclude_special_tokens x", "--exclude_special_tokens: invalid bool|list value: 'x'"),
    ("--seqpos_slice 5 5", "(5, 5) results in an empty range"),
    ("--model_kwargs {", "--model_kwargs: invalid json_dict value: '{'"),
    ('--model_kwargs {"a":NaN}', "model_kwargs.a: nan cannot be used; allowed: a finite number"),
    (f"--model_kwargs {'[' * 100_000}", "nested too deeply"),
    (f"--model_name {'x' * 5000}", "xxx' cannot be used; allowed: at most 4,096 characters"),
    (f"--output_path {'deep/' * 900}", "' cannot be used; allowed: at most 4,096 characters"),
    ("--output_path file", "output_path: 'file' cannot be written to: it is not a folder"),
    ("--dataset_path ./nowhere", "dataset_path: './nowhere' cannot be used; allowed: a path that "),
    ("--resume_from_checkpoint nowhere", "resume_from_checkpoint: 'nowhere' cannot be used; "),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[m for _, m in BAD_FLAGS])
def test_a_bad_flag_is_named_with_its_value(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line(cli.main(["train", *GOOD_FLAGS, *flags.split()]), capsys, message)


ARCHITECTURE_FIELDS: dict[str, dict[str, Any]] = {
    "matryoshka_batchtopk": {"matryoshka_widths": [16, 64]},
    "matching_pursuit": {"decoder_init_norm": 1.0},
}
GOOD_CHANGES: dict[str, dict[str, Any]] = {
    "the base": {},
    "nulls": {
        **dict.fromkeys(("hook_head_index", "lr_end", "llm_device", "act_store_device")),
        **dict.fromkeys(("eval_batch_size_prompts", "model_from_pretrained_kwargs")),
        **dict.fromkeys(("output_path", "checkpoint_path", "sequence_separator_token")),
    },
    "whole numbers as learning rates": {"lr": 1, "lr_end": 0},
    "an upper-case scheduler": {"lr_scheduler_name": "CosineAnnealing"},
    "warm restarts": {"lr_scheduler_name": "cosineannealingwarmrestarts", "n_restart_cycles": 100},
    "a schedule": {"lr_warm_up_steps": 49, "lr_decay_steps": 50},
    "betas of 0": {"adam_beta1": 0, "adam_beta2": 0.0},
    "torch's names of dtypes": {"dtype": "torch.float16", "sae.dtype": "torch.bfloat16"},
    "positions": {"seqpos_slice": [5, -5]},
    "positions with a step": {"seqpos_slice": [None, 120, 2]},
    "tokens": {"exclude_special_tokens": [0, 50256], "sequence_separator_token": 0},
    "prefetching": {"prefetch_llm_batches": 3, "act_store_device": "with_model"},
    "no mixing": {"activations_mixing_fraction": 0},
    "resumed": {"resume_from_checkpoint": "runs/512"},
    "resumed from a damaged checkpoint beside a whole one": {"resume_from_checkpoint": "runs/1024"},
    "resumed from a run's folder": {"resume_from_checkpoint": "runs"},
    "pretrained": {"from_pretrained_path": "runs/512"},
    "cached": {"use_cached_activations": True, "cached_activations_path": "activations"},
    "a name of a hub": {"model_name": "someone/model", "dataset_path": "someone/text"},
    "rescaled": {"sae.normalize_activations": "constant_norm_rescale"},
    "metadata": {"sae.metadata": {"model_name": "x", "l0": 3.5, "anything": [1, {"a": None}]}},
    "Weights & Biases": {"logger": {"log_to_wandb": True, "wandb_id": "a1", "wandb_project": "p"}},
    "a head": {
        "model_class_name": "HookedTransformer",
        "model_name": "gpt2",
        "hook_name": "blocks.0.attn.hook_z",
        "hook_head_index": 3,
    },
    "a compilation mode that is not used": {"sae_compilation_mode": "?"},
    **{
        architecture: {
            "sae": {"architecture": architecture, "d_in": 16, "d_sae": 64}
            | ({"k": 4} if "k" in config_class.__dataclass_fields__ else {})
            | ARCHITECTURE_FIELDS.get(architecture.removesuffix("_sparse"), {})
        }
        for architecture, (_, config_class) in SAE_TRAINING_CLASS_REGISTRY.items()
    },
}


@pytest.mark.parametrize("name", GOOD_CHANGES)
def test_a_good_config_gets_as_far_as_loading_its_model(name: str) -> None:
    with pytest.raises(ModelIsLoaded):
        train(config(GOOD_CHANGES[name]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_repository_gets_as_far_as_loading_its_model(path: Path) -> None:
    values = json.loads(path.read_text())
    # Those for a GPU, here; and what `scripts/setup.sh` makes.
    values["device"] = values["sae"]["device"] = "cpu"
    for name in ("smollm2-135m", "python-docs", "activations"):
        (Path(".cache") / name).mkdir(parents=True)
    with pytest.raises(ModelIsLoaded):
        train(values)


def test_good_flags_get_as_far_as_loading_the_model() -> None:
    with pytest.raises(ModelIsLoaded):
        cli.main(["train", *GOOD_FLAGS, "--lr", "1", "--seqpos_slice", "1", "-1"])


def test_a_full_disk_is_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1000))
    message = "output_path: 'output' has room for 0 MB; this training needs"
    assert_one_line(train(config({})), capsys, message)


def test_messages_stay_short_and_keep_their_words() -> None:
    assert one_line("a  b\n  c") == "a  b c"
    assert re.fullmatch(r"see x{200}\.\.\. there", one_line(f"see {'x' * 900} there"))
    assert len(one_line("word " * 1000)) < 1010
