"""Runs of SAELens's runner: each option trains the sparse architecture as it trains stock."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    MultiSAETrainingRunner,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig
from sae_lens.registry import get_sae_training_class

from saelens_sparse import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saelens_sparse.architectures import ARCHITECTURES
from tests.support.runs import (
    BATCH,
    BOTH,
    CONTEXT,
    D_MODEL,
    D_SAE,
    HOOK,
    N_TOKENS,
    K,
    Run,
    config_of,
    multi_config,
    runner_config,
    sae_config,
    what_libraries_say,
)
from tests.support.saes import assert_same_training, parameters

pytestmark = what_libraries_say


def test_object(run: Run) -> None:
    sparse, stock = (run(sae_config(config_class)).sae for config_class in BOTH[::-1])
    assert type(sparse) is SparseTopKTrainingSAE
    assert_same_training(sparse, stock)


def test_dict_and_json(run: Run, tmp_path: Path) -> None:
    cfg = runner_config(sae_config(k=3, screen_buffer_mib=7), tmp_path)
    runs = [run(cfg).sae]
    for cfg_dict in (cfg.to_dict(), json.loads(json.dumps(cfg.to_dict()))):
        assert cfg_dict["sae"]["architecture"] == "topk_sparse"
        loaded = LanguageModelSAERunnerConfig.from_dict(cfg_dict)
        assert type(loaded.sae) is SparseTopKTrainingSAEConfig
        assert loaded.sae == cfg.sae
        runs.append(run(loaded).sae)
    for other in runs[1:]:
        assert_same_training(other, runs[0], tolerance=0)


def test_the_one_word_change(run: Run, tmp_path: Path) -> None:
    cfg_dict = runner_config(sae_config(TopKTrainingSAEConfig), tmp_path).to_dict()
    cfg_dict["sae"]["architecture"] = "topk_sparse"
    runner = run(LanguageModelSAERunnerConfig.from_dict(cfg_dict))
    assert type(runner.sae) is SparseTopKTrainingSAE
    assert_same_training(runner.sae, run(sae_config(TopKTrainingSAEConfig)).sae)


RUN_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "no rescaling": ({"rescale_acts_by_decoder_norm": False}, {}),
    "no centring": ({"apply_b_dec_to_input": False}, {}),
    "no decoder_init_norm": ({"decoder_init_norm": None}, {}),
    "expected_average_only_in": ({"normalize_activations": "expected_average_only_in"}, {}),
    "covariance_whitening": ({"normalize_activations": "covariance_whitening"}, {}),
    "whitening, nothing else": (
        {
            "normalize_activations": "covariance_whitening",
            "rescale_acts_by_decoder_norm": False,
            "apply_b_dec_to_input": False,
        },
        {},
    ),
    "constant_norm_rescale": (
        {"normalize_activations": "constant_norm_rescale"},
        {"dead_feature_window": 10**6},
    ),
    "layer_norm": ({"normalize_activations": "layer_norm"}, {"dead_feature_window": 10**6}),
    "float64": ({"dtype": "float64"}, {}),
    "prefetch": ({}, {"prefetch_llm_batches": 2}),
    "act_store_device": ({}, {"act_store_device": "with_model"}),
    "exclude_special_tokens": ({}, {"exclude_special_tokens": True}),
    "exclude given tokens": ({}, {"exclude_special_tokens": [3, 4]}),
    "no mixing": ({}, {"activations_mixing_fraction": 0.0}),
    "schedules": ({}, {"lr_warm_up_steps": 3, "lr_decay_steps": 5}),
    "cosine": ({}, {"lr_scheduler_name": "cosineannealing"}),
    "seqpos_slice": ({}, {"seqpos_slice": (2, 14)}),
    "head": ({"d_in": 8}, {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}),
    "all heads": ({"d_in": 16}, {"hook_name": "blocks.0.attn.hook_z"}),
}
JUMPRELU_RUN_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "step": ({}, {}),
    "tanh": ({"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}, {}),
    "quadratic": ({"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0}, {}),
    "no centring": ({"apply_b_dec_to_input": False}, {}),
    "expected_average_only_in": ({"normalize_activations": "expected_average_only_in"}, {}),
    "covariance_whitening": ({"normalize_activations": "covariance_whitening"}, {}),
    "constant_norm_rescale": ({"normalize_activations": "constant_norm_rescale"}, {}),
    "layer_norm": ({"normalize_activations": "layer_norm"}, {}),
}


def assert_same_run(sparse: Any, stock: Any) -> None:
    assert type(sparse) is get_sae_training_class(f"{stock.cfg.architecture()}_sparse")[0]
    assert_same_training(sparse, stock)
    assert sparse.cfg.normalize_activations == stock.cfg.normalize_activations
    assert sparse.cfg.metadata.l0 == pytest.approx(stock.cfg.metadata.l0)
    assert sparse.cfg.metadata.num_dead_features == stock.cfg.metadata.num_dead_features


@pytest.mark.parametrize("name", RUN_OPTIONS)
def test_options_train_as_stock(run: Run, name: str) -> None:
    sae_options, runner_options = RUN_OPTIONS[name]
    stock, sparse = (
        run(sae_config(config_class, **sae_options), **runner_options).sae for config_class in BOTH
    )
    assert_same_run(sparse, stock)


@pytest.mark.parametrize("implementation", ["torch", "auto"])
@pytest.mark.parametrize("name", JUMPRELU_RUN_OPTIONS)
def test_jumprelu_options_train_as_stock(run: Run, name: str, implementation: str) -> None:
    sae_options, runner_options = JUMPRELU_RUN_OPTIONS[name]
    stock = run(config_of("jumprelu", **sae_options), **runner_options).sae
    cfg = config_of("jumprelu_sparse", **sae_options, implementation=implementation)
    sparse = run(cfg, **runner_options).sae
    assert_same_run(sparse, stock)


@pytest.mark.parametrize("low_precision", ["bfloat16", "autocast"])
def test_low_precision(run: Run, low_precision: str) -> None:
    options = (
        ({"dtype": "bfloat16"}, {"dtype": "bfloat16"})
        if low_precision == "bfloat16"
        else ({}, {"autocast": True})
    )
    reference = run(sae_config(TopKTrainingSAEConfig, dtype="float64")).sae
    stock, sparse = (
        run(sae_config(config_class, **options[0]), **options[1]).sae for config_class in BOTH
    )
    expected = parameters(reference)
    for name, value in parameters(sparse).items():
        stock_error = (parameters(stock)[name] - expected[name]).norm()
        assert (value - expected[name]).norm() <= 2 * stock_error, name


def test_compile_sae(run: Run) -> None:
    compiled, eager = (
        run(sae_config(), compile_sae=compile_sae, training_tokens=4 * BATCH)
        for compile_sae in (True, False)
    )
    assert "training_forward_pass" in vars(compiled.sae), "nothing was compiled"
    assert_same_training(compiled.sae, eager.sae, tolerance=0)


def test_default_implementation(run: Run) -> None:
    """What a user gets who says nothing but the architecture."""
    cfg = SparseTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=K)
    sae = run(cfg).sae
    assert isinstance(sae, SparseTopKTrainingSAE)
    assert sae.implementation.name == "torch"
    assert_same_training(sae, run(sae_config(TopKTrainingSAEConfig)).sae)


def test_cached_activations(hf_folder: Path, dataset: Dataset, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "cached"
    cache = CacheActivationsRunnerConfig(
        dataset_path="made",
        model_name=str(hf_folder / "model"),
        model_class_name="AutoModelForCausalLM",
        model_batch_size=8,
        hook_name="transformer.h.0",
        d_in=D_MODEL,
        training_tokens=N_TOKENS,
        context_size=CONTEXT,
        new_cached_activations_path=str(path),
        device="cpu",
        # Two shards.
        buffer_size_gb=N_TOKENS * D_MODEL * 4 / 2 / 1e9,
    )
    CacheActivationsRunner(cache, override_dataset=dataset).run()
    stock, sparse = (
        run(
            sae_config(config_class),
            hook_name="transformer.h.0",
            use_cached_activations=True,
            cached_activations_path=str(path),
        ).sae
        for config_class in BOTH
    )
    assert_same_training(sparse, stock)


def test_several_saes_beside_stock(
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(wandb, "log", lambda record, **_: records.append(record))
    monkeypatch.setattr(wandb, "log_artifact", lambda *_, **__: None)
    configs = {
        "sparse": sae_config(),
        "stock": sae_config(TopKTrainingSAEConfig),
        "wide": sae_config(d_sae=160, k=3),
        "normalized": sae_config(normalize_activations="expected_average_only_in"),
        "relu": StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32),
    }
    cfg = multi_config(
        configs,
        tmp_path,
        hook_names={**dict.fromkeys(configs, HOOK), "wide": "blocks.0.hook_resid_post"},
        logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2),
        n_checkpoints=1,
        prefetch_llm_batches=True,
    )
    torch.manual_seed(0)
    runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    for name in ("W_enc", "W_dec"):
        getattr(runner.saes["sparse"], name).data.copy_(getattr(runner.saes["stock"], name).data)
    saes = runner.run()
    assert_same_training(saes["sparse"], saes["stock"])
    steps = [record for record in records if "sparse/losses/mse_loss" in record]
    assert len(steps) == N_TOKENS // BATCH // 2
    for record in steps:
        for name in ("losses/mse_loss", "metrics/l0", "metrics/explained_variance"):
            assert record[f"sparse/{name}"] == pytest.approx(record[f"stock/{name}"], rel=1e-3)
    loaded = SAE.load_from_disk(tmp_path / "output" / "wide")
    assert loaded.cfg.architecture() == "topk"
    assert loaded.cfg.k == 3


def test_every_architecture_beside_its_stock(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    names = {one.name: one.stock for one in ARCHITECTURES.values()}
    cfg = multi_config({name: config_of(name) for pair in names.items() for name in pair}, tmp_path)
    runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    for sparse, stock in names.items():
        runner.saes[sparse].load_state_dict(runner.saes[stock].state_dict())
    saes = runner.run()
    for sparse, stock in names.items():
        assert_same_training(saes[sparse], saes[stock])
