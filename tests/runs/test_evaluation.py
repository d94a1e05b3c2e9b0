"""What SAELens measures and logs of a trained sparse SAE, also inside of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens import SAE, HookedSAETransformer
from sae_lens.config import LoggingConfig
from sae_lens.evals import EvalConfig, get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse import SparseTopKTrainingSAE
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
    flatten,
    sae_config,
    what_libraries_say,
)
from tests.support.saes import make_stock, sparse_like, stock_like, zipf_inputs
from tests.support.trainers import make_trainer

pytestmark = what_libraries_say


def test_evaluator_of_the_runner(run: Run) -> None:
    """The same trained weights evaluated by both architectures."""
    runner = run(sae_config(), exclude_special_tokens=[3])
    sparse = runner.sae
    assert isinstance(sparse, SparseTopKTrainingSAE)
    stock = stock_like(sparse, torch.float32)
    stock.cfg.metadata = sparse.cfg.metadata
    metrics = []
    for sae in (stock, sparse):
        runner.activations_store.iterable_sequences = (
            runner.activations_store._iterate_tokenized_sequences()
        )
        metrics.append(runner.evaluator(sae, runner.activations_store, ActivationScaler()))
    expected, actual = (flatten(dictionary) for dictionary in metrics)
    assert "model_performance_preservation/ce_loss_score" in expected
    assert actual == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_run_evals_computes_everything(run: Run, model: HookedSAETransformer) -> None:
    runner = run(sae_config())
    sparse = runner.sae
    assert isinstance(sparse, SparseTopKTrainingSAE)
    stock = stock_like(sparse, torch.float32)
    stock.cfg.metadata = sparse.cfg.metadata
    assert runner.cfg.output_path is not None
    inference = SAE.load_from_disk(runner.cfg.output_path)
    config = get_eval_everything_config(
        batch_size_prompts=4,
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
    )
    assert isinstance(config, EvalConfig)
    results = []
    assert runner.activations_store.dataset is not None
    for sae in (stock, sparse, inference):
        store = ActivationsStore.from_sae(
            model, sae, dataset=runner.activations_store.dataset, context_size=CONTEXT,
            streaming=False,
        )  # fmt: skip
        results.append(run_evals(sae, store, model, ActivationScaler(), config, verbose=False))
    (expected, expected_features), *others = results
    for metrics, features in others:
        assert flatten(metrics) == pytest.approx(flatten(expected), rel=1e-3, nan_ok=True)
        assert features["feature_density"] == pytest.approx(
            expected_features["feature_density"], abs=1e-6
        )


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be sent to wandb."""
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(wandb, "log", lambda record, **_: records.append(record))
    monkeypatch.setattr(wandb, "log_artifact", lambda *_, **__: None)
    return records


def test_metrics_of_stock_and_the_recomputed_rows(run: Run, logged: list[dict[str, Any]]) -> None:
    names, values = [], []
    for config_class in BOTH:
        logged.clear()
        run(
            sae_config(config_class),
            logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2),
            feature_sampling_window=4,
            n_checkpoints=1,
        )
        names.append([tuple(record) for record in logged])
        values.append([record for record in logged if "losses/mse_loss" in record])
    new = "metrics/rows_recomputed"
    assert len(values[0]) == N_TOKENS // BATCH // 2
    assert any(new in record for record in names[1])
    assert [set(record) - {new} for record in names[1]] == [set(r) for r in names[0]]
    for expected, actual in zip(*values, strict=True):
        rows = actual.pop(new)
        assert rows == 0
        assert isinstance(rows, int)
        assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_offline_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
    runner = run(
        sae_config(),
        logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2),
        feature_sampling_window=4,
        n_checkpoints=1,
    )
    assert type(runner.sae) is SparseTopKTrainingSAE
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("use_error_term", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_spliced_into_a_model(
    model: HookedSAETransformer, tokens: torch.Tensor, use_error_term: bool,
    trained: bool,
) -> None:  # fmt: skip
    stock = make_stock(d_in=D_MODEL, d_sae=D_SAE, k=K)
    sparse = sparse_like(stock)
    if trained:
        make_trainer(sparse).step(zipf_inputs(sparse, 16))
        stock = stock_like(sparse, torch.float32)
    results = []
    for sae in (stock, sparse):
        sae.cfg.metadata.hook_name = HOOK
        with model.saes(saes=[sae], use_error_term=use_error_term):
            logits, cache = model.run_with_cache(tokens[:3])
            ablated = model.run_with_hooks(
                tokens[:3],
                fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", lambda acts, hook: acts * 0)],  # noqa: ARG005
            )
            plain = model(tokens[:3])
            loss = model(tokens[:3], return_type="loss")
            model.zero_grad()
            loss.backward()
        results.append((logits, ablated, plain, loss, model.W_E.grad, dict(cache)))
    *expected, expected_cache = results[0]
    *actual, cache = results[1]
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left, right)
    assert cache.keys() == expected_cache.keys()
    assert f"{HOOK}.hook_sae_acts_post" in cache
    assert (f"{HOOK}.hook_sae_error" in cache) == use_error_term
    for name, value in expected_cache.items():
        torch.testing.assert_close(cache[name], value)
    if use_error_term:
        torch.testing.assert_close(expected[2], model(tokens[:3]))
