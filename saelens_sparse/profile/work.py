"""How many bytes an operation of PyTorch asks for, and its floating point operations."""

from __future__ import annotations

import ast
import json
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_DTYPES = {
    "double": torch.float64, "float": torch.float32, "c10::Half": torch.float16,
    "c10::BFloat16": torch.bfloat16, "c10::Float8_e4m3fn": torch.float8_e4m3fn,
    "long int": torch.int64, "long": torch.int64, "int": torch.int32, "signed char": torch.int8,
    "unsigned char": torch.uint8, "bool": torch.bool,
}  # fmt: skip
_WRITE_ONLY = ("aten::copy_", "aten::fill_", "aten::zero_", "aten::_foreach_copy_")


@cache
def operation_work(name: str, arguments: str) -> tuple[float, float] | None:
    """
    Bytes of all inputs and outputs, each counted once, and flops; None if they are not known.

    Outputs are those that the operation gives on PyTorch's meta device. Caches may serve part of
    the bytes. Operations without products count one flop for each element of the largest tensor.

    Args:
        name: such as "aten::mm".
        arguments: JSON of `Input Dims`, `Input type` and `Concrete Inputs` of a trace. Types of
            lists are not in it: their tensors are taken to be float32.
    """
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    given = [_argument(*parts) for parts in zip(*json.loads(arguments), strict=True)]
    if packet is None or not _tensors(given):
        return None
    schema = getattr(packet, packet.overloads()[0])._schema
    pairs = zip(schema.arguments, given, strict=False)
    # A fused Adam writes gradients only where it scales them.
    written = [v for a, v in pairs if a.alias_info and a.alias_info.is_write and a.name != "grads"]
    n_own = len(schema.arguments)
    buffers = _tensors(given[n_own:])  # of an overload that writes to them
    if buffers:
        given, written = given[:n_own], buffers
    if not written and any(result.alias_info for result in schema.returns):
        return None  # a view
    overwrites = name in _WRITE_ONLY
    for n in range(len(given), 0, -1):  # the last ones may be those that are given by name only
        try:
            outputs = written or [packet(*given[:n])]
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue
        moved = [_tensors(v) for v in (given[1:] if overwrites else given[:n]) + outputs]
        flops = 0.0 if overwrites else max(sum(t.numel() for t in part) for part in moved)
        if packet in flop_registry:
            flops = flop_registry[packet](*given[:n], out_val=outputs[0])
        return float(sum(t.nbytes for part in moved for t in part)), float(flops)
    return None


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _argument(dims: Any, kind: str, constant: str = "") -> Any:
    """A tensor on the meta device, a list of them, or a constant."""
    if kind in _DTYPES:
        return torch.empty(dims, dtype=_DTYPES[kind], device="meta")
    if kind == "TensorList":
        return [torch.empty(shape, device="meta") for shape in dims]
    try:
        return ast.literal_eval(constant) if constant else None
    except (SyntaxError, ValueError):
        return constant
