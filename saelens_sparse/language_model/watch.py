"""Whether a model is still the one that was read: its modules, hooks and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from saelens_sparse.private_names import MODULE_HOOKS, MODULE_MEMBERS

FORWARD_HOOKS = MODULE_HOOKS[:2]


def edits(model: nn.Module, is_own: Callable[[Any], bool] = lambda _: False) -> str | None:
    """
    What of a model's computation was replaced on the object, in words; None if nothing was.

    Args:
        model: any module.
        is_own: whether a hook belongs to the model itself.
    """
    for name, module in model.named_modules():
        state = vars(module)
        if "forward" in state:
            return f"its module {name!r} has a forward of its own"
        hooks = [hook for kind in FORWARD_HOOKS for hook in state[kind].values()]
        if not all(map(is_own, hooks)):
            return f"its module {name!r} has a hook"
    return None


def fingerprint(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """
    Changes when a submodule or parameter of these modules is replaced, moved to other memory or
    gets a hook.

    Takes about a microsecond a module, and does not wait for a device. New values in the same
    memory do not change it, and need not.
    """
    print_: list[Any] = []
    for module in modules:
        state = vars(module)
        children, parameters = (state[members].values() for members in MODULE_MEMBERS)
        print_.extend(map(id, children))
        print_.extend(
            (id(parameter), parameter.data_ptr())
            for parameter in parameters
            if parameter is not None
        )
        print_.extend(len(state[hooks]) for hooks in FORWARD_HOOKS)
        print_.append("forward" in state)
    return tuple(print_)


def placement(model: nn.Module) -> str | None:
    """What of a model's weights is not plain memory on one device, in words; None if all are."""
    kinds = {(parameter.device, parameter.dtype) for parameter in model.parameters()}
    if len(kinds) > 1:
        return "its weights have several devices or dtypes"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return f"its weight {name!r} is a {type(parameter).__qualname__}"
    return None
