"""A product of float16 matrices whose sums are float32, whatever PyTorch's switches allow.

Two switches of a process let cuBLAS add in less. `allow_fp16_reduced_precision_reduction`, on by
default, lets it split a long sum and round each part to float16. `allow_fp16_accumulation` lets
whole sums be float16. Other threads multiply under the same switches, so this package only reads
them.

- While whole sums may be float16, nothing is screened (`has_float32_sums`).
- Each new shape is tried first: does its product round parts? cuBLAS chooses how to multiply by
  shape and switches. It splits sums where a result is too small to occupy the GPU.
- A shape that rounds parts is multiplied with a float32 result, whose parts are float32 too. That
  would be right for every shape, but the buffer would be written and read at twice its size.

A bound cannot allow for rounded parts instead. It would grow by 2^-11 |x'| |w'| with each part, and
nothing limits their number. At 2304 -> 65,536, k 64, on normal data, a row has 77 candidates. With
two parts it would have 105, with four 143, with eight 253.

One thing is not covered: a thread that changes a switch after a screen has read it and before the
product is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from saelens_sparse.ops.common.precision import matmul, matmul_dtype
from saelens_sparse.warn import warn_caller

# With fewer rows a trial tells too little, and a float32 result costs little.
MIN_ROWS_TRIED = 128

_rounds_parts: dict[tuple[object, ...], bool] = {}


def has_float32_sums(operand: torch.Tensor) -> bool:
    """Whether a screen with this operand is possible: one in float16 needs float32 sums."""
    if matmul_dtype(operand) != torch.float32 or not _switches()[0]:
        return True
    _warn_of_float16_sums()
    return False


def multiply_float16(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`out = x @ weight.T`, each element a float32 sum rounded once.

    Args:
        x: `[n_rows, d_in]` float16.
        weight: `[d_sae, d_in]` float16.
        out: `[n_rows, d_sae]` float16.
    """
    library = torch.backends.cuda.preferred_blas_library()
    key = (x.device, x.shape, weight.shape, library, *_switches())
    if x.shape[0] >= MIN_ROWS_TRIED and key not in _rounds_parts:
        _rounds_parts[key] = rounds_parts(torch.mm, weight, out)
    if _rounds_parts.get(key, True):
        out.copy_(matmul(x, weight.T, torch.float32))
    else:
        torch.mm(x, weight.T, out=out)


def rounds_parts(multiply: Callable[..., object], weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether a product of this shape rounds parts of a sum to float16; or if it does not tell.

    Each row tried has two elements, in columns drawn at random, whose products with one latent
    cancel to less than a thousandth. In a float32 sum what remains is right. Where the two are in
    different parts, or the sum is float16, it is off by the rounding of one, some 2^-12 of it.

    Args:
        multiply: called as `torch.mm`.
        weight: `[d_sae, d_in]` float16, as it will be multiplied with.
        out: `[n_rows, d_sae]` float16, overwritten.
    """
    (d_sae, d_in), n_rows, device = weight.shape, out.shape[0], weight.device
    chance = torch.Generator(device).manual_seed(0)
    latents, first, apart = (
        torch.randint(n, (n_rows,), generator=chance, device=device)
        for n in (d_sae, d_in, max(1, d_in - 1))
    )
    second = (first + 1 + apart) % d_in
    weight1, weight2 = (weight[latents, columns].double() for columns in (first, second))
    x1 = (1 + torch.rand(n_rows, generator=chance, device=device)).to(weight.dtype)
    x2 = (-x1 * weight1 / weight2).to(weight.dtype)
    rows = torch.arange(n_rows, device=device)
    x = weight.new_zeros(n_rows, d_in)
    x[rows, first], x[rows, second] = x1, x2
    multiply(x, weight.T, out=out)
    term = x1 * weight1
    rest = term + x2 * weight2
    # Elsewhere a weight is zero, tiny or not finite.
    tells = (term.abs() > 2.0**-6) & (rest.abs() < 2.0**-10 * term.abs())
    right = (out[rows, latents] - rest).abs() <= 2.0**-17 * term.abs()  # a NaN is not
    return bool((tells & ~right).any() | (tells.sum() < n_rows // 2))


def _switches() -> tuple[bool, bool]:
    """Whether sums, and parts of them, may be float16."""
    switches = torch.backends.cuda.matmul
    return (
        bool(switches.allow_fp16_accumulation),
        bool(switches.allow_fp16_reduced_precision_reduction),
    )


@cache
def _warn_of_float16_sums() -> None:
    warn_caller(
        "saelens_sparse computes the encoder's products in float32, which is slower, because "
        "torch.backends.cuda.matmul.allow_fp16_accumulation is on: "
        "no bound holds for a screen whose sums are float16."
    )
