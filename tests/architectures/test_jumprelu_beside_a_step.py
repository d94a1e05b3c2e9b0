"""What a subclass, an evaluation or a custom loop does with JumpReLU's public methods."""

from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainStepInput

from tests.conftest import TARGETS, Target
from tests.support.jumprelu import (
    MODES,
    decide,
    decided_inputs,
    every_fast_path,
    every_mode,
    make_case,
    make_jumprelu,
    margin_of,
    pre_acts,
    sparse_jumprelu,
)
from tests.support.saes import (
    FLOAT32,
    FLOAT64,
    coefficients,
    compare_steps,
    dead_mask,
    error,
    forward_pass,
    not_interpreted,
    require_same_gradients,
    step_values,
    superposed_rows,
)


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

    @every_mode
    @pytest.mark.parametrize("path", ["torch", "fused"])
    @pytest.mark.parametrize("pre_act_loss", [None, 0.3])
    def test_thresholds_of_activations_without_a_graph(
        self, mode: str, path: str, pre_act_loss: float | None
    ) -> None:
        options = {"pre_act_loss_coefficient": pre_act_loss, **MODES[mode]}
        stock, x = make_case(TARGETS["torch-cpu"], FLOAT64, n_rows=20, **options)
        sparse = sparse_jumprelu(stock, path)
        mask = dead_mask(stock, 10)
        for sae in (stock, sparse):
            with torch.no_grad():
                acts, hidden_pre = sae.encode_with_hidden_pre(x)
            step_input = TrainStepInput(x, {"l0": 0.7}, mask, 0, False)
            losses = sae.calculate_aux_loss(step_input, acts, hidden_pre, sae.decode(acts))
            torch.stack([*losses.values()]).sum().backward()
        require_same_gradients(sparse, stock)
        if mode != "tanh":
            assert sparse.threshold.grad is not None and sparse.threshold.grad.any()
