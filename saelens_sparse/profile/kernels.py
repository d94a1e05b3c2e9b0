"""Kernels by their names: how these are shortened, and what is known of each by its name alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from saelens_sparse.profile.work import ADAM_FLOPS, ADAM_PASSES, Problem, Work

# PyTorch's and cuBLAS's names of matrix products.
_GEMM = re.compile(r"gemm|nvjet|cutlass.*(tensorop|simt)|xmma|gemv|splitK", re.IGNORECASE)
_TENSOR_CORE_GEMM = re.compile(
    r"nvjet_(?:sm\d+_)?(?!s)|tensorop|16816|1688|hmma|wgmma|tf32|f16", re.IGNORECASE
)
_SORT = re.compile(r"sort|searchsorted|topk", re.IGNORECASE)
_NOT_IN_NAME = re.compile(r"^\s*(void|static|inline)\s+")


@dataclass(frozen=True)
class Place:
    """
    Where in a step something belongs.

    Attributes:
        phase: one of `phases.PHASES`.
        part: of the backward phase, what the gradient is of; else empty.
    """

    phase: str
    part: str = ""


ACTIVATIONS, OTHER = "activations", "other"
WEIGHT = "a weight"
"""The part of kernels that serve both weights: what surrounds them tells which."""


@dataclass(frozen=True)
class OwnKernel:
    """
    What is known of a kernel of this package by its name.

    Attributes:
        place: where in the step it belongs.
        work: that of a step, from the number of launches in it; None if it depends on the data.
    """

    place: Place
    work: Callable[[Problem, float], Work] | None = None


def _gather(p: Problem) -> Work:
    return _pairs(p, p.pairs) + Work(p.n_rows * p.d_in * p.weight_bytes)


def _pairs(p: Problem, pairs: float) -> Work:
    """A row of a matrix, a coefficient and a latent for each pair."""
    row = p.d_in * p.weight_bytes
    return Work(pairs * (row + 12), 2.0 * pairs * p.d_in, at_least=not p.selected)


def _partial_sums(p: Problem) -> Work:
    return _pairs(p, p.long_pairs)


def _segment_sum(p: Problem) -> Work:
    written = float(p.d_sae) * p.d_in * p.weight_bytes
    return _pairs(p, p.pairs - p.long_pairs) + Work(written)


def _square_sums(p: Problem) -> Work:
    return _pairs(p, p.pairs - p.long_pairs) + Work(0.0, 2.0 * p.d_sae * p.d_in)


def _update(p: Problem) -> Work:
    elements = float(p.d_sae) * p.d_in
    updated = Work(6.0 * elements * p.weight_bytes, ADAM_FLOPS * elements)
    # One of the two weights is written in low precision too.
    return updated + _pairs(p, p.pairs - p.long_pairs) + Work(elements)


def _add_rows(p: Problem) -> Work:
    elements = float(p.n_dead) * p.d_in
    return Work(3.0 * elements * p.weight_bytes, elements)


def _dead_values(p: Problem) -> Work:
    elements = float(p.n_rows) * p.n_dead
    return Work(elements * (2 * (2 if p.exact else 4) + 1), 2.0 * elements)


def _dense_passes(tensors: int) -> Callable[[Problem], Work]:
    def work(p: Problem) -> Work:
        elements = float(p.n_rows) * p.d_sae
        return Work(tensors * elements * (2 if p.exact else 4), 4.0 * elements)

    return work


# What works on chunks of the batch is launched for each; together they are the whole of it.
def _round_rows(p: Problem, launches: float) -> Work:
    rows = p.n_rows + (p.d_sae if launches > 1 else 0)
    return Work(6.0 * rows * p.d_in, 6.0 * rows * p.d_in)


def _read_screen(p: Problem, _: float) -> Work:
    elements = float(p.n_rows) * p.d_sae
    return Work(2.0 * elements, (2.0 if p.exact else 8.0) * elements)


def _read_marks(p: Problem, _: float) -> Work:
    return Work(p.n_rows * p.d_sae / 8)


def _rescore(p: Problem, _: float) -> Work:
    return Work(p.pairs * p.d_in * p.weight_bytes, 2.0 * p.pairs * p.d_in, at_least=True)


def _adam(p: Problem, launches: float) -> Work:
    """One launch for each parameter, of which the two weights may be updated elsewhere."""
    weights = 2 * p.d_sae * p.d_in
    elements = p.n_parameters if launches > 3 else p.n_parameters - weights
    return Work(float(ADAM_PASSES * p.weight_bytes * elements), float(ADAM_FLOPS * elements))


def _each(work: Callable[[Problem], Work]) -> Callable[[Problem, float], Work]:
    """The work of a step from that of one launch."""
    return lambda problem, launches: launches * work(problem)


_ENCODE, _SELECT = Place("encode"), Place("select")
_ACTIVATIONS, _WEIGHT = Place("backward", ACTIVATIONS), Place("backward", WEIGHT)

OWN_KERNELS = {
    "_round_rows_kernel": OwnKernel(_ENCODE, _round_rows),
    "_latent_terms_kernel": OwnKernel(_ENCODE),
    "_row_squares_kernel": OwnKernel(_ENCODE),
    "_group_maxima_kernel": OwnKernel(_SELECT, _read_screen),
    "_group_terms_kernel": OwnKernel(_SELECT),
    "_reaching_groups_kernel": OwnKernel(_SELECT),
    "_candidates_kernel": OwnKernel(_SELECT),
    "_refine_kernel": OwnKernel(_SELECT),
    "_rescore_kernel": OwnKernel(_SELECT, _rescore),
    "_select_kernel": OwnKernel(_SELECT),
    "_mark_kernel": OwnKernel(_SELECT, _read_screen),
    "_count_marks_kernel": OwnKernel(_SELECT, _read_marks),
    "_list_marks_kernel": OwnKernel(_SELECT, _read_marks),
    "_resolve_kernel": OwnKernel(_SELECT),
    "_pair_gate_kernel": OwnKernel(_SELECT),
    "_dense_gate_kernel": OwnKernel(_SELECT, _each(_dense_passes(2))),
    "_gather_sum_kernel": OwnKernel(Place("decode"), _each(_gather)),
    "_topk_values_kernel": OwnKernel(Place("loss"), _each(_dead_values)),
    "_gather_dot_kernel": OwnKernel(_ACTIVATIONS, _each(_gather)),
    "_pair_gate_gradients_kernel": OwnKernel(_ACTIVATIONS),
    "_dense_gate_gradients_kernel": OwnKernel(_ACTIVATIONS, _each(_dense_passes(3))),
    "_segment_totals_kernel": OwnKernel(Place("backward", "threshold")),
    "_row_combination_kernel": OwnKernel(Place("backward", "b_dec")),
    "_partial_sums_kernel": OwnKernel(_WEIGHT, _each(_partial_sums)),
    "_segment_sum_kernel": OwnKernel(_WEIGHT, _each(_segment_sum)),
    "_add_rows_kernel": OwnKernel(_WEIGHT, _each(_add_rows)),
    "_square_sums_kernel": OwnKernel(Place("clip"), _each(_square_sums)),
    "_adam_kernel": OwnKernel(Place("optimizer"), _adam),
    "_update_kernel": OwnKernel(Place("optimizer"), _each(_update)),
}


def kernel_work(name: str, problem: Problem, launches: float) -> Work | None:
    """
    The work of one of this package's kernels in a step; None if not known.

    Args:
        name: of the kernel.
        problem: that it works on.
        launches: how often it is launched in a step.
    """
    own = OWN_KERNELS.get(name)
    return None if own is None or own.work is None else own.work(problem, launches)


def base_name(name: str) -> str:
    """
    A kernel's own name, without namespaces, template arguments and parameters.

    `void at::native::reduce_kernel<512, 1, at::native::ReduceOp<...> >(...)` is `reduce_kernel`.
    """
    name = _NOT_IN_NAME.sub("", name.replace("(anonymous namespace)::", ""))
    kept: list[str] = []
    depth = 0
    for character in name:
        if character in "<([":
            depth += 1
        elif character in ">)]":
            depth -= 1
        elif depth == 0:
            kept.append(character)
        if character == "(" and depth == 1:
            break
    return "".join(kept).strip().split("::")[-1].strip() or name


def is_gemm(name: str) -> bool:
    """Whether a kernel of this name multiplies matrices."""
    return _GEMM.search(name) is not None


def is_tensor_core_gemm(name: str) -> bool:
    """Whether it does so on tensor cores, as far as its name tells."""
    return is_gemm(name) and _TENSOR_CORE_GEMM.search(name) is not None


def is_sort(name: str) -> bool:
    """Whether a kernel or an operation of this name sorts, or searches in what is sorted."""
    return _SORT.search(name) is not None
