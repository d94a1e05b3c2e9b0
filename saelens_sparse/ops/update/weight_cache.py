"""What an update makes of a weight for the next step, and whether it is still of that weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch

WeightView = Literal["rounded", "scaled", "norms"]
"""What an update can write of a weight: its rows in the dtype that autocast multiplies them in; its
rows as `round_rows` scales and rounds them for a screen; or their Euclidean norms."""


@dataclass
class WeightCopy:
    """Something made from all rows of a weight.

    Attributes:
        values: `[d_sae, d]`, the rows in lower precision; or `[d_sae]`, their norms in float32.
        source: the rows, which are kept so that their memory is not given to another.
        errors: `[3, d_sae]` float32, what undoes the scale of scaled rows, their norms, and the
            norms of what rounding took away; None if this is another view.
        version: `source._version` when the copy was made; None if it has yet to be.
    """

    values: torch.Tensor
    source: torch.Tensor
    errors: torch.Tensor | None = None
    version: int | None = None

    @classmethod
    def of(cls, rows: torch.Tensor, view: WeightView, dtype: torch.dtype) -> WeightCopy:
        """
        Room for a view of a weight.

        Args:
            rows: `[d_sae, d]`.
            view: which.
            dtype: of the copied rows.
        """
        d_sae, device = rows.shape[0], rows.device
        if view == "norms":
            return cls(torch.empty(d_sae, dtype=torch.float32, device=device), rows.detach())
        errors = None
        if view == "scaled":  # a scale of one is replaced where it does not fit
            errors = torch.ones(3, d_sae, dtype=torch.float32, device=device)
        return cls(torch.empty_like(rows, dtype=dtype), rows.detach(), errors)

    def parts(self) -> list[torch.Tensor]:
        """The tensors that an update writes."""
        return [self.values] if self.errors is None else [self.values, self.errors]

    @property
    def is_norms(self) -> bool:
        """Whether this is of norms and not of rows."""
        return self.values.ndim == 1

    def is_a(self, view: WeightView, dtype: torch.dtype) -> bool:
        """Whether this is such a view of its weight, in `dtype` if that is of rows."""
        if view == "norms" or self.is_norms:
            return view == "norms" and self.is_norms
        return (view == "scaled") == (self.errors is not None) and self.values.dtype == dtype

    @property
    def is_current(self) -> bool:
        """Whether the weight has not changed since the copy was made."""
        return not self.source.is_inference() and self.version == self.source._version

    def is_of(self, rows: torch.Tensor) -> bool:
        """Whether this is a copy of what `rows`, `[d_sae, d]`, are now."""
        return self.is_for(rows) and not rows.is_inference() and self.is_current

    def is_for(self, rows: torch.Tensor) -> bool:
        """Whether `rows` are those that this was made for, whatever their values."""
        return (
            rows.data_ptr() == self.source.data_ptr()
            and rows.shape == self.source.shape
            and rows.stride() == self.source.stride()
        )

    def is_written(self) -> None:
        """Say that an update has just written it."""
        self.version = self.source._version


@dataclass
class WeightCache:
    """
    What updates have written of an SAE's weights. The optimizer that writes it owns it.

    Attributes:
        copies: one for each weight that the last update has written something of.
    """

    copies: list[WeightCopy] = field(default_factory=list[WeightCopy])

    def rounded(self, rows: torch.Tensor) -> WeightCopy | None:
        """The low-precision rows of `rows` as they are now, if there are any."""
        return self._current(rows, is_norms=False)

    def norms(self, rows: torch.Tensor) -> WeightCopy | None:
        """The norms of `rows` as they are now, if there are any."""
        return self._current(rows, is_norms=True)

    def _current(self, rows: torch.Tensor, *, is_norms: bool) -> WeightCopy | None:
        for copy in self.copies:
            if copy.is_norms == is_norms and copy.is_of(rows):
                return copy
        return None

    def of(self, rows: torch.Tensor) -> WeightCopy | None:
        """What the next update has to write of `rows`."""
        return next((copy for copy in self.copies if copy.is_for(rows)), None)

    def make_room(
        self, wanted: Iterable[tuple[torch.Tensor, WeightView, torch.dtype]]
    ) -> WeightCache:
        """
        A cache with room for what the next update is to write, in this one's memory where it fits.

        Args:
            wanted: rows, what to write of them, and the dtype of copied ones.
        """
        copies: list[WeightCopy] = []
        for rows, view, dtype in wanted:
            copy = self.of(rows)
            if copy is None or not copy.is_a(view, dtype):
                copy = WeightCopy.of(rows, view, dtype)
            copies.append(copy)
        return WeightCache(copies)

    def addresses(self) -> list[int]:
        """Where what is current lies in memory."""
        parts = (part for copy in self.copies if copy.is_current for part in copy.parts())
        return [part.data_ptr() for part in parts]
