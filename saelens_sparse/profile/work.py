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
    "c10::BFloat16": torch.bfloat16, "long int": torch.int64, "long": torch.int64,
    "int": torch.int32, "signed char": torch.int8, "unsigned char": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
_WRITE_ONLY = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")


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
    for overload in packet.overloads() if packet else ():
        operation = getattr(packet, overload)
        expected = operation._schema.arguments
        if len(expected) != len(given):
            continue
        of = dict(zip((argument.name for argument in expected), given, strict=True))
        written = [a.name for a in expected if a.alias_info and a.alias_info.is_write]
        is_view = any(a.alias_info for a in operation._schema.returns) and not written
        try:
            output = None if written or is_view else operation(**of)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue
        # A fused Adam writes gradients only where it scales them.
        outputs = [output, *(of[n] for n in written if n != "grads")]
        outs = [a.name for a in expected if a.is_out]
        overwritten = written if operation._schema.name.split("::")[-1] in _WRITE_ONLY else outs
        moved = [_tensors(part) for n, part in of.items() if n not in overwritten]
        moved.append(_tensors(outputs))
        if is_view or not any(moved):
            return None
        flops = float(max(sum(tensor.numel() for tensor in part) for part in moved))
        if packet in flop_registry:
            factors = [of[a.name] for a in expected if not a.kwarg_only]
            flops = float(flop_registry[packet](*factors, out_val=output))
        bytes_ = sum(tensor.nbytes for part in moved for tensor in part)
        return float(bytes_), 0.0 if overwritten is written else flops
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
