"""Keeps the optimizer's moments of latent-major weights in the weights' own layout.

A checkpoint written by a stock SAE brings its Adam moments in stock's layout. Element-wise
updates stay correct, but with mixed strides they leave PyTorch's fast path.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

_MARK = "_saelens_sparse_latent_major"


def mark_latent_major(weight: torch.nn.Parameter) -> None:
    """Declare that `weight` is the transposed view of a contiguous tensor, and to stay so."""
    setattr(weight, _MARK, True)


@cache
def keep_moments_in_layout() -> None:
    """Register the hook that aligns moments before an optimizer step; once per process."""
    register_optimizer_step_pre_hook(_align_moments)


def _align_moments(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if not hasattr(weight, _MARK):
                continue
            state = optimizer.state.get(weight, {})
            for name, value in state.items():
                if (
                    isinstance(value, torch.Tensor)
                    and value.shape == weight.shape
                    and value.stride() != weight.stride()
                ):
                    state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
