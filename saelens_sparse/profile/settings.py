"""What is profiled: the problem, the precision and the arms, from a runner config or a shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class

from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.cases import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    L0_COEFFICIENT,
    PRECISIONS,
    SPARSE,
    SPARSE_RUNNER,
    SPARSE_SUFFIX,
    STOCK,
    Arm,
    Case,
    Precision,
)

ARMS = {arm.name: arm for arm in (STOCK, SPARSE, SPARSE_RUNNER)}
DEFAULT_L0 = 64.0
# Fields of an SAE's config that the case states itself, or that say nothing about a step.
_NOT_OPTIONS = {"d_in", "d_sae", "k", "dtype", "device", "metadata"}


@dataclass(frozen=True)
class Settings:
    """
    All that decides what is measured.

    Args:
        case: The problem.
        precision: How weights are stored and whether the trainer autocasts.
        device: "cuda" or "cpu".
        steps: Number of timed steps.
        warmup_train: Training steps that lead from planted features to the weights used.
        counters: Whether hardware counters are read if the machine has what that takes.
    """

    case: Case
    precision: Precision
    device: str
    steps: int
    warmup_train: int
    counters: bool

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes them from, and what tells results of other settings apart."""
        case = self.case
        return {
            "architecture": case.architecture,
            "d_in": case.d_in,
            "d_sae": case.d_sae,
            "k": case.k,
            "l0": case.l0,
            "batch": case.batch,
            "dead_fraction": case.dead_fraction,
            "options": dict(case.options),
            "precision": self.precision.name,
            "device": self.device,
            "steps": self.steps,
            "warmup_train": self.warmup_train,
            "counters": self.counters,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """The settings that `to_json` described."""
        case = Case(
            name="profile",
            d_in=values["d_in"],
            d_sae=values["d_sae"],
            k=values["k"],
            batch=values["batch"],
            precisions=(),
            dead_fraction=values["dead_fraction"],
            architecture=values["architecture"],
            l0=values["l0"],
            options=values["options"],
        )
        rest = {name: values[name] for name in ("device", "steps", "warmup_train", "counters")}
        return cls(case, PRECISIONS[values["precision"]], **rest)

    def describe(self) -> str:
        """The problem in one line."""
        case = self.case
        active = f"k {case.k}" if case.l0 is None else f"mean L0 {case.l0:g}"
        dead = f", {case.dead_fraction:.0%} dead" if case.dead_fraction else ""
        return (
            f"{case.architecture}, {case.d_in} -> {case.d_sae:,}, {active}, "
            f"batch {case.batch}{dead}, {self.precision.name}"
        )


def architectures() -> list[str]:
    """SAELens's names of the architectures that have a sparse counterpart."""
    names = SAE_TRAINING_CLASS_REGISTRY.keys()
    return sorted(name for name in names if name + SPARSE_SUFFIX in names)


def case_of_shape(
    shape: Sequence[int], architecture: str, l0: float | None, dead_fraction: float
) -> Case:
    """
    The case of `d_in, d_sae, k, batch`, with SAELens's defaults.

    Args:
        shape: the four sizes; for an architecture without k it is the mean L0 unless `l0` is given.
        architecture: the stock or the sparse one of a pair.
        l0: mean number of active latents per row that thresholds are calibrated to.
        dead_fraction: share of latents held dead.

    Raises:
        UsageError: a size cannot be used.
    """
    d_in, d_sae, k, batch = shape
    base = _base_of(architecture, "--architecture")
    options: dict[str, Any] = {}
    if _has_field(base, "l0_coefficient"):
        options["l0_coefficient"] = L0_COEFFICIENT
    has_k = _has_field(base, "k")
    return _checked(
        Case(
            "profile",
            d_in,
            d_sae,
            k if has_k else None,
            batch,
            (),
            dead_fraction,
            architecture=base,
            l0=_l0_of(has_k, k if l0 is None else l0, l0),
            options=options,
        ),
        "--shape",
    )


def case_of_config(
    cfg: LanguageModelSAERunnerConfig[Any],
    architecture: str | None,
    l0: float | None,
    dead_fraction: float,
) -> Case:
    """
    The case of a runner config: the SAE's sizes and settings, and the batch size.

    Args:
        cfg: a whole runner config; nothing that it names is loaded.
        architecture: overrides that of the config.
        l0: for an architecture without k; by default the config's `target_l0`, else 64.
        dead_fraction: share of latents held dead.

    Raises:
        UsageError: a setting cannot be used; the message names it.
    """
    base = _base_of(architecture or cfg.sae.architecture(), "sae.architecture")
    has_k = _has_field(base, "k")
    stock_fields = {field.name for field in dataclasses.fields(get_sae_training_class(base)[1])}
    values = {name: value for name, value in cfg.sae.to_dict().items() if name in stock_fields}
    expected_l0 = l0 or getattr(cfg.sae, "target_l0", None) or DEFAULT_L0
    return _checked(
        Case(
            "profile",
            cfg.sae.d_in,
            cfg.sae.d_sae,
            getattr(cfg.sae, "k", None) if has_k else None,
            cfg.train_batch_size_tokens,
            (),
            dead_fraction,
            architecture=base,
            l0=_l0_of(has_k, expected_l0, l0),
            options={name: value for name, value in values.items() if name not in _NOT_OPTIONS},
        ),
        "the config",
    )


def precision_of_config(cfg: LanguageModelSAERunnerConfig[Any]) -> Precision:
    """
    The precision that a runner config trains in.

    Raises:
        UsageError: it is none of those that are measured.
    """
    dtype = getattr(torch, str(cfg.sae.dtype).removeprefix("torch."), None)
    if dtype == torch.float32:
        return AUTOCAST if cfg.autocast else FLOAT32
    if dtype == torch.bfloat16:
        return BFLOAT16  # which autocast leaves as it is
    raise UsageError(f"sae.dtype: {cfg.sae.dtype!r} is not measured; allowed: float32, bfloat16")


def parse_arms(text: str) -> list[Arm]:
    """
    Arms from their names, separated by commas, in their usual order.

    Raises:
        UsageError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ARMS]:
        raise UsageError(f"--arms: unknown {', '.join(unknown)}; allowed: {', '.join(ARMS)}")
    return [arm for name, arm in ARMS.items() if name in names]


def _base_of(architecture: str, option: str) -> str:
    base = architecture.removesuffix(SPARSE_SUFFIX)
    if base not in architectures():
        allowed = ", ".join(name + SPARSE_SUFFIX for name in architectures())
        raise UsageError(f"{option}: {architecture!r} has no sparse arm; allowed: {allowed}")
    return base


def _has_field(architecture: str, name: str) -> bool:
    fields = dataclasses.fields(get_sae_training_class(architecture)[1])
    return name in {field.name for field in fields}


def _l0_of(has_k: bool, expected: float, asked: float | None) -> float | None:
    if not has_k:
        return float(expected)
    if asked is not None:
        raise UsageError(f"--l0: {asked:g} has no use here, for this architecture has k")
    return None


def _checked(case: Case, option: str) -> Case:
    for name in ("d_in", "d_sae", "batch"):
        if getattr(case, name) < 1:
            raise UsageError(f"{option}: {name} must be 1 or more; got {getattr(case, name)}")
    if case.k is not None and not 1 <= case.k <= case.d_sae:
        raise UsageError(f"{option}: k must be from 1 to d_sae={case.d_sae}; got {case.k}")
    if case.l0 is not None and not 0 < case.l0 <= case.d_sae:
        raise UsageError(f"--l0: must be above 0 and at most d_sae={case.d_sae}; got {case.l0:g}")
    if not 0 <= case.dead_fraction < 1:
        raise UsageError(
            f"--dead-fraction: must be at least 0 and below 1; got {case.dead_fraction:g}"
        )
    return case
