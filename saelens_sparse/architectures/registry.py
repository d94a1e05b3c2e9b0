"""The sparse architectures: what the runners, the reports and the tests ask of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig


@dataclass(frozen=True)
class Architecture:
    """
    A sparse architecture, and the one of SAELens that trains the same model.

    Attributes:
        sae: training SAE.
        config: its config.
        stock_sae: SAELens's training SAE.
        stock_config: its config.
        inference_sae: what SAELens saves a trained one as.
        inference_config: its config.
        sparsity_field: config field that sets how many latents are active on a row; None if that
            is a result of the training.
        demo_config: file beside `compare` with a runner config for its built-in model.
        needed_fields: config fields without which there is no SAE, for so many latents; with values
            for whoever has none.
    """

    sae: type[TrainingSAE[Any]]
    config: type[TrainingSAEConfig]
    stock_sae: type[TrainingSAE[Any]]
    stock_config: type[TrainingSAEConfig]
    inference_sae: type[SAE[Any]]
    inference_config: type[SAEConfig]
    sparsity_field: str | None
    demo_config: str
    needed_fields: Callable[[int], Mapping[str, Any]] = lambda _: {}

    @property
    def name(self) -> str:
        """SAELens's name of the sparse architecture."""
        return self.config.architecture()

    @property
    def stock(self) -> str:
        """SAELens's name of its own."""
        return self.stock_config.architecture()

    def sparsity_label(self, value: float) -> str:
        """How reports write how many latents are active: "k 64", "L0 64"."""
        return f"{self.sparsity_field or 'L0'} {value:g}"


ARCHITECTURES: dict[str, Architecture] = {}
"""Every sparse architecture, by name. Importing `saelens_sparse.architectures` fills it."""


def add(architecture: Architecture) -> None:
    """Make an architecture known to this package and to SAELens.

    For inference its name stands for SAELens's own classes, so that `SAE.load_from_disk` opens a
    training checkpoint; unless the stock architecture has none of its name, whose training
    checkpoints SAELens does not open so either. Calling it again changes nothing.

    Raises:
        ValueError: another package has registered the name.
    """
    name = architecture.name
    training = (architecture.sae, architecture.config)
    inference = (architecture.inference_sae, architecture.inference_config)
    if SAE_TRAINING_CLASS_REGISTRY.get(name) != training:
        register_sae_training_class(name, *training)
    opens_checkpoints = architecture.inference_config.architecture() == architecture.stock
    if opens_checkpoints and SAE_CLASS_REGISTRY.get(name) != inference:
        register_sae_class(name, *inference)
    ARCHITECTURES[name] = architecture
