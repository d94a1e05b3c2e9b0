"""What is measured: problem sizes, precisions, arms and the ratios aimed at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE


@dataclass(frozen=True)
class Precision:
    """How the weights are stored and whether `SAETrainer` autocasts to bfloat16."""

    name: str
    dtype: torch.dtype
    autocast: bool = False


FLOAT64 = Precision("float64", torch.float64)
FLOAT32 = Precision("float32", torch.float32)
AUTOCAST = Precision("autocast", torch.float32, autocast=True)
BFLOAT16 = Precision("bfloat16", torch.bfloat16)

PRECISIONS = {precision.name: precision for precision in (FLOAT32, AUTOCAST, BFLOAT16)}

# The precision in which stock serves as the reference for each measured one.
REFERENCE_PRECISION = {"float32": FLOAT64, "autocast": FLOAT32, "bfloat16": FLOAT32}


MAX_FEATURES_PER_ROW = 64
LEARNING_RATE = 3e-4
JUMPRELU_LEARNING_RATE = 3e-6
L0_COEFFICIENT = 1e-3
"""Both so small that L0 stays where it was put while steps are timed."""


@dataclass(frozen=True)
class Case:
    """A problem size, with the precisions it is measured in unless others are asked for."""

    name: str
    d_in: int
    d_sae: int
    k: int | None
    """Active latents per row of a Top-K SAE; None for other architectures."""
    batch: int
    precisions: tuple[Precision, ...]
    dead_fraction: float = 0.0
    check_rows: int | None = None
    """Rows of each batch in the steps that compare the arms; None for all of them."""
    architecture: str = "topk"
    """SAELens's name of what the stock arm trains, and the sparse arm after it."""
    l0: float | None = None
    """Mean number of active latents per row that thresholds are calibrated to; None for Top-K."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Fields of SAELens's training config that differ from its defaults, besides the sizes."""

    @property
    def features_per_row(self) -> float:
        """
        Expected number of true features in a row of the inputs.

        At most 64 for JumpReLU: a language model's activations do not hold thousands of features
        because thresholds are low. What fires beyond that early in training, when L0 is high, is
        the overlap of latents with features that are not theirs.
        """
        if self.l0 is None:
            assert self.k is not None
            return self.k
        return min(self.l0, MAX_FEATURES_PER_ROW)

    @property
    def learning_rate(self) -> float:
        """That of the checked and timed steps."""
        return LEARNING_RATE if self.l0 is None else JUMPRELU_LEARNING_RATE


def _jumprelu(
    name: str,
    d_in: int,
    d_sae: int,
    l0: float,
    batch: int,
    precisions: tuple[Precision, ...],
    dead_fraction: float = 0.0,
    **options: float,
) -> Case:
    return Case(
        name,
        d_in,
        d_sae,
        None,
        batch,
        precisions,
        dead_fraction,
        architecture="jumprelu",
        l0=l0,
        options={"l0_coefficient": L0_COEFFICIENT, **options},
    )


def _by_name(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


STEP_CASES = _by_name(
    Case("gemma2b", 2304, 65_536, 64, 4096, (FLOAT32, AUTOCAST)),
    Case("gemma2b_dead30", 2304, 65_536, 64, 4096, (AUTOCAST,), dead_fraction=0.3),
    Case("gpt2", 768, 24_576, 32, 4096, (FLOAT32, AUTOCAST)),
    Case("llama8b", 4096, 131_072, 64, 4096, (AUTOCAST,)),
    Case("wide", 2304, 262_144, 64, 4096, (AUTOCAST,)),
    # Stock runs out of memory on full batches here, not on the few rows it is compared on.
    Case("million", 2304, 1_048_576, 64, 4096, (AUTOCAST,), check_rows=256),
    Case("seed1", 2048, 16_384, 128, 4096, (FLOAT32,)),
    Case("flash_sae", 4096, 65_536, 64, 1024, (BFLOAT16,)),
    Case("cpu", 512, 16_384, 32, 1024, (FLOAT32,)),
    Case("tiny", 32, 256, 4, 64, (FLOAT32,), dead_fraction=0.3),
    *(
        _jumprelu(f"jumprelu_l0_{l0}", 2304, 65_536, l0, 4096, (FLOAT32, AUTOCAST))
        for l0 in (64, 200, 1000, 3000)
    ),
    _jumprelu("cpu_jumprelu", 512, 16_384, 32, 1024, (FLOAT32,)),
    _jumprelu("tiny_jumprelu", 32, 256, 4, 64, (FLOAT32,), 0.3, pre_act_loss_coefficient=3e-6),
)
DEFAULT_STEP_CASES = {
    "cuda": tuple(name for name in STEP_CASES if not name.startswith(("cpu", "tiny"))),
    "cpu": ("cpu", "cpu_jumprelu"),
}

FORWARD_CASES = _by_name(
    Case("flash_sae", 4096, 65_536, 64, 1024, (BFLOAT16,)),
    *(
        Case(f"seed1_{d_sae // 1024}k", 4096, d_sae, 128, 4096, (FLOAT32,))
        for d_sae in (16_384, 32_768, 65_536, 131_072)
    ),
    _jumprelu("jumprelu_768_64k", 768, 65_536, 64, 4096, (FLOAT32,)),
    Case("tiny", 32, 256, 4, 64, (FLOAT32,)),
    _jumprelu("tiny_jumprelu", 32, 256, 4, 64, (FLOAT32,)),
)
DEFAULT_FORWARD_CASES = {
    "cuda": tuple(name for name in FORWARD_CASES if not name.startswith("tiny")),
    "cpu": ("tiny", "tiny_jumprelu"),
}


def compile_sae(sae: TrainingSAE[Any]) -> None:
    """Compile as SAELens's runner does when `compile_sae` is set."""
    sae.training_forward_pass = torch.compile(  # pyright: ignore[reportAttributeAccessIssue]
        sae.training_forward_pass, mode=None, backend="inductor"
    )


@dataclass(frozen=True)
class Arm:
    """One contender: SAELens's class of the case's architecture or ours, and how it is run."""

    name: str
    sparse: bool = False
    own_trainer: bool = False
    """Whether steps are those of `SparseTrainingRunner` instead of SAELens's runner."""
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    """Names of the precisions in which the arm means something."""
    matmul_precision: str = "highest"
    """Passed to `torch.set_float32_matmul_precision`; "high" allows TF32."""
    prepare: Callable[[TrainingSAE[Any]], None] | None = None
    """Applied to the SAE once its trainer exists, where the runner compiles it."""

    def architecture(self, case: Case) -> str:
        """SAELens's name of what the arm trains."""
        return f"{case.architecture}_sparse" if self.sparse else case.architecture


STOCK = Arm("stock")
STOCK_TF32 = Arm("stock_tf32", precisions=("float32",), matmul_precision="high")
STOCK_COMPILE = Arm("stock_compile", precisions=("autocast",), prepare=compile_sae)
SPARSE = Arm("sparse", sparse=True)
SPARSE_RUNNER = Arm("sparse_runner", sparse=True, own_trainer=True)


@dataclass(frozen=True)
class Target:
    """Ratios against stock: at least this much faster, at most this share of its memory."""

    speedup: float
    memory: float | None = None


# By case, precision and operation.
TARGETS = {
    ("gemma2b", "float32", "step"): Target(12.0, 0.6),
    ("gemma2b", "autocast", "step"): Target(2.7, 0.6),
    ("gemma2b_dead30", "autocast", "step"): Target(3.0),
    ("gpt2", "float32", "step"): Target(6.0),
    ("gpt2", "autocast", "step"): Target(1.8),
    ("llama8b", "autocast", "step"): Target(3.0, 0.6),
    ("wide", "autocast", "step"): Target(3.0, 0.6),
    ("cpu", "float32", "step"): Target(2.5),
    ("jumprelu_l0_64", "float32", "step"): Target(12.0, 0.6),
    ("jumprelu_l0_64", "autocast", "step"): Target(2.8, 0.6),
    ("jumprelu_l0_200", "float32", "step"): Target(10.0, 1.0),
    ("jumprelu_l0_200", "autocast", "step"): Target(2.3, 1.0),
    ("jumprelu_l0_1000", "float32", "step"): Target(4.0, 1.0),
    ("jumprelu_l0_1000", "autocast", "step"): Target(1.3, 1.0),
    ("jumprelu_l0_3000", "float32", "step"): Target(1.5, 1.0),
    ("jumprelu_l0_3000", "autocast", "step"): Target(1.1, 1.0),
    ("cpu_jumprelu", "float32", "step"): Target(2.5),
    ("jumprelu_768_64k", "float32", "forward"): Target(4.5),
    ("flash_sae", "bfloat16", "decode"): Target(13.6),
    ("flash_sae", "bfloat16", "forward"): Target(1.78),
    **{
        (case, "float32", "forward_backward"): Target(4.0)
        for case in FORWARD_CASES
        if case.startswith("seed1")
    },
}
