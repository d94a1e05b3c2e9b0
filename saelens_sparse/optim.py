"""SAELens's Adam on the weights of a sparse SAE: fused, and in the weights' own layout.

The trainer builds a plain `torch.optim.Adam`. Before each step PyTorch calls a hook common to
all optimizers; for parameter groups with a sparse SAE's weights it

- asks for PyTorch's fused Adam where nobody has chosen otherwise: the same update in one pass
  instead of ten, and without a temporary of the size of all parameters;
- gives moments that come from a stock checkpoint the strides of their weight.

What `state_dict()` returns stays what stock writes: stock's options, contiguous moments.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_saelens_sparse_fused_adam"
_prepared: WeakSet[Optimizer] = WeakSet()


def mark_weight(weight: torch.nn.Parameter, fused_adam: bool) -> None:
    """Declare a weight of a sparse SAE, and whether the Adam that updates it may be fused."""
    setattr(weight, _MARK, fused_adam)


@cache
def prepare_optimizers() -> None:
    """Register the hook that prepares optimizers before a step; once per process."""
    register_optimizer_step_pre_hook(_prepare)


def _prepare(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        marks = [getattr(p, _MARK) for p in group["params"] if hasattr(p, _MARK)]
        if not marks:
            continue
        if optimizer not in _prepared:
            optimizer.register_state_dict_post_hook(_write_as_stock)
            _prepared.add(optimizer)
        if isinstance(optimizer, Adam) and all(marks) and _nobody_chose(group):
            group["fused"] = True
        for parameter in group["params"]:
            _align_state(parameter, optimizer.state.get(parameter, {}), group)


def _nobody_chose(group: dict[str, Any]) -> bool:
    return (
        group.get("fused") is None
        and group.get("foreach") is None
        and not group.get("capturable")
        and not group.get("differentiable")
    )


def _align_state(parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.shape == parameter.shape and value.stride() != parameter.stride():
            state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif name == "step" and group.get("fused") and value.device != parameter.device:
            state[name] = value.to(parameter.device)


def _write_as_stock(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    for live, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        if any(hasattr(parameter, _MARK) for parameter in live["params"]):
            group["fused"] = None
    state_dict["state"] = {
        index: {
            name: value.contiguous() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        for index, state in state_dict["state"].items()
    }
