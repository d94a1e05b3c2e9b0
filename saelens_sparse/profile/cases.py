"""What is profiled and benchmarked: the sizes of a problem, and its precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from saelens_sparse.architectures.registry import ARCHITECTURES, Architecture

LEARNING_RATE = 3e-4
# Both so small that L0 stays where it was put while steps are timed.
THRESHOLD_LEARNING_RATE, L0_COEFFICIENT = 3e-6, 1e-3


@dataclass(frozen=True)
class Precision:
    """How weights are stored, and whether SAELens's trainer autocasts to bfloat16."""

    name: str
    dtype: torch.dtype
    autocast: bool = False


FLOAT64 = Precision("float64", torch.float64)
FLOAT32 = Precision("float32", torch.float32)
AUTOCAST = Precision("autocast", torch.float32, autocast=True)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)
PRECISIONS = {precision.name: precision for precision in (FLOAT32, AUTOCAST, BFLOAT16)}


@dataclass(frozen=True)
class Case:
    """
    A problem.

    Args:
        name: what it is asked for by.
        architecture: SAELens's name of a sparse architecture.
        d_in: width of a row.
        d_sae: number of latents.
        sparsity: value of the architecture's `sparsity_field`; where it has none, the mean L0 that
            thresholds are calibrated to.
        batch: rows of a batch.
        precisions: that it is measured in unless others are asked for.
        dead_fraction: share of latents held dead.
        options: fields of SAELens's training config that differ from its defaults.
    """

    name: str
    architecture: str
    d_in: int
    d_sae: int
    sparsity: float
    batch: int
    precisions: tuple[Precision, ...] = ()
    dead_fraction: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def registered(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def label(self) -> str:
        """How many latents are active, such as "k 64"."""
        return self.registered.sparsity_label(self.sparsity)

    @property
    def sae_options(self) -> dict[str, Any]:
        """Fields of the SAE's config besides its name and the sizes."""
        fixed = dict(self.registered.needed_fields(self.d_sae))
        if hasattr(self.registered.stock_config, "l0_coefficient"):
            fixed["l0_coefficient"] = L0_COEFFICIENT
        if name := self.registered.sparsity_field:
            fixed[name] = self.sparsity
        return {**fixed, **self.options}

    @property
    def features_per_row(self) -> float:
        """
        True features in a row of the inputs. At most 64 where L0 is no setting: activations do not
        hold thousands of features because thresholds are low.
        """
        return self.sparsity if self.registered.sparsity_field else min(self.sparsity, 64.0)

    @property
    def learning_rate(self) -> float:
        """That of the checked and timed steps."""
        return LEARNING_RATE if self.registered.sparsity_field else THRESHOLD_LEARNING_RATE
