"""Fields of the configurations: stock's, those that are new, and values that are refused."""

import json
import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

import saelens_sparse
from saelens_sparse import (
    SparseJumpReLUTrainingSAE,
    SparseJumpReLUTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)
from saelens_sparse.architectures import topk as topk_sparse_sae
from tests.support.jumprelu import MODES
from tests.support.saes import forward_pass

CLASSES = {
    "topk": (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    "jumprelu": (SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig),
}


@pytest.mark.parametrize("architecture", CLASSES)
def test_fields_and_defaults_of_stock(architecture: str) -> None:
    (_, stock_class), (_, sparse_class) = (
        get_sae_training_class(architecture),
        CLASSES[architecture],
    )
    stock: Any = stock_class(d_in=8, d_sae=200)
    sparse: Any = sparse_class(d_in=8, d_sae=200)
    for field in fields(stock):
        if field.name != "metadata":
            assert getattr(sparse, field.name) == getattr(stock, field.name), field.name
    new = {field.name for field in fields(sparse)} - {field.name for field in fields(stock)}
    assert {name: getattr(sparse, name) for name in new} == {
        "implementation": "auto",
        "screen_buffer_mib": 1024,
        "fused_adam": True,
        "gradient_buffers": False,
        "cuda_graph": True,
    }


def test_dict_and_json() -> None:
    cfg = SparseJumpReLUTrainingSAEConfig(
        d_in=8, d_sae=200, implementation="torch", screen_buffer_mib=3, **MODES["quadratic"]
    )
    for cfg_dict in (cfg.to_dict(), json.loads(json.dumps(cfg.to_dict()))):
        assert cfg_dict["architecture"] == "jumprelu_sparse"
        assert SparseJumpReLUTrainingSAEConfig.from_dict(cfg_dict) == cfg


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1; got 0"),
        ({"k": -3}, ValueError, "k must be at least 1; got -3"),
        ({"k": 129}, ValueError, "k must be at most d_sae=128; got 129"),
        ({"k": 2.5}, TypeError, "k must be an int; got 2.5"),
        ({"k": True}, TypeError, "k must be an int; got True"),
        ({"k": "4"}, TypeError, "k must be an int; got '4'"),
        ({"k": float("nan")}, TypeError, "k must be an int; got nan"),
        ({"d_in": 0}, ValueError, "d_in must be at least 1; got 0"),
        ({"d_in": 3.0}, TypeError, "d_in must be an int; got 3.0"),
        ({"d_sae": -1, "k": 1}, ValueError, "d_sae must be at least 1; got -1"),
        ({"screen_buffer_mib": 0}, ValueError, "screen_buffer_mib must be at least 1; got 0"),
        ({"aux_loss_coefficient": float("nan")}, ValueError, "aux_loss_coefficient must be"),
        ({"aux_loss_coefficient": float("inf")}, ValueError, "aux_loss_coefficient must be"),
        ({"decoder_init_norm": float("nan")}, ValueError, "decoder_init_norm must be"),
        ({"decoder_init_norm": 0.0}, ValueError, "decoder_init_norm must be"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of auto, triton"),
        ({"normalize_activations": "l2"}, ValueError, "normalize_activations must be"),
    ],
    ids=str,
)
def test_bad_values_of_topk(options: dict[str, Any], error: type[Exception], message: str) -> None:
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 128, "k": 4, **options}
    with pytest.raises(error, match=message):
        SparseTopKTrainingSAEConfig(**settings)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"d_in": 0}, ValueError, "d_in must be at least 1; got 0"),
        ({"d_in": 16.0}, TypeError, "d_in must be an int; got 16.0"),
        ({"d_sae": -1}, ValueError, "d_sae must be at least 1; got -1"),
        ({"d_sae": "many"}, TypeError, "d_sae must be an int"),
        ({"screen_buffer_mib": 0}, ValueError, "screen_buffer_mib must be at least 1; got 0"),
        ({"screen_buffer_mib": 1.5}, TypeError, "screen_buffer_mib must be an int"),
        ({"fused_adam": 1}, TypeError, "fused_adam must be a bool"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of auto, triton"),
        ({"implementation": "fused"}, ValueError, "implementation must be one of auto, triton"),
        ({"jumprelu_bandwidth": 0.0}, ValueError, "jumprelu_bandwidth must be"),
        ({"jumprelu_bandwidth": -0.05}, ValueError, "jumprelu_bandwidth must be"),
        ({"jumprelu_bandwidth": float("nan")}, ValueError, "jumprelu_bandwidth must be"),
        ({"jumprelu_bandwidth": "wide"}, TypeError, "jumprelu_bandwidth must be"),
        ({"jumprelu_init_threshold": float("inf")}, ValueError, "jumprelu_init_threshold must"),
        ({"jumprelu_init_threshold": None}, TypeError, "jumprelu_init_threshold must"),
        ({"l0_coefficient": float("nan")}, ValueError, "l0_coefficient must be"),
        ({"l0_coefficient": "1"}, TypeError, "l0_coefficient must be"),
        ({"l0_warm_up_steps": -1}, ValueError, "l0_warm_up_steps must be at least 0; got -1"),
        ({"l0_warm_up_steps": 2.5}, TypeError, "l0_warm_up_steps must be an int"),
        ({"pre_act_loss_coefficient": float("inf")}, ValueError, "pre_act_loss_coefficient"),
        ({"pre_act_loss_coefficient": "3e-6"}, TypeError, "pre_act_loss_coefficient must be"),
        ({"jumprelu_tanh_scale": float("nan")}, ValueError, "jumprelu_tanh_scale must be"),
        ({"jumprelu_ste_to_input": "yes"}, TypeError, "jumprelu_ste_to_input must be a bool"),
        ({"jumprelu_sparsity_loss_mode": "l1"}, ValueError, "jumprelu_sparsity_loss_mode"),
        ({"decoder_init_norm": 0.0}, ValueError, "decoder_init_norm must be"),
        ({"dtype": "int64"}, ValueError, "dtype"),
        ({"normalize_activations": "l2"}, ValueError, "normalize_activations must be"),
    ],
    ids=str,
)
def test_bad_values_of_jumprelu(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    settings: dict[str, Any] = {"d_in": 8, "d_sae": 16, **options}
    with pytest.raises(error, match=message):
        SparseJumpReLUTrainingSAEConfig(**settings)


@pytest.mark.parametrize("target_l0", [None, 0, -1.0, 17])
def test_a_bad_target_l0_is_refused_where_stock_does(target_l0: float | None) -> None:
    options: dict[str, Any] = {
        "d_in": 8, "d_sae": 16, "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": target_l0,
    }  # fmt: skip
    classes: list[tuple[Any, Any]] = [
        (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
        (SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig),
    ]
    for sae_class, config_class in classes:
        with pytest.raises(ValueError, match="target_l0 must be"):
            sae_class(config_class(**options))
    with pytest.raises(ValueError, match=rf"above 0 and at most d_sae=16 .* got {target_l0}$"):
        SparseJumpReLUTrainingSAEConfig(**options)


def test_use_sparse_activations_warns_once() -> None:
    def config() -> SparseTopKTrainingSAEConfig:
        return SparseTopKTrainingSAEConfig(
            d_in=16, d_sae=128, k=4, implementation="torch", use_sparse_activations=True
        )

    topk_sparse_sae._say_sparse_activations_are_moot.cache_clear()
    with pytest.warns(UserWarning, match="use_sparse_activations=True has nothing left"):
        cfg = config()
    assert cfg.use_sparse_activations
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae = SparseTopKTrainingSAE(config())
    output = forward_pass(sae, torch.randn(5, 16))
    output.loss.backward()
    assert not output.feature_acts.is_sparse


@pytest.mark.parametrize("architecture", CLASSES)
def test_registration_is_idempotent(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        saelens_sparse.register()
    name = f"{architecture}_sparse"
    assert get_sae_training_class(name) == CLASSES[architecture]
    monkeypatch.delitem(SAE_TRAINING_CLASS_REGISTRY, name)
    saelens_sparse.register()
    assert get_sae_training_class(name) == CLASSES[architecture]
    monkeypatch.setitem(SAE_TRAINING_CLASS_REGISTRY, name, get_sae_training_class(architecture))
    with pytest.raises(ValueError, match=f"{name} already registered"):
        saelens_sparse.register()


@pytest.mark.parametrize("architecture", CLASSES)
def test_triton_is_never_replaced(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sae_class, config_class = CLASSES[architecture]
    cfg: Any = config_class(d_in=16, d_sae=128, implementation="triton")
    sae: Any = sae_class(cfg)
    with pytest.raises(ValueError, match=r"implementation='triton' cannot run here: .*'torch'"):
        sae.encode(torch.zeros(4, 16))
