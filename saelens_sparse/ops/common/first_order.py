"""Backward passes that cannot be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_Gradients = tuple[torch.Tensor | None, ...] | torch.Tensor


def first_order(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Refuse to give a graph of a gradient, rather than give a gradient without one.

    PyTorch's `once_differentiable` returns it without one where the upstream gradient is constant.

    Raises:
        RuntimeError: `backward`, which becomes the backward pass of a `torch.autograd.Function`, is
            asked for a graph.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: torch.Tensor | None) -> _Gradients:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: sparse encoders and decoders have no second derivatives; "
                "set implementation='dense' for them."
            )
        return backward(ctx, *grads)

    return checked
