"""The threshold of the saved SAE: a moving average that moves once a step, as in SAELens."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

from tests.conftest import TARGETS, Target
from tests.support.architectures import ALL_OR_NO_OPTIONS, Subject
from tests.support.saes import (
    FLOAT32,
    FLOAT64,
    forward_pass,
    not_interpreted,
    sparse_like,
    stock_like,
    superposed_rows,
)
from tests.support.trainers import make_trainer, own_trainer, stock_trainer, train

options_of_both = pytest.mark.parametrize(
    "options", ALL_OR_NO_OPTIONS.values(), ids=ALL_OR_NO_OPTIONS
)
trainers = pytest.mark.parametrize(
    "make", [make_trainer, own_trainer], ids=["SAELens's trainer", "own trainer"]
)
TARGET = TARGETS["torch-cpu"]
Make = Callable[..., SAETrainer[Any, Any]]


def case(target: Target, **cfg: Any) -> tuple[Any, Any]:
    """A stock and a sparse SAE, with a threshold that has moved before."""
    stock = Subject("batchtopk_sparse", target).stock(topk_threshold_lr=0.1, **cfg)
    stock.topk_threshold.fill_(0.7)
    return stock, sparse_like(stock, target.backend)


def batches_for(stock: Any, target: Target, n_steps: int) -> list[torch.Tensor]:
    return [superposed_rows(stock, target.few_rows(20)) for _ in range(n_steps)]


@options_of_both
@trainers
def test_moves_as_in_stock(target: Target, options: dict[str, Any], make: Make) -> None:
    stock, sparse = case(target, **options)
    batches = batches_for(stock, target, 2 if target.interpreted else 6)
    logs: list[list[float]] = []
    like = {make_trainer: make_trainer, own_trainer: stock_trainer}[make]
    for trainer in (like(stock_like(stock)), make(sparse)):
        metrics: list[float] = []
        for batch in batches:
            before = trainer.sae.topk_threshold
            output = trainer.step(batch.to(trainer.sae.dtype))
            trainer.n_training_steps += 1
            threshold = trainer.sae.topk_threshold
            assert threshold is not before  # reassigned: who holds on to the old one keeps it
            assert threshold.dtype == torch.float64
            assert threshold.device == before.device
            assert output.metrics["topk_threshold"] is threshold
            log = trainer.build_train_step_log_dict(output, 20)
            metrics.append(log["metrics/topk_threshold"])
        logs.append(metrics)
    assert len(set(logs[0])) == len(batches)
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def test_is_exactly_the_formula_s(target: Target) -> None:
    _, sparse = case(target)
    (x,) = batches_for(sparse, target, 1)
    output = forward_pass(sparse, x)
    acts = output.feature_acts.detach()
    expected = 0.9 * torch.tensor(0.7, dtype=torch.float64) + 0.1 * acts[acts > 0].min().double()
    assert float(sparse.topk_threshold) == float(expected)


@trainers
def test_kept_outputs_keep_their_own(target: Target, make: Make) -> None:
    _, sparse = case(target)
    trainer = make(sparse)
    metrics: list[Any] = []
    seen: list[float] = []
    for batch in batches_for(sparse, target, 3):
        metrics.append(trainer.step(batch).metrics["topk_threshold"])
        trainer.n_training_steps += 1
        seen.append(float(sparse.topk_threshold))
    assert [float(value) for value in metrics] == seen
    assert len(set(seen)) == 3


@trainers
def test_a_step_that_is_taken_twice_moves_it_once(
    target: Target, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sparse = case(target)
    (x,) = batches_for(sparse, target, 1)
    expected = make(copy.deepcopy(sparse))
    expected.step(x)
    original, n_passes = sparse.propose, list[int]()

    class Missing:
        def passed(self) -> bool:
            return False

    def incomplete(step_input: Any, step: Any) -> Any:
        n_passes.append(1)
        output = original(step_input, step)
        if not step.asks_at_once:
            step.seen["least_active"] = torch.tensor(1e6)
            step.checks.append(Missing())
        return output

    monkeypatch.setattr(sparse, "propose", incomplete)
    output = make(sparse).step(x)
    assert len(n_passes) == 2
    assert float(sparse.topk_threshold) == float(expected.sae.topk_threshold)
    assert output.metrics["topk_threshold"] is sparse.topk_threshold


def test_encoding_and_an_unfinished_step_leave_it(target: Target) -> None:
    _, sparse = case(target)
    (x,) = batches_for(sparse, target, 1)
    sparse.encode(x)
    sparse(x)
    sparse.encode_with_hidden_pre(x)
    step_input = TrainStepInput(x, {}, None, 0, False)
    step = sparse.start_step(step_input)
    sparse.propose(step_input, step)
    assert float(sparse.topk_threshold) == 0.7
    sparse.commit(step)
    assert float(sparse.topk_threshold) != 0.7


@pytest.mark.parametrize("k", [5.0, 0.01], ids=["nothing positive", "no pair"])
@trainers
def test_stays_where_nothing_is_active(target: Target, make: Make, k: float) -> None:
    stock, sparse = case(target, k=k)
    (x,) = batches_for(sparse, target, 1)
    for sae in (stock, sparse):
        with torch.no_grad():
            sae.b_enc.sub_(1e4 if k == 5.0 else 0.0)
    output = make(sparse).step(x)
    assert not output.feature_acts.any()
    assert output.metrics["topk_threshold"] is sparse.topk_threshold
    assert float(sparse.topk_threshold) == 0.7
    make_trainer(stock).step(x)
    assert float(stock.topk_threshold) == 0.7


@trainers
def test_a_dense_step_moves_it_too(make: Make) -> None:
    stock = Subject("batchtopk_sparse", TARGET).stock(topk_threshold_lr=0.1)
    dense, hooked = sparse_like(stock, "dense"), sparse_like(stock)
    hooked.hook_sae_acts_post.add_hook(lambda tensor, hook: tensor)  # noqa: ARG005
    x = superposed_rows(stock, 20)
    make_trainer(stock).step(x)
    for sae in (dense, hooked):
        assert sae.implementation.name == "dense"
        output = make(sae).step(x)
        assert float(sae.topk_threshold) == float(stock.topk_threshold)
        assert output.metrics["topk_threshold"] is sae.topk_threshold


def test_what_a_subclass_makes_of_the_activations_counts() -> None:
    """A change of the activations that are reported moves the threshold as in stock."""
    stock = Subject("batchtopk_sparse", TARGET).stock(topk_threshold_lr=0.1)
    sparse = sparse_like(stock)
    x = superposed_rows(stock, 20)
    for sae in (stock, sparse):

        def doubled(x: torch.Tensor, original: Any = sae.encode_with_hidden_pre) -> Any:
            acts, hidden_pre = original(x)
            return 2 * acts, hidden_pre

        sae.encode_with_hidden_pre = doubled
        forward_pass(sae, x)
    assert float(sparse.topk_threshold) == pytest.approx(float(stock.topk_threshold), rel=1e-6)


@options_of_both
@not_interpreted
def test_what_is_saved_has_it(target: Target, options: dict[str, Any], tmp_path: Path) -> None:
    """The saved SAE, of a scaled training, computes with the moved threshold as stock's does."""
    stock, sparse = case(target, **options)
    batches = batches_for(stock, target, 4)
    for name, sae in (("stock", stock), ("sparse", sparse)):
        train(make_trainer(sae), batches)
        moved = float(sae.topk_threshold)
        assert moved > 0.8
        sae.fold_activation_norm_scaling_factor(3.0)
        sae.save_inference_model(tmp_path / name)
    loaded: list[Any] = [SAE.load_from_disk(tmp_path / name) for name in ("stock", "sparse")]
    expected, actual = loaded
    assert actual.cfg.architecture() == expected.cfg.architecture() == "jumprelu"
    assert len(set(actual.threshold.tolist())) == 1
    torch.testing.assert_close(actual.threshold, expected.threshold, rtol=1e-4, atol=1e-6)
    scale = 3.0 if options["rescale_acts_by_decoder_norm"] else 1.0
    assert float(actual.threshold[0]) == pytest.approx(moved / scale)
    x = batches[0].cpu() / 3
    torch.testing.assert_close(actual(x), expected(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_checkpoints_keep_it(dtype: str, tmp_path: Path) -> None:
    precision = {"float32": FLOAT32, "float64": FLOAT64}.get(dtype, FLOAT32)
    stock = Subject("batchtopk_sparse", TARGET).stock(precision, topk_threshold_lr=0.1)
    sparse = sparse_like(stock).to(getattr(torch, dtype))
    stock = stock.to(getattr(torch, dtype))
    x = superposed_rows(stock, 20)
    for first, second in ((stock, sparse), (sparse, stock)):
        forward_pass(first, x)
        first.save_model(tmp_path / "folder")
        second.load_weights_from_checkpoint(tmp_path / "folder")
        assert torch.equal(second.topk_threshold, first.topk_threshold)
        assert second.topk_threshold.dtype == first.topk_threshold.dtype
        loaded: Any = TrainingSAE.load_from_disk(tmp_path / "folder")
        assert float(loaded.topk_threshold) == pytest.approx(float(first.topk_threshold), rel=1e-6)
