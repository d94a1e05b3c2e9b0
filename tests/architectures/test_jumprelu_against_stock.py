"""One training step against SAELens's own JumpReLU SAE.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is. Inputs decide every gate and every edge of a
straight-through window by more than rounding, except where the rounding is the test.
"""

from typing import Any

import pytest
import torch

from tests.conftest import Target
from tests.support.jumprelu import (
    D_IN,
    D_SAE,
    FAST_PATHS,
    MODES,
    PATHS,
    SIX_OPTIONS,
    THREE_OPTIONS,
    bandwidth_of,
    compare_jumprelu_steps,
    decide,
    decided_inputs,
    every_fast_path,
    every_mode,
    every_path,
    in_window,
    make_case,
    make_jumprelu,
    margin_of,
    pre_acts,
    sparse_jumprelu,
)
from tests.support.saes import (
    FLOAT32,
    N_DEAD,
    PRECISIONS,
    Precision,
    dead_mask,
    input_or_not,
    step_values,
    superposed_rows,
    target_precision_parameters,
)

every_path_and_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS, targets=FAST_PATHS)
)
three_options = pytest.mark.parametrize("options", THREE_OPTIONS.values(), ids=THREE_OPTIONS)
six_options = pytest.mark.parametrize("options", SIX_OPTIONS.values(), ids=SIX_OPTIONS)


class TestStep:
    @every_path_and_precision
    def test_the_contract_s_inputs_are_on_both_sides_of_every_edge(
        self, target: Target, precision: Precision
    ) -> None:
        stock, x = make_case(target, precision)
        hidden_pre = pre_acts(stock, x)
        window, active = in_window(stock, hidden_pre), hidden_pre > stock.threshold
        assert (window & active).any() and (window & ~active).any() and (active & ~window).any()

    @pytest.mark.parametrize("dead", ["no-dead", "few-dead"])
    @three_options
    def test_step_in_the_interpreter(self, options: dict[str, Any], dead: str) -> None:
        target = PATHS["triton-interpreter"]
        if not target.runs_here:
            pytest.skip("the kernels are compiled here, or there are none")
        # Without and with the gradient of a constant input's bias, and of the input.
        input_gradient = dead == "no-dead"
        stock, x = make_case(target, pre_act_loss_coefficient=0.3, **options)
        mask = dead_mask(stock, N_DEAD[dead])
        compare_jumprelu_steps(stock, target, x, mask, FLOAT32, input_gradient=input_gradient)

    @pytest.mark.pairwise
    @pytest.mark.parametrize("coefficient", [None, 3e-6, 10.0])
    @pytest.mark.parametrize("dead", [None, "no-dead", "few-dead", "all-dead"])
    @every_mode
    @every_fast_path
    def test_pre_act_loss(
        self, target: Target, mode: str, dead: str | None, coefficient: float | None
    ) -> None:
        stock, x = make_case(target, pre_act_loss_coefficient=coefficient, **MODES[mode])
        mask = None if dead is None else dead_mask(stock, N_DEAD[dead])
        compare_jumprelu_steps(stock, target, x, mask, FLOAT32, input_gradient=True)

    @pytest.mark.parametrize("coefficient", [0.0, 0.037, 25.0])
    @every_mode
    @every_fast_path
    def test_l0_coefficient(self, target: Target, mode: str, coefficient: float) -> None:
        stock, x = make_case(target, l0_coefficient=coefficient, **MODES[mode])
        compare_jumprelu_steps(stock, target, x, None, FLOAT32, input_gradient=True)

    @pytest.mark.parametrize("scale", [0.1, 4.0, 100.0])
    @every_fast_path
    def test_tanh_scale(self, target: Target, scale: float) -> None:
        stock, x = make_case(target, jumprelu_tanh_scale=scale, **MODES["tanh"])
        compare_jumprelu_steps(stock, target, x, None, FLOAT32, input_gradient=True)

    @pytest.mark.pairwise
    @pytest.mark.parametrize("bandwidth", [1e-3, 0.05, 1.0, 20.0])
    @three_options
    @every_path_and_precision
    def test_bandwidths(
        self, target: Target, precision: Precision, options: dict[str, Any], bandwidth: float
    ) -> None:
        """From a window that holds hardly anything to one that holds everything."""
        stock, x = make_case(target, precision, jumprelu_bandwidth=bandwidth, **options)
        share = in_window(stock, pre_acts(stock, x)).double().mean()
        assert share < 0.05 if bandwidth < 0.01 else share > 0.95 if bandwidth > 10 else True
        compare_jumprelu_steps(
            stock, target, x, dead_mask(stock, 3), precision, input_gradient=True
        )

    @pytest.mark.pairwise
    @pytest.mark.parametrize("kind", ["zero", "initial", "large", "firing from never to always"])
    @three_options
    @every_path_and_precision
    def test_thresholds(
        self, target: Target, precision: Precision, options: dict[str, Any], kind: str
    ) -> None:
        stock = make_jumprelu(
            dtype=precision.dtype,
            device=target.device,
            jumprelu_bandwidth=bandwidth_of(precision),
            pre_act_loss_coefficient=0.3,
            **options,
        )
        with torch.no_grad():
            if kind == "zero":
                stock.threshold.zero_()
            elif kind == "initial":
                stock.threshold.fill_(torch.tensor(0.01).bfloat16().item())
            elif kind == "large":
                stock.threshold.add_(2)
            else:
                stock.threshold[:10] = 50.0
                stock.b_enc[10:14] = 16.0
        x = decided_inputs(stock, target.few_rows(40), precision)
        rate = (pre_acts(stock, x) > stock.threshold).double().mean(0)
        if kind == "firing from never to always":
            assert (rate[:10] == 0).all() and (rate[10:14] == 1).all() and 0 < rate[14:].mean() < 1
        compare_jumprelu_steps(
            stock, target, x, dead_mask(stock, 20), precision, input_gradient=True
        )

    @pytest.mark.pairwise
    @pytest.mark.parametrize(
        "normalize",
        ["expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"],
    )
    @input_or_not
    @every_path_and_precision
    def test_normalization(
        self, target: Target, precision: Precision, normalize: str, input_gradient: bool
    ) -> None:
        stock, x = make_case(
            target, precision, normalize_activations=normalize, pre_act_loss_coefficient=0.3
        )
        compare_jumprelu_steps(
            stock, target, x, dead_mask(stock, 20), precision, input_gradient=input_gradient
        )

    @three_options
    @every_path_and_precision
    def test_rows_on_which_nothing_or_everything_is_active(
        self, target: Target, precision: Precision, options: dict[str, Any]
    ) -> None:
        stock = make_jumprelu(
            dtype=precision.dtype,
            device=target.device,
            jumprelu_bandwidth=bandwidth_of(precision),
            **options,
        )
        x = superposed_rows(stock, target.few_rows(40))
        with torch.no_grad():
            stock.W_enc[0] = 0.5 + torch.rand(D_SAE).bfloat16()
        x[::3], x[1::3] = 0.0, 0.0
        x[::3, 0], x[1::3, 0] = 32.0, -32.0
        # The first row of the encoder is larger than the rest, and so is its rounding.
        decide(stock, x, 3 * margin_of(precision))
        l0 = (pre_acts(stock, x) > stock.threshold).sum(-1)
        assert (l0[::3] == D_SAE).all() and (l0[1::3] == 0).all()
        assert ((l0[2::3] > 0) & (l0[2::3] < D_SAE)).any()
        compare_jumprelu_steps(
            stock, target, x, dead_mask(stock, 20), precision, input_gradient=True
        )

    @pytest.mark.pairwise
    @pytest.mark.parametrize("active", ["nothing", "everything"])
    @three_options
    @every_path_and_precision
    def test_batches_on_which_nothing_or_everything_is_active(
        self, target: Target, precision: Precision, options: dict[str, Any], active: str
    ) -> None:
        stock, x = make_case(target, precision, pre_act_loss_coefficient=0.3, **options)
        with torch.no_grad():
            stock.b_enc.fill_(-100.0 if active == "nothing" else 100.0)
        share = (pre_acts(stock, x) > stock.threshold).double().mean()
        assert share == (0 if active == "nothing" else 1)
        compare_jumprelu_steps(
            stock, target, x, dead_mask(stock, 20), precision, input_gradient=True
        )

    @three_options
    @every_path
    def test_empty_batch(self, target: Target, options: dict[str, Any]) -> None:
        """As in stock: losses are means over nothing, gradients sums over nothing."""
        stock = make_jumprelu(device=target.device, pre_act_loss_coefficient=0.3, **options)
        x, mask = torch.zeros(0, D_IN, device=target.device), dead_mask(stock, 20)
        expected, actual = (
            step_values(sae, x, mask) for sae in (stock, sparse_jumprelu(stock, target.backend))
        )
        assert expected["loss"].isnan()
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, equal_nan=True, msg=name)

    @three_options
    @every_fast_path
    def test_a_single_latent(self, target: Target, options: dict[str, Any]) -> None:
        if "target_l0" in options:
            options = {**options, "target_l0": 0.5}
        stock, x = make_case(target, n_rows=20, d_sae=1, **options)
        compare_jumprelu_steps(stock, target, x, dead_mask(stock, 1), FLOAT32, input_gradient=True)
