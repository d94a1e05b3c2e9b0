"""In which precision products run."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from saelens_sparse.ops.common.backend import Backend

ScreenDtype = Literal["auto", "float8"]
SCREEN_DTYPES: tuple[ScreenDtype, ...] = get_args(ScreenDtype)
FLOAT8 = torch.float8_e4m3fn
"""4 significant bits, up to 448: of the formats of a byte the one with more bits."""
FLOAT8_MULTIPLE = 16
"""What the sizes of a float8 product's matrices must be multiples of."""


def matmul_dtype(operand: torch.Tensor) -> torch.dtype:
    """The dtype in which a product with this operand runs: autocast's, which spares float64."""
    device = operand.device.type
    if operand.dtype == torch.float64 or operand.is_meta or not torch.is_autocast_enabled(device):
        return operand.dtype
    return torch.get_autocast_dtype(device)


def summed_dtype(operand: torch.Tensor, backend: Backend) -> torch.dtype:
    """The dtype in which kernels read the rows that a weight's gradient sums: bfloat16 under its
    autocast, in which stock multiplies them.
    """
    dtype = matmul_dtype(operand)
    return dtype if backend == "triton" and dtype == torch.bfloat16 else operand.dtype


def matmul(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`a @ b`, outside autocast and with a result in `dtype`, unrounded where cuBLAS can."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == dtype:
            return a @ b
        if a.is_cuda and dtype == torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32)
        return (a @ b).to(dtype)
