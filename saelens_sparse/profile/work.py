"""How many bytes an operation asks for and how many products and sums it computes.

Bytes are those of all inputs and outputs, each counted as often as it is asked for. Caches may
serve part of them, so that this over time can exceed what memory delivers: only hardware counters
tell the two apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from saelens_sparse.profile.trace import HostEvent, flat_shapes

# Sizes of elements by the name of their type in a trace.
_ITEM_BYTES = {
    "double": 8,
    "long int": 8,
    "long": 8,
    "float": 4,
    "int": 4,
    "c10::Half": 2,
    "c10::BFloat16": 2,
    "bool": 1,
    "unsigned char": 1,
    "signed char": 1,
}
_LOW_PRECISION = ("c10::Half", "c10::BFloat16")

_COMPARISONS = {"gt", "lt", "ge", "le", "eq", "ne", "isnan", "logical_and", "logical_not"}
_ELEMENTWISE = _COMPARISONS | {
    "abs", "add", "addcdiv", "addcmul", "bitwise_and", "bitwise_not", "clamp", "clamp_max",
    "clamp_min", "copy", "div", "exp", "lerp", "masked_fill", "maximum", "minimum", "mse_loss",
    "mse_loss_backward", "mul", "neg", "pow", "reciprocal", "relu", "rsqrt", "sqrt", "sub", "tanh",
    "tanh_backward", "threshold_backward", "where",
}  # fmt: skip
_REDUCTIONS = {
    "sum", "mean", "linalg_vector_norm", "norm", "any", "all", "amax", "amin", "max", "min",
    "count_nonzero", "topk",
}  # fmt: skip
_WRITES_ONLY = {"fill", "zero"}
_PRODUCTS = {"mm", "addmm", "bmm", "mv", "addmv", "addmv_"}
# A fused Adam reads a parameter, its gradient and two moments, and writes all but the gradient.
ADAM_PASSES, ADAM_FLOPS = 7, 12


@dataclass(frozen=True)
class Work:
    """
    What is asked of the device.

    Attributes:
        bytes: read and written.
        flops: additions and multiplications.
        at_least: whether there is more, of an amount that depends on the data.
    """

    bytes: float
    flops: float = 0.0
    at_least: bool = False

    def __add__(self, other: Work) -> Work:
        at_least = self.at_least or other.at_least
        return Work(self.bytes + other.bytes, self.flops + other.flops, at_least)

    def __rmul__(self, factor: float) -> Work:
        return Work(factor * self.bytes, factor * self.flops, self.at_least)


@dataclass(frozen=True)
class Problem:
    """
    What the work of this package's kernels follows from.

    Attributes:
        n_rows: rows of a batch.
        d_in: width of a row.
        d_sae: number of latents.
        pairs: active pairs of a batch; of a JumpReLU's more are computed, for its window.
        long_pairs: those of latents with more pairs than are summed in one go.
        selected: whether there are k latents of each row.
        weight_bytes: of an element of a weight.
        exact: whether the encoder's low-precision product is what the caller asks for.
        n_dead: latents held dead.
        n_parameters: elements of all parameters.
    """

    n_rows: int
    d_in: int
    d_sae: int
    pairs: float
    long_pairs: float
    selected: bool
    weight_bytes: int
    exact: bool
    n_dead: int
    n_parameters: int

    @property
    def encoder_flops(self) -> float:
        """Of one dense product of the batch with the encoder."""
        return 2.0 * self.n_rows * self.d_in * self.d_sae

    @property
    def optimizer_bytes(self) -> float:
        """Of reading and writing parameters and two moments once."""
        return 6.0 * self.n_parameters * self.weight_bytes


def operation_work(operation: HostEvent) -> Work | None:
    """The work of a PyTorch operation from the shapes in the trace; None if it is not known."""
    name = operation.name.removeprefix("aten::")
    if name in ("_fused_adam_", "_fused_adamw_"):
        elements = _list_elements(operation, 0)
        return Work(ADAM_PASSES * 4 * elements, ADAM_FLOPS * elements)
    if name.startswith("_foreach_"):
        return _foreach_work(operation, name)
    inputs = _tensors(operation)
    if not inputs:
        return None
    if name in _PRODUCTS and len(inputs) > 1:
        return _product_work(inputs, name)
    in_place, name = name.endswith("_"), name.removesuffix("_")
    read = float(sum(math.prod(shape) * item for shape, item in inputs))
    most = float(max(math.prod(shape) for shape, _ in inputs))
    first = float(math.prod(inputs[0][0]) * inputs[0][1])
    if name in _WRITES_ONLY:
        return Work(first)
    if name == "copy":
        return Work(read)  # of its target nothing is read
    if name in _REDUCTIONS:
        return Work(read, most, at_least=name == "topk")
    if name in _ELEMENTWISE:
        item = 1 if name in _COMPARISONS else max(item for _, item in inputs)
        written = first if in_place else math.prod(_broadcast([s for s, _ in inputs])) * item
        return Work(read + written, most)
    return None


def uses_tensor_cores(operation: HostEvent, allows_tf32: bool) -> bool:
    """Whether a matrix product runs on tensor cores, from the types of its inputs."""
    types = [kind for kind in operation.types if kind in _ITEM_BYTES]
    if not types or operation.name.removeprefix("aten::") not in ("mm", "addmm", "bmm"):
        return False
    return all(kind in _LOW_PRECISION or (kind == "float" and allows_tf32) for kind in types)


def _tensors(operation: HostEvent) -> list[tuple[tuple[int, ...], int]]:
    """Shapes of the input tensors and the bytes of an element."""
    return [
        (tuple(int(size) for size in shape), _ITEM_BYTES[kind])
        for shape, kind in zip(operation.shapes, operation.types, strict=False)
        if kind in _ITEM_BYTES
    ]


def _product_work(inputs: list[tuple[tuple[int, ...], int]], name: str) -> Work:
    # What is added comes first, and where the result goes, if it is given, last.
    (left, item), (right, _) = inputs[1:3] if name.startswith("add") else inputs[:2]
    if name in ("mv", "addmv", "addmv_"):
        return Work(item * (math.prod(left) + right[0] + left[0]), 2.0 * math.prod(left))
    batch = left[0] if name == "bmm" else 1
    rows, inner, columns = left[-2], left[-1], right[-1]
    elements = batch * (rows * inner + inner * columns + rows * columns)
    return Work(float(elements * item), 2.0 * batch * rows * inner * columns)


def _list_elements(operation: HostEvent, index: int) -> float:
    if index >= len(operation.shapes):
        return 0.0
    return float(sum(math.prod(shape) for shape in flat_shapes([operation.shapes[index]])))


def _foreach_work(operation: HostEvent, name: str) -> Work:
    """The trace has no types of lists: parameters are taken to be float32."""
    read = sum(
        _list_elements(operation, index)
        for index, kind in enumerate(operation.types)
        if kind == "TensorList"
    )
    first = _list_elements(operation, 0)
    written = 0.0 if name == "_foreach_norm" else first
    if name in ("_foreach_zero_", "_foreach_copy_"):
        read -= first
    return Work(4.0 * (read + written), first)


def _broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    width = max(len(shape) for shape in shapes)
    padded = [(1,) * (width - len(shape)) + shape for shape in shapes]
    return tuple(max(sizes) for sizes in zip(*padded, strict=True))
