"""Values that a JumpReLU configuration refuses."""

from typing import Any

import pytest
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

from saelens_sparse import SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig


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
def test_bad_values(options: dict[str, Any], error: type[Exception], message: str) -> None:
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
