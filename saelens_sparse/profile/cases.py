"""What is measured: problem sizes, precisions and arms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
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


SPARSE_SUFFIX = "_sparse"
"""What names of sparse architectures end in, after that of their stock counterpart."""
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
    sweep: str | None = None
    """Name of the series that the case is a point of, and under which it can be asked for."""

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
    sweep: str | None = None,
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
        sweep=sweep,
        options={"l0_coefficient": L0_COEFFICIENT, **options},
    )


def _by_name(*cases: Case) -> dict[str, Case]:
    return {case.name: case for case in cases}


def _thousands(number: int) -> str:
    return f"{number // 1024}k" if number >= 2048 else str(number)


def _sweep_cases() -> Iterable[Case]:
    """One size varied at a time, the others as in "gemma2b"; and the like for a CPU."""
    sizes = {
        "sweep_d_sae": [8192 << i for i in range(6)],
        "sweep_k": [16 << i for i in range(7)],
        "sweep_batch": [512 << i for i in range(6)],
        "sweep_l0": [32, 64, 128, 256, 512, 1024, 2048, 3000],
    }
    for d_sae in sizes["sweep_d_sae"]:
        yield _sweep_case("sweep_d_sae", d_sae, d_sae=d_sae)
    for k in sizes["sweep_k"]:
        yield _sweep_case("sweep_k", k, k=k)
    for batch in sizes["sweep_batch"]:
        yield _sweep_case("sweep_batch", batch, batch=batch)
    for l0 in sizes["sweep_l0"]:
        yield _jumprelu(
            f"sweep_l0_{l0}", 2304, 65_536, l0, 4096, (AUTOCAST,), sweep="sweep_l0"
        )  # fmt: skip
    for d_sae in (512 << i for i in range(6)):
        name = f"cpu_sweep_d_sae_{_thousands(d_sae)}"
        yield Case(name, 256, d_sae, 16, 256, (FLOAT32,), sweep="cpu_sweep_d_sae")
    for l0 in (8, 32, 128, 512, 1024):
        yield _jumprelu(
            f"cpu_sweep_l0_{l0}", 256, 4096, l0, 256, (FLOAT32,), sweep="cpu_sweep_l0"
        )  # fmt: skip


def _sweep_case(
    sweep: str, value: int, d_sae: int = 65_536, k: int = 64, batch: int = 4096
) -> Case:
    name = f"{sweep}_{_thousands(value)}"
    return Case(name, 2304, d_sae, k, batch, (AUTOCAST,), sweep=sweep)


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
    *(
        _jumprelu(f"jumprelu_l0_{l0}", 2304, 65_536, l0, 4096, (FLOAT32, AUTOCAST))
        for l0 in (64, 200, 1000, 3000)
    ),
    Case("cpu", 512, 16_384, 32, 1024, (FLOAT32,)),
    _jumprelu("cpu_jumprelu", 512, 16_384, 32, 1024, (FLOAT32,)),
    Case("quick_topk", 256, 8192, 32, 256, (FLOAT32,)),
    _jumprelu("quick_jumprelu", 256, 8192, 32, 256, (FLOAT32,)),
    Case("tiny", 32, 256, 4, 64, (FLOAT32,), dead_fraction=0.3),
    _jumprelu("tiny_jumprelu", 32, 256, 4, 64, (FLOAT32,), 0.3, pre_act_loss_coefficient=3e-6),
    *_sweep_cases(),
)

FORWARD_CASES = _by_name(
    Case("flash_sae", 4096, 65_536, 64, 1024, (BFLOAT16,)),
    *(
        Case(f"seed1_{d_sae // 1024}k", 4096, d_sae, 128, 4096, (FLOAT32,))
        for d_sae in (16_384, 32_768, 65_536, 131_072)
    ),
    _jumprelu("jumprelu_768_64k", 768, 65_536, 64, 4096, (FLOAT32,)),
    Case("quick_topk", 256, 8192, 32, 256, (FLOAT32,)),
    _jumprelu("quick_jumprelu", 256, 8192, 32, 256, (FLOAT32,)),
    Case("tiny", 32, 256, 4, 64, (FLOAT32,)),
    _jumprelu("tiny_jumprelu", 32, 256, 4, 64, (FLOAT32,)),
)


def _groups(cases: Mapping[str, Case], cpu: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Names that stand for several cases, "cuda" and "cpu" for the default ones of the device."""
    single = [case.name for case in cases.values() if case.sweep is None]
    groups = {"cuda": tuple(n for n in single if not n.startswith(("cpu", "quick", "tiny")))}
    groups |= {"cpu": cpu, "quick": ("quick_topk", "quick_jumprelu")}
    sweeps = dict.fromkeys(case.sweep for case in cases.values() if case.sweep is not None)
    for sweep in sweeps:
        groups[sweep] = tuple(case.name for case in cases.values() if case.sweep == sweep)
    for prefix in ("sweep", "cpu_sweep"):
        if members := [names for sweep, names in groups.items() if sweep.startswith(f"{prefix}_")]:
            groups[f"{prefix}s"] = tuple(chain.from_iterable(members))
    return groups


STEP_GROUPS = _groups(STEP_CASES, cpu=("cpu", "cpu_jumprelu"))
FORWARD_GROUPS = _groups(FORWARD_CASES, cpu=("quick_topk", "quick_jumprelu"))


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
    peer: str | None = None
    """Distribution of another library that does the whole of it; None for SAELens's and ours."""

    def architecture(self, case: Case) -> str:
        """SAELens's name of what the arm trains."""
        return case.architecture + (SPARSE_SUFFIX if self.sparse else "")

    def takes(self, case: Case, precision: Precision) -> bool:
        """Whether the arm means something for the case in this precision; peers are Top-K only."""
        return precision.name in self.precisions and (
            self.peer is None or case.architecture == "topk"
        )


STOCK = Arm("stock")
STOCK_TF32 = Arm("stock_tf32", precisions=("float32",), matmul_precision="high")
STOCK_COMPILE = Arm("stock_compile", precisions=("autocast",), prepare=compile_sae)
SPARSE = Arm("sparse", sparse=True)
SPARSE_RUNNER = Arm("sparse_runner", sparse=True, own_trainer=True)
SPARSIFY = Arm("sparsify", peer="eai-sparsify")
DICTIONARY_LEARNING = Arm("dictionary_learning", peer="dictionary-learning")
