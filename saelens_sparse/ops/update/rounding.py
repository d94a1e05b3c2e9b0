"""Stochastic rounding to bfloat16 by a counter-based generator, in PyTorch.

A value between two neighbours in bfloat16 becomes the upper one with a probability in proportion to
its distance from the lower one, so that the expected result is the value. Random bits depend on
the number of the update, the weight, the row and the column alone. There is no state to save.

`rounding_kernels.py` makes the same bits in Triton.
"""

import torch

# lowbias32 of Chris Wellons's hash-prospector, public domain: a bijection of 32-bit integers.
# https://github.com/skeeto/hash-prospector
MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
# The golden ratio's fraction times 2**32, odd: spreads neighbouring indices over all bits.
SPREAD = 0x9E3779B9

_MASK = 0xFFFFFFFF
_HALF = 0xFFFF


def mix(x: torch.Tensor) -> torch.Tensor:
    """lowbias32 of each element; int64 in [0, 2**32), as the result."""
    x = x ^ (x >> 16)
    x = (x * MULTIPLIER_1) & _MASK
    x = x ^ (x >> 15)
    x = (x * MULTIPLIER_2) & _MASK  # int64 may overflow, which leaves the low bits right
    return x ^ (x >> 16)


def combine(key: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A key for each index under `key`; both int64 in [0, 2**32), as the result."""
    return mix(((index * SPREAD) & _MASK) ^ key)


def random_bits(
    salt: int, step: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """
    32 random bits for each element of a block of a weight.

    bits[i, j] = combine(combine(combine(salt, step), rows[i]), columns[j])

    Args:
        salt: of the weight, in [0, 2**31).
        step: one element, the number of the update.
        rows: `[n_rows]` int64, indices into the weight's rows.
        columns: `[n_columns]` int64.

    Returns:
        `[n_rows, n_columns]` int64 in [0, 2**32).
    """
    of_step = combine(torch.full_like(rows[:1], salt), step.to(torch.int64).reshape(1))
    of_rows = combine(of_step, rows)
    return combine(of_rows[:, None], columns)


def round_stochastically(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Add 16 random bits to those that bfloat16 lacks, and cut these off.

    Infinities and NaN stay. A finite value beyond the largest in bfloat16 may become infinite, as
    it may by rounding to nearest.

    Args:
        values: float32.
        noise: integer in [0, 2**16), of the same shape.

    Returns:
        bfloat16.
    """
    bits = values.view(torch.int32) + noise.to(torch.int32)
    cut = (bits & ~_HALF).view(torch.float32)
    return cut.masked_fill_(values.isnan(), torch.nan).bfloat16()


def round_moments(
    first: torch.Tensor, second: torch.Tensor, bits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both moments, float32, in bfloat16: each by one half of the bits of `random_bits`."""
    return round_stochastically(first, bits & _HALF), round_stochastically(second, bits >> 16)
