"""What moves, casts, folds or copies weights gives stock's results, before and after training."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE

from saelens_sparse.codes.on_demand import SparseFeatureActs
from tests.support.architectures import ON_CPU, Arm, arms
from tests.support.jumprelu import FAST_PATHS, PATHS, make_case, make_jumprelu, sparse_jumprelu
from tests.support.saes import (
    PRECISIONS,
    compare_steps,
    dead_mask,
    forward_pass,
    make_stock,
    make_trainer,
    sparse_like,
    stock_like,
    superposed_rows,
    zipf_inputs,
)

JUMPRELU_ON_CPU = {name: FAST_PATHS[name] for name in ("torch-cpu", "fused-cpu")}
every_arm_on_cpu = arms(topk=ON_CPU, jumprelu=JUMPRELU_ON_CPU)
fresh_or_trained = pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])


def fold_whitening(sae: TrainingSAE[Any]) -> None:
    d_in = sae.cfg.d_in
    whitening = torch.eye(d_in) + torch.ones(d_in, d_in).tril()
    sae.fold_activation_whitening(
        torch.linspace(-1, 1, d_in), whitening, torch.linalg.inv(whitening)
    )


def stock_and_sparse(arm: Arm, trained: bool) -> tuple[Any, Any]:
    options: dict[str, Any] = {}
    if arm.architecture == "jumprelu":
        options["jumprelu_bandwidth"] = 0.5
    stock = arm.stock(**options)
    sparse = arm.sparse(stock)
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
@every_arm_on_cpu
def test_change(arm: Arm, trained: bool, change: Callable[[TrainingSAE[Any]], Any]) -> None:
    stock, sparse = stock_and_sparse(arm, trained)
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
    if arm.architecture == "topk":
        x = zipf_inputs(stock, 16, dead)
        assert type(forward_pass(sparse, x).feature_acts) is SparseFeatureActs
    else:
        assert sparse.threshold.dtype == torch.float32
        with torch.no_grad():
            # Training and folding leave thresholds that bfloat16 would round.
            stock.threshold.copy_(stock.threshold.bfloat16())
        x = arm.inputs(stock, 16, precision)
        sparse.load_state_dict(stock.state_dict())
    compare_steps(stock, sparse, x, dead, precision)


@fresh_or_trained
@every_arm_on_cpu
def test_deepcopy(arm: Arm, trained: bool) -> None:
    _, sparse = stock_and_sparse(arm, trained)
    copied = copy.deepcopy(sparse)
    x = superposed_rows(sparse, 16)
    for sae in (sparse, copied):
        make_trainer(sae).step(x)
    for name, value in sparse.named_parameters():
        assert torch.equal(getattr(copied, name), value), name
        assert getattr(copied, name).data_ptr() != value.data_ptr(), name


def test_folding_needs_rescaling_as_in_stock() -> None:
    stock = make_stock(rescale_acts_by_decoder_norm=False)
    for sae in (stock, sparse_like(stock)):
        with pytest.raises(NotImplementedError, match="Folding W_dec_norm is not safe"):
            sae.fold_W_dec_norm()


@arms(topk=ON_CPU, jumprelu=ON_CPU)
def test_load_from_disk_options(arm: Arm, tmp_path: Path) -> None:
    stock, x = arm.case(n_rows=9)
    sparse = arm.sparse(stock)
    make_trainer(sparse).step(x)
    sparse.save_model(tmp_path)
    folded = TrainingSAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
    torch.testing.assert_close(folded(x), sparse(x))
    assert TrainingSAE.load_from_disk(tmp_path, dtype="float64")(x).dtype == torch.float64


def test_folding_keeps_what_is_active() -> None:
    stock, x = make_case(PATHS["torch-cpu"])
    sparse = sparse_jumprelu(stock)
    norms = stock.W_dec.norm(dim=-1)
    acts, recons = sparse.encode(x), sparse(x)
    sparse.fold_W_dec_norm()
    torch.testing.assert_close(sparse.threshold, stock.threshold * norms)
    torch.testing.assert_close(sparse.encode(x), acts * norms)
    torch.testing.assert_close(sparse(x), recons)


def test_thresholds_stay_float32_in_every_cast() -> None:
    casts: list[Callable[[TrainingSAE[Any]], Any]] = [
        lambda sae: sae.bfloat16(),
        lambda sae: sae.double(),
        lambda sae: sae.half().float(),
        lambda sae: sae.to(torch.zeros(1, dtype=torch.bfloat16)),
    ]
    for cast in casts:
        sparse = sparse_jumprelu(make_jumprelu())
        parameter = sparse.threshold
        cast(sparse)
        assert sparse.threshold is parameter
        assert sparse.threshold.dtype == torch.float32
    assert sparse_jumprelu(make_jumprelu(dtype=torch.bfloat16)).threshold.dtype == torch.float32
