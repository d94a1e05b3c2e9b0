"""Whether somebody has hooked into an SAE."""

from __future__ import annotations

from torch import nn

from saelens_sparse.private_names import MODULE_HOOKS, TENSOR_HOOKS


def has_hooks(hook_point: nn.Module) -> bool:
    """Whether any hook is attached to a hook point, or to what stands in for it.

    `HookPoint.has_hooks()` does not see hooks that were registered past it.
    """
    return any(getattr(hook_point, hooks) for hooks in MODULE_HOOKS)


def any_hooks(sae: nn.Module) -> bool:
    """Whether any hook is attached to a module or a parameter of an SAE."""
    return any(has_hooks(module) for module in sae.modules()) or any(
        getattr(parameter, hooks) for parameter in sae.parameters() for hooks in TENSOR_HOOKS
    )
