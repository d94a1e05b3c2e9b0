"""Levels that a Matryoshka configuration refuses or completes, and what is said of it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)

from saelens_sparse import (
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
)
from tests.support.matryoshka import make_matryoshka
from tests.support.saes import dead_mask, forward_pass, sparse_like, superposed_rows

SETTINGS: dict[str, Any] = {"d_in": 16, "d_sae": 128, "k": 4}


def stock_sae(**options: Any) -> MatryoshkaBatchTopKTrainingSAE:
    return MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(**SETTINGS, **options)
    )


def sparse_sae(**options: Any) -> SparseMatryoshkaBatchTopKTrainingSAE:
    return SparseMatryoshkaBatchTopKTrainingSAE(
        SparseMatryoshkaBatchTopKTrainingSAEConfig(**SETTINGS, **options)
    )


@pytest.mark.parametrize(
    "widths", [[], [0, 128], [-4, 128], [32, 16], [16, 16], [128, 64], [200]], ids=str
)
@pytest.mark.filterwarnings("ignore:.*final matryoshka level:UserWarning")
def test_widths_that_stock_refuses(widths: list[int]) -> None:
    said: list[str] = []
    for make in (stock_sae, sparse_sae):
        with pytest.raises(ValueError, match=r"cfg\.matryoshka_widths must") as raised:
            make(matryoshka_widths=list(widths))
        said.append(str(raised.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("make", [stock_sae, sparse_sae])
def test_the_last_width_is_added_with_a_warning(make: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match=r"final matryoshka level of width=cfg\.d_sae will be"):
        sae = make(matryoshka_widths=[16, 64])
    assert sae.cfg.matryoshka_widths == [16, 64, 128]


@pytest.mark.parametrize("make", [stock_sae, sparse_sae])
def test_one_level_is_warned_about(make: Callable[..., Any]) -> None:
    with pytest.warns(UserWarning, match="only set one matryoshka level"):
        make(matryoshka_widths=[128])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(matryoshka_widths=[64, 128])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"matryoshka_widths": 16}, TypeError, "matryoshka_widths must be a list of ints; got 16"),
        ({"matryoshka_widths": [1.5]}, TypeError, r"matryoshka_widths must be a list.*\[1\.5\]"),
        ({"matryoshka_widths": [True]}, TypeError, "matryoshka_widths must be a list of ints"),
        ({"matryoshka_widths": ["8"]}, TypeError, "matryoshka_widths must be a list of ints"),
        ({"use_matryoshka_aux_loss": 1}, TypeError, "use_matryoshka_aux_loss must be a bool"),
        ({"k": 0}, ValueError, "k must be above 0"),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseMatryoshkaBatchTopKTrainingSAEConfig(**{**SETTINGS, **options})


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("of_level", [True, False])
def test_run_time_normalization_fails_as_in_stock(normalize: str, of_level: bool) -> None:
    """Undoing it uses up what SAELens noted of the batch, which serves the outer level alone."""
    stock = make_matryoshka(normalize_activations=normalize, use_matryoshka_aux_loss=of_level)
    x = superposed_rows(stock, 20)
    said: list[str] = []
    for sae in (stock, sparse_like(stock)):
        with pytest.raises(AttributeError) as raised:
            forward_pass(sae, x)
        said.append(str(raised.value).replace("Sparse", ""))
    assert said[0] == said[1]


@pytest.mark.parametrize("of_level", [True, False])
def test_saved_as_the_jumprelu_of_stock(of_level: bool, tmp_path: Path) -> None:
    stock = make_matryoshka(use_matryoshka_aux_loss=of_level)
    sparse = sparse_like(stock)
    x = superposed_rows(stock, 20)
    for sae, folder in ((stock, tmp_path / "stock"), (sparse, tmp_path / "sparse")):
        forward_pass(sae, x, dead_mask(stock, 3))
        sae.save_inference_model(folder)
    saved = [SAE.load_from_disk(tmp_path / name) for name in ("stock", "sparse")]
    assert [type(sae) for sae in saved] == [JumpReLUSAE] * 2
    for name, value in saved[0].state_dict().items():
        torch.testing.assert_close(saved[1].state_dict()[name], value, msg=name)
    torch.testing.assert_close(saved[1](x), saved[0](x))
