"""A subclass or an instance that replaces a part of the forward pass gets its way, as in stock."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.architectures import NOT_INTERPRETED, ON_CPU, Subject, subjects
from tests.support.overrides import compare_changed, in_subclass, on_instance, shifted


@pytest.mark.parametrize("replace", [in_subclass, on_instance])
@pytest.mark.parametrize("input_gradient", [False, True], ids=["", "input gradient"])
@subjects(ON_CPU)
def test_the_encoder_s_input(subject: Subject, replace: Any, input_gradient: bool) -> None:
    compare_changed(
        subject,
        lambda sae: replace(sae, "process_sae_in", shifted),
        input_gradient=input_gradient,
    )


@pytest.mark.parametrize("name", ["run_time_activation_norm_fn_in", "mse_loss_fn"])
@subjects(NOT_INTERPRETED)
def test_functions_that_an_instance_holds(subject: Subject, name: str) -> None:
    compare_changed(subject, lambda sae: on_instance(sae, name, shifted))


@pytest.mark.parametrize("name", ["encode_with_hidden_pre", "decode", "calculate_aux_loss"])
@pytest.mark.parametrize("replace", [in_subclass, on_instance])
@subjects(NOT_INTERPRETED)
def test_methods_of_a_training_step(subject: Subject, name: str, replace: Any) -> None:
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

    compare_changed(subject, with_keywords)
