"""Who takes part in a benchmark: stock SAELens, the sparse SAEs, and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE

from benchmarks.cases import NamedCase
from benchmarks.models import Model, SAELensModel
from benchmarks.peers import DictionaryLearning, Peer, Sparsify
from saelens_sparse.choice.availability import require_float8
from saelens_sparse.profile.cases import PRECISIONS, Precision
from saelens_sparse.profile.trainers import Inputs


def compile_sae(sae: TrainingSAE[Any]) -> None:
    """Compile as SAELens's runner does when `compile_sae` is set."""
    sae.training_forward_pass = torch.compile(  # pyright: ignore[reportAttributeAccessIssue]
        sae.training_forward_pass, mode=None, backend="inductor"
    )


def keep_light_moments(sae: TrainingSAE[Any]) -> None:
    """Let the optimizer of `SparseTrainingRunner` keep Adam's moments in bfloat16."""
    sae.cfg.moments = "bfloat16"


def has_float8(device: str) -> bool:
    """Whether a device multiplies float8."""
    try:
        require_float8(torch.device(device))
    except ValueError:
        return False
    return True


def screen_in_float8(sae: TrainingSAE[Any]) -> None:
    """Let training steps screen pre-activations in float8."""
    sae.cfg.screen_dtype = "float8"


def screen_and_keep_little(sae: TrainingSAE[Any]) -> None:
    """Both."""
    keep_light_moments(sae)
    screen_in_float8(sae)


@dataclass(frozen=True)
class Contender:
    """
    SAELens's class of a case's architecture, the sparse one or another library's, and how it runs.

    Attributes:
        name: key of its rows.
        sparse: whether it trains the sparse architecture.
        sparse_runner: whether its steps are those of `SparseTrainingRunner`.
        precisions: names of the precisions in which it means something.
        matmul_precision: of `torch.set_float32_matmul_precision`; "high" allows TF32.
        prepare: applied to the SAE once its trainer exists, before the first step.
        peer: the other library's model.
        runs_on: whether it can run on a device.
    """

    name: str
    sparse: bool = False
    sparse_runner: bool = False
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    matmul_precision: str = "highest"
    prepare: Callable[[TrainingSAE[Any]], None] | None = None
    peer: type[Peer] | None = None
    runs_on: Callable[[str], bool] = lambda _: True

    def takes(self, case: NamedCase, precision: Precision) -> bool:
        """Whether it means something for the case in this precision."""
        trains = self.peer is None or self.peer.architecture == case.registered.stock
        return trains and precision.name in self.precisions

    def build(self, case: NamedCase, precision: Precision, device: str, inputs: Inputs) -> Model:
        """Its model, with the weights of `inputs`."""
        if self.peer is not None:
            return self.peer(case, precision, device, inputs)
        model = SAELensModel(
            case,
            precision,
            device,
            inputs,
            sparse=self.sparse,
            sparse_runner=self.sparse_runner,
        )
        if self.prepare is not None:
            self.prepare(model.sae)
        return model


STOCK = Contender("stock")
STOCK_TF32 = Contender("stock_tf32", precisions=("float32",), matmul_precision="high")
STOCK_COMPILE = Contender("stock_compile", precisions=("autocast",), prepare=compile_sae)
SPARSE = Contender("sparse", sparse=True)
SPARSE_RUNNER = Contender("sparse_runner", sparse=True, sparse_runner=True)
BFLOAT16_MOMENTS = Contender(
    "sparse_runner_bfloat16_moments",
    sparse=True,
    sparse_runner=True,
    precisions=("float32", "autocast"),
    prepare=keep_light_moments,
)
FLOAT8 = replace(
    BFLOAT16_MOMENTS, name="sparse_runner_float8", prepare=screen_in_float8, runs_on=has_float8
)
FLOAT8_BFLOAT16_MOMENTS = replace(
    FLOAT8, name="sparse_runner_float8_bfloat16_moments", prepare=screen_and_keep_little
)
TRADE_OFFS = (BFLOAT16_MOMENTS, FLOAT8, FLOAT8_BFLOAT16_MOMENTS)
"""Contenders that do not train the very same SAE."""
SPARSIFY = Contender("sparsify", peer=Sparsify)
DICTIONARY_LEARNING = Contender("dictionary_learning", peer=DictionaryLearning)
