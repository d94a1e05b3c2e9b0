"""The ratios aimed at."""

from __future__ import annotations

from dataclasses import dataclass

from saelens_sparse.evaluation.cases import (
    FORWARD_CASES,
    SPARSE,
    SPARSE_RUNNER,
    STOCK,
    STOCK_COMPILE,
    Arm,
)


@dataclass(frozen=True)
class Target:
    """At least this much faster, with at most this share of the memory."""

    speedup: float
    memory: float | None = None


def target_of(case: str, precision: str, operation: str, arm: str, against: str) -> Target | None:
    """What is aimed at for the arm against another, by their names; None where nothing is."""
    return _TARGETS.get((case, precision, operation, arm, against))


def _key(
    case: str, precision: str, operation: str = "step", arm: Arm = SPARSE, against: Arm = STOCK
) -> tuple[str, str, str, str, str]:
    return case, precision, operation, arm.name, against.name


_TARGETS = {
    _key("gemma2b", "float32"): Target(19.0, 0.6),
    _key("gemma2b", "autocast"): Target(3.9, 0.6),
    _key("gemma2b_dead30", "autocast"): Target(3.0),
    _key("gpt2", "float32"): Target(6.0),
    _key("gpt2", "autocast"): Target(1.8),
    _key("llama8b", "autocast"): Target(3.0, 0.6),
    _key("wide", "autocast"): Target(3.0, 0.6),
    _key("cpu", "float32"): Target(2.5),
    _key("jumprelu_l0_64", "float32"): Target(12.0, 0.6),
    _key("jumprelu_l0_64", "autocast"): Target(2.8, 0.6),
    _key("jumprelu_l0_200", "float32"): Target(10.0, 1.0),
    _key("jumprelu_l0_200", "autocast"): Target(2.3, 1.0),
    _key("jumprelu_l0_1000", "float32"): Target(4.0, 1.0),
    _key("jumprelu_l0_1000", "autocast"): Target(1.3, 1.0),
    _key("jumprelu_l0_3000", "float32"): Target(1.5, 1.0),
    _key("jumprelu_l0_3000", "autocast"): Target(1.1, 1.0),
    _key("cpu_jumprelu", "float32"): Target(2.5),
    _key("gemma2b", "float32", arm=SPARSE_RUNNER): Target(25.0),
    _key("gemma2b", "autocast", arm=SPARSE_RUNNER): Target(5.0),
    _key("gemma2b", "autocast", arm=SPARSE_RUNNER, against=STOCK_COMPILE): Target(3.7),
    _key("llama8b", "autocast", arm=SPARSE_RUNNER): Target(5.0, 0.45),
    _key("wide", "autocast", arm=SPARSE_RUNNER): Target(5.0, 0.45),
    _key("gpt2", "float32", arm=SPARSE_RUNNER): Target(12.0),
    _key("gpt2", "autocast", arm=SPARSE_RUNNER): Target(4.0),
    _key("jumprelu_l0_64", "float32", arm=SPARSE_RUNNER): Target(25.0),
    _key("jumprelu_l0_64", "autocast", arm=SPARSE_RUNNER): Target(5.0),
    _key("cpu", "float32", arm=SPARSE_RUNNER): Target(5.0),
    _key("jumprelu_768_64k", "float32", "forward"): Target(4.5),
    _key("flash_sae", "bfloat16", "decode"): Target(13.6),
    _key("flash_sae", "bfloat16", "forward"): Target(1.78),
    **{
        _key(case, "float32", "forward_backward"): Target(4.0)
        for case in FORWARD_CASES
        if case.startswith("seed1")
    },
}
