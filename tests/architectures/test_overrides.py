"""A subclass or an instance that replaces a part of the forward pass gets its way, as in stock."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.topk_sae import TopK

from tests.support.architectures import ON_CPU, Arm, arms
from tests.support.jumprelu import FAST_PATHS
from tests.support.saes import error, step_values


def in_subclass(sae: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    """Give the SAE a subclass of its own class in which a method is replaced."""
    original = getattr(type(sae), name)

    def method(self: Any, *args: Any) -> Any:
        return wrap(lambda *rest: original(self, *rest))(*args)

    sae.__class__ = type(f"Custom{type(sae).__name__}", (type(sae),), {name: method})


def on_instance(sae: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    setattr(sae, name, wrap(getattr(sae, name)))


def shifted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    # Exact in bfloat16, so that what is active stays decided.
    return lambda *args: function(*args) * 2.0


def compare(arm: Arm, change: Callable[[Any], None], *, input_gradient: bool = False) -> None:
    stock, x = arm.case(n_rows=20)
    sparse = arm.sparse(stock)
    plain = step_values(sparse, x)
    for sae in (stock, sparse):
        change(sae)
    expected, actual = (
        step_values(sae, x, input_gradient=input_gradient) for sae in (stock, sparse)
    )
    for name, value in expected.items():
        assert error(actual[name], value) <= 1e-4 * value.norm() + 1e-9, name
    assert error(plain["loss"], expected["loss"]) > 1e-3, "the change changes nothing"


@pytest.mark.parametrize("replace", [in_subclass, on_instance])
@pytest.mark.parametrize("input_gradient", [False, True], ids=["", "input gradient"])
@arms(topk=ON_CPU, jumprelu={"torch-cpu": FAST_PATHS["torch-cpu"]})
def test_the_encoder_s_input(arm: Arm, replace: Any, input_gradient: bool) -> None:
    compare(
        arm,
        lambda sae: replace(sae, "process_sae_in", shifted),
        input_gradient=input_gradient,
    )


@pytest.mark.parametrize("name", ["run_time_activation_norm_fn_in", "mse_loss_fn"])
@arms(topk=ON_CPU)
def test_functions_that_an_instance_holds(arm: Arm, name: str) -> None:
    compare(arm, lambda sae: on_instance(sae, name, shifted))


@pytest.mark.parametrize("name", ["encode_with_hidden_pre", "decode", "calculate_aux_loss"])
@pytest.mark.parametrize("replace", [in_subclass, on_instance])
@arms(topk=ON_CPU)
def test_methods_of_a_training_step(arm: Arm, name: str, replace: Any) -> None:
    def change(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if isinstance(result, dict):
                return {**result, "own": torch.ones((), requires_grad=True) * 0.5}
            return (result[0] * 2, result[1]) if isinstance(result, tuple) else result * 2

        return changed

    def with_keywords(sae: Any) -> None:
        if replace is on_instance:
            on_instance(sae, name, change)
            return
        original = getattr(type(sae), name)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return change(lambda *a, **k: original(self, *a, **k))(*args, **kwargs)

        sae.__class__ = type(f"Custom{type(sae).__name__}", (type(sae),), {name: method})

    compare(arm, with_keywords)


class Halved(TopK):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "a subclass of TopK": lambda sae: setattr(sae, "activation_fn", Halved(sae.cfg.k)),
    "a forward hook": lambda sae: sae.activation_fn.register_forward_hook(
        lambda module, args, output: output / 2  # noqa: ARG005
    ),
    "another forward": lambda sae: on_instance(sae.activation_fn, "forward", shifted),
    "another k": lambda sae: setattr(sae.activation_fn, "k", 2),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions(name: str) -> None:
    arm = Arm("topk", ON_CPU["torch-cpu"])
    compare(arm, ACTIVATIONS[name])


def test_an_activation_function_that_is_replaced_within_a_step() -> None:
    arm = Arm("topk", ON_CPU["torch-cpu"])

    def change(sae: Any) -> None:
        own_loss = sae.calculate_aux_loss

        def with_sparsity(step_input: Any, *args: Any, **kwargs: Any) -> Any:
            losses = own_loss(step_input, *args, **kwargs)
            top_k, sae.activation_fn = sae.activation_fn, torch.nn.ReLU()
            losses["sparsity"] = sae.encode(step_input.sae_in).mean()
            sae.activation_fn = top_k
            return losses

        sae.calculate_aux_loss = with_sparsity

    compare(arm, change)
