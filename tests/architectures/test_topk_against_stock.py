"""One training step against SAELens's own Top-K SAE.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE

from saelens_sparse.codes.on_demand import SparseFeatureActs
from tests.conftest import Target
from tests.support.architectures import ALL_OR_NO_OPTIONS, TOPK_OPTIONS, TRAITS
from tests.support.saes import (
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    Precision,
    Values,
    compare_steps,
    dead_mask,
    forward_pass,
    make_stock,
    not_interpreted,
    require_within_budget,
    sparse_like,
    step_values,
    stock_like,
    target_precision_parameters,
    zipf_inputs,
)
from tests.support.trainers import make_trainer

every_target_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS)
)
every_option = pytest.mark.parametrize("options", TOPK_OPTIONS.values(), ids=TOPK_OPTIONS)
all_or_no_options = pytest.mark.parametrize(
    "options", ALL_OR_NO_OPTIONS.values(), ids=ALL_OR_NO_OPTIONS
)


def test_the_contract_s_sizes_are_screened(device: torch.device) -> None:
    kernels = pytest.importorskip("saelens_sparse.ops.search.topk_kernels")
    stock = make_stock(**TRAITS["topk_sparse"].screened, device=str(device))
    assert kernels.can_screen(zipf_inputs(stock, 9), stock.W_enc.T, stock.cfg.k)


def test_step_without_a_mask_of_dead_latents(backend: str, device: torch.device) -> None:
    stock = make_stock(device=str(device))
    compare_steps(stock, sparse_like(stock, backend), zipf_inputs(stock, 9), None, FLOAT32)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_auxk_refuses_run_time_normalization_as_stock_does(normalize: str) -> None:
    stock = make_stock(normalize_activations=normalize)
    x, dead = zipf_inputs(stock, 20), dead_mask(stock, 3)
    messages = []
    for sae in (stock, sparse_like(stock)):
        with pytest.raises(ValueError, match="does not support activation normalization") as raised:
            forward_pass(sae, x, dead)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("shape", "n_rows"),
    [
        ({"k": 1}, 20),
        ({"k": 7}, 20),
        ({"k": 48}, 20),
        ({"d_in": 7, "d_sae": 37, "k": 3}, 20),
        ({"d_sae": 1, "k": 1}, 20),
        ({}, 1),
        ({}, 129),
    ],
    ids=["k=1", "k=7", "k=d_sae", "odd-widths", "d_sae=1", "one-row", "129-rows"],
)
@all_or_no_options
def test_shapes(
    target: Target, shape: dict[str, Any], n_rows: int, options: dict[str, Any]
) -> None:
    stock = make_stock(**shape, **options, device=target.device)
    compare_steps(
        stock,
        sparse_like(stock, target.backend),
        zipf_inputs(stock, target.few_rows(n_rows)),
        dead_mask(stock, min(20, stock.cfg.d_sae)),
        FLOAT32,
        input_gradient=True,
    )


def everywhere_active(stock: TopKTrainingSAE) -> None:
    stock.b_enc[7] = 50.0


def mostly_clipped(stock: TopKTrainingSAE) -> None:
    stock.b_enc.sub_(2.5)


def entirely_clipped(stock: TopKTrainingSAE) -> None:
    stock.b_enc.sub_(1e4)


@pytest.mark.pairwise
@pytest.mark.parametrize("change", [everywhere_active, mostly_clipped, entirely_clipped])
@all_or_no_options
@every_target_precision
def test_activation_patterns(
    target: Target,
    precision: Precision,
    options: dict[str, Any],
    change: Callable[[TopKTrainingSAE], None],
) -> None:
    stock = make_stock(k=20, dtype=precision.dtype, device=target.device, **options)
    # So far below zero bfloat16 tells no latents apart: AuxK would take any of the dead ones.
    all_tie = change is entirely_clipped and precision.dtype == torch.bfloat16
    dead = dead_mask(stock, 0 if all_tie else 20)
    x = zipf_inputs(stock, target.few_rows(40), dead)
    with torch.no_grad():
        change(stock)
    l0 = stock.encode(x).bool().sum(-1)
    shows_pattern = {
        "everywhere_active": (stock.encode(x)[:, 7] > 0).all(),
        "mostly_clipped": 0 < l0.float().mean() < stock.cfg.k - 1,
        "entirely_clipped": (l0 == 0).all(),
    }
    assert shows_pattern[change.__name__]
    compare_steps(
        stock,
        sparse_like(stock, target.backend),
        x,
        dead,
        precision,
        input_gradient=True,
    )


@pytest.mark.pairwise
@every_option
@every_target_precision
def test_ties(target: Target, precision: Precision, options: dict[str, Any]) -> None:
    """Latents in identical pairs tie exactly, and an odd k splits a pair in every row.

    Which one of a pair is kept is arbitrary; what both SAEs must share is all that does not
    depend on it: losses, values, the reconstruction, and gradients summed over each pair.
    """
    stock = make_stock(dtype=precision.dtype, device=target.device, **options)
    with torch.no_grad():
        for parameter in (stock.W_dec, stock.W_enc.T, stock.b_enc):
            parameter[1::2] = parameter[::2]
    dead = dead_mask(stock, 20)
    dead[1::2] = dead[::2]
    x = zipf_inputs(stock, target.few_rows(40), dead, n_selected=stock.cfg.k + 1)

    def values(sae: TopKTrainingSAE, autocast: bool = False) -> Values:
        result = step_values(sae, x, dead, autocast=autocast, input_gradient=True)
        for name in ("W_dec", "b_enc"):
            gradient = result[f"gradient of {name}"]
            result[f"gradient of {name}"] = gradient[::2] + gradient[1::2]
        gradient = result["gradient of W_enc"]
        result["gradient of W_enc"] = gradient[:, ::2] + gradient[:, 1::2]
        return result

    if precision == FLOAT64:
        precision = FLOAT32
        stock = stock_like(stock, torch.float32)
    require_within_budget(
        values(sparse_like(stock, target.backend), precision.autocast),
        values(stock, precision.autocast),
        values(stock_like(stock)),
        precision.eps,
    )


@not_interpreted
def test_small_screen_buffer_gives_the_same_step(target: Target) -> None:
    """One MiB holds at most 8 of the 19 rows, and the last chunk is partial."""
    stock = make_stock(device=target.device, d_in=5, d_sae=2**16, k=3)
    sparse = sparse_like(stock, target.backend, screen_buffer_mib=1)
    dead = dead_mask(stock, 20)
    compare_steps(stock, sparse, zipf_inputs(stock, 19), dead, FLOAT32)


def test_auto_uses_dense_products_where_most_latents_are_active() -> None:
    stock = make_stock(d_sae=48, k=7)
    sparse = sparse_like(stock, "auto")
    assert sparse.implementation.name == "dense"
    assert "active" in sparse.implementation.reason
    stock = make_stock(d_sae=48, k=6)
    sparse = sparse_like(stock, "auto")
    assert sparse.implementation.name == "torch"
    assert isinstance(forward_pass(sparse, zipf_inputs(stock, 4)).feature_acts, SparseFeatureActs)


def test_auto_uses_dense_products_sooner_where_they_run_in_low_precision() -> None:
    sparse = sparse_like(make_stock(d_sae=200, k=6), "auto")
    assert sparse.implementation.name == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse.implementation.name == "dense"
    assert sparse.to(torch.bfloat16).implementation.name == "dense"
    few = sparse_like(make_stock(d_sae=200, k=5), "auto")
    with torch.autocast("cpu", torch.bfloat16):
        assert few.implementation.name == "torch"


def test_the_choice_can_be_asked_for_on_the_meta_device() -> None:
    sparse = sparse_like(make_stock(), "dense").to("meta")
    assert sparse.implementation.name == "dense"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_latents_of_a_bad_row_are_counted_as_in_stock(bad: float) -> None:
    stock = make_stock()
    x = zipf_inputs(stock, 12)
    x[3, 2] = bad
    trainers = [make_trainer(sae) for sae in (stock, sparse_like(stock))]
    for trainer in trainers:
        trainer.step(x)
    assert trainers[0].act_freq_scores.sum() == trainers[1].act_freq_scores.sum()


def test_folding_needs_rescaling_as_in_stock() -> None:
    stock = make_stock(rescale_acts_by_decoder_norm=False)
    for sae in (stock, sparse_like(stock)):
        with pytest.raises(NotImplementedError, match="Folding W_dec_norm is not safe"):
            sae.fold_W_dec_norm()
