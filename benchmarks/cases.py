"""What is measured: problem sizes, precisions, arms and the ratios aimed at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

# The precision in which stock `topk` serves as the reference for each measured one.
REFERENCE_PRECISION = {"float32": FLOAT64, "autocast": FLOAT32, "bfloat16": FLOAT32}


@dataclass(frozen=True)
class Case:
    """A problem size, with the precisions it is measured in unless others are asked for."""

    name: str
    d_in: int
    d_sae: int
    k: int
    batch: int
    precisions: tuple[Precision, ...]
    dead_fraction: float = 0.0
    check_rows: int | None = None
    """Rows of each batch in the steps that compare the arms; None for all of them."""

    @property
    def shape(self) -> str:
        return f"{self.d_in} -> {self.d_sae:,}, k {self.k}, batch {self.batch}"


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
)
DEFAULT_STEP_CASES = {
    "cuda": tuple(name for name in STEP_CASES if name not in ("cpu", "tiny")),
    "cpu": ("cpu",),
}

FORWARD_CASES = _by_name(
    Case("flash_sae", 4096, 65_536, 64, 1024, (BFLOAT16,)),
    *(
        Case(f"seed1_{d_sae // 1024}k", 4096, d_sae, 128, 4096, (FLOAT32,))
        for d_sae in (16_384, 32_768, 65_536, 131_072)
    ),
    Case("tiny", 32, 256, 4, 64, (FLOAT32,)),
)
DEFAULT_FORWARD_CASES = {
    "cuda": tuple(name for name in FORWARD_CASES if name != "tiny"),
    "cpu": ("tiny",),
}


def compile_sae(sae: TrainingSAE[Any]) -> None:
    """Compile as SAELens's runner does when `compile_sae` is set."""
    sae.training_forward_pass = torch.compile(  # pyright: ignore[reportAttributeAccessIssue]
        sae.training_forward_pass, mode=None, backend="inductor"
    )


@dataclass(frozen=True)
class Arm:
    """One contender: a SAELens training architecture and how it is run."""

    name: str
    architecture: str
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    """Names of the precisions in which the arm means something."""
    matmul_precision: str = "highest"
    """Passed to `torch.set_float32_matmul_precision`; "high" allows TF32."""
    prepare: Callable[[TrainingSAE[Any]], None] | None = None
    """Applied to the SAE once its trainer exists, where the runner compiles it."""


STOCK = Arm("stock", "topk")
STOCK_TF32 = Arm("stock_tf32", "topk", precisions=("float32",), matmul_precision="high")
STOCK_COMPILE = Arm("stock_compile", "topk", precisions=("autocast",), prepare=compile_sae)
SPARSE = Arm("sparse", "topk_sparse")


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
    ("flash_sae", "bfloat16", "decode"): Target(13.6),
    ("flash_sae", "bfloat16", "forward"): Target(1.78),
    **{
        (case, "float32", "forward_backward"): Target(4.0)
        for case in FORWARD_CASES
        if case.startswith("seed1")
    },
}
