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
