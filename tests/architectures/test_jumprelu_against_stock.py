"""One training step against SAELens's own JumpReLU SAE.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is. Inputs decide every gate and every edge of a
straight-through window by more than rounding, except where the rounding is the test.
"""

from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput

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
    edge_distances,
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
    coefficients,
    compare_steps,
    dead_mask,
    error,
    forward_pass,
    input_or_not,
    not_interpreted,
    step_values,
    stock_like,
    superposed_rows,
    target_precision_parameters,
)

every_path_and_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS, targets=FAST_PATHS)
)
three_options = pytest.mark.parametrize("options", THREE_OPTIONS.values(), ids=THREE_OPTIONS)
six_options = pytest.mark.parametrize("options", SIX_OPTIONS.values(), ids=SIX_OPTIONS)


class TestStep:
    @pytest.mark.parametrize("dead", N_DEAD)
    @six_options
    @every_path_and_precision
    def test_step(
        self, target: Target, precision: Precision, options: dict[str, Any], dead: str
    ) -> None:
        stock, x = make_case(target, precision, pre_act_loss_coefficient=0.3, **options)
        hidden_pre = pre_acts(stock, x)
        window, active = in_window(stock, hidden_pre), hidden_pre > stock.threshold
        assert (window & active).any() and (window & ~active).any() and (active & ~window).any()
        mask = dead_mask(stock, N_DEAD[dead])
        compare_jumprelu_steps(stock, target, x, mask, precision, input_gradient=True)

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

    @six_options
    @every_path_and_precision
    def test_step_on_a_constant_input(
        self, target: Target, precision: Precision, options: dict[str, Any]
    ) -> None:
        stock, x = make_case(target, precision, **options)
        compare_jumprelu_steps(stock, target, x, dead_mask(stock, 20), precision)

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

    @pytest.mark.parametrize(
        ("shape", "n_rows"),
        [
            ({"d_in": 1}, 20),
            ({"d_in": 7, "d_sae": 37}, 20),
            ({"d_in": 12, "d_sae": 100}, 20),
            ({"d_sae": 1}, 20),
            ({}, 1),
            ({}, 129),
        ],
        ids=["d_in=1", "odd-widths", "d_sae=100", "d_sae=1", "one-row", "129-rows"],
    )
    @three_options
    @every_fast_path
    def test_shapes(
        self, target: Target, shape: dict[str, Any], n_rows: int, options: dict[str, Any]
    ) -> None:
        options = {**options, **shape, "pre_act_loss_coefficient": 0.3}
        if "target_l0" in options and shape.get("d_sae") == 1:
            options["target_l0"] = 0.5
        stock, x = make_case(target, n_rows=n_rows, **options)
        mask = dead_mask(stock, min(20, stock.cfg.d_sae))
        compare_jumprelu_steps(stock, target, x, mask, FLOAT32, input_gradient=True)

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

    @every_mode
    @every_fast_path
    def test_a_batch_with_two_leading_dimensions(self, target: Target, mode: str) -> None:
        stock, x = make_case(target, n_rows=8, **MODES[mode])
        compare_jumprelu_steps(
            stock, target, x.view(2, 4, -1), dead_mask(stock, 3), FLOAT32, input_gradient=True
        )

    @three_options
    @every_fast_path
    def test_non_contiguous_input(self, target: Target, options: dict[str, Any]) -> None:
        stock, x = make_case(target, **options)
        compare_jumprelu_steps(stock, target, x.T.contiguous().T, None, FLOAT32)


def on_grid(shape: tuple[int, ...], limit: int, unit: float) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape) * unit


class TestEdges:
    """Pre-activations so near to an edge that only exact arithmetic tells on which side."""

    BANDWIDTH = 2.0**-4

    def exact_case(self, target: Target) -> tuple[JumpReLUTrainingSAE, torch.Tensor]:
        """Inputs whose pre-activations float32 computes exactly in any order of summation.

        Inputs have 12 bits, more than float16 holds; weights have 7: products sum in 24 bits.
        """
        n_rows = 6 if target.interpreted else 40
        stock = make_jumprelu(
            device=target.device,
            jumprelu_bandwidth=self.BANDWIDTH,
            apply_b_dec_to_input=False,
        )
        with torch.no_grad():
            stock.W_enc.copy_(on_grid((D_IN, D_SAE), 127, 2.0**-7))
            stock.b_enc.copy_(on_grid((D_SAE,), 2**14, 2.0**-17))
        x = on_grid((n_rows, D_IN), 4095, 2.0**-11).to(target.device)
        assert not torch.equal(x, x.half().float())
        hidden_pre = pre_acts(stock, x)
        exact = x[:, :6] @ stock.W_enc[:6] + x[:, 6:] @ stock.W_enc[6:] + stock.b_enc
        assert torch.equal(exact.double(), hidden_pre)
        return stock, x

    def near_row(
        self, hidden_pre: torch.Tensor, offsets: list[float], *, relative: bool
    ) -> torch.Tensor:
        """A threshold per latent, at an offset from its pre-activation on some row."""
        n_rows, d_sae = hidden_pre.shape
        latents = torch.arange(d_sae)
        # A row on which the latent's pre-activation is positive.
        first = (hidden_pre > 0.2).double().argmax(0)
        near = hidden_pre[first, latents.to(first.device)]
        offset = torch.tensor(offsets, dtype=torch.float64)[latents % len(offsets)].to(near)
        assert n_rows > 1
        return (near * (1 + offset) if relative else near + offset).float()

    def require_same_gates(
        self, stock: JumpReLUTrainingSAE, target: Target, x: torch.Tensor
    ) -> None:
        oracle, sparse = stock_like(stock), sparse_jumprelu(stock, target.backend)
        outputs = [forward_pass(oracle, x.double()), forward_pass(sparse, x)]
        expected, actual = (output.feature_acts.detach() > 0 for output in outputs)
        assert torch.equal(actual, expected)
        expected, actual = (output.losses["l0_loss"].double() for output in outputs)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
        # Of the threshold, the L0 loss has a gradient of one unit per row in the window.
        counts = []
        for sae, output in zip((oracle, sparse), outputs, strict=True):
            (gradient,) = torch.autograd.grad(output.losses["l0_loss"], [sae.threshold])
            counts.append((-gradient * len(x) * self.BANDWIDTH).double().cpu())
        torch.testing.assert_close(counts[1], counts[0], rtol=1e-5, atol=1e-5)
        assert counts[0].sum() > 0
        for row in x[:3].split(1):
            expected, actual = (sae.encode(row.to(sae.dtype)) > 0 for sae in (oracle, sparse))
            assert torch.equal(actual, expected)

    @every_path
    def test_a_gate_is_exact_to_the_last_bit_and_strict(self, target: Target) -> None:
        stock, x = self.exact_case(target)
        ulp = torch.finfo(torch.float32).eps
        offsets = [0.0, ulp, -ulp, 4 * ulp, -4 * ulp, 1e-6, -1e-6, 2e-5, -2e-5, 3e-4, -3e-4]
        hidden_pre = pre_acts(stock, x)
        with torch.no_grad():
            stock.threshold.copy_(self.near_row(hidden_pre, offsets, relative=True))
        distance = (hidden_pre - stock.threshold).abs()
        assert (distance == 0).sum() >= D_SAE // len(offsets), "no tie was made"
        assert ((distance > 0) & (distance < 1e-6)).sum() >= D_SAE // len(offsets)
        self.require_same_gates(stock, target, x)

    @every_path
    def test_an_edge_of_the_window_is_exact_to_the_last_bit_and_strict(
        self, target: Target
    ) -> None:
        stock, x = self.exact_case(target)
        unit = 2.0**-17
        half = self.BANDWIDTH / 2
        offsets = [sign * half + n * unit for sign in (1, -1) for n in (0, 1, -1, 5, -5)]
        hidden_pre = pre_acts(stock, x)
        with torch.no_grad():
            stock.threshold.copy_(self.near_row(hidden_pre, offsets, relative=False))
        on_the_edge = (hidden_pre - stock.threshold).abs() == half
        assert on_the_edge.sum() >= 2 * (D_SAE // len(offsets)), "no tie was made"
        self.require_same_gates(stock, target, x)

    @every_path
    def test_gates_nearer_than_a_float16_screen_can_tell(self, target: Target) -> None:
        """Far enough for float32 on ordinary values, and within the error of half precision."""
        stock = make_jumprelu(d_in=32, device=target.device, jumprelu_bandwidth=self.BANDWIDTH)
        x = torch.randn(target.few_rows(64), 32, device=target.device)
        hidden_pre = pre_acts(stock, x)
        offsets = [3e-5, -3e-5, 6e-5, -6e-5, 1e-4, -1e-4, 3e-4, -3e-4]
        with torch.no_grad():
            stock.threshold.copy_(self.near_row(hidden_pre, offsets, relative=True))
        # Rows that happen to be nearer to some edge than float32 can tell.
        keep = (edge_distances(stock, hidden_pre) > 4e-6).all(1)
        x, hidden_pre = x[keep], hidden_pre[keep]
        assert keep.double().mean() > 0.5
        distance = (hidden_pre - stock.threshold).abs()
        assert (distance < 3e-4 * hidden_pre.abs()).sum() > D_SAE // 4
        half_precision = (x.half() @ stock.W_enc.half()).double() + stock.b_enc
        active = hidden_pre > stock.threshold
        if stock.cfg.apply_b_dec_to_input:
            half_precision -= (stock.b_dec @ stock.W_enc).double()
        assert ((half_precision > stock.threshold) != active).any(), "half precision tells too"
        self.require_same_gates(stock, target, x)
        if not target.interpreted:
            compare_jumprelu_steps(stock, target, x, None, FLOAT32, input_gradient=True)


class TestOutsideOfATrainingStep:
    """What a subclass, an evaluation or a custom loop does with the public methods."""

    @not_interpreted
    def test_a_subclass_may_read_activations_in_its_losses(self, target: Target) -> None:
        stock, x = make_case(target, jumprelu_ste_to_input=True)
        sparse = sparse_jumprelu(stock, target.backend)

        def with_penalty(sae: JumpReLUTrainingSAE) -> type[JumpReLUTrainingSAE]:
            class WithPenalty(type(sae)):
                def calculate_aux_loss(
                    self,
                    step_input: Any,
                    feature_acts: torch.Tensor,
                    hidden_pre: torch.Tensor,
                    sae_out: torch.Tensor,
                ) -> dict[str, torch.Tensor]:
                    penalty = 0.01 * feature_acts.abs().sum()
                    losses = super().calculate_aux_loss(
                        step_input, feature_acts, hidden_pre, sae_out
                    )
                    return {**losses, "penalty": penalty}

            return WithPenalty

        saes: list[Any] = [stock, sparse]
        for sae in saes:
            sae.__class__ = with_penalty(sae)
        expected, actual = (step_values(sae, x) for sae in (stock, sparse))
        for name, value in expected.items():
            assert error(actual[name], value) <= 1e-5 * value.norm() + 1e-6, name

    @pytest.mark.parametrize("implementation", ["torch", "fused"])
    def test_losses_of_a_custom_loop(self, implementation: str) -> None:
        stock = make_jumprelu(pre_act_loss_coefficient=0.3)
        x, dead = superposed_rows(stock, 20), dead_mask(stock, 20)
        losses = []
        for sae in (stock, sparse_jumprelu(stock, implementation)):
            feature_acts, hidden_pre = sae.encode_with_hidden_pre(x)
            step_input = TrainStepInput(x, coefficients(sae), dead, 0, is_logging_step=False)
            terms = sae.calculate_aux_loss(
                step_input, feature_acts, hidden_pre, sae.decode(feature_acts)
            )
            losses.append({name: term.item() for name, term in terms.items()})
        assert losses[0]["pre_act_loss"] > 0
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_float64_stays_float64_under_autocast(self) -> None:
        stock = make_jumprelu(dtype=torch.float64)
        x = superposed_rows(stock, 20)
        expected = step_values(stock, x, autocast=True)
        for implementation in ("torch", "fused"):
            actual = step_values(sparse_jumprelu(stock, implementation), x, autocast=True)
            for name, value in expected.items():
                assert error(actual[name], value) <= 1e-6 * value.norm(), name

    @pytest.mark.parametrize("implementation", ["torch", "fused"])
    def test_the_tanh_loss_of_many_rows_does_not_overflow_float16(
        self, implementation: str
    ) -> None:
        stock = make_jumprelu(dtype=torch.float16, jumprelu_sparsity_loss_mode="tanh")
        x = superposed_rows(stock, 8192)
        expected, actual = (
            forward_pass(sae, x).losses["l0_loss"].item()
            for sae in (stock, sparse_jumprelu(stock, implementation))
        )
        assert actual == pytest.approx(expected, rel=0.01)

    @pytest.mark.parametrize("implementation", ["torch", "fused"])
    def test_encode_is_as_precise_as_stock_s_under_autocast(self, implementation: str) -> None:
        stock = make_jumprelu()
        x = superposed_rows(stock, 20)
        with torch.autocast("cpu", torch.bfloat16):
            expected = stock.encode(x)
            actual = sparse_jumprelu(stock, implementation).encode(x)
        assert actual.dtype == expected.dtype
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected)

    def test_a_loss_mode_that_was_changed_later_is_refused_as_in_stock(self) -> None:
        stock = make_jumprelu()
        for sae in (stock, sparse_jumprelu(stock)):
            sae.cfg.jumprelu_sparsity_loss_mode = "bogus"  # pyright: ignore[reportAttributeAccessIssue]
            with pytest.raises(ValueError, match="bogus"):
                forward_pass(sae, superposed_rows(stock, 4))

    @every_fast_path
    def test_encode_does_not_clamp_thresholds_but_a_training_step_does(
        self, target: Target
    ) -> None:
        stock = make_jumprelu(device=target.device)
        with torch.no_grad():
            stock.threshold[::2] = -0.25
        x = decided_inputs(stock, target.few_rows(20), FLOAT32)
        sparse = sparse_jumprelu(stock, target.backend)
        expected = stock.encode(x)
        assert (expected < 0).any(), "no negative pre-activation passes a gate"
        torch.testing.assert_close(sparse.encode(x), expected)
        assert (sparse.threshold[::2] == -0.25).all()
        with torch.no_grad():
            stock.threshold.clamp_(min=0)
        decide(stock, x, margin_of(FLOAT32))
        with torch.no_grad():
            stock.threshold[::2] = -0.25
        sparse = sparse_jumprelu(stock, target.backend)
        values = [step_values(sae, x) for sae in (stock, sparse)]
        assert (sparse.threshold[::2] == 0).all()
        for name, value in values[0].items():
            torch.testing.assert_close(values[1][name], value, rtol=1e-4, atol=1e-5, msg=name)

    @not_interpreted
    def test_small_screen_buffer_gives_the_same_step(self, target: Target) -> None:
        """One MiB holds 8 of the 19 rows in float32 and 16 in half precision."""
        stock = make_jumprelu(device=target.device, d_in=5, d_sae=2**15)
        with torch.no_grad():
            stock.b_enc.sub_(13)
        x = 8 * torch.nn.functional.normalize(superposed_rows(stock, 19))
        decide(stock, x, margin_of(FLOAT32), n_shifts=6)
        assert 10 < (pre_acts(stock, x) > stock.threshold).sum(-1).double().mean() < 200
        sparse = sparse_jumprelu(stock, target.backend, screen_buffer_mib=1)
        compare_steps(stock, sparse, x, dead_mask(stock, 20), FLOAT32, input_gradient=True)
