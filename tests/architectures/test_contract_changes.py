"""What moves, casts, folds or copies weights gives stock's results, before and after training."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE

from tests.support.architectures import ON_CPU, Subject, subjects
from tests.support.saes import (
    AUTOCAST,
    PRECISIONS,
    compare_steps,
    dead_mask,
    forward_pass,
    stock_like,
    superposed_rows,
)
from tests.support.trainers import make_trainer

fresh_or_trained = pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])


def fold_whitening(sae: TrainingSAE[Any]) -> None:
    d_in = sae.cfg.d_in
    whitening = torch.eye(d_in) + torch.ones(d_in, d_in).tril()
    sae.fold_activation_whitening(
        torch.linspace(-1, 1, d_in), whitening, torch.linalg.inv(whitening)
    )


def stock_and_sparse(subject: Subject, trained: bool) -> tuple[Any, Any]:
    """Of a kind that bfloat16 decides too."""
    stock = subject.stock(AUTOCAST)
    sparse = subject.sparse(stock)
    if trained:
        make_trainer(sparse).step(superposed_rows(sparse, 16))
        stock = stock_like(sparse, torch.float32)
    return stock, sparse


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda sae: sae.to(torch.bfloat16), id="to-bfloat16"),
        pytest.param(lambda sae: sae.to(dtype=torch.float64), id="to-float64"),
        pytest.param(lambda sae: sae.to("cpu"), id="to-cpu"),
        pytest.param(lambda sae: sae.fold_W_dec_norm(), id="fold_W_dec_norm"),
        pytest.param(lambda sae: sae.fold_activation_norm_scaling_factor(3.0), id="fold_scaling"),
        pytest.param(fold_whitening, id="fold_whitening"),
    ],
)
@fresh_or_trained
@subjects(frozenset({"torch-cpu", "fused-cpu"}))
def test_change(subject: Subject, trained: bool, change: Callable[[TrainingSAE[Any]], Any]) -> None:
    stock, sparse = stock_and_sparse(subject, trained)
    for sae in (stock, sparse):
        change(sae)
    for field in ("dtype", "normalize_activations", "rescale_acts_by_decoder_norm"):
        assert getattr(sparse.cfg, field, None) == getattr(stock.cfg, field, None)
    assert sparse.dtype == stock.dtype == sparse.W_enc.dtype
    for name, expected in stock.named_parameters():
        assert getattr(sparse, name).dtype == expected.dtype
        torch.testing.assert_close(getattr(sparse, name), expected, rtol=1e-5, atol=1e-6)
    (precision,) = (p for p in PRECISIONS if p.dtype == stock.dtype and not p.autocast)
    dead = dead_mask(stock, 20)
    x = subject.inputs(stock, 16, precision, dead)
    sparse.load_state_dict(stock.state_dict())
    assert type(forward_pass(sparse, x).feature_acts) is not torch.Tensor
    compare_steps(stock, sparse, x, dead, precision)


@fresh_or_trained
@subjects(frozenset({"torch-cpu", "fused-cpu"}))
def test_deepcopy(subject: Subject, trained: bool) -> None:
    _, sparse = stock_and_sparse(subject, trained)
    copied = copy.deepcopy(sparse)
    x = superposed_rows(sparse, 16)
    for sae in (sparse, copied):
        make_trainer(sae).step(x)
    for name, value in sparse.named_parameters():
        assert torch.equal(getattr(copied, name), value), name
        assert getattr(copied, name).data_ptr() != value.data_ptr(), name


@subjects(ON_CPU)
def test_load_from_disk_options(subject: Subject, tmp_path: Path) -> None:
    stock, x = subject.case(n_rows=9)
    sparse = subject.sparse(stock)
    make_trainer(sparse).step(x)
    sparse.save_model(tmp_path)
    folded = TrainingSAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    torch.testing.assert_close(folded(x), sparse(x))
    assert TrainingSAE.load_from_disk(tmp_path, dtype="float64")(x).dtype == torch.float64
