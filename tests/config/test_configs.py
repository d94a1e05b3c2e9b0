"""The configs in `configs/` are complete, and SAELens loads them as they stand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import get_sae_training_class
from transformer_lens import loading_from_pretrained

from saelens_sparse.config.files import load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))

# Deprecated, or written by SAELens itself.
OMITTED = {"hook_eval", "metadata", "sae_lens_version", "sae_lens_training_version"}
# Where the file says null, SAELens puts in what follows from other fields.
DERIVED = {"llm_device", "act_store_device", "lr_end", "run_name"}


def field_names(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)} - OMITTED


def config_classes(config: dict[str, Any]) -> tuple[str, type, type]:
    """The stock architecture of a config, and the stock and the sparse config class."""
    architecture = config["sae"]["architecture"]
    assert architecture.endswith("_sparse")
    stock = architecture.removesuffix("_sparse")
    return stock, get_sae_training_class(stock)[1], get_sae_training_class(architecture)[1]


def assert_kept(given: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Every value of the file is in the loaded config."""
    for name, value in given.items():
        if isinstance(value, dict) and name != "model_from_pretrained_kwargs":
            assert_kept(value, loaded[name])
        elif not (name in DERIVED and value is None):
            assert loaded[name] == value, name


def test_every_promised_config_is_there() -> None:
    assert {path.stem for path in CONFIGS} == {
        "smollm2_demo_topk",
        "smollm2_demo_batchtopk",
        "smollm2_demo_matryoshka_batchtopk",
        "smollm2_demo_jumprelu",
        "gpt2_small_topk",
        "gpt2_small_batchtopk",
        "gpt2_small_matryoshka_batchtopk",
        "gpt2_small_jumprelu",
        "gemma_2_2b_topk",
        "gemma_2_2b_batchtopk",
        "gemma_2_2b_matryoshka_batchtopk",
        "gemma_2_2b_jumprelu",
        "llama_3_1_8b_topk",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
class TestConfig:
    def test_names_every_stock_field_and_no_unknown_one(self, path: Path) -> None:
        config = json.loads(path.read_text())
        assert set(config) == field_names(LanguageModelSAERunnerConfig)
        _, stock_class, sparse_class = config_classes(config)
        in_sae = set(config["sae"])
        assert in_sae >= field_names(stock_class) | {"architecture", "implementation"}
        assert in_sae <= field_names(sparse_class) | {"architecture"}
        assert set(config["logger"]) == field_names(LoggingConfig)

    def test_loads_as_it_stands(self, path: Path) -> None:
        loaded, config = load_config(path), json.loads(path.read_text())
        assert type(loaded.sae) is config_classes(config)[2]
        assert_kept(config, loaded.to_dict())

    def test_is_a_stock_config_but_for_the_architecture(self, path: Path) -> None:
        config = json.loads(path.read_text())
        config["sae"]["architecture"], stock_class, _ = config_classes(config)
        loaded = LanguageModelSAERunnerConfig.from_dict(config)
        assert type(loaded.sae) is stock_class
        del config["sae"]["implementation"]
        assert_kept(config, loaded.to_dict())

    def test_learning_rate_schedule_fits_the_training(self, path: Path) -> None:
        loaded = load_config(path)
        assert loaded.lr_warm_up_steps + loaded.lr_decay_steps < loaded.total_training_steps

    def test_names_a_known_model_and_one_of_its_layers(self, path: Path) -> None:
        loaded = load_config(path)
        if loaded.model_class_name == "HookedTransformer":
            assert loading_from_pretrained.get_official_model_name(loaded.model_name)
            assert loaded.hook_name.startswith("blocks.")
        else:
            assert loaded.hook_name.startswith("model.layers.")
