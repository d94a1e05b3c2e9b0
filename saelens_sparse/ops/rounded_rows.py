"""Low-precision copies of weights, and whether they still are copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.ops.dense_gate import matmul_dtype


@dataclass
class RoundedRows:
    """Rows of a weight in the dtype that autocast multiplies them in.

    Attributes:
        rows: `[d_sae, d]`.
        source: the weight, which is kept so that its memory is not given to another.
        version: `source._version` when the copy was made; None if it has yet to be.
    """

    rows: torch.Tensor
    source: torch.Tensor
    version: int | None = None

    @classmethod
    def empty(cls, weight: torch.Tensor, dtype: torch.dtype) -> RoundedRows:
        """Room for the rows of `weight`, `[d_sae, d]`, in `dtype`."""
        return cls(torch.empty_like(weight, dtype=dtype), weight.detach())

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this is a copy of what `weight`, `[d_sae, d]`, is now."""
        return self.is_for(weight) and not weight.is_inference() and self.version == weight._version

    def is_for(self, weight: torch.Tensor) -> bool:
        """Whether `weight` is the one that this was made for, whatever its values."""
        return (
            weight.data_ptr() == self.source.data_ptr()
            and weight.shape == self.source.shape
            and weight.stride() == self.source.stride()
        )


def rounded_dtype(weight: torch.Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies `weight`; None if that is its own."""
    dtype = matmul_dtype(weight)
    return None if dtype == weight.dtype else dtype
