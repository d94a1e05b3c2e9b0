"""A product of float8 matrices, for a screen whose candidates are computed again."""

from __future__ import annotations

import torch


def multiply_float8(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`out = x @ weight.T`, with the tensor cores' fast accumulation.

    Fast accumulation keeps some 14 bits of a sum where float32 keeps 24. Its error is small beside
    that of operands with 4 bits.

    Args:
        x: `[n_rows, d_in]` float8 (e4m3).
        weight: `[d_sae, d_in]` float8 (e4m3).
        out: `[n_rows, d_sae]` float16.
    """
    one = torch.ones((), dtype=torch.float32, device=x.device)
    torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        x, weight.T, one, one, out_dtype=out.dtype, use_fast_accum=True, out=out
    )
