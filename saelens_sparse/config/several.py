"""Configs of runs of several SAEs: from files, and checked as those of one SAE are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens import MultiSAETrainingRunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from typing_extensions import override

from saelens_sparse.config.fields import (
    check_architecture,
    check_group,
    check_run_fields,
    check_sae_fields,
    field_hints,
)
from saelens_sparse.config.messages import named_sae, shown


@dataclass
class SparseMultiSAETrainingRunnerConfig(MultiSAETrainingRunnerConfig):
    """
    SAELens's `MultiSAETrainingRunnerConfig`, with cached activations and `from_dict`.

    Args:
        use_cached_activations: Whether activations come from a cache, as in
            `LanguageModelSAERunnerConfig`.
        cached_activations_path: Where the cache is.

    Raises:
        ValueError: as SAELens's; or the cache has no path.
    """

    use_cached_activations: bool = False
    cached_activations_path: str | None = None

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_cached_activations and self.cached_activations_path is None:
            raise ValueError("cached_activations_path: missing, and use_cached_activations is true")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseMultiSAETrainingRunnerConfig:
        """
        The config that `to_dict` gives these values of, or SAELens's `to_dict`.

        Raises:
            ValueError, TypeError: SAELens does not take them; a message on an SAE names it.
        """
        saes: dict[str, TrainingSAEConfig] = {}
        for name, sae in values["saes"].items():
            config_class = get_sae_training_class(sae["architecture"])[1]
            try:
                saes[name] = config_class.from_dict(sae)
            except (TypeError, ValueError) as error:
                raise ValueError(f"saes.{name}: {error}") from error
        made: dict[str, Any] = {**values, "saes": saes, "logger": LoggingConfig(**values["logger"])}
        if "seqpos_slice" in values:  # JSON has lists only
            made["seqpos_slice"] = tuple(values["seqpos_slice"])
        config = cls(**made)
        if "checkpoint_path" in values:  # SAELens appends the run's id to it
            config.checkpoint_path = values["checkpoint_path"]
        return config


def with_shared_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """
    A config whose `sae` holds fields of all SAEs, with these in each of `saes`.

    Raises:
        ValueError: `sae`, `saes` or one of them is no object with settings.
    """
    check_group("saes", values["saes"])
    shared = values.get("sae", {})
    check_group("sae", shared)
    for name, sae in values["saes"].items():
        check_group(f"saes.{name}", sae)
    saes = {name: {**shared, **sae} for name, sae in values["saes"].items()}
    return {**{name: value for name, value in values.items() if name != "sae"}, "saes": saes}


def check_multi_fields(values: Mapping[str, Any]) -> None:
    """
    `check_fields` for several SAEs.

    Args:
        values: The config, in the form of `SparseMultiSAETrainingRunnerConfig.to_dict`.

    Raises:
        ValueError: with the first field that does not fit, its value, and what is allowed.
    """
    for name in ("hook_names", "logger"):
        if name not in values:
            raise ValueError(f"{name}: missing")
    check_group("logger", values["logger"])
    if not values["saes"]:
        raise ValueError("saes: there is none; allowed: a config for each SAE by its name")
    for name, sae in values["saes"].items():
        if not re.fullmatch(r"[\w.+=-]+", name) or not name.strip("."):
            raise ValueError(
                f"saes: {shown(name)} cannot be a name, for it is that of a folder; allowed: "
                "letters, digits and . _ + = -"
            )
        with named_sae(name):
            check_architecture(sae)
            check_sae_fields(sae, field_hints([sae["architecture"]]))
    hints = field_hints(SAE_TRAINING_CLASS_REGISTRY, SparseMultiSAETrainingRunnerConfig)
    of_run = {n: h for n, h in hints.items() if n != "evaluator" and not n.startswith(("_", "sae"))}
    check_run_fields(values, {**of_run, "sae_lens_version": str, "sae_lens_training_version": str})
