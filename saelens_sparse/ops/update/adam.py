"""Adam with moments in bfloat16 where kernels do not run."""

import math

import torch

from saelens_sparse.ops.update.rounding import random_bits, round_moments

# Elements that are updated at once: temporaries stay far below the size of a weight.
_BLOCK = 2**18


def adam_update_by_blocks(
    rows: torch.Tensor,
    gradient: torch.Tensor,
    first_moment: torch.Tensor,
    second_moment: torch.Tensor,
    step: torch.Tensor,
    divisor: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    salt: int,
) -> None:
    """
    Adam (Kingma & Ba 2015, arXiv:1412.6980, algorithm 1) on gradient / divisor, in place.

    The moments are rounded stochastically when they are stored. The update takes them before that.

    Args:
        rows: `[n_rows, n_columns]` float32, the weight.
        gradient: same shape, float32.
        first_moment: same shape, bfloat16, running mean of the gradients.
        second_moment: same shape, bfloat16, running mean of their squares.
        step: one element, the number of this update, counted from one.
        divisor: one element, what the gradient is divided by first.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: what keeps Adam from dividing by zero.
        salt: of the weight, for `random_bits`.
    """
    correction1, correction2 = (
        -torch.expm1(step * (math.log(beta) if beta > 0 else -math.inf)) for beta in betas
    )
    columns = torch.arange(rows.shape[1], device=rows.device)
    n = max(1, _BLOCK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], n):
        block = slice(start, min(start + n, rows.shape[0]))
        scaled = gradient[block] / divisor
        first = first_moment[block].float().lerp_(scaled, 1 - betas[0])
        second = second_moment[block].float().lerp_(scaled.square_(), 1 - betas[1])
        denominator = second.sqrt().div_(correction2.sqrt()).add_(eps)
        rows[block] -= (first * (lr / correction1)).div_(denominator)
        indices = torch.arange(block.start, block.stop, device=rows.device)
        bits = random_bits(salt, step, indices, columns)
        first_moment[block], second_moment[block] = round_moments(first, second, bits)
