"""Stochastic rounding of Adam's moments in Triton, with the bits of `rounding.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from saelens_sparse.ops.update import rounding

_MULTIPLIER_1 = tl.constexpr(rounding.MULTIPLIER_1)
_MULTIPLIER_2 = tl.constexpr(rounding.MULTIPLIER_2)
_SPREAD = tl.constexpr(rounding.SPREAD)


@triton.jit
def _mix(x):
    """lowbias32; uint32."""
    x ^= x >> 16
    x *= _MULTIPLIER_1
    x ^= x >> 15
    x *= _MULTIPLIER_2
    return x ^ (x >> 16)


@triton.jit
def _combine(key, index):
    return _mix((index.to(tl.uint32) * _SPREAD) ^ key)


@triton.jit
def random_bits(salt, step, row, column):
    """As in `rounding.py`, uint32 in the shape of row and column together."""
    return _combine(_combine(_combine(salt.to(tl.uint32), step), row), column)


@triton.jit
def round_stochastically(value, noise):
    """A float32 in bfloat16: 16 random bits are added, and the low 16 cut off."""
    bits = (value.to(tl.uint32, bitcast=True) + noise) >> 16
    bits = tl.where(value == value, bits, 0x7FC0)  # of NaN
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_moments(
    rule,  # AdamRule
    first,
    second,
    row,
    column,
):
    """Moments, float32, as they are to be stored: in bfloat16 if the rule has a salt."""
    if rule.salt is not None:
        bits = random_bits(rule.salt, tl.load(rule.step).to(tl.int32), row, column)
        first = round_stochastically(first, bits & 0xFFFF)
        second = round_stochastically(second, bits >> 16)
    return first, second
