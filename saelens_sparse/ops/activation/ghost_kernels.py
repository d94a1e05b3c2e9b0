"""Triton kernels of ghost gradients; `ghost.py` says what they compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments


@dataclass(frozen=True)
class GhostLaunch:
    """A program holds at most BLOCK columns of a row at once, PER_THREAD of them in a thread."""

    BLOCK: int = 4096
    PER_THREAD: int = 16


LAUNCH = GhostLaunch()


@triton.jit
def _pre_acts(products_ptr, bias_ptr, row, m, live):
    product = tl.load(products_ptr + row + m, mask=live, other=0.0).to(tl.float32)
    return product + tl.load(bias_ptr + m, mask=live, other=0.0)


@kernel
def _ghost_values_kernel(
    values_ptr,  # [N, M]
    products_ptr,  # [N, M]
    bias_ptr,  # [n] float32
    n_columns,
    M,
    BLOCK: tl.constexpr,
):
    """exp(h - max of the row) for h = products + bias, zero from column n on

    Grid: a program a row, [N]. What the first loop has read is in the cache for the second.
    """
    row = tl.program_id(0).to(tl.int64) * M
    largest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    for start in range(0, n_columns, BLOCK):
        m = start + tl.arange(0, BLOCK)
        live = m < n_columns
        pre_act = _pre_acts(products_ptr, bias_ptr, row, m, live)
        largest = tl.maximum(largest, tl.where(live, pre_act, -float("inf")))
    shift = tl.max(largest, axis=0)
    for start in range(0, M, BLOCK):
        m = start + tl.arange(0, BLOCK)
        live = m < n_columns
        pre_act = _pre_acts(products_ptr, bias_ptr, row, m, live)
        value = tl.where(live, tl.exp(pre_act - shift), 0.0)
        tl.store(values_ptr + row + m, value.to(values_ptr.dtype.element_ty), mask=m < M)


@kernel
def _ghost_losses_kernel(
    losses_ptr,  # [N]
    coefficients_ptr,  # [2, N]
    ghosts_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    N,
    D,
    eps,
    BLOCK: tl.constexpr,
):
    """Of each row the loss, and a and c of its gradient a g - c r

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    rr = tl.zeros((BLOCK,), dtype=tl.float32)
    gg = tl.zeros((BLOCK,), dtype=tl.float32)
    gr = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        g = tl.load(ghosts_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        r = tl.load(residual_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        rr += r * r
        gg += g * g
        gr += g * r
    r_square = tl.sum(rr, axis=0)
    g_square = tl.sum(gg, axis=0)
    scale = tl.sqrt(r_square) / (2 * tl.sqrt(g_square) + eps)
    apart = r_square + scale * (scale * g_square - 2 * tl.sum(gr, axis=0))
    weight = r_square / (apart + eps)
    tl.store(losses_ptr + n, weight * apart)
    tl.store(coefficients_ptr + n, 2 * weight * scale * scale)
    tl.store(coefficients_ptr + N + n, 2 * weight * scale)


@kernel
def _ghost_gradient_kernel(
    grad_ptr,  # [N, D]
    ghosts_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    coefficients_ptr,  # [2, N]
    N,
    D,
    BLOCK: tl.constexpr,
):
    """grad[n, :] = a[n] ghosts[n, :] - c[n] residual[n, :]

    Grid: a program a row, [N].
    """
    n = tl.program_id(0).to(tl.int64)
    a = tl.load(coefficients_ptr + n)
    c = tl.load(coefficients_ptr + N + n)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        g = tl.load(ghosts_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        r = tl.load(residual_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(grad_ptr + n * D + d, (a * g - c * r).to(grad_ptr.dtype.element_ty), mask=d < D)


@on_device_of_arguments
def ghost_values(products: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As `ghost.ghost_values`, without a graph."""
    products = products.contiguous()
    values = torch.empty_like(products)
    n_rows, width = products.shape
    if n_rows > 0:
        _ghost_values_kernel[(n_rows,)](
            values_ptr=values,
            products_ptr=products,
            bias_ptr=bias.float().contiguous(),
            n_columns=bias.numel(),
            M=width,
            **_tile(width),
        )
    return values


@on_device_of_arguments
def ghost_losses(
    ghosts: torch.Tensor, residual: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses `[n_rows]` and coefficients `[2, n_rows]` of rows `[n_rows, d]`, float32."""
    n_rows, d = residual.shape
    losses = torch.empty(n_rows, device=residual.device)
    coefficients = torch.empty(2, n_rows, device=residual.device)
    if n_rows > 0:
        _ghost_losses_kernel[(n_rows,)](
            losses_ptr=losses,
            coefficients_ptr=coefficients,
            ghosts_ptr=ghosts.contiguous(),
            residual_ptr=residual.contiguous(),
            N=n_rows,
            D=d,
            eps=eps,
            **_tile(d),
        )
    return losses, coefficients


@on_device_of_arguments
def ghost_gradient(
    ghosts: torch.Tensor, residual: torch.Tensor, coefficients: torch.Tensor
) -> torch.Tensor:
    """`a g - c r` for rows `[n_rows, d]` and coefficients `[2, n_rows]`."""
    ghosts = ghosts.contiguous()
    grad = torch.empty_like(ghosts)
    n_rows, d = ghosts.shape
    if n_rows > 0:
        _ghost_gradient_kernel[(n_rows,)](
            grad_ptr=grad,
            ghosts_ptr=ghosts,
            residual_ptr=residual.contiguous(),
            coefficients_ptr=coefficients.contiguous(),
            N=n_rows,
            D=d,
            **_tile(d),
        )
    return grad


def _tile(width: int) -> dict[str, int]:
    """Columns that a program holds at once, and its warps; the same for every card."""
    block = min(LAUNCH.BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // (32 * LAUNCH.PER_THREAD)))}
