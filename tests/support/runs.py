"""Configurations of runs so small that they take a second."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from safetensors.torch import load_file

from saelens_sparse import SparseMultiSAETrainingRunnerConfig, SparseTopKTrainingSAEConfig

CONTEXT, VOCABULARY, D_MODEL = 16, 50, 16
D_SAE, K = 128, 4
HOOK = "blocks.0.hook_mlp_out"
N_TOKENS, BATCH = 1280, 64
Config = type[TrainingSAEConfig]
BOTH: list[Config] = [TopKTrainingSAEConfig, SparseTopKTrainingSAEConfig]
# Runs SAELens's stock runner; see the fixture `run`.
Run = Callable[..., LanguageModelSAETrainingRunner]
# Runs a scenario of `hit_runs` and returns its exit status; see the fixture `train`.
Train = Callable[..., int]
# What a checkpoint holds of each SAE, and of the run.
SAE_FILES = {
    "sae_weights.safetensors",
    "cfg.json",
    "sparsity.safetensors",
    "trainer_state.pt",
    "activation_scaler.json",
}
RUN_FILES = {"activations_store_state.safetensors", "runner_cfg.json"}
what_libraries_say = [
    # What SAELens, TransformerLens and datasets say about tiny data and about themselves.
    pytest.mark.filterwarnings("ignore:.*dataset.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*sourceTensor.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*HookedTransformer is deprecated.*"),
]


def sae_config(config_class: Config = SparseTopKTrainingSAEConfig, **options: Any) -> Any:
    if config_class is SparseTopKTrainingSAEConfig:
        options = {"implementation": "torch", **options}
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "k": K, **options}
    return config_class(**settings)


# Rounding decides nothing in these runs; a JumpReLU goes from half of its latents to few.
FIELDS: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "batchtopk": {"k": K + 0.3, "topk_threshold_lr": 0.1},
    "matryoshka_batchtopk": {
        "k": K + 0.3, "topk_threshold_lr": 0.1, "matryoshka_widths": [8, D_SAE],
        "use_matryoshka_aux_loss": True,
    },
    "jumprelu": {
        "dtype": "float64", "jumprelu_bandwidth": 0.2, "l0_coefficient": 0.3,
        "l0_warm_up_steps": 4, "pre_act_loss_coefficient": 3e-3,
    },
}  # fmt: skip


def config_of(architecture: str, **options: Any) -> Any:
    """A configuration of an architecture, stock or sparse."""
    _, config_class = get_sae_training_class(architecture)
    fields = FIELDS.get(architecture.removesuffix("_sparse"), {})
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, **fields, **options}
    return config_class(**settings)


def runner_config(
    sae: TrainingSAEConfig, folder: Path, **options: Any
) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "hook_name": HOOK,
        "dataset_path": "made",
        "context_size": CONTEXT,
        "training_tokens": N_TOKENS,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": BATCH,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 2,
        "dead_feature_window": 5,
        "lr": 3e-3,
        "verbose": False,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    return LanguageModelSAERunnerConfig(sae=sae, **settings)


def multi_config(
    saes: Mapping[str, TrainingSAEConfig], folder: Path, **options: Any
) -> MultiSAETrainingRunnerConfig:
    settings: dict[str, Any] = {
        "hook_names": HOOK,
        "dataset_path": "made",
        "context_size": CONTEXT,
        "training_tokens": N_TOKENS,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": BATCH,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 2,
        "dead_feature_window": 5,
        "lr": 3e-3,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    if "use_cached_activations" in options:
        return SparseMultiSAETrainingRunnerConfig(saes=saes, **settings)
    return MultiSAETrainingRunnerConfig(saes=saes, **settings)


def checkpoints(cfg: LanguageModelSAERunnerConfig[Any]) -> list[Path]:
    assert cfg.checkpoint_path is not None
    return sorted(Path(cfg.checkpoint_path).iterdir(), key=lambda path: path.stat().st_mtime)


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def read_all(folder: Path) -> None:
    """Fails where a file is cut."""
    for path in folder.rglob("*.*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            torch.load(path)


def assert_same_output(folder: Path, expected: Path) -> None:
    """Bit for bit."""
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert files
    for file in files:
        tensors, others = load_file(folder / file), load_file(expected / file)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), (file, name)


def log_of(folder: Path) -> str:
    return (folder / "log.txt").read_text()
