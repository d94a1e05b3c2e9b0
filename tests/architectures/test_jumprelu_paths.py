"""What JumpReLU computes with: dense or sparse by what is active, in room enough, no more."""

import importlib
import itertools
from copy import deepcopy
from statistics import fmean
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

from saelens_sparse import SparseJumpReLUTrainingSAE
from saelens_sparse.architectures.jumprelu import MAX_MEASURED_DENSITY
from tests.conftest import Target
from tests.support.drift import Curve, nudges, require_drift_of_rounding
from tests.support.jumprelu import (
    D_IN,
    FUSED,
    decide,
    in_window,
    make_jumprelu,
    margin_of,
    parameters_of,
    pre_acts,
    sparse_jumprelu,
)
from tests.support.saes import (
    FLOAT32,
    compare_steps,
    dead_mask,
    error,
    forward_pass,
    gradients,
    not_interpreted,
    step_values,
    superposed_rows,
)
from tests.support.trainers import structured_batches, training_curve


def sparse_name(target: Target) -> str:
    return "triton" if target.device == "cuda" else "torch"


def with_density(sae: SparseJumpReLUTrainingSAE, density: float) -> None:
    """Make a share of the latents active on every row, far from any edge."""
    n_active = round(density * sae.cfg.d_sae)
    with torch.no_grad():
        sae.b_enc.fill_(-1e4)
        sae.b_enc[:n_active] = 1e4


class TestAuto:
    """A run that begins dense and ends sparse."""

    D_IN, D_SAE, N_STEPS = 32, 512, 100

    @pytest.fixture(autouse=True)
    def switch_after_a_third(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Wherever the crossing lies on a device: these SAEs are too small to get there."""
        for key in MAX_MEASURED_DENSITY:
            monkeypatch.setitem(MAX_MEASURED_DENSITY, key, 0.4)

    def case(self, dtype: torch.dtype) -> tuple[JumpReLUTrainingSAE, list[torch.Tensor]]:
        batches = structured_batches(self.N_STEPS, 64, self.D_IN, dtype)
        # SAELens's own initialisation, the same for every device.
        stock = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                d_in=self.D_IN,
                d_sae=self.D_SAE,
                l0_coefficient=0.4,
                l0_warm_up_steps=20,
                jumprelu_bandwidth=0.3,
                pre_act_loss_coefficient=3e-3,
                dtype=str(dtype).removeprefix("torch."),
            )
        )
        with torch.no_grad():
            # Latents that are dead from the first step on, some of which the loss revives.
            stock.b_enc[-64:] = torch.linspace(-2, -8, 64)
        return stock, batches

    def curve(
        self, sae: JumpReLUTrainingSAE, batches: list[torch.Tensor]
    ) -> tuple[Curve, list[str]]:
        """Metrics of every step, and what each ran on."""
        logs = training_curve(sae, batches, lr=8e-3, dead_feature_window=10)
        names = {
            "mse": "losses/mse_loss",
            "pre-act loss": "losses/pre_act_loss",
            "l0": "metrics/l0",
            "threshold": "threshold",
            "dead": "sparsity/dead_features",
            "passes since fired": "sparsity/mean_passes_since_fired",
            **{name: name for name in gradients(sae)},
        }
        curve = {short: [float(log[name]) for log in logs] for short, name in names.items()}
        return curve, [log["ran on"] for log in logs if "ran on" in log]

    def require_telling(self, expected: Curve, target: Target, ran_on: list[str]) -> None:
        """The run was dense first and sparse later, and learned; latents died and revived."""
        assert expected["l0"][0] > 0.25 * self.D_SAE, "the run does not begin dense"
        assert expected["l0"][-1] < 0.04 * self.D_SAE, "the run does not end sparse"
        assert fmean(expected["mse"][-20:]) < 0.5 * expected["mse"][0], "nothing was learned"
        dead = expected["dead"]
        assert dead[20] > min(dead[20:]) + 10 < dead[-1], "no latent was revived, or none died"
        first_sparse = ran_on.index(sparse_name(target))
        assert first_sparse > 5, "the run hardly began dense"
        assert ran_on[:first_sparse] == ["fused"] * first_sparse
        n_sparse = self.N_STEPS - first_sparse
        assert n_sparse > 50
        assert ran_on[first_sparse:] == [sparse_name(target)] * n_sparse

    def test_a_run_in_float64_crosses_the_switch_without_a_kink(self) -> None:
        target = FUSED["fused-cpu"]
        stock, batches = self.case(torch.float64)
        sparse = sparse_jumprelu(stock, "auto")
        for sae in (stock, sparse):
            # SAELens keeps thresholds in float32, whose rounding moves gates in some runs.
            sae.threshold.data = sae.threshold.data.double()
        actual, ran_on = self.curve(sparse, batches)
        expected, _ = self.curve(stock, batches)
        self.require_telling(expected, target, ran_on)
        for name, values in expected.items():
            assert actual[name] == pytest.approx(values, rel=1e-8), name

    @pytest.mark.parametrize("target", parameters_of(FUSED))
    def test_a_run_in_float32_drifts_from_stock_as_rounding_makes_stock_drift(
        self, target: Target
    ) -> None:
        stock, batches = self.case(torch.float32)
        stock.cfg.device = target.device
        stock.to(target.device)
        sparse = sparse_jumprelu(stock, "auto")
        controls = [self.curve(deepcopy(stock), nudged)[0] for nudged in nudges(batches, n_pairs=2)]
        actual, ran_on = self.curve(sparse, batches)
        expected, _ = self.curve(stock, batches)
        self.require_telling(expected, target, ran_on)
        require_drift_of_rounding(actual, expected, controls, counts={"dead"})


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

    @pytest.mark.parametrize("density", [0.002, 0.9])
    def test_an_evaluation_within_a_step_does_not_disturb_the_training(
        self, density: float
    ) -> None:
        sae = self.sae()
        own_loss = sae.calculate_aux_loss

        def with_evaluation(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                with_density(sae, 0.9 - density)
                sae.encode(torch.randn(16, D_IN))
                with_density(sae, density)
            return own_loss(*args, **kwargs)

        sae.calculate_aux_loss = with_evaluation  # pyright: ignore[reportAttributeAccessIssue]
        with_density(sae, density)
        for _ in range(3):
            forward_pass(sae, torch.randn(16, D_IN))
        assert sae.implementation.name == ("torch" if density == 0.002 else "fused")

    def test_batches_of_nan_stay_dense(self) -> None:
        sae = sparse_jumprelu(make_jumprelu(d_sae=1000), "auto")
        for _ in range(4):
            assert sae.implementation.name == "fused"
            assert forward_pass(sae, torch.full((16, D_IN), float("nan"))).loss.isnan()


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
        gate_triton = importlib.import_module("saelens_sparse.ops.search.threshold_kernels")
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
