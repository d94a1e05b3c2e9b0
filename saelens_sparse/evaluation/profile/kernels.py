"""Names of kernels: how they are shortened, and what is known of each by its name alone."""

from __future__ import annotations

import re
from dataclasses import dataclass

# PyTorch's and cuBLAS's names of matrix products.
_GEMM = re.compile(r"gemm|nvjet|cutlass.*(tensorop|simt)|xmma|gemv|splitK", re.IGNORECASE)
_TENSOR_CORE_GEMM = re.compile(
    r"nvjet_(?!s)|tensorop|16816|1688|hmma|wgmma|tf32|f16", re.IGNORECASE
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

# This package's kernels, where the name says it all. The sums over a latent's pairs serve every
# weight: see `WEIGHT_SUMS`.
PLACES = {
    "_round_rows_kernel": Place("encode"),
    "_latent_terms_kernel": Place("encode"),
    "_row_squares_kernel": Place("encode"),
    "_group_maxima_kernel": Place("select"),
    "_group_terms_kernel": Place("select"),
    "_reaching_groups_kernel": Place("select"),
    "_candidates_kernel": Place("select"),
    "_refine_kernel": Place("select"),
    "_rescore_kernel": Place("select"),
    "_select_kernel": Place("select"),
    "_mark_kernel": Place("select"),
    "_count_marks_kernel": Place("select"),
    "_list_marks_kernel": Place("select"),
    "_resolve_kernel": Place("select"),
    "_pair_gate_kernel": Place("select"),
    "_dense_gate_kernel": Place("select"),
    "_gather_sum_kernel": Place("decode"),
    "_topk_values_kernel": Place("loss"),
    "_gather_dot_kernel": Place("backward", ACTIVATIONS),
    "_pair_gate_gradients_kernel": Place("backward", ACTIVATIONS),
    "_dense_gate_gradients_kernel": Place("backward", ACTIVATIONS),
    "_segment_totals_kernel": Place("backward", "threshold"),
    "_row_combination_kernel": Place("backward", "b_dec"),
    "_square_sums_kernel": Place("clip"),
    "_adam_kernel": Place("optimizer"),
    "_update_kernel": Place("optimizer"),
}
WEIGHT_SUMS = ("_partial_sums_kernel", "_segment_sum_kernel", "_add_rows_kernel")


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


def is_own(name: str) -> bool:
    """Whether it is a kernel of this package, of those that are known here."""
    return name in PLACES or name in WEIGHT_SUMS


def is_gemm(name: str) -> bool:
    """Whether a kernel of this name multiplies matrices."""
    return _GEMM.search(name) is not None


def is_tensor_core_gemm(name: str) -> bool:
    """Whether it does so on tensor cores, as far as its name tells."""
    return is_gemm(name) and _TENSOR_CORE_GEMM.search(name) is not None


def is_sort(name: str) -> bool:
    """Whether a kernel or an operation of this name sorts, or searches in what is sorted."""
    return _SORT.search(name) is not None
