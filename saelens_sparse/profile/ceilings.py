"""What a device can do at most, measured: copying memory and multiplying matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from saelens_sparse.profile.measure import measure_calls
from saelens_sparse.profile.work import Problem

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
_SQUARE = {"cuda": 8192, "cpu": 1024}
_REPEATS = {"cuda": 20, "cpu": 3}
# A CPU emulates what is not float32.
_DTYPES = {"cuda": (torch.bfloat16, torch.float16, torch.float32), "cpu": (torch.float32,)}


@dataclass(frozen=True)
class Ceilings:
    """
    Attributes:
        copy_bytes: per second, read plus written, of a copy within the device's memory.
        gemm_flops: per second, of the fastest matrix product by dtype, without TF32.
        encoder_ms: milliseconds of one encoder product, by dtype.
    """

    copy_bytes: float
    gemm_flops: dict[str, float]
    encoder_ms: dict[str, float]

    @property
    def best_gemm(self) -> str:
        """The dtype whose products are fastest."""
        return max(self.gemm_flops, key=lambda dtype: self.gemm_flops[dtype])

    def floor_ms(self, problem: Problem) -> dict[str, float]:
        """
        Milliseconds that a training step cannot avoid: one encoder product, and parameters and
        two moments read and written once.
        """
        product = 1e3 * problem.encoder_flops / self.gemm_flops[self.best_gemm]
        update = 1e3 * problem.optimizer_bytes / self.copy_bytes
        return {"encoder product": product, "update": update, "total": product + update}


def measure_ceilings(problem: Problem, device: str) -> Ceilings:
    """Measure them; takes a second or two."""
    flops: dict[str, float] = {}
    encoder: dict[str, float] = {}
    side = _SQUARE[device]
    for dtype in _DTYPES[device]:
        name = str(dtype).removeprefix("torch.")
        square_ms = _product_ms(side, side, side, dtype, device)
        encoder[name] = _product_ms(problem.n_rows, problem.d_in, problem.d_sae, dtype, device)
        flops[name] = max(2e3 * side**3 / square_ms, 1e3 * problem.encoder_flops / encoder[name])
    return Ceilings(_copy_bandwidth(device), flops, encoder)


def _copy_bandwidth(device: str) -> float:
    source = torch.zeros(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2e3 * source.numel() / _milliseconds(lambda: target.copy_(source), device)


def _product_ms(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str) -> float:
    left = torch.randn(rows, inner, device=device).to(dtype)
    # Columns are contiguous, as those of a latent-major encoder are.
    right = torch.randn(columns, inner, device=device).to(dtype).T
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    return _milliseconds(lambda: torch.mm(left, right, out=out), device)


def _milliseconds(call: Callable[[], object], device: str) -> float:
    """Of the fastest of a few calls: a ceiling is what can be reached."""
    return measure_calls(call, device, _REPEATS[device])["ms_min"]
