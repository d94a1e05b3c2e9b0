"""Replacing a part of an SAE's forward pass, in stock and in a sparse one alike."""

from collections.abc import Callable
from typing import Any

import torch

from tests.support.architectures import Subject
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


def compare_changed(
    subject: Subject, change: Callable[[Any], None], *, input_gradient: bool = False
) -> None:
    stock, x = subject.case(n_rows=20)
    sparse = subject.sparse(stock)
    plain = step_values(sparse, x)
    for sae in (stock, sparse):
        change(sae)
    expected, actual = (
        step_values(sae, x, input_gradient=input_gradient) for sae in (stock, sparse)
    )
    for name, value in expected.items():
        assert error(actual[name], value) <= 1e-4 * value.norm() + 1e-9, name
    assert error(plain["loss"], expected["loss"]) > 1e-3, "the change changes nothing"
