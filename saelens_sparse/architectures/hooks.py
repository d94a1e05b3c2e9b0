"""Whether somebody has hooked into an SAE."""

from __future__ import annotations

import torch
from torch import nn

from saelens_sparse.private_names import MODULE_HOOKS, TENSOR_HOOKS


def has_hooks(hook_point: nn.Module) -> bool:
    """Whether any hook is attached to a hook point, or to what stands in for it.

    `HookPoint.has_hooks()` does not see hooks that were registered past it.
    """
    return any(getattr(hook_point, hooks) for hooks in MODULE_HOOKS)


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether somebody hooks into a parameter's gradient, and expects a tensor there."""
    return any(getattr(parameter, hooks) for hooks in TENSOR_HOOKS)


def any_hooks(sae: nn.Module) -> bool:
    """Whether any hook is attached to a module or a parameter of an SAE."""
    return any(map(has_hooks, sae.modules())) or any(map(has_gradient_hooks, sae.parameters()))
