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


class Watch:
    """
    Notices that a submodule or parameter of some modules was replaced, moved to other memory or
    given a hook.

    Looking takes about half a microsecond a module, and does not wait for a device. New values in
    the same memory are no change.

    Args:
        modules: all whose own members count.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._states = [vars(module) for module in modules]
        self._hooks = [state[kind] for state in self._states for kind in FORWARD_HOOKS]
        members = [state[kind] for state in self._states for kind in MODULE_MEMBERS]
        self._members = [group for group in members if group]
        # Kept, so that no other object can get the address of one of these.
        self._kept = [member for group in self._members for member in group.values()]
        self._seen = self._look()

    @property
    def has_changed(self) -> bool:
        """Whether anything differs from what there was at first."""
        return self._look() != self._seen

    def _look(self) -> tuple[list[Any], ...]:
        members = [member for group in self._members for member in group.values()]
        return (
            list(map(len, self._hooks)),
            ["forward" in state for state in self._states],
            list(map(id, members)),
            [member.data_ptr() for member in members if isinstance(member, nn.Parameter)],
        )


def placement(model: nn.Module) -> str | None:
    """What of a model's weights is not plain memory on one device, in words; None if all are."""
    kinds = {(parameter.device, parameter.dtype) for parameter in model.parameters()}
    if len(kinds) > 1:
        return "its weights have several devices or dtypes"
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return f"its weight {name!r} is a {type(parameter).__qualname__}"
    return None
