"""Ghost gradients: dead latents, with an exponential for an activation, reconstruct a residual.

Formula: Jermyn and Templeton 2024 (transformer-circuits.pub/2024/jan-update), "Ghost grads". For a
row with the residual r and the dead latents' pre-activations h, and with sg for a value that gets
no gradient,

    g = sum over dead i of exp(h_i - sg(max h)) W_dec[i]
    s = sg(|r| / (2 |g| + eps))         l = |s g - sg(r)|^2         loss = sg(|r|^2 / (l + eps)) l

The loss is the mean over rows. Without eps it does not change when a row of h is shifted.
"""

from __future__ import annotations

from typing import Any

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order

EPS = 1e-6
# Elements of a chunk of rows in the PyTorch path: small enough to stay in a CPU's cache.
_CHUNK_ELEMENTS = 2**18


def ghost_grad_loss(
    products: torch.Tensor,
    bias: torch.Tensor,
    W_dec: torch.Tensor,
    residual: torch.Tensor,
    backend: Backend,
) -> torch.Tensor:
    """The loss of dead latents, differentiable once with respect to all but the residual.

    Args:
        products: `[n_rows, width]`, pre-activations before the bias; columns beyond the length of
            `bias` are padding.
        bias: `[n]`, 1 <= n <= width.
        W_dec: `[width, d_in]`.
        residual: `[..., d]` with the elements of `[n_rows, d_in]`. Each of its vectors is a row of
            the formula.
        backend: `"triton"` or `"torch"`.

    Returns:
        `[]`, in the dtype of the residual; the sums are float32 or better.
    """
    ghosts = ghost_values(products, bias, backend) @ W_dec
    return ghost_loss(ghosts.view_as(residual), residual, backend)


def dense_ghost_grad_loss(
    hidden_pre: torch.Tensor,
    dead: torch.Tensor,
    W_dec: torch.Tensor,
    residual: torch.Tensor,
    *,
    is_rescaled: bool,
) -> torch.Tensor:
    """The loss of dead latents by operations of PyTorch, which can be differentiated twice.

    Args:
        hidden_pre: `[..., d_sae]`, pre-activations of all latents.
        dead: `[d_sae]` bool, which are dead.
        W_dec: `[d_sae, d_in]`.
        residual: as for `ghost_grad_loss`.
        is_rescaled: whether `hidden_pre` has been multiplied by the norms of `W_dec`.

    Returns:
        `[]`, as `ghost_grad_loss`; zero without dead latents. Waits for their number.
    """
    latents = dead.nonzero().squeeze(1)
    if latents.numel() == 0:
        return residual.new_zeros(())
    rows = W_dec.index_select(0, latents)
    pre_acts = hidden_pre.flatten(0, -2).index_select(1, latents)
    sum_dtype = torch.promote_types(pre_acts.dtype, torch.float32)
    pre_acts = pre_acts.to(sum_dtype)
    if is_rescaled:
        pre_acts = pre_acts / rows.norm(dim=-1)
    values = (pre_acts - pre_acts.amax(1, keepdim=True).detach()).exp()
    ghosts = (values.to(rows.dtype) @ rows).view_as(residual).to(sum_dtype)
    target = residual.to(sum_dtype)
    size = target.norm(dim=-1, keepdim=True)
    scale = size / (2 * ghosts.detach().norm(dim=-1, keepdim=True) + EPS)
    apart = (scale * ghosts - target).pow(2).sum(-1)
    weight = target.pow(2).sum(-1) / (apart.detach() + EPS)
    return (weight * apart).mean().to(residual.dtype)


def ghost_values(products: torch.Tensor, bias: torch.Tensor, backend: Backend) -> torch.Tensor:
    """`exp(h - max of the row)` for `h = products + bias`, zero in padding.

    The maximum gets no gradient.

    Args:
        products: `[n_rows, width]`.
        bias: `[n]`, 1 <= n <= width; columns of `products` from n on are padding.
        backend: `"triton"` or `"torch"`.

    Returns:
        `[n_rows, width]`, in the dtype of `products`.
    """
    n, width = bias.numel(), products.shape[1]
    if not 1 <= n <= width:
        raise ValueError(f"need 1 <= len(bias) <= width; got {n} and {width}")
    return _GhostValues.apply(products, bias, backend)  # pyright: ignore[reportReturnType]


def ghost_loss(ghosts: torch.Tensor, residual: torch.Tensor, backend: Backend) -> torch.Tensor:
    """The loss of reconstructions, differentiable once with respect to these.

    Args:
        ghosts: `[..., d]`, g of each row.
        residual: `[..., d]`.
        backend: `"triton"` or `"torch"`.

    Returns:
        `[]`, in the dtype of the residual. No tensor of the size of the residual is made for it.
    """
    if ghosts.shape != residual.shape:
        raise ValueError(f"ghosts must have shape {list(residual.shape)}; got {list(ghosts.shape)}")
    d = residual.shape[-1]
    return _GhostLoss.apply(  # pyright: ignore[reportReturnType]
        ghosts.reshape(-1, d), residual.detach().reshape(-1, d), backend
    )


def _values(products: torch.Tensor, bias: torch.Tensor, backend: Backend) -> torch.Tensor:
    """As `ghost_values`, without a graph."""
    if backend == "triton":
        from saelens_sparse.ops.activation import ghost_kernels

        return ghost_kernels.ghost_values(products, bias)
    n, sum_dtype = bias.numel(), _sum_dtype(products)
    pre_acts = products[:, :n].to(sum_dtype) + bias.to(sum_dtype)
    values = torch.zeros_like(products)
    values[:, :n] = pre_acts.sub_(pre_acts.amax(1, keepdim=True)).exp_()
    return values


def _losses(
    ghosts: torch.Tensor, residual: torch.Tensor, backend: Backend
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Loss of each row, `[n_rows]`, and the coefficients of its gradient, `[2, n_rows]`.

    With the coefficients a and c of a row, the gradient of its loss is a g - c r. As |s g| is at
    most |r| / 2, `l = |r|^2 + s^2 |g|^2 - 2 s <g, r>` is a quarter of |r|^2 at least: nothing
    cancels.
    """
    if backend == "triton":
        from saelens_sparse.ops.activation import ghost_kernels

        return ghost_kernels.ghost_losses(ghosts, residual, EPS)
    rr, gg, gr = _dot(residual, residual), _dot(ghosts, ghosts), _dot(ghosts, residual)
    scale = rr.sqrt() / (2 * gg.sqrt() + EPS)
    apart = rr + scale * (scale * gg - 2 * gr)
    weight = rr / (apart + EPS)
    return weight * apart, torch.stack([2 * weight * scale * scale, 2 * weight * scale])


def _gradient(
    ghosts: torch.Tensor, residual: torch.Tensor, coefficients: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """`a g - c r` for coefficients `[2, n_rows]`, in the dtype of `ghosts`."""
    if backend == "triton":
        from saelens_sparse.ops.activation import ghost_kernels

        return ghost_kernels.ghost_gradient(ghosts, residual, coefficients)
    a, c = coefficients.unsqueeze(2)
    return (a * ghosts).sub_(c * residual).to(ghosts.dtype)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Dot products of rows, `[n_rows]`, in float32 or better; a few rows at a time."""
    n_rows = max(1, _CHUNK_ELEMENTS // max(1, a.shape[1]))
    sum_dtype = _sum_dtype(a, b)
    parts = zip(a.split(n_rows), b.split(n_rows), strict=True)
    return torch.cat([(x.to(sum_dtype) * y.to(sum_dtype)).sum(1) for x, y in parts])


def _sum_dtype(*tensors: torch.Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _GhostValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, products: torch.Tensor, bias: torch.Tensor, backend: Backend
    ) -> torch.Tensor:
        values = _values(products, bias, backend)
        # What the product with W_dec keeps anyway.
        ctx.save_for_backward(values)
        ctx.n, ctx.bias_dtype = bias.numel(), bias.dtype
        return values

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (values,) = ctx.saved_tensors
        grad_products = grads[0] * values
        sum_dtype = torch.promote_types(ctx.bias_dtype, torch.float32)
        grad_bias = grad_products.sum(0, dtype=sum_dtype)[: ctx.n].to(ctx.bias_dtype)
        return grad_products, grad_bias, None


class _GhostLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ghosts: torch.Tensor, residual: torch.Tensor, backend: Backend
    ) -> torch.Tensor:
        losses, coefficients = _losses(ghosts, residual, backend)
        ctx.save_for_backward(ghosts, residual, coefficients)
        ctx.backend = backend
        return losses.mean().to(residual.dtype)

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        ghosts, residual, coefficients = ctx.saved_tensors
        of_mean = coefficients * (grads[0].to(coefficients.dtype) / max(1, ghosts.shape[0]))
        return _gradient(ghosts, residual, of_mean, ctx.backend), None, None
