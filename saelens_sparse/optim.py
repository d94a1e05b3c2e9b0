"""SAELens's Adam on the parameters of a sparse SAE: fused, and in the weights' own layout.

The trainer builds a plain `torch.optim.Adam`. Before each step PyTorch calls a hook common to
all optimizers; for parameter groups of sparse SAEs it

- asks for PyTorch's fused Adam where nobody has chosen otherwise: the same update in one pass
  instead of ten, and without a temporary of the size of all parameters;
- gives gradients and moments the strides of their weight (a stock checkpoint brings its own).

What `state_dict()` returns stays what stock writes: stock's options, contiguous moments.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch.autograd.graph import increment_version
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_saelens_sparse_fused_adam"
_SWITCHED = "saelens_sparse_fused"  # key of groups that were fused here; never saved
_followed: WeakSet[Optimizer] = WeakSet()


def mark_parameter(parameter: torch.nn.Parameter, fused_adam: bool) -> None:
    """Declare a parameter of a sparse SAE, and whether the Adam that updates it may be fused."""
    setattr(parameter, _MARK, fused_adam)


@cache
def prepare_optimizers() -> None:
    """Register the hook that prepares optimizers before a step; once per process."""
    register_optimizer_step_pre_hook(_prepare)


def _prepare(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        parameters: list[torch.nn.Parameter] = group["params"]
        if not any(hasattr(parameter, _MARK) for parameter in parameters):
            continue
        if optimizer not in _followed:
            optimizer.register_state_dict_post_hook(_write_as_stock)
            optimizer.register_step_post_hook(_count_changes)
            _followed.add(optimizer)
        _choose_fused(optimizer, group)
        for parameter in parameters:
            _align(parameter, optimizer.state.get(parameter, {}), fused=bool(group.get("fused")))


def _choose_fused(optimizer: Optimizer, group: dict[str, Any]) -> None:
    wanted = type(optimizer) is Adam and all(
        getattr(parameter, _MARK, False) for parameter in group["params"]
    )
    if group.get(_SWITCHED) and not wanted:
        group["fused"] = None
        del group[_SWITCHED]
    elif wanted and not (
        group["fused"] is not None
        or group["foreach"] is not None
        or group["capturable"]
        or group["differentiable"]
    ):
        group["fused"] = group[_SWITCHED] = True


def _align(parameter: torch.nn.Parameter, state: dict[str, Any], *, fused: bool) -> None:
    gradient = parameter.grad
    if gradient is not None and gradient.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape == parameter.shape and value.stride() != parameter.stride():
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif name == "step" and fused and value.device != parameter.device:
            state[name] = value.to(parameter.device)


def _count_changes(optimizer: Optimizer, *_: Any) -> None:
    """The fused kernel changes parameters without telling autograd, which others rely on."""
    for group in optimizer.param_groups:
        if group.get(_SWITCHED):
            increment_version(group["params"])


def _write_as_stock(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:  # noqa: ARG001
    for group in state_dict["param_groups"]:
        if group.pop(_SWITCHED, False):
            group["fused"] = None
    state_dict["state"] = {
        index: {
            name: value.contiguous() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        for index, state in state_dict["state"].items()
    }
