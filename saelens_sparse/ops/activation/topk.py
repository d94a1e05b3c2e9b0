"""The top k of each row of a dense block, differentiable."""

from __future__ import annotations

from typing import Any

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.first_order import first_order
from saelens_sparse.ops.search.topk import topk_values


def keep_topk(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    backend: Backend,
) -> torch.Tensor:
    """The values of `topk_values`, differentiable with respect to `products` and `bias`."""
    return _KeepTopK.apply(products, bias, norms, k, backend)  # pyright: ignore[reportReturnType]


class _KeepTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: torch.Tensor,
        bias: torch.Tensor,
        norms: torch.Tensor | None,
        k: int,
        backend: Backend,
    ) -> torch.Tensor:
        values, kept = topk_values(products, bias, norms, k, backend)
        ctx.save_for_backward(kept)
        ctx.n, ctx.bias_dtype = bias.numel(), bias.dtype
        return values

    @staticmethod
    @first_order
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        grad_products = torch.where(kept, grads[0], 0.0)
        sum_dtype = torch.promote_types(ctx.bias_dtype, torch.float32)
        grad_bias = grad_products.sum(0, dtype=sum_dtype)[: ctx.n].to(ctx.bias_dtype)
        return grad_products, grad_bias, None, None, None
