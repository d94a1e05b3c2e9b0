"""What is measured: problem sizes by name, and names that stand for several of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from saelens_sparse.profile.cases import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Case,
)

REFERENCE_PRECISION = {"float32": FLOAT64, "autocast": FLOAT32, "bfloat16": FLOAT32}
"""In which stock serves as the reference for each measured precision."""

BOTH = (FLOAT32, AUTOCAST)
TOPK, BATCHTOPK, JUMPRELU = "topk_sparse", "batchtopk_sparse", "jumprelu_sparse"
# Its levels have a 32nd, an eighth, half and all of the latents.
MATRYOSHKA = "matryoshka_batchtopk_sparse"
FORWARD, STEP_AND_FORWARD = ("forward",), ("step", "forward")


@dataclass(frozen=True)
class NamedCase(Case):
    """
    A case of the registry.

    Attributes:
        benchmarks: in which it can be asked for.
        check_rows: rows of each batch in the steps that compare contenders; None for all of them.
        sweep: name of the series that the case is a point of, and under which it can be asked for.
    """

    benchmarks: tuple[str, ...] = ("step",)
    check_rows: int | None = None
    sweep: str | None = None


def _sweep(name: str, point: NamedCase, **sizes: Iterable[int]) -> Iterable[NamedCase]:
    """One field of a case varied, the others as they are."""
    for field, values in sizes.items():
        for value in values:
            is_long = value >= 2048 and field != "sparsity"
            text = f"{value // 1024}k" if is_long else str(value)
            yield replace(point, name=f"{name}_{text}", sweep=name, **{field: value})


GEMMA = NamedCase("gemma2b", TOPK, 2304, 65_536, 64, 4096, BOTH)
AUTOCAST_GEMMA = replace(GEMMA, precisions=(AUTOCAST,))
BATCH = replace(GEMMA, name="batchtopk", architecture=BATCHTOPK)
AUTOCAST_BATCH = replace(BATCH, precisions=(AUTOCAST,))
CPU = NamedCase("", TOPK, 256, 4096, 16, 256, (FLOAT32,))
QUICK = NamedCase("quick_topk", TOPK, 256, 8192, 32, 256, (FLOAT32,), benchmarks=STEP_AND_FORWARD)
TINY = NamedCase(
    "tiny", TOPK, 32, 256, 4, 64, (FLOAT32,), dead_fraction=0.3, benchmarks=STEP_AND_FORWARD
)
L0S = (32, 64, 128, 256, 512, 1024, 2048, 3000)

CASES: dict[str, NamedCase] = {
    case.name: case
    for case in (
        GEMMA,
        replace(AUTOCAST_GEMMA, name="gemma2b_dead30", dead_fraction=0.3),
        NamedCase("gpt2", TOPK, 768, 24_576, 32, 4096, BOTH),
        NamedCase("llama8b", TOPK, 4096, 131_072, 64, 4096, (AUTOCAST,)),
        replace(AUTOCAST_GEMMA, name="wide", d_sae=262_144),
        # Stock runs out of memory on full batches here, not on the few rows it is compared on.
        replace(AUTOCAST_GEMMA, name="million", d_sae=1_048_576, check_rows=256),
        NamedCase("seed1", TOPK, 2048, 16_384, 128, 4096, (FLOAT32,)),
        NamedCase(
            "flash_sae", TOPK, 4096, 65_536, 64, 1024, (BFLOAT16,), benchmarks=STEP_AND_FORWARD
        ),
        BATCH,
        replace(AUTOCAST_BATCH, name="batchtopk_dead30", dead_fraction=0.3),
        replace(AUTOCAST_BATCH, name="batchtopk_wide", d_sae=262_144),
        replace(AUTOCAST_BATCH, name="batchtopk_million", d_sae=1_048_576, check_rows=256),
        replace(BATCH, name="matryoshka", architecture=MATRYOSHKA),
        NamedCase("batchtopk_gpt2", BATCHTOPK, 768, 24_576, 32, 4096, BOTH),
        *(
            replace(GEMMA, name=f"jumprelu_l0_{l0}", architecture=JUMPRELU, sparsity=l0)
            for l0 in (64, 200, 1000, 3000)
        ),
        *(
            NamedCase(
                f"seed1_{n}k", TOPK, 4096, 1024 * n, 128, 4096, (FLOAT32,), benchmarks=FORWARD
            )
            for n in (16, 32, 64, 128)
        ),
        NamedCase(
            "jumprelu_768_64k", JUMPRELU, 768, 65_536, 64, 4096, (FLOAT32,), benchmarks=FORWARD
        ),
        NamedCase("cpu", TOPK, 512, 16_384, 32, 1024, (FLOAT32,)),
        NamedCase("cpu_batchtopk", BATCHTOPK, 512, 16_384, 32, 1024, (FLOAT32,)),
        NamedCase("cpu_matryoshka", MATRYOSHKA, 512, 16_384, 32, 1024, (FLOAT32,)),
        NamedCase("cpu_jumprelu", JUMPRELU, 512, 16_384, 32, 1024, (FLOAT32,)),
        QUICK,
        replace(QUICK, name="quick_batchtopk", architecture=BATCHTOPK),
        replace(QUICK, name="quick_jumprelu", architecture=JUMPRELU),
        TINY,
        replace(TINY, name="tiny_batchtopk", architecture=BATCHTOPK),
        replace(TINY, name="tiny_matryoshka", architecture=MATRYOSHKA),
        replace(
            TINY, name="tiny_jumprelu", architecture=JUMPRELU,
            options={"pre_act_loss_coefficient": 3e-6},
        ),
        *_sweep("sweep_d_sae", AUTOCAST_GEMMA, d_sae=[8192 << i for i in range(6)]),
        *_sweep("sweep_k", AUTOCAST_GEMMA, sparsity=[16 << i for i in range(7)]),
        *_sweep("sweep_batch", AUTOCAST_GEMMA, batch=[512 << i for i in range(6)]),
        *_sweep("sweep_l0", replace(AUTOCAST_GEMMA, architecture=JUMPRELU), sparsity=L0S),
        *_sweep("cpu_sweep_d_sae", CPU, d_sae=[512 << i for i in range(6)]),
        *_sweep(
            "cpu_sweep_l0", replace(CPU, architecture=JUMPRELU), sparsity=(8, 32, 128, 512, 1024)
        ),
    )
}  # fmt: skip


def groups_of(benchmark: str) -> dict[str, tuple[str, ...]]:
    """Names that stand for several cases of a benchmark: "cuda" and "cpu" for those by default."""
    cases = [case for case in CASES.values() if benchmark in case.benchmarks]
    single = [case.name for case in cases if case.sweep is None]
    groups: dict[str, tuple[str, ...]] = {
        "cuda": tuple(n for n in single if not n.startswith(("cpu", "quick", "tiny"))),
        "quick": ("quick_topk", "quick_batchtopk", "quick_jumprelu"),
    }
    on_cpu = ("cpu", "cpu_batchtopk", "cpu_matryoshka", "cpu_jumprelu")
    groups["cpu"] = on_cpu if benchmark == "step" else groups["quick"]
    for case in cases:
        if case.sweep is not None:
            every = "cpu_sweeps" if case.sweep.startswith("cpu") else "sweeps"
            for group in (case.sweep, every):
                groups[group] = (*groups.get(group, ()), case.name)
    return groups
