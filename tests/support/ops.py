"""Inputs and error budgets for the tests of the sparse operations."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.pairs import LatentOrder, Rows
from saelens_sparse.ops.rows import operations


@contextmanager
def cublas_switch(name: str, value: bool) -> Generator[None]:
    """A switch of `torch.backends.cuda.matmul`: `monkeypatch` would delete it afterwards."""
    switches = torch.backends.cuda.matmul
    before = getattr(switches, name)
    setattr(switches, name, value)
    try:
        yield
    finally:
        setattr(switches, name, before)


def random_latents(
    n_rows: int,
    d_sae: int,
    k: int,
    law: str = "uniform",
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Distinct latents for each row; with "zipf", low latents are on nearly every row."""
    if n_rows == 0:
        return torch.zeros(0, k, dtype=torch.int64, device=device)
    frequency = torch.ones(d_sae) if law == "uniform" else 1 / torch.arange(1.0, d_sae + 1)
    return torch.multinomial(frequency.expand(n_rows, d_sae), k).to(device)


def order_of(latents: torch.Tensor, active: torch.Tensor, d_sae: int) -> LatentOrder:
    """The active ones of latents `[n_rows, k]`, by latent."""
    keys = latents.int().masked_fill(~active, d_sae)
    return LatentOrder.of_keys(keys.flatten(), Rows.regular(*latents.shape), d_sae)


def gather_sum(
    coefficients: torch.Tensor,
    latents: torch.Tensor,
    weight: torch.Tensor,
    backend: Backend,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`operations.gather_sum` of coefficients and latents `[n_rows, k]`."""
    rows = Rows.regular(*latents.shape)
    return operations.gather_sum(
        coefficients.flatten(), latents.flatten(), rows, weight, backend, bias
    )


def gather_dot(
    batch: torch.Tensor, latents: torch.Tensor, weight: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """`operations.gather_dot` at latents `[n_rows, k]`."""
    rows = Rows.regular(*latents.shape)
    dots = operations.gather_dot(batch, latents.flatten(), rows, weight, backend)
    return dots.view_as(latents)


def segment_sum(
    order: LatentOrder,
    coefficients: torch.Tensor,
    batch: torch.Tensor,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.segment_sum` of coefficients `[n_rows, k]`."""
    return operations.segment_sum(order, coefficients.flatten(), batch, dtype, backend)


def dense_code(latents: torch.Tensor, coefficients: torch.Tensor, d_sae: int) -> torch.Tensor:
    """`coefficients` at `latents`, zero elsewhere; `[n_rows, d_sae]`."""
    code = coefficients.new_zeros(latents.shape[0], d_sae)
    return code.scatter_(1, latents, coefficients)


def assert_within_budget(
    actual: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Each row's error is at most twice that of plain PyTorch, plus a small floor.

    The floor is one rounding of the result, and of the terms that it adds where those cancel.

    Args:
        actual: `[n_rows, n]`, what was computed.
        plain: the same by plain PyTorch in the same dtype.
        exact: the same in float64.
        magnitude: the sum of the absolute values of the terms that `exact` adds, in float64.
    """
    assert actual.shape == plain.shape == exact.shape
    if actual.numel() == 0:
        return
    error, plain_error = ((value.double() - exact).abs().amax(-1) for value in (actual, plain))
    floor = torch.finfo(actual.dtype).eps / 2 * exact.abs().amax(-1)
    if magnitude is not None:
        floor += torch.finfo(torch.float32).eps * magnitude.to(floor.device).amax(-1)
    budget = 2 * plain_error + floor
    worst = (error - budget).argmax()
    # Written so that a NaN fails.
    assert (error <= budget).all(), (
        f"row {int(worst)}: error {error[worst]:.3g}, plain PyTorch {plain_error[worst]:.3g}, "
        f"floor {floor[worst]:.3g}"
    )


def within(actual: torch.Tensor, expected: torch.Tensor, error: torch.Tensor) -> bool:
    """Written so that a NaN fails."""
    assert actual.shape == expected.shape
    return bool(((actual.cpu().double() - expected).abs() <= error).all())


def require_gpu_memory(gib: float) -> None:
    """Skip a test for which the GPU has too little free memory."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory; {free:.0f} GiB are free")
