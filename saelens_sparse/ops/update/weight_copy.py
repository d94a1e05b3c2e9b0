"""What an update makes of a weight for the next step, and whether it is still of that weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.ops.common.precision import matmul_dtype


@dataclass
class WeightCopy:
    """Something made from all rows of a weight.

    Attributes:
        values: `[d_sae, d]`, the rows in the dtype that autocast multiplies them in; or `[d_sae]`,
            their Euclidean norms in float32.
        source: the weight, which is kept so that its memory is not given to another.
        version: `source._version` when the copy was made; None if it has yet to be.
    """

    values: torch.Tensor
    source: torch.Tensor
    version: int | None = None

    @classmethod
    def of_rows(cls, weight: torch.Tensor, dtype: torch.dtype) -> WeightCopy:
        """Room for the rows of `weight`, `[d_sae, d]`, in `dtype`."""
        return cls(torch.empty_like(weight, dtype=dtype), weight.detach())

    @classmethod
    def of_norms(cls, weight: torch.Tensor) -> WeightCopy:
        """Room for the norms of the rows of `weight`, `[d_sae, d]`."""
        return cls(torch.empty(weight.shape[0], device=weight.device), weight.detach())

    @property
    def is_norms(self) -> bool:
        """Whether this is of norms and not of rows."""
        return self.values.ndim == 1

    @property
    def is_current(self) -> bool:
        """Whether the weight has not changed since the copy was made."""
        return not self.source.is_inference() and self.version == self.source._version

    def is_of(self, weight: torch.Tensor) -> bool:
        """Whether this is a copy of what `weight`, `[d_sae, d]`, is now."""
        return self.is_for(weight) and not weight.is_inference() and self.is_current

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
