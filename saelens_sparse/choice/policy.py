"""Dense or sparse, where a training changes what is faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saelens_sparse.measured import HYSTERESIS
from saelens_sparse.ops.common.host_copy import HostCopy

STATE_FILENAME = "saelens_sparse_state.json"
"""Beside the weights in a checkpoint: what `auto` has measured."""


@dataclass(frozen=True)
class PairTotals:
    """How many pairs a batch had.

    Attributes:
        totals: `[2]` int64 on its way to the host, number of pairs and of active ones.
        n_rows: rows of the batch.
        d_sae: number of latents.
    """

    totals: HostCopy
    n_rows: int
    d_sae: int

    @property
    def density(self) -> float:
        """Share of all pairs. Waits for the device."""
        return int(self.totals.values()[0]) / (self.n_rows * self.d_sae)

    @property
    def mean_l0(self) -> float:
        """Mean number of active latents of a row. Waits for the device."""
        return int(self.totals.values()[1]) / self.n_rows


class DensityPolicy:
    """How many pairs recent batches had, and whether a step computes sparsely for that.

    Numbers that are still on their way from the device are read when they are asked for. Asking
    changes nothing of what the next step runs on; `settle` and `expect` do.
    """

    def __init__(self) -> None:
        self._goes_sparse = False
        self._mean_l0: float | None = None
        self._density: float | None = None
        self._coming: PairTotals | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> DensityPolicy:
        return DensityPolicy()

    __copy__ = __deepcopy__

    def expect(self, coming: PairTotals) -> None:
        """The numbers of the batch just taken, when they arrive."""
        if coming.n_rows > 0:
            self._coming = coming

    @property
    def density(self) -> float | None:
        """Share of all pairs that the last batch had; None before the first batch."""
        self._read()
        return self._density

    @property
    def mean_l0(self) -> float | None:
        """Mean number of active latents of the last batch's rows; None before the first batch."""
        self._read()
        return self._mean_l0

    def prefers_sparse(self, limit: float, hysteresis: float = HYSTERESIS) -> bool:
        """Whether the next step computes sparsely, if that is faster up to a density of `limit`.

        Args:
            limit: the density.
            hysteresis: share of it below which a training that computes densely changes.
        """
        density = self.density
        if not self._goes_sparse:
            limit = hysteresis * limit
        return density is not None and density < limit

    def settle(self, goes_sparse: bool) -> None:
        """Remember what the step just taken ran on."""
        self._goes_sparse = goes_sparse

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on with the same choices, for JSON."""
        return {"goes_sparse": self._goes_sparse, "share": self.density, "mean_l0": self.mean_l0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._goes_sparse, self._coming = bool(state["goes_sparse"]), None
        self._density, self._mean_l0 = state["share"], state["mean_l0"]

    def _read(self) -> None:
        coming, self._coming = self._coming, None
        if coming is not None:
            self._density, self._mean_l0 = coming.density, coming.mean_l0
