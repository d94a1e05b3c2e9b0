"""What an optimizer needs for moments in bfloat16, and their way through its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from saelens_sparse.architectures.fields import moments_need_float32
from saelens_sparse.architectures.parameters import FUSED_ADAM, moments_salt

MOMENTS = ("exp_avg", "exp_avg_sq")
_OTHER_UPDATES = (
    "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable",
)  # fmt: skip

States = dict[int, dict[str, Any]]


def require_own_update(optimizer: Optimizer, group: dict[str, Any], is_own: bool) -> None:
    """
    Check that an optimizer updates a group as moments in bfloat16 need it.

    Args:
        optimizer: is about to update.
        group: of its groups of parameters, one with such moments.
        is_own: whether the optimizer is this package's.

    Raises:
        ValueError: it does not; the message says what is in the way.
    """
    if not is_own:
        raise ValueError(
            "moments='bfloat16' needs the update of SparseTrainingRunner, "
            f"SparseMultiSAETrainingRunner or SparseSAETrainer; got {type(optimizer).__name__}"
        )
    for name in _OTHER_UPDATES:
        if group[name]:
            raise ValueError(
                f"moments='bfloat16' needs an optimizer without {name}; got {name}={group[name]!r}"
            )
    if group["fused"] is False:
        raise ValueError("moments='bfloat16' needs an update that is fused; got fused=False")
    for parameter in (p for each in optimizer.param_groups for p in each["params"]):
        if moments_salt(parameter) is not None and parameter.dtype != torch.float32:
            raise ValueError(moments_need_float32(parameter.dtype))
        if not getattr(parameter, FUSED_ADAM, False):
            raise ValueError(
                "moments='bfloat16' needs fused_adam=True, and an optimizer of the SAE's own "
                f"parameters; got one with another parameter, of shape {list(parameter.shape)}"
            )


def moments_dtype(parameter: nn.Parameter) -> torch.dtype:
    """The dtype of a parameter's moments."""
    return parameter.dtype if moments_salt(parameter) is None else torch.bfloat16


def convert_moments(parameter: nn.Parameter, state: dict[str, Any]) -> None:
    """
    Bring a parameter's moments into their dtype, rounded to nearest.

    They have another if `moments` of the configuration was changed, or if they were loaded before
    an optimizer knew of it. Those that are wider than need be stay where the parameter's are not to
    be in bfloat16.
    """
    dtype = moments_dtype(parameter)
    for name in MOMENTS:
        held = state[name].dtype
        if held != dtype and (
            moments_salt(parameter) is not None or held.itemsize < dtype.itemsize
        ):
            state[name] = torch.empty_like(parameter, dtype=dtype).copy_(state[name])


def set_moments_apart(
    state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> tuple[dict[str, Any], dict[nn.Parameter, dict[str, torch.Tensor]]]:
    """
    Take moments that are to be in bfloat16 out of an optimizer's state.

    Args:
        state_dict: of the optimizer's state, which stays as it is.
        groups: the optimizer's own groups of parameters.

    Returns:
        The rest of the state, and those moments in bfloat16 on the device of their parameter.
    """
    saved, own = (
        [each for group in one for each in group["params"]]
        for one in (state_dict["param_groups"], groups)
    )
    states: States = dict(state_dict["state"])
    apart: dict[nn.Parameter, dict[str, torch.Tensor]] = {}
    for index, parameter in zip(saved, own, strict=False):  # PyTorch compares their numbers
        if moments_salt(parameter) is None or index not in states:
            continue
        apart[parameter] = {
            name: states[index][name].to(parameter.device, torch.bfloat16)
            for name in MOMENTS
            if name in states[index]
        }
        states[index] = {n: value for n, value in states[index].items() if n not in MOMENTS}
    return {**state_dict, "state": states}, apart
