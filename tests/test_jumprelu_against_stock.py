"""One training step, and several, against SAELens's own JumpReLU SAE.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is. Inputs decide every gate and every edge of a
straight-through window by more than rounding, except where the rounding is the test.
"""

import importlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sae_lens import SAE, JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig, TrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors.torch import load_file, save_file

from saelens_sparse import SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig
from saelens_sparse.lazy import OnDemandTensor
from saelens_sparse.saes.jumprelu_sparse_sae import MAX_SPARSE_SHARE
from tests.conftest import Target, marks, target_parameters
from tests.jumprelu_helpers import (
    FUSED,
    PATHS,
    compare_jumprelu_steps,
    decide,
    decided_inputs,
    edge_distances,
    in_window,
    make_jumprelu,
    margin_of,
    pre_acts,
    sparse_jumprelu,
)
from tests.sae_helpers import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    LargestTensor,
    Precision,
    Values,
    coefficients,
    compare_steps,
    dead_mask,
    error,
    forward_pass,
    gradients,
    make_trainer,
    on_cpu,
    record_materializations,
    require_within_budget,
    step_values,
    stock_like,
    superposed_rows,
    target_precision_parameters,
)

MODES: dict[str, dict[str, Any]] = {
    "step": {"jumprelu_sparsity_loss_mode": "step"},
    "tanh": {"jumprelu_sparsity_loss_mode": "tanh"},
    "quadratic": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.5},
}
OPTIONS = [
    pytest.param(
        {**MODES[mode], "jumprelu_ste_to_input": ste, "apply_b_dec_to_input": centre},
        id=f"{mode}-{'ste-to-input' if ste else 'ste-to-threshold'}-"
        f"{'centred' if centre else 'uncentred'}",
    )
    for mode, ste, centre in itertools.product(MODES, (True, False), (True, False))
]
D_IN, D_SAE = 13, 64
N_DEAD = {"no-dead": 0, "few-dead": 3, "many-dead": 20, "all-dead": D_SAE}


def parameters_of(targets: Mapping[str, Target]) -> list[Any]:
    return [
        pytest.param(target, id=name, marks=marks(target))
        for name, target in targets.items()
        if target.runs_here
    ]


FUSED_HERE = parameters_of(FUSED)
# A step in Triton's interpreter takes seconds: what has to do with the kernels runs there too.
FAST_PATHS = {name: target for name, target in PATHS.items() if not target.interpreted}
every_path = pytest.mark.parametrize("target", parameters_of(PATHS))
every_fast_path = pytest.mark.parametrize("target", parameters_of(FAST_PATHS))
every_path_and_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS, targets=FAST_PATHS)
)
not_interpreted = pytest.mark.parametrize("target", target_parameters(interpreted=False))
every_mode = pytest.mark.parametrize("mode", MODES)
every_option = pytest.mark.parametrize("options", OPTIONS)
# Each mode once, and each mode twice; every option takes both of its values.
three_options = pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 7, 9)])
six_options = pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 3, 5, 6, 8, 11)])
input_or_not = pytest.mark.parametrize(
    "input_gradient", [False, True], ids=["constant-input", "input-gradient"]
)


def bandwidth_of(precision: Precision) -> float:
    """One that holds decided pre-activations."""
    return 0.0625 if margin_of(precision) < 0.01 else 0.5


def make_case(
    target: Target, precision: Precision = FLOAT32, n_rows: int = 40, **cfg: Any
) -> tuple[JumpReLUTrainingSAE, torch.Tensor]:
    """A stock SAE in a given precision, and inputs that it decides."""
    d_sae = 20 if target.interpreted else D_SAE
    cfg = {"d_sae": d_sae, "jumprelu_bandwidth": bandwidth_of(precision), **cfg}
    stock = make_jumprelu(dtype=precision.dtype, device=target.device, **cfg)
    return stock, decided_inputs(stock, target.few_rows(n_rows), precision)


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

    @every_fast_path
    def test_head_reshaping(self, target: Target) -> None:
        stock, flat = make_case(target, n_rows=20, d_in=12)
        x = flat.view(-1, 4, 3)

        def sparse() -> SparseJumpReLUTrainingSAE:
            sae = sparse_jumprelu(stock, target.backend)
            sae.turn_on_forward_pass_hook_z_reshaping()
            return sae

        stock.turn_on_forward_pass_hook_z_reshaping()
        expected = step_values(stock, x, input_gradient=True)
        actual = step_values(sparse(), x, input_gradient=True)
        for name, value in expected.items():
            assert actual[name].shape == value.shape, name
            assert error(actual[name], value) <= 1e-5 * value.norm(), name
        torch.testing.assert_close(sparse().encode(x), stock.encode(x))
        torch.testing.assert_close(sparse()(x), stock(x))
        with pytest.raises(ValueError, match="x must have d_in=12"):
            sparse().encode(torch.zeros(2, 4, 4, device=target.device))

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

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @every_fast_path
    def test_inputs_of_other_dtypes(self, target: Target, dtype: torch.dtype) -> None:
        stock, x = make_case(target)
        x = x.to(dtype)
        sparse = sparse_jumprelu(stock, target.backend)
        expected, actual = (forward_pass(sae, x) for sae in (stock, sparse))
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.sae_out, expected.sae_out)


def random_objective(*names: str) -> Callable[[TrainStepOutput], torch.Tensor]:
    """A loss that reads tensors of the step's output with fixed random weights."""

    def objective(output: TrainStepOutput) -> torch.Tensor:
        total = torch.zeros((), dtype=output.sae_out.dtype, device=output.sae_out.device)
        for name in names:
            value = getattr(output, name)
            generator = torch.Generator().manual_seed(len(name))
            weights = torch.randn(value.shape, generator=generator).bfloat16()
            total = total + (value * weights.to(value)).sum()
        return total

    return objective


class TestGradients:
    @input_or_not
    @pytest.mark.parametrize(
        "names",
        [("feature_acts", "sae_out"), ("hidden_pre",), ("loss", "hidden_pre")],
        ids="+".join,
    )
    @three_options
    @every_path_and_precision
    def test_random_upstream_gradients(
        self,
        target: Target,
        precision: Precision,
        options: dict[str, Any],
        names: tuple[str, ...],
        input_gradient: bool,
    ) -> None:
        stock, x = make_case(target, precision, **options)
        compare_jumprelu_steps(
            stock,
            target,
            x,
            None,
            precision,
            input_gradient=input_gradient,
            objective=random_objective(*names),
        )

    @three_options
    @every_fast_path
    def test_each_loss_term_alone(self, target: Target, options: dict[str, Any]) -> None:
        """Gradients of the terms apart, in one graph, add up to the gradient of the loss."""
        stock, x = make_case(target, pre_act_loss_coefficient=0.3, **options)
        dead = dead_mask(stock, 20)
        terms = ("mse_loss", "l0_loss", "pre_act_loss")
        for term in terms:
            compare_jumprelu_steps(
                stock, target, x, dead, FLOAT32,
                objective=lambda output, term=term: output.losses[term],
            )  # fmt: skip
        whole = step_values(sparse_jumprelu(stock, target.backend), x, dead)
        for order in (terms, terms[::-1]):
            sparse = sparse_jumprelu(stock, target.backend)
            output = forward_pass(sparse, x, dead)
            for term in order:
                output.losses[term].backward(retain_graph=True)
            for name, value in on_cpu(gradients(sparse)).items():
                assert error(value, whole[name]) <= 1e-6 * whole[name].norm(), name

    @every_mode
    @every_fast_path
    def test_gradients_of_single_parameters(self, target: Target, mode: str) -> None:
        stock, x = make_case(target, pre_act_loss_coefficient=0.3, **MODES[mode])
        dead = dead_mask(stock, 20)
        whole = step_values(sparse_jumprelu(stock, target.backend), x, dead)
        for name, _ in stock.named_parameters():
            sparse = sparse_jumprelu(stock, target.backend)
            loss = forward_pass(sparse, x, dead).loss
            (gradient,) = torch.autograd.grad(loss, [getattr(sparse, name)])
            torch.testing.assert_close(
                gradient.double().cpu(), whole[f"gradient of {name}"], rtol=0, atol=0, msg=name
            )

    @every_mode
    @every_fast_path
    def test_frozen_parameters_get_no_gradient(self, target: Target, mode: str) -> None:
        for frozen in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold"):
            stock, x = make_case(target, n_rows=8, pre_act_loss_coefficient=0.3, **MODES[mode])
            sparse = sparse_jumprelu(stock, target.backend)
            for sae in (stock, sparse):
                getattr(sae, frozen).requires_grad_(False)
            compare_steps(stock, sparse, x, dead_mask(stock, 20), FLOAT32)
            assert getattr(sparse, frozen).grad is None

    @every_fast_path
    def test_gradients_accumulate(self, target: Target) -> None:
        stock, x = make_case(target)
        dead, batches = dead_mask(stock, 20), [x, x.flip(1)]
        single = [step_values(sparse_jumprelu(stock, target.backend), x, dead) for x in batches]
        sparse = sparse_jumprelu(stock, target.backend)
        for x in batches:
            forward_pass(sparse, x, dead).loss.backward()
        for name, value in on_cpu(gradients(sparse)).items():
            expected = single[0][name] + single[1][name]
            assert error(value, expected) <= 1e-6 * expected.norm(), name

    @every_fast_path
    def test_gradients_lie_in_memory_as_their_parameters(self, target: Target) -> None:
        """Autograd would copy them otherwise."""
        stock, x = make_case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        forward_pass(sparse, x, dead_mask(sparse, 20)).loss.backward()
        for name, parameter in sparse.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.stride() == parameter.stride(), name

    @pytest.mark.default_algorithms
    @every_mode
    @every_path_and_precision
    def test_the_same_step_gives_the_same_bits(
        self, target: Target, precision: Precision, mode: str
    ) -> None:
        n_threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            shape = {} if target.interpreted else {"d_in": 32, "d_sae": 512}
            stock = make_jumprelu(
                **shape,
                dtype=precision.dtype,
                device=target.device,
                pre_act_loss_coefficient=0.3,
                **MODES[mode],
            )
            x, dead = superposed_rows(stock, target.few_rows(256)), dead_mask(stock, 30)
            repeats = [
                step_values(
                    sparse_jumprelu(stock, target.backend),
                    x,
                    dead,
                    autocast=precision.autocast,
                    input_gradient=True,
                )
                for _ in range(2)
            ]
        finally:
            torch.set_num_threads(n_threads)
        for name, value in repeats[0].items():
            assert torch.equal(value, repeats[1][name]), name


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


class TestPublicMethods:
    @pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (0,)], ids=str)
    @pytest.mark.parametrize("centre", [True, False], ids=["centred", "uncentred"])
    @every_fast_path
    def test_any_leading_shape(self, target: Target, centre: bool, shape: tuple[int, ...]) -> None:
        stock = make_jumprelu(device=target.device, apply_b_dec_to_input=centre)
        n_rows = torch.Size(shape).numel()
        x = decided_inputs(stock, max(1, n_rows), FLOAT32)[:n_rows].reshape(*shape, D_IN)

        def sparse() -> SparseJumpReLUTrainingSAE:
            return sparse_jumprelu(stock, target.backend)

        acts = stock.encode(x)
        for expected, actual in (
            (acts, sparse().encode(x)),
            (stock(x), sparse()(x)),
            (stock.decode(acts), sparse().decode(acts)),
        ):
            assert type(actual) is torch.Tensor
            assert actual.shape == expected.shape
            torch.testing.assert_close(actual, expected)
        sae = sparse()
        torch.testing.assert_close(sae.decode(sae.encode(x)), stock(x))
        feature_acts, hidden_pre = sparse().encode_with_hidden_pre(x)
        expected_acts, expected_pre = stock.encode_with_hidden_pre(x)
        assert feature_acts.shape == expected_acts.shape == hidden_pre.shape
        torch.testing.assert_close(feature_acts.clone(), expected_acts)
        torch.testing.assert_close(hidden_pre.clone(), expected_pre)
        sae = sparse()
        torch.testing.assert_close(sae.decode(sae.encode_with_hidden_pre(x)[0]), stock(x))

    @pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
    @every_fast_path
    def test_without_gradients(self, target: Target, name: str) -> None:
        stock, x = make_case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        with getattr(torch, name)():
            output = forward_pass(sparse, x)
            expected = forward_pass(stock, x)
            assert not output.feature_acts.requires_grad
            torch.testing.assert_close(output.feature_acts.clone(), expected.feature_acts)
            torch.testing.assert_close(output.loss, expected.loss)

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

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @every_fast_path
    def test_bad_activations_surface_as_in_stock(self, target: Target, bad: float) -> None:
        stock, x = make_case(target, n_rows=20)
        sparse = sparse_jumprelu(stock, target.backend)
        x[3, 2] = bad
        bad_rows = []
        for sae in (stock, sparse):
            output = make_trainer(sae).step(x)
            assert not torch.isfinite(output.loss)
            assert all(not torch.isfinite(p).all() for p in sae.parameters())
            bad_rows.append((~torch.isfinite(output.sae_out).all(-1)).nonzero().flatten().tolist())
        assert bad_rows == [[3], [3]]

    @every_path
    def test_a_row_of_nan_weights_surfaces(self, target: Target) -> None:
        stock, x = make_case(target, n_rows=20)
        sparse = sparse_jumprelu(stock, target.backend)
        with torch.no_grad():
            sparse.W_enc[:, 5] = float("nan")
        assert torch.isnan(forward_pass(sparse, x).loss)

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


class TestDenseImplementation:
    @pytest.mark.parametrize("dead", N_DEAD)
    @every_option
    def test_is_stock_bit_for_bit(self, options: dict[str, Any], dead: str) -> None:
        stock = make_jumprelu(pre_act_loss_coefficient=0.3, **options)
        dense = sparse_jumprelu(stock, "dense")
        assert dense.implementation.name == "dense"
        x, mask = superposed_rows(stock, 40), dead_mask(stock, N_DEAD[dead])
        assert type(forward_pass(dense, x, mask).feature_acts) is torch.Tensor
        expected, actual = (
            step_values(sae, x, mask, input_gradient=True) for sae in (stock, dense)
        )
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), name
        batches = [superposed_rows(stock, 32) for _ in range(5)]
        expected, actual = trajectory(stock, batches), trajectory(dense, batches)
        for name, value in expected.items():
            assert torch.equal(value, actual[name]), name


def trajectory(sae: JumpReLUTrainingSAE, batches: list[torch.Tensor], **options: Any) -> Values:
    """Losses, statistics and final parameters of steps of SAELens's trainer."""
    trainer = make_trainer(sae, **{"dead_feature_window": 3, "lr": 3e-3, **options})
    losses: dict[str, list[torch.Tensor]] = {}
    n_dead, l0, lowest = [], [], []
    for batch in batches:
        n_dead.append(trainer.dead_neurons.sum())
        output = trainer.step(batch.to(sae.dtype))
        trainer.n_training_steps += 1
        log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        l0.append(torch.tensor(log["metrics/l0"]))
        lowest.append(sae.threshold.detach().min())
        for name, loss in {"loss": output.loss, **output.losses}.items():
            losses.setdefault(name, []).append(loss.detach())
    return on_cpu(
        {
            **{name: torch.stack(values) for name, values in losses.items()},
            **{f"final {name}": parameter for name, parameter in sae.named_parameters()},
            "l0": torch.stack(l0),
            "lowest threshold": torch.stack(lowest),
            "n_dead": torch.stack(n_dead),
            "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
            "act_freq_scores": trainer.act_freq_scores,
        }
    )


COUNTS = ("l0", "n_dead", "n_forward_passes_since_fired", "act_freq_scores")


class TestTrainer:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({**MODES["step"], "l0_coefficient": 0.1}, id="step"),
            pytest.param({**MODES["tanh"], "jumprelu_ste_to_input": True}, id="tanh-ste"),
            pytest.param({**MODES["quadratic"], "l0_coefficient": 0.1}, id="quadratic"),
            pytest.param({"l0_warm_up_steps": 7, "l0_coefficient": 3.0}, id="warm-up"),
            pytest.param({"apply_b_dec_to_input": False}, id="uncentred"),
        ],
    )
    @every_fast_path
    def test_trainer_steps_stay_together(self, target: Target, options: dict[str, Any]) -> None:
        dtype = torch.float64 if torch.float64 in target.dtypes else torch.float32
        n_steps = 20 if dtype == torch.float64 else 6
        stock = make_jumprelu(
            device=target.device,
            dtype=dtype,
            jumprelu_bandwidth=0.2,
            pre_act_loss_coefficient=0.03,
            **options,
        )
        with torch.no_grad():
            # Some latents cross zero, where thresholds are clamped; some are dead.
            stock.threshold[::3] = 1e-3
            stock.b_enc[::5] = -30.0
        batches = [superposed_rows(stock, 32) for _ in range(n_steps - 1)]
        batches.append(superposed_rows(stock, 17))
        sparse = trajectory(sparse_jumprelu(stock, target.backend), batches)
        oracle = trajectory(stock_like(stock), batches)
        yardstick = trajectory(stock_like(stock, torch.float32), batches)

        assert oracle["n_dead"].max() > 0, "no latent died"
        assert oracle["pre_act_loss"].max() > 0
        assert (oracle["lowest threshold"] < 0).any(), "no threshold had to be clamped"
        for values in (sparse, oracle, yardstick):
            # One value of a vector whose rounding is judged as a whole.
            del values["lowest threshold"]
        if "l0_warm_up_steps" in options:
            assert oracle["l0_loss"][0] == 0 < oracle["l0_loss"][5]
        for name in COUNTS:
            assert torch.equal(sparse[name], oracle[name]), name
        if dtype == torch.float64:
            # Thresholds are float32 in stock, whatever the dtype of the rest: no two runs are
            # nearer than that.
            shrink = FLOAT64.eps / FLOAT32.eps
            yardstick = {
                name: oracle[name] + shrink * (value - oracle[name])
                for name, value in yardstick.items()
            }
        require_within_budget(sparse, yardstick, oracle, FLOAT32.eps)

    @pytest.mark.parametrize(
        ("target", "precision"),
        target_precision_parameters(BFLOAT16, AUTOCAST, targets=PATHS),
    )
    @every_mode
    def test_trainer_steps_in_low_precision(
        self, target: Target, precision: Precision, mode: str
    ) -> None:
        """Ten steps drift from float64 at most twice as far as stock's."""
        stock = make_jumprelu(
            d_in=32, d_sae=256, dtype=precision.dtype, device=target.device, **MODES[mode]
        )
        batches = [superposed_rows(stock, 256) for _ in range(10)]
        oracle = trajectory(stock_like(stock), batches)
        # Before stock is trained in place.
        sparse = sparse_jumprelu(stock, target.backend)
        expected, actual = (
            trajectory(sae, batches, autocast=precision.autocast) for sae in (stock, sparse)
        )
        names = ["loss", "mse_loss", "l0_loss", "l0", "act_freq_scores"]
        names += [name for name in oracle if name.startswith("final ")]
        actual, expected, oracle = (
            {name: values[name] for name in names} for values in (actual, expected, oracle)
        )
        require_within_budget(actual, expected, oracle, precision.eps)

    @every_fast_path
    def test_thresholds_below_zero_are_clamped_at_the_next_step_as_in_stock(
        self, target: Target
    ) -> None:
        stock, x = make_case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        for sae in (stock, sparse):
            trainer = make_trainer(sae, lr=1.0)
            trainer.step(x)
            below = sae.threshold < 0
            assert below.any()
            trainer.optimizer.param_groups[0]["lr"] = 0.0
            trainer.step(x)
            assert (sae.threshold[below] == 0).all()
            assert (sae.threshold >= 0).all()
        torch.testing.assert_close(sparse.threshold, stock.threshold, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("second", ["jumprelu", "jumprelu_sparse"])
    @pytest.mark.parametrize("first", ["jumprelu", "jumprelu_sparse"])
    @every_fast_path
    def test_checkpoint_continues_bit_for_bit_or_to_rounding(
        self, target: Target, first: str, second: str, tmp_path: Path
    ) -> None:
        """Four steps, a checkpoint, four more; against eight steps in one go."""
        if torch.float64 not in target.dtypes:
            pytest.skip("rounding to float32 moves gates within eight steps")
        stock = make_jumprelu(
            device=target.device, dtype=torch.float64, l0_warm_up_steps=6, jumprelu_bandwidth=0.2
        )
        batches = [superposed_rows(stock, 32) for _ in range(8)]
        options = {
            "dead_feature_window": 2, "total_training_samples": 256, "lr_decay_steps": 6,
            "train_batch_size_samples": 32,
        }  # fmt: skip

        def make(architecture: str) -> Any:
            if architecture == "jumprelu":
                return stock_like(stock)
            return sparse_jumprelu(stock, target.backend)

        whole = make_trainer(make(first), **options)
        half = make_trainer(make(first), **options)
        for trainer, n_steps in ((whole, 8), (half, 4)):
            for x in batches[:n_steps]:
                trainer.step(x)
                trainer.n_training_steps += 1
        half.save_checkpoint("half", base_path=tmp_path)

        sae = make(second)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.zero_()
        resumed = make_trainer(sae, **options)
        resumed.load_trainer_state(tmp_path / "half")
        sae.load_weights_from_checkpoint(tmp_path / "half")
        for name, value in half.sae.named_parameters():
            assert torch.equal(getattr(sae, name), value), name
        assert resumed.get_coefficients() == half.get_coefficients()
        for x in batches[4:]:
            resumed.step(x)
            resumed.n_training_steps += 1

        # Nothing is rounded otherwise, unless what ran before decides what runs next. Thresholds
        # and their moments are in float32.
        tolerance = 0 if first == second and target.backend != "fused" else 1e-6
        for name, expected in whole.sae.named_parameters():
            parameter = getattr(sae, name)
            assert (parameter - expected).norm() <= tolerance * expected.norm(), name
            state = resumed.optimizer.state[parameter]
            expected_state = whole.optimizer.state[expected]
            assert state["step"] == expected_state["step"] == 8
            for moment in ("exp_avg", "exp_avg_sq"):
                distance = (state[moment] - expected_state[moment]).norm()
                assert distance <= 10 * tolerance * expected_state[moment].norm(), (name, moment)
                if second == "jumprelu_sparse":
                    assert state[moment].stride() == parameter.stride(), (name, moment)
        assert torch.equal(resumed.act_freq_scores, whole.act_freq_scores)
        assert resumed.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()


def structured_batches(
    n_steps: int, n_rows: int, d_in: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Sparse sums of 64 random directions with Zipf-like frequencies, and a little noise."""
    directions = torch.nn.functional.normalize(torch.randn(64, d_in), dim=-1)
    presence = (torch.arange(1, 65) ** -0.7).clamp(max=0.9)
    batches = []
    for _ in range(n_steps):
        strengths = (torch.rand(n_rows, 64) < presence) * (0.5 * torch.randn(n_rows, 64)).exp()
        batches.append((strengths @ directions + 0.02 * torch.randn(n_rows, d_in)).to(dtype))
    return batches


def training_curve(
    sae: JumpReLUTrainingSAE, batches: list[torch.Tensor]
) -> tuple[dict[str, list[float]], list[str]]:
    """Metrics of every step, and what each ran on."""
    n_steps, n_rows = len(batches), len(batches[0])
    trainer = make_trainer(
        sae,
        total_training_samples=n_steps * n_rows,
        train_batch_size_samples=n_rows,
        dead_feature_window=30,
        lr=4e-3,
    )
    curve: dict[str, list[float]] = {name: [] for name in ("mse", "l0", "threshold", "dead")}
    ran_on = []
    for x in batches:
        if isinstance(sae, SparseJumpReLUTrainingSAE):
            ran_on.append(sae.implementation.name)
        output = trainer.step(x)
        trainer.n_training_steps += 1
        log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        curve["mse"].append(log["losses/mse_loss"])
        curve["l0"].append(log["metrics/l0"])
        curve["dead"].append(log["sparsity/dead_features"])
        curve["threshold"].append(sae.threshold.mean().item())
    return curve, ran_on


class TestAuto:
    """A run that begins dense and ends sparse."""

    D_IN, D_SAE, N_STEPS = 32, 512, 200

    @pytest.fixture(autouse=True)
    def switch_half_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever the crossing lies on a device: these SAEs are too small to get there."""
        for key in MAX_SPARSE_SHARE:
            monkeypatch.setitem(MAX_SPARSE_SHARE, key, 0.15)

    def curves(
        self, target: Target, dtype: torch.dtype
    ) -> tuple[dict[str, list[float]], dict[str, list[float]], list[str]]:
        batches = structured_batches(self.N_STEPS, 64, self.D_IN, dtype)
        # SAELens's own initialisation, the same for every device.
        stock = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                d_in=self.D_IN,
                d_sae=self.D_SAE,
                l0_coefficient=0.2,
                l0_warm_up_steps=60,
                jumprelu_bandwidth=0.3,
                pre_act_loss_coefficient=3e-3,
                dtype=str(dtype).removeprefix("torch."),
            )
        )
        stock.cfg.device = target.device
        stock.to(target.device)
        sparse = sparse_jumprelu(stock, "auto")
        actual, ran_on = training_curve(sparse, batches)
        expected, _ = training_curve(stock, batches)
        print(ran_on, {name: values[::20] for name, values in expected.items()})
        assert expected["l0"][0] > 0.25 * self.D_SAE, "the run does not begin dense"
        assert expected["l0"][-1] < 0.04 * self.D_SAE, "the run does not end sparse"
        assert fmean(expected["mse"][-20:]) < 0.5 * expected["mse"][0], "nothing was learned"
        return expected, actual, ran_on

    def require_one_switch(self, target: Target, ran_on: list[str]) -> None:
        first_sparse = ran_on.index(sparse_name(target))
        assert first_sparse > 5, "the run hardly began dense"
        assert ran_on[:first_sparse] == ["fused"] * first_sparse
        n_sparse = self.N_STEPS - first_sparse
        assert n_sparse > 50
        assert ran_on[first_sparse:] == [sparse_name(target)] * n_sparse

    def test_a_run_in_float64_crosses_the_switch_without_a_kink(self) -> None:
        target = FUSED["fused-cpu"]
        expected, actual, ran_on = self.curves(target, torch.float64)
        self.require_one_switch(target, ran_on)
        for name, values in expected.items():
            assert actual[name] == pytest.approx(values, rel=1e-6), name

    @pytest.mark.parametrize("target", FUSED_HERE)
    def test_a_run_in_float32_tracks_stock(self, target: Target) -> None:
        expected, actual, ran_on = self.curves(target, torch.float32)
        self.require_one_switch(target, ran_on)
        for name, values in expected.items():
            for start in range(0, self.N_STEPS, 20):
                part = slice(start, start + 20)
                mean = fmean(values[part])
                tolerance = 2.0 if name == "dead" else 0.01 * mean
                assert fmean(actual[name][part]) == pytest.approx(mean, abs=tolerance), (name, part)


def sparse_name(target: Target) -> str:
    return "triton" if target.device == "cuda" else "torch"


def with_density(sae: SparseJumpReLUTrainingSAE, density: float) -> None:
    """Make a share of the latents active on every row, far from any edge."""
    n_active = round(density * sae.cfg.d_sae)
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_enc[:n_active] = 1e4


class TestSwitch:
    """`auto` goes from dense to sparse and back by the density that it measures."""

    N_CALLS = 6

    def sae(self) -> SparseJumpReLUTrainingSAE:
        return sparse_jumprelu(make_jumprelu(d_sae=1000), "auto")

    def run(self, sae: SparseJumpReLUTrainingSAE, density: float) -> list[str]:
        """What each of some steps at one density runs on."""
        with_density(sae, density)
        names = []
        for _ in range(self.N_CALLS):
            names.append(sae.implementation.name)
            output = forward_pass(sae, torch.randn(16, D_IN))
            output.loss.backward()
            assert output.feature_acts.bool().float().sum(-1).mean() == round(1000 * density)
        return names

    def crossings(self, sae: SparseJumpReLUTrainingSAE) -> tuple[float, float]:
        """The densities at which it becomes sparse on the way down, and dense on the way up."""
        densities = [0.9 * 0.93**n for n in range(80)]
        self.run(sae, 0.95)
        down = next(d for d in densities if self.run(sae, d)[-1] == "torch")
        self.run(sae, 0.001)
        up = next(d for d in densities[::-1] if self.run(sae, d)[-1] == "fused")
        return down, up

    def test_the_first_call_is_fused(self) -> None:
        choice = self.sae().implementation
        assert choice.name == "fused"
        assert choice.reason

    def test_the_way_down_and_the_way_up_cross_at_different_densities(self) -> None:
        down, up = self.crossings(self.sae())
        assert 0.005 < down < up < 0.5

    def test_a_density_that_wavers_around_a_crossing_does_not_flap(self) -> None:
        sae = self.sae()
        for density in self.crossings(sae):
            names = []
            for _ in range(6):
                for factor in (0.94, 1.06):
                    names += self.run(sae, factor * density)
            n_switches = sum(a != b for a, b in itertools.pairwise(names))
            assert n_switches <= 1, names

    def test_the_reason_names_the_density(self) -> None:
        sae = self.sae()
        self.run(sae, 0.6)
        assert "60" in sae.implementation.reason and "%" in sae.implementation.reason

    def test_each_sae_measures_for_itself(self) -> None:
        sparse, fresh = self.sae(), self.sae()
        assert self.run(sparse, 0.002)[-1] == "torch"
        assert fresh.implementation.name == "fused"
        assert self.run(sparse, 0.002)[0] == "torch"

    @pytest.mark.parametrize("implementation", ["torch", "dense"])
    def test_a_request_is_obeyed_at_any_density(self, implementation: str) -> None:
        sae = sparse_jumprelu(make_jumprelu(d_sae=1000), implementation)
        for density in (0.9, 0.002, 0.9):
            assert self.run(sae, density) == [implementation] * self.N_CALLS


class TestCapacity:
    """Rows are stored compressed, for as many latents as the last call needed."""

    def case(self, target: Target) -> tuple[JumpReLUTrainingSAE, torch.Tensor, torch.Tensor]:
        """An SAE, a batch without an active latent, and one with many."""
        d_sae = 32 if target.interpreted else 512
        stock = make_jumprelu(device=target.device, d_sae=d_sae, pre_act_loss_coefficient=0.3)
        x = superposed_rows(stock, 5 if target.interpreted else 64)
        with torch.no_grad():
            stock.W_enc[0] = 0.5 + torch.rand(d_sae)
        few = torch.zeros_like(x)
        few[:, 0] = -64.0
        decide(stock, torch.cat([x, few]), margin_of(FLOAT32))
        n_pairs = [
            ((acts > stock.threshold) | in_window(stock, acts)).sum()
            for acts in (pre_acts(stock, few), pre_acts(stock, x))
        ]
        assert n_pairs[0] == 0 and n_pairs[1] > 40
        return stock, few, x

    def test_an_overflow_changes_no_bit(self, target: Target) -> None:
        stock, few, x = self.case(target)
        dead = dead_mask(stock, 20)
        results = []
        for before in (few, x):
            sparse = sparse_jumprelu(stock, target.backend)
            for _ in range(2):
                forward_pass(sparse, before, dead)
            results.append(step_values(sparse, x, dead, input_gradient=True))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name

    def test_overflows_are_recovered_as_stock_computes_them(self, target: Target) -> None:
        stock, few, x = self.case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        mixed = torch.where(torch.arange(len(x), device=x.device).unsqueeze(1) == 3, x, few)
        for batch in (few, x, mixed, x[:1], x):
            compare_steps(stock, sparse, batch, None, FLOAT32, input_gradient=True)

    @not_interpreted
    def test_an_overflow_is_found_a_second_time(
        self, target: Target, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if target.backend != "triton":
            pytest.skip("the PyTorch path finds room by itself")
        capacities: list[int] = []
        gate_triton = importlib.import_module("saelens_sparse.ops.gate_triton")
        original = gate_triton.find_pattern

        def recording(*args: Any) -> Any:
            assert not torch.is_grad_enabled()
            found = original(*args)
            capacities.append(found[0].latents.numel())
            return found

        monkeypatch.setattr(gate_triton, "find_pattern", recording)
        stock, few, x = self.case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        n_found = []
        for batch in (few, few, x, x):
            capacities.clear()
            forward_pass(sparse, batch)
            n_found.append(len(capacities))
            n_pairs = len(forward_pass(stock, batch).feature_acts.nonzero())
            assert capacities[-1] >= n_pairs
        assert n_found[1:] == [1, 2, 1]

    def test_encode_recovers_too(self, target: Target) -> None:
        stock, few, x = self.case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        for batch in (few, x, few):
            torch.testing.assert_close(sparse.encode(batch), stock.encode(batch))
            expected = stock(batch)
            assert error(sparse(batch), expected) <= 1e-6 * expected.norm()


class TestNothingIsDense:
    @pytest.fixture
    def materializations(self, monkeypatch: pytest.MonkeyPatch) -> list[type]:
        return record_materializations(monkeypatch)

    @not_interpreted
    @every_mode
    def test_a_trainer_step_computes_neither_activations_nor_pre_activations(
        self, target: Target, mode: str, materializations: list[type]
    ) -> None:
        stock, x = make_case(target, n_rows=10, pre_act_loss_coefficient=0.3, **MODES[mode])
        with torch.no_grad():
            stock.b_enc[:9] = -30.0
        trainer = make_trainer(
            sparse_jumprelu(stock, target.backend),
            feature_sampling_window=1,
            dead_feature_window=1,
        )
        outputs: list[TrainStepOutput] = []
        for _ in range(4):
            trainer.maybe_reset_sparsity()
            outputs.append(trainer.step(x))
            trainer.n_training_steps += 1
            trainer.build_train_step_log_dict(outputs[-1], trainer.n_training_samples)
        output = outputs[-1]
        assert isinstance(output.feature_acts, OnDemandTensor)
        assert isinstance(output.hidden_pre, OnDemandTensor)
        assert trainer.dead_neurons.sum() >= 9
        assert output.losses["pre_act_loss"] > 0
        assert materializations == []
        # The recorder works.
        output.feature_acts.max()
        assert len(materializations) == 1

    @every_mode
    @not_interpreted
    def test_no_tensor_of_a_trainer_step_is_dense(self, target: Target, mode: str) -> None:
        n_rows, d_sae = 64, 2**14
        stock = make_jumprelu(
            d_in=4,
            d_sae=d_sae,
            device=target.device,
            pre_act_loss_coefficient=0.3,
            **MODES[mode],
        )
        with torch.no_grad():
            # Some tens of latents are active on a row.
            stock.b_enc.fill_(-1e3)
            stock.b_enc[::200] = 0.1
        sparse = sparse_jumprelu(stock, target.backend, screen_buffer_mib=1)
        trainer = make_trainer(sparse)
        trainer.n_forward_passes_since_fired[:20] = 10**6
        x = superposed_rows(stock, n_rows)
        for _ in range(2):
            with LargestTensor() as largest:
                output = trainer.step(x)
                trainer.build_train_step_log_dict(output, trainer.n_training_samples)
            assert output.losses["pre_act_loss"] > 0
            bound_of_the_screen = 2**20 // 2
            assert largest.numel <= bound_of_the_screen < n_rows * d_sae

    @not_interpreted
    @pytest.mark.parametrize("name", ["feature_acts", "hidden_pre"])
    def test_a_use_sees_an_ordinary_tensor(self, target: Target, name: str) -> None:
        stock, x = make_case(target)
        uses: list[Callable[[torch.Tensor], Any]] = [
            lambda a: a + 1, lambda a: a[2], lambda a: a @ a.T, lambda a: a.sum(-1),
            lambda a: (a > 0).float().mean(0), lambda a: a.detach().clone(), lambda a: a.max(),
            lambda a: torch.cat([a, a]), lambda a: a.shape, lambda a: a.dtype,
            lambda a: a.requires_grad, lambda a: a.nonzero(), lambda a: a.bool().float().sum(0),
            lambda a: a.bool().float().sum(-1), lambda a: a.bool().any(0), len,
        ]  # fmt: skip
        for use in uses:
            expected, actual = (
                use(getattr(forward_pass(sae, x), name))
                for sae in (stock, sparse_jumprelu(stock, target.backend))
            )
            if isinstance(expected, torch.Tensor):
                assert type(actual) is torch.Tensor
                torch.testing.assert_close(actual, expected)
            else:
                assert actual == expected

    @not_interpreted
    def test_writes_to_activations_are_seen_by_decode(self, target: Target) -> None:
        stock, x = make_case(target)
        recons = []
        for sae in (stock, sparse_jumprelu(stock, target.backend)):
            acts, _ = sae.encode_with_hidden_pre(x)
            acts = acts * 1
            acts[:, 3] = 2.0
            recons.append(sae.decode(acts))
        torch.testing.assert_close(recons[1], recons[0])

    @not_interpreted
    def test_pre_activations_of_changed_weights_are_refused(self, target: Target) -> None:
        stock, x = make_case(target)
        output = make_trainer(sparse_jumprelu(stock, target.backend)).step(x)
        with pytest.raises(RuntimeError, match="weights have changed"):
            output.hidden_pre.max()


class TestHooks:
    NAMES = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")

    @every_fast_path
    def test_run_with_cache(self, target: Target) -> None:
        stock, x = make_case(target, n_rows=6)
        sparse = sparse_jumprelu(stock, target.backend)
        x = x.view(2, 3, -1)
        (expected, expected_cache), (actual, cache) = (
            sae.run_with_cache(x) for sae in (stock, sparse)
        )
        torch.testing.assert_close(actual, expected)
        assert cache.keys() == expected_cache.keys()
        assert set(self.NAMES) < set(cache.keys())
        for name, value in expected_cache.items():
            assert type(cache[name]) is torch.Tensor
            torch.testing.assert_close(cache[name], value)
        assert sparse.implementation.name != "dense"

    @pytest.mark.parametrize("name", NAMES)
    @every_fast_path
    def test_a_hook_makes_the_call_dense(self, target: Target, name: str) -> None:
        stock, x = make_case(target, n_rows=6, pre_act_loss_coefficient=0.3)
        sparse = sparse_jumprelu(stock, target.backend)
        seen: list[list[torch.Tensor]] = []
        outputs = []
        for sae in (stock, sparse):
            calls: list[torch.Tensor] = []

            def halve(value: torch.Tensor, hook: Any, calls: Any = calls) -> torch.Tensor:  # noqa: ARG001
                calls.append(value)
                return value * 0.5

            with sae.hooks(fwd_hooks=[(name, halve)]):
                if isinstance(sae, SparseJumpReLUTrainingSAE):
                    assert sae.implementation.name == "dense"
                    assert name in sae.implementation.reason
                outputs.append(forward_pass(sae, x, dead_mask(sae, 0)))
                outputs[-1].loss.backward()
            seen.append(calls)
        assert len(seen[0]) == 1
        torch.testing.assert_close(seen[1], seen[0])
        assert type(seen[1][0]) is torch.Tensor
        torch.testing.assert_close(outputs[1].sae_out, outputs[0].sae_out)
        for parameter, expected in stock.named_parameters():
            torch.testing.assert_close(getattr(sparse, parameter).grad, expected.grad)
        assert sparse.implementation.name != "dense"

    @pytest.mark.parametrize("name", NAMES)
    @every_fast_path
    def test_backward_hooks(self, target: Target, name: str) -> None:
        stock, x = make_case(target, n_rows=6)
        seen = []
        for sae in (stock, sparse_jumprelu(stock, target.backend)):
            collected: list[torch.Tensor] = []
            hook = getattr(sae, name)
            hook.add_hook(lambda grad, hook, g=collected: g.append(grad), dir="bwd")  # noqa: ARG005
            forward_pass(sae, x).loss.backward()
            sae.reset_hooks(including_permanent=True)
            seen.append(collected)
        assert len(seen[0]) == 1
        torch.testing.assert_close(seen[1], seen[0])

    @pytest.mark.parametrize("name", ["hook_sae_input", "hook_sae_output"])
    @every_fast_path
    def test_hooks_that_change_nothing_about_the_path(self, target: Target, name: str) -> None:
        stock, x = make_case(target, n_rows=6)
        results = []
        for sae in (stock, sparse_jumprelu(stock, target.backend)):
            with sae.hooks(fwd_hooks=[(name, lambda value, hook: value.clone())]):  # noqa: ARG005
                if isinstance(sae, SparseJumpReLUTrainingSAE):
                    assert sae.implementation.name == target.backend
                results.append(sae(x))
        torch.testing.assert_close(results[1], results[0])

    @every_fast_path
    def test_error_term(self, target: Target) -> None:
        stock, x = make_case(target, n_rows=6)
        results = []
        for sae in (stock, sparse_jumprelu(stock, target.backend)):
            with pytest.warns(DeprecationWarning, match="use_error_term"):
                sae.use_error_term = True
            results.append(sae(x))
        torch.testing.assert_close(results[0], x)
        torch.testing.assert_close(results[1], x)


class TestConfiguration:
    def test_fields_and_defaults_of_stock(self) -> None:
        stock = JumpReLUTrainingSAEConfig(d_in=8, d_sae=200)
        sparse = SparseJumpReLUTrainingSAEConfig(d_in=8, d_sae=200)
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

    def test_dict_and_json(self) -> None:
        cfg = SparseJumpReLUTrainingSAEConfig(
            d_in=8, d_sae=200, implementation="torch", screen_buffer_mib=3, **MODES["quadratic"]
        )
        for cfg_dict in (cfg.to_dict(), json.loads(json.dumps(cfg.to_dict()))):
            assert cfg_dict["architecture"] == "jumprelu_sparse"
            assert SparseJumpReLUTrainingSAEConfig.from_dict(cfg_dict) == cfg

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
    def test_bad_values(
        self, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        options = {"d_in": 8, "d_sae": 16} | options
        with pytest.raises(error, match=message):
            SparseJumpReLUTrainingSAEConfig(**options)

    @pytest.mark.parametrize("target_l0", [None, 0, -1.0, 17])
    def test_a_bad_target_l0_is_refused_as_in_stock(self, target_l0: float | None) -> None:
        options: dict[str, Any] = {
            "d_in": 8, "d_sae": 16, "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": target_l0,
        }  # fmt: skip
        messages: list[str] = []
        classes: list[tuple[Any, Any]] = [
            (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
            (SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig),
        ]
        for sae_class, config_class in classes:
            with pytest.raises(ValueError, match="target_l0 must be") as raised:
                sae_class(config_class(**options))
            messages.append(str(raised.value))
        assert messages[0] == messages[1]

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(4, D_IN + 1), ValueError, rf"x must have d_in={D_IN} .*\[4, 14\]"),
            (torch.zeros(()), ValueError, "x must have d_in"),
            (torch.zeros(4, D_IN, dtype=torch.int64), TypeError, "x must have a floating"),
            (torch.zeros(4, D_IN, device="meta"), ValueError, "x must be on the SAE's device"),
            ([[0.0] * D_IN], TypeError, "x must be a torch.Tensor; got list"),
        ],
        ids=["width", "scalar", "integer", "device", "list"],
    )
    @pytest.mark.parametrize("implementation", ["torch", "fused", "dense"])
    def test_bad_inputs(
        self, x: Any, error: type[Exception], message: str, implementation: str
    ) -> None:
        sae = sparse_jumprelu(make_jumprelu(), implementation)
        for method in (sae.encode, sae.forward, sae.encode_with_hidden_pre):
            with pytest.raises(error, match=message):
                method(x)


class TestFiles:
    @not_interpreted
    def test_inference_model_is_stock_s(self, target: Target, tmp_path: Path) -> None:
        stock, x = make_case(target)
        sparse = sparse_jumprelu(stock, target.backend)
        forward_pass(sparse, x)
        for folder, sae in (("stock", stock), ("sparse", sparse)):
            sae.save_inference_model(tmp_path / folder)
        assert sparse.implementation.name == target.backend
        loaded = [
            SAE.load_from_disk(tmp_path / folder, device=target.device)
            for folder in ("stock", "sparse")
        ]
        assert type(loaded[1]) is JumpReLUSAE
        assert loaded[1].cfg.architecture() == "jumprelu"
        for name, value in loaded[0].state_dict().items():
            assert torch.equal(loaded[1].state_dict()[name], value), name
        configs = [json.loads((tmp_path / f / "cfg.json").read_text()) for f in ("stock", "sparse")]
        assert configs[0].pop("metadata").keys() == configs[1].pop("metadata").keys()
        assert configs[0] == configs[1]
        torch.testing.assert_close(loaded[1].encode(x), sparse.encode(x))
        torch.testing.assert_close(loaded[1](x), stock(x))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_training_model_round_trip(self, dtype: str, tmp_path: Path) -> None:
        sparse = sparse_jumprelu(make_jumprelu(dtype=getattr(torch, dtype)))
        x = superposed_rows(sparse, 9)
        make_trainer(sparse).step(x)
        sparse.save_model(tmp_path)
        loaded = TrainingSAE.load_from_disk(tmp_path)
        assert type(loaded) is SparseJumpReLUTrainingSAE
        assert {**loaded.cfg.to_dict(), "metadata": None} == {
            **sparse.cfg.to_dict(),
            "metadata": None,
        }
        assert loaded.threshold.dtype == torch.float32
        with torch.no_grad():
            # Stock's load_from_disk casts all, and thresholds back.
            sparse.threshold.copy_(sparse.threshold.to(sparse.dtype))
        for step in range(2):
            for name, value in sparse.named_parameters():
                assert torch.equal(getattr(loaded, name), value), (name, step)
            # And it goes on training.
            for sae in (sparse, loaded):
                make_trainer(sae).step(x)

    @pytest.mark.parametrize("first", ["jumprelu", "jumprelu_sparse"])
    def test_weights_of_one_architecture_load_as_the_other(
        self, first: str, tmp_path: Path
    ) -> None:
        stock = make_jumprelu()
        saes = [stock, sparse_jumprelu(stock)]
        for sae in saes:
            make_trainer(sae).step(superposed_rows(stock, 8))
        saved, other = saes if first == "jumprelu" else saes[::-1]
        saved.save_model(tmp_path)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_weights_from_checkpoint(tmp_path)
        assert {n: v.shape for n, v in other.state_dict().items()} == {
            n: v.shape for n, v in saved.state_dict().items()
        }
        for name, value in saved.named_parameters():
            assert torch.equal(getattr(other, name), value), name

    def test_older_checkpoints_hold_log_threshold(self, tmp_path: Path) -> None:
        stock, x = make_case(PATHS["torch-cpu"])
        stock.save_model(tmp_path)
        weights_path = tmp_path / "sae_weights.safetensors"
        weights = load_file(weights_path)
        threshold = weights.pop("threshold").clamp(min=0.01)
        save_file({**weights, "log_threshold": threshold.log()}, weights_path)
        cfg = {**stock.cfg.to_dict(), "architecture": "jumprelu_sparse", "implementation": "torch"}
        (tmp_path / "cfg.json").write_text(json.dumps(cfg))
        loaded = TrainingSAE.load_from_disk(tmp_path)
        assert type(loaded) is SparseJumpReLUTrainingSAE
        torch.testing.assert_close(loaded.threshold.detach(), threshold)
        sparse = sparse_jumprelu(make_jumprelu())
        sparse.load_weights_from_checkpoint(tmp_path)
        torch.testing.assert_close(sparse.threshold.detach(), threshold)
        torch.testing.assert_close(sparse.W_enc, stock.W_enc)
        assert torch.isfinite(forward_pass(loaded, x).loss)

    def test_trainer_state_file_is_as_stock_writes_it(self, tmp_path: Path) -> None:
        stock, x = make_case(PATHS["torch-cpu"])
        states = []
        for name, sae in {"sparse": sparse_jumprelu(stock), "stock": stock}.items():
            trainer = make_trainer(sae)
            trainer.step(x)
            trainer.save_checkpoint(name, base_path=tmp_path)
            states.append(torch.load(tmp_path / name / "trainer_state.pt"))
        assert {p.name for p in (tmp_path / "stock").iterdir()} == {
            p.name for p in (tmp_path / "sparse").iterdir()
        }
        actual, expected = (state["optimizer"] for state in states)
        assert actual["param_groups"] == expected["param_groups"]
        assert actual["state"].keys() == expected["state"].keys()
        for index, moments in expected["state"].items():
            for name, value in moments.items():
                other = actual["state"][index][name]
                assert (other.shape, other.dtype, other.stride(), other.device) == (
                    value.shape, value.dtype, value.stride(), value.device,
                )  # fmt: skip
                torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-7)


class TestTransformations:
    """What moves, casts or folds weights gives stock's results, before and after training."""

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda sae: sae.to(torch.bfloat16), id="to-bfloat16"),
            pytest.param(lambda sae: sae.to(dtype=torch.float64), id="to-float64"),
            pytest.param(lambda sae: sae.to("cpu"), id="to-cpu"),
            pytest.param(lambda sae: sae.fold_W_dec_norm(), id="fold_W_dec_norm"),
            pytest.param(
                lambda sae: sae.fold_activation_norm_scaling_factor(3.0), id="fold_scaling"
            ),
            pytest.param(
                lambda sae: sae.fold_activation_whitening(
                    torch.linspace(-1, 1, D_IN),
                    torch.eye(D_IN) + torch.ones(D_IN, D_IN).tril(),
                    torch.linalg.inv(torch.eye(D_IN) + torch.ones(D_IN, D_IN).tril()),
                ),
                id="fold_whitening",
            ),
        ],
    )
    @pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
    @pytest.mark.parametrize("implementation", ["torch", "fused"])
    def test_change(
        self, change: Callable[[TrainingSAE[Any]], Any], trained: bool, implementation: str
    ) -> None:
        stock = make_jumprelu(jumprelu_bandwidth=0.5)
        sparse = sparse_jumprelu(stock, implementation)
        if trained:
            make_trainer(sparse).step(superposed_rows(sparse, 16))
            stock = stock_like(sparse, torch.float32)
        for sae in (stock, sparse):
            change(sae)
        assert sparse.cfg.dtype == stock.cfg.dtype
        assert sparse.dtype == stock.dtype == sparse.W_enc.dtype
        assert sparse.threshold.dtype == torch.float32
        assert sparse.cfg.normalize_activations == stock.cfg.normalize_activations
        for name, expected in stock.named_parameters():
            torch.testing.assert_close(getattr(sparse, name), expected, rtol=1e-5, atol=1e-6)
        (precision,) = (p for p in PRECISIONS if p.dtype == stock.dtype and not p.autocast)
        with torch.no_grad():
            # Training and folding leave thresholds that bfloat16 would round.
            stock.threshold.copy_(stock.threshold.bfloat16())
        x = decided_inputs(stock, 16, precision)
        sparse.load_state_dict(stock.state_dict())
        compare_steps(stock, sparse, x, dead_mask(stock, 20), precision)

    def test_folding_keeps_what_is_active(self) -> None:
        stock, x = make_case(PATHS["torch-cpu"])
        sparse = sparse_jumprelu(stock)
        norms = stock.W_dec.norm(dim=-1)
        acts, recons = sparse.encode(x), sparse(x)
        sparse.fold_W_dec_norm()
        torch.testing.assert_close(sparse.threshold, stock.threshold * norms)
        torch.testing.assert_close(sparse.encode(x), acts * norms)
        torch.testing.assert_close(sparse(x), recons)

    def test_thresholds_stay_float32_in_every_cast(self) -> None:
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

    def test_an_evaluation_does_not_disturb_the_training(self) -> None:
        sae = sparse_jumprelu(make_jumprelu(d_sae=1000), "auto")
        with_density(sae, 0.002)
        for _ in range(3):
            forward_pass(sae, torch.randn(16, D_IN))
        assert sae.implementation.name == "torch"
        with_density(sae, 0.9)
        with torch.no_grad():
            sae.encode(torch.randn(16, D_IN))
        sae.eval()
        sae(torch.randn(16, D_IN))
        sae.train()
        assert sae.implementation.name == "torch"

    def test_batches_of_nan_stay_dense(self) -> None:
        sae = sparse_jumprelu(make_jumprelu(d_sae=1000), "auto")
        for _ in range(4):
            assert sae.implementation.name == "fused"
            assert forward_pass(sae, torch.full((16, D_IN), float("nan"))).loss.isnan()

    def test_a_state_dict_can_be_saved_by_safetensors(self, tmp_path: Path) -> None:
        stock = make_jumprelu()
        sparse = sparse_jumprelu(stock)
        forward_pass(sparse, superposed_rows(stock, 4))
        save_file(sparse.state_dict(), tmp_path / "weights.safetensors")
        for name, value in load_file(tmp_path / "weights.safetensors").items():
            assert torch.equal(value, stock.state_dict()[name]), name

    def test_a_loss_mode_that_was_changed_later_is_refused_as_in_stock(self) -> None:
        stock = make_jumprelu()
        for sae in (stock, sparse_jumprelu(stock)):
            sae.cfg.jumprelu_sparsity_loss_mode = "bogus"  # pyright: ignore[reportAttributeAccessIssue]
            with pytest.raises(ValueError, match="bogus"):
                forward_pass(sae, superposed_rows(stock, 4))
