"""Triton kernel of an Adam update that divides gradients on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from saelens_sparse.ops.common.launch import kernel, on_device_of_arguments
from saelens_sparse.ops.update.rounding_kernels import round_moments

_BLOCK = 1024


@dataclass(frozen=True)
class AdamSettings:
    """Adam's learning rate, decay rates of the moments, and what keeps it from dividing by zero.

    The learning rate is one element, float32, on the device: it changes from step to step where
    the launches of a CUDA graph do not.

    With a salt, which differs between weights, moments in bfloat16 are rounded stochastically when
    they are stored (see `rounding.py`); without one, moments are rounded to nearest.
    """

    lr: torch.Tensor
    beta1: float
    beta2: float
    eps: float
    salt: int | None = None

    def rule(self, step: torch.Tensor, divisor: torch.Tensor) -> AdamRule:
        """
        What kernels take for an update. Its corrections are computed on the current device.

        Args:
            step: one element, float32, the number of this update, counted from one.
            divisor: one element, what the gradient is divided by first.
        """
        corrections = torch.empty(2, dtype=torch.float32, device=step.device)
        _corrections_kernel[(1,)](
            corrections,
            step_ptr=step,
            log_beta1=_log(self.beta1),
            log_beta2=_log(self.beta2),
            num_warps=1,
        )
        return AdamRule(
            step, divisor, self.lr, corrections, 1 - self.beta1, 1 - self.beta2, self.eps, self.salt
        )


class AdamRule(NamedTuple):
    """One update's step, divisor and settings, as kernels take them."""

    step: torch.Tensor  # one element, float32
    divisor: torch.Tensor  # one element
    lr: torch.Tensor  # one element, float32
    corrections: torch.Tensor  # [2] float32, 1 - beta1 ** step and sqrt(1 - beta2 ** step)
    gain1: float  # 1 - beta1
    gain2: float
    eps: float
    salt: int | None  # of stochastic rounding, in [2, 2**31); None: moments to nearest


@kernel
def _corrections_kernel(
    corrections_ptr,  # [2]
    step_ptr,
    log_beta1,
    log_beta2,
):
    """What Adam divides moments by in an update, which programs of it would each compute in float64

    Grid: one program.
    """
    step = tl.load(step_ptr).to(tl.float64)
    tl.store(corrections_ptr, (1.0 - tl.exp(step * log_beta1)).to(tl.float32))
    tl.store(corrections_ptr + 1, tl.sqrt((1.0 - tl.exp(step * log_beta2)).to(tl.float32)))


@triton.jit
def adam_rule(
    rule,  # AdamRule
    parameter,
    gradient,
    first,
    second,
):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) on gradient / divisor."""
    correction1 = tl.load(rule.corrections)
    correction2 = tl.load(rule.corrections + 1)
    gradient = gradient / tl.load(rule.divisor).to(tl.float32)
    first += rule.gain1 * (gradient - first)
    second += rule.gain2 * (gradient * gradient - second)
    denominator = tl.sqrt(second) / correction2 + rule.eps
    parameter -= (tl.load(rule.lr) / correction1) * first / denominator
    return parameter, first, second


@kernel
def _adam_kernel(
    parameter_ptr,  # [n], as the next three
    gradient_ptr,
    first_moment_ptr,
    second_moment_ptr,
    rule,  # AdamRule
    n,
    width,  # columns of a row
    BLOCK: tl.constexpr,
):
    """Adam on n elements. Grid: blocks of them."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    gradient = tl.load(gradient_ptr + i, mask=live, other=0.0).to(tl.float32)
    first = tl.load(first_moment_ptr + i, mask=live, other=0.0).to(tl.float32)
    second = tl.load(second_moment_ptr + i, mask=live, other=0.0).to(tl.float32)
    parameter = tl.load(parameter_ptr + i, mask=live, other=0.0).to(tl.float32)
    parameter, first, second = adam_rule(rule, parameter, gradient, first, second)
    if rule.salt is not None:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        row = start // width
        column = (start - row * width).to(tl.int32) + tl.arange(0, BLOCK)
        row += column // width
        first, second = round_moments(rule, first, second, row, column % width)
    tl.store(parameter_ptr + i, parameter.to(parameter_ptr.dtype.element_ty), mask=live)
    tl.store(first_moment_ptr + i, first.to(first_moment_ptr.dtype.element_ty), mask=live)
    tl.store(second_moment_ptr + i, second.to(second_moment_ptr.dtype.element_ty), mask=live)


@on_device_of_arguments
def adam_update(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    step: torch.Tensor,
    divisor: torch.Tensor,
    settings: AdamSettings,
) -> None:
    """Update a parameter and its moments in place, in one pass.

    Args:
        parameter: any shape, without gaps in memory; contiguous `[n_rows, n_columns]` if the
            settings have a salt.
        gradient: same shape and strides, as the moments.
        first_moment: running mean of the gradients.
        second_moment: running mean of their squares.
        step: one element, float32, the number of this update, counted from one.
        divisor: one element, what the gradient is divided by first.
        settings: the rest of what Adam needs.
    """
    n = parameter.numel()
    if n > 0:
        _adam_kernel[(triton.cdiv(n, _BLOCK),)](
            parameter,
            gradient_ptr=gradient,
            first_moment_ptr=first_moment,
            second_moment_ptr=second_moment,
            rule=settings.rule(step, divisor),
            n=n,
            width=1 if settings.salt is None else parameter.shape[-1],
            BLOCK=_BLOCK,
            num_warps=4,
        )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf
