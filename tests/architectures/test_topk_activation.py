"""An activation function that is not SAELens's Top-K, or does more, gets its way, as in stock."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.topk_sae import TopK

from tests.support.architectures import SUBJECTS
from tests.support.overrides import compare_changed, on_instance, shifted


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
    compare_changed(SUBJECTS["topk_sparse"], ACTIVATIONS[name])


def test_an_activation_function_that_is_replaced_within_a_step() -> None:
    def change(sae: Any) -> None:
        own_loss = sae.calculate_aux_loss

        def with_sparsity(step_input: Any, *args: Any, **kwargs: Any) -> Any:
            losses = own_loss(step_input, *args, **kwargs)
            top_k, sae.activation_fn = sae.activation_fn, torch.nn.ReLU()
            losses["sparsity"] = sae.encode(step_input.sae_in).mean()
            sae.activation_fn = top_k
            return losses

        sae.calculate_aux_loss = with_sparsity

    compare_changed(SUBJECTS["topk_sparse"], change)
