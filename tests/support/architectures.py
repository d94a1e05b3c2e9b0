"""Both sparse architectures behind one face, for what they must do alike."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.conftest import TARGETS, Target, marks
from tests.support.jumprelu import (
    FAST_PATHS,
    THREE_OPTIONS,
    decided_inputs,
    make_case,
    make_jumprelu,
    sparse_jumprelu,
)
from tests.support.saes import FLOAT32, Precision, make_stock, runs, sparse_like, zipf_inputs

TOPK_OPTIONS: dict[str, dict[str, Any]] = {
    f"{'rescaled' if rescale else 'raw'}-{'centred' if centre else 'uncentred'}": {
        "rescale_acts_by_decoder_norm": rescale,
        "apply_b_dec_to_input": centre,
    }
    for rescale, centre in itertools.product((True, False), repeat=2)
}
ALL_OR_NO_OPTIONS = {name: TOPK_OPTIONS[name] for name in ("rescaled-centred", "raw-uncentred")}
# By architecture, few that say most about it.
FEW_OPTIONS = {"topk": ALL_OR_NO_OPTIONS, "jumprelu": THREE_OPTIONS}
ON_CPU = {"torch-cpu": TARGETS["torch-cpu"]}


@dataclass(frozen=True)
class Arm:
    """A sparse architecture on one of its paths.

    Attributes:
        architecture: "topk" or "jumprelu", which the sparse SAE must be like.
        target: what the sparse SAE computes with, and where both are.
    """

    architecture: str
    target: Target

    def stock(self, precision: Precision = FLOAT32, **cfg: Any) -> Any:
        """A stock SAE with random weights from the global generator."""
        make = make_stock if self.architecture == "topk" else make_jumprelu
        return make(dtype=precision.dtype, device=self.target.device, **cfg)

    def sparse(self, stock: Any, implementation: str | None = None, **changes: Any) -> Any:
        """A sparse SAE like `stock`, by the arm's implementation unless told otherwise."""
        make: Any = sparse_like if self.architecture == "topk" else sparse_jumprelu
        return make(stock, implementation or self.target.backend, **changes)

    def inputs(self, stock: Any, n_rows: int, precision: Precision = FLOAT32) -> torch.Tensor:
        """Rows for which rounding does not move an active latent; may shift `stock`'s biases."""
        if self.architecture == "topk":
            return zipf_inputs(stock, n_rows)
        return decided_inputs(stock, n_rows, precision)

    def case(
        self, precision: Precision = FLOAT32, n_rows: int = 40, **cfg: Any
    ) -> tuple[Any, torch.Tensor]:
        """A stock SAE with a loss for dead latents, and inputs; fewer in Triton's interpreter."""
        if self.architecture == "jumprelu":
            cfg = {"pre_act_loss_coefficient": 0.3, **cfg}
            return make_case(self.target, precision, n_rows, **cfg)
        stock = self.stock(precision, **cfg)
        return stock, zipf_inputs(stock, self.target.few_rows(n_rows))


def arms(
    *,
    topk: Mapping[str, Target] = TARGETS,
    jumprelu: Mapping[str, Target] = FAST_PATHS,
    precisions: Sequence[Precision] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> pytest.MarkDecorator:
    """Runs a test for both architectures, on each of their paths that runs here.

    Args:
        topk: its paths.
        jumprelu: its paths; a step of it in Triton's interpreter takes seconds.
        precisions: the test also takes a `precision`, each that a path takes.
        options: the test also takes `options`, each of its architecture.
    """
    names = ["arm", *["precision"] * bool(precisions), *["options"] * bool(options)]
    parameters: list[Any] = []
    for architecture, targets in {"topk": topk, "jumprelu": jumprelu}.items():
        axes = itertools.product(
            targets.items(),
            [(p.name, p) for p in precisions] or [None],
            options[architecture].items() if options else [None],
        )
        for (name, target), precision, option in axes:
            if not target.runs_here or (precision and not runs(target, precision[1])):
                continue
            named = [(f"{architecture}-{name}", Arm(architecture, target)), precision, option]
            ids, values = zip(*(one for one in named if one is not None), strict=True)
            parameters.append(pytest.param(*values, id="-".join(ids), marks=marks(target)))
    return pytest.mark.parametrize(names, parameters)


every_arm = arms()
every_arm_and_option = arms(options=FEW_OPTIONS)
