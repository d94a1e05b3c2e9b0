"""What a device can do at most, measured: copying memory and multiplying matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from saelens_sparse.profile.cases import Case
from saelens_sparse.profile.measure import time_calls
from saelens_sparse.profile.trainers import Inputs

COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
SQUARE = {"cuda": 8192, "cpu": 1024}
# A CPU emulates what is not float32.
DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}


def measure_ceilings(case: Case, inputs: Inputs, device: str) -> dict[str, Any]:
    """
    The ceilings for a case, and milliseconds that a step cannot avoid: one encoder product, and
    parameters and two moments read and written once.
    """
    copy_bytes, flops = copy_bandwidth(device), 2.0 * case.batch * case.d_in * case.d_sae
    gemm_flops: dict[str, float] = {}
    for dtype in DTYPES[device]:
        name = str(dtype).removeprefix("torch.")
        encoder = product_flops(dtype, device, (case.batch, case.d_in, case.d_sae))
        gemm_flops[name] = max(encoder, product_flops(dtype, device))
    state_bytes = 6.0 * sum(weight.nbytes for weight in inputs.weights.values())
    product, update = 1e3 * flops / max(gemm_flops.values()), 1e3 * state_bytes / copy_bytes
    floor = {"encoder product": product, "update": update, "total": product + update}
    ceilings = {"copy_bytes": copy_bytes, "gemm_flops": gemm_flops}
    return {"ceilings": ceilings, "floor_ms": floor}


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a copy within the device's memory."""
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def product_flops(
    dtype: torch.dtype, device: str, shape: tuple[int, int, int] | None = None
) -> float:
    """FLOP per second, without TF32, of a product of `rows, inner, columns`; by default large."""
    rows, inner, columns = shape or (SQUARE[device],) * 3
    left = torch.randn(rows, inner, device=device).to(dtype)
    # Columns are contiguous, as those of a latent-major encoder are.
    right = torch.randn(columns, inner, device=device).to(dtype).T
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    seconds = _seconds(lambda: torch.mm(left, right, out=out), device)
    return 2.0 * rows * inner * columns / seconds


def _seconds(call: Callable[[], object], device: str) -> float:
    """Of the fastest of a few calls: a ceiling is what can be reached."""
    return min(time_calls(call, device, 20 if device == "cuda" else 3).ms) / 1e3
