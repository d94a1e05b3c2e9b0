"""A search that was not complete costs one further pass, and none in the steps after it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saelens_sparse import SparseTopKTrainingSAE
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.conftest import TARGETS, Target, marks
from tests.support.saes import make_stock, sparse_like, zipf_inputs
from tests.support.trainers import make_trainer

KERNELS = [
    pytest.param(target, id=name, marks=marks(target))
    for name, target in TARGETS.items()
    if target.backend == "triton" and target.runs_here
]


class Counted(SparseTopKTrainingSAE):
    """Counts its encodings."""

    n_encodings = 0

    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.n_encodings += 1
        return super().encode_with_hidden_pre(x)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("own", [False, True], ids=["SAELens's trainer", "own trainer"])
def test_a_row_that_is_never_found_is_looked_for_twice_once(target: Target, own: bool) -> None:
    """A NaN leaves its row to be computed in full, in every batch that has one."""
    stock = make_stock(d_sae=80, k=2, device=target.device)
    good, x = (zipf_inputs(stock, 3) for _ in range(2))
    bad = x.clone()
    bad[2, 3] = float("nan")
    sae = Counted(sparse_like(stock, "triton").cfg)
    sae.load_state_dict(stock.state_dict())
    trainer = make_trainer(sae, lr=0.0, lr_end=0.0)
    if own:
        trainer = SparseSAETrainer.taking_over(trainer)
    costs: list[int] = []
    for batch in (bad, bad, good, good, bad):
        weights = {name: value.clone() for name, value in sae.state_dict().items()}
        before = sae.n_encodings
        output = trainer.step(batch)
        sae.load_state_dict(weights)  # whatever a NaN has made of them
        costs.append(sae.n_encodings - before)
        assert output.metrics["rows_recomputed"] == int(batch is bad)
    assert costs == [2, 1, 1, 1, 2]


@pytest.mark.parametrize("target", KERNELS)
def test_what_a_step_counts_is_counted_once(target: Target) -> None:
    stock = make_stock(d_sae=80, k=2, device=target.device)
    x = zipf_inputs(stock, 3)
    bad = x.clone()
    bad[2, 3] = float("nan")
    fired: list[torch.Tensor] = []
    wrap: Callable[[Any], Any]
    for wrap in (lambda trainer: trainer, SparseSAETrainer.taking_over):
        trainer = wrap(make_trainer(sparse_like(stock, "triton")))
        trainer.step(bad)
        assert trainer.n_training_samples == 3
        assert trainer.n_frac_active_samples == trainer.cfg.train_batch_size_samples
        fired.append(trainer.act_freq_scores)
    expected = make_trainer(stock)
    expected.step(bad)
    assert torch.equal(fired[0], fired[1])
    assert fired[0].sum() == expected.act_freq_scores.sum()
