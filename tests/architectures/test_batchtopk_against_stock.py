"""One training step against SAELens's own BatchTopK SAE, for what the contract does not vary."""

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopK

from saelens_sparse.codes.on_demand import SparseFeatureActs
from saelens_sparse.ops.search import batch_topk
from tests.conftest import TARGETS, Target
from tests.support.architectures import ALL_OR_NO_OPTIONS, TOPK_OPTIONS, Subject
from tests.support.saes import (
    AUTOCAST,
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    LargestTensor,
    Precision,
    Values,
    compare_steps,
    dead_mask,
    forward_pass,
    not_interpreted,
    record_materializations,
    require_within_budget,
    sparse_like,
    superposed_rows,
    target_precision_parameters,
)
from tests.support.trainers import own_trainer

all_or_no_options = pytest.mark.parametrize(
    "options", ALL_OR_NO_OPTIONS.values(), ids=ALL_OR_NO_OPTIONS
)
every_option = pytest.mark.parametrize("options", TOPK_OPTIONS.values(), ids=TOPK_OPTIONS)
every_target_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS)
)


def make(target: Target, precision: Precision = FLOAT32, **cfg: Any) -> Any:
    return Subject("batchtopk_sparse", target).stock(precision, **cfg)


def rows_for(stock: Any, n_rows: int, dead: torch.Tensor | None = None) -> torch.Tensor:
    return Subject("batchtopk_sparse", TARGETS["torch-cpu"]).inputs(stock, n_rows, FLOAT32, dead)


def test_it_is_computed_by_what_was_asked_for(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    owners = {"torch": (batch_topk, "_find_in_full")}
    if target.backend == "triton":
        kernels = import_module("saelens_sparse.ops.search.batch_topk_kernels")
        owners["triton"] = (kernels, "find_largest")
    for name, (owner, function) in owners.items():
        original = getattr(owner, function)

        def spy(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            taken.append(name)
            return original(*args, **options)

        monkeypatch.setattr(owner, function, spy)
    stock = make(target)
    sparse = sparse_like(stock, target.backend)
    forward_pass(sparse, rows_for(stock, 9))
    assert taken == [target.backend]


@pytest.mark.parametrize(
    ("shape", "n_rows"),
    [
        ({"k": 1}, 20),
        ({"k": 0.3}, 20),
        ({"k": 7.99}, 20),
        ({"k": 48}, 20),
        ({"k": 0.3}, 3),
        ({"d_in": 7, "d_sae": 37, "k": 3}, 20),
        ({"d_sae": 1, "k": 1}, 20),
    ],
    ids=["k=1", "k=0.3", "k=7.99", "k=d_sae", "no pair at all", "odd-widths", "d_sae=1"],
)
@all_or_no_options
def test_shapes(
    target: Target, shape: dict[str, Any], n_rows: int, options: dict[str, Any]
) -> None:
    stock = make(target, **shape, **options)
    n_rows = target.few_rows(n_rows)
    x = superposed_rows(stock, n_rows)
    dead = dead_mask(stock, min(20, stock.cfg.d_sae))
    compare_steps(stock, sparse_like(stock, target.backend), x, dead, FLOAT32, input_gradient=True)


@pytest.mark.pairwise
@every_option
@every_target_precision
def test_one_row_takes_most_and_others_none(
    target: Target, precision: Precision, options: dict[str, Any]
) -> None:
    stock = make(target, precision, k=4, **options)
    # Nothing else is near the limit that the row with most sets.
    x = 2.0**-6 * superposed_rows(stock, target.few_rows(20))
    x[2] *= 2.0**9
    with torch.no_grad():
        stock.b_dec.zero_()
        stock.b_enc.copy_(-stock.b_enc.abs() - 1.0)
    acts = stock.encode(x)
    l0 = acts.bool().sum(-1)
    assert l0[2] > 10
    assert (l0 == 0).sum() == len(x) - 1
    compare_steps(stock, sparse_like(stock, target.backend), x, None, precision)


@all_or_no_options
def test_no_latent_is_active(target: Target, options: dict[str, Any]) -> None:
    stock = make(target, **options)
    x = superposed_rows(stock, target.few_rows(20))
    with torch.no_grad():
        stock.b_enc.sub_(1e4)
    sparse = sparse_like(stock, target.backend)
    compare_steps(stock, sparse, x, dead_mask(stock, 20), FLOAT32, input_gradient=True)
    assert not forward_pass(sparse, x).feature_acts.any()


def test_ties_are_cut_to_exactly_the_count(target: Target) -> None:
    """A batch of one row many times: each latent's activations tie."""
    stock = make(target, k=5)
    x = superposed_rows(stock, 1).repeat(target.few_rows(20) - 1, 1)
    expected, actual = (forward_pass(sae, x) for sae in (stock, sparse_like(stock, target.backend)))
    wanted = 5 * len(x)
    for output in (expected, actual):
        assert output.feature_acts.bool().sum() == wanted
    values = [
        output.feature_acts.flatten().sort(descending=True).values for output in (expected, actual)
    ]
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_auxk_refuses_run_time_normalization_as_stock_does(normalize: str) -> None:
    stock = make(TARGETS["torch-cpu"], normalize_activations=normalize)
    x, dead = superposed_rows(stock, 20), dead_mask(stock, 3)
    messages = []
    for sae in (stock, sparse_like(stock)):
        with pytest.raises(ValueError, match="does not support activation normalization") as raised:
            forward_pass(sae, x, dead)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@not_interpreted
def test_small_screen_buffer_gives_the_same_step(target: Target) -> None:
    """One MiB holds at most 8 of the 19 rows, and the last chunk is partial."""
    stock = make(target, d_in=5, d_sae=2**16, k=3)
    sparse = sparse_like(stock, target.backend, screen_buffer_mib=1)
    x, dead = superposed_rows(stock, 19), dead_mask(stock, 20)
    compare_steps(stock, sparse, x, dead, FLOAT32)


@not_interpreted
def test_a_step_makes_nothing_dense(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the threshold nor what is logged needs all activations."""
    stock = make(target, d_in=8, d_sae=2**15, k=3)
    sparse = sparse_like(stock, target.backend, screen_buffer_mib=1)
    trainer = own_trainer(sparse)
    x = superposed_rows(stock, 64)
    computed = record_materializations(monkeypatch)
    with LargestTensor() as largest:
        output = trainer.step(x)
        trainer.build_train_step_log_dict(output, 64)
    assert isinstance(output.feature_acts, SparseFeatureActs)
    assert computed == []
    score_bytes = 2 if target.backend == "triton" and target.device == "cuda" else 4
    assert largest.numel <= max(8 * 2**15, 2**20 // score_bytes)  # weights, the screen's buffer


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("precision", [FLOAT64, AUTOCAST], ids=lambda p: p.name)
@not_interpreted
def test_encoding_takes_the_largest_of_its_rows_in_either_mode(
    target: Target, mode: str, precision: Precision
) -> None:
    """As in stock, where the threshold is for the saved SAE alone."""
    if precision.dtype not in target.dtypes:
        pytest.skip("not a dtype of the target")
    stock = make(target, precision)
    x = rows_for(stock, 12)
    results: list[Values] = []
    exact = copy.deepcopy(stock).double()
    for sae in (stock, sparse_like(stock, target.backend), exact):
        getattr(sae, mode)()
        rows = x.double() if sae is exact else x
        enabled = precision.autocast and sae is not exact
        with torch.no_grad(), torch.autocast(target.device, torch.bfloat16, enabled=enabled):
            values = {"acts": sae.encode(rows), "of five": sae.encode(rows[:5]), "out": sae(rows)}
        results.append({name: value.double() for name, value in values.items()})
    require_within_budget(results[1], results[0], results[2], precision.eps)
    acts, of_five = results[0]["acts"], results[0]["of five"]
    assert not torch.equal(acts[:5].bool(), of_five.bool())


def test_k_of_the_activation_function_is_obeyed(target: Target) -> None:
    """As by a schedule that lowers it during the training."""
    stock = make(target, k=5)
    sparse = sparse_like(stock, target.backend)
    x = superposed_rows(stock, target.few_rows(20))
    for k in (5, 2.5, 8):
        for sae in (stock, sparse):
            sae.activation_fn.k = k
        expected, actual = (forward_pass(sae, x) for sae in (stock, sparse))
        assert actual.feature_acts.bool().sum() == int(k * len(x))
        torch.testing.assert_close(actual.loss, expected.loss)


class Halved(BatchTopK):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


@pytest.mark.parametrize("change", ["subclass", "instance", "hook"])
def test_another_activation_function_makes_the_step_dense(change: str) -> None:
    stock = make(TARGETS["torch-cpu"])
    sparse = sparse_like(stock)
    x = rows_for(stock, 12)
    for sae in (stock, sparse):
        if change == "subclass":
            sae.activation_fn = Halved(sae.cfg.k)
        elif change == "instance":
            original = sae.activation_fn.forward
            sae.activation_fn.forward = lambda x, original=original: original(x) / 2
        else:
            sae.activation_fn.register_forward_hook(lambda *args: args[-1] / 2)
    assert sparse.implementation.name == "dense"
    assert "activation_fn is not SAELens's BatchTopK" in sparse.implementation.reason
    compare_steps(stock, sparse, x, dead_mask(stock, 5), FLOAT32)


def test_auto_goes_by_the_share_of_active_latents() -> None:
    stock = make(TARGETS["torch-cpu"], d_sae=48, k=6.2)
    assert sparse_like(stock, "auto").implementation.name == "dense"
    stock = make(TARGETS["torch-cpu"], d_sae=48, k=5.9)
    assert sparse_like(stock, "auto").implementation.name == "torch"
