"""What a forward pass leaves of itself: the values at the hook points that were asked for."""

from __future__ import annotations

import torch

Wanted = tuple[tuple[str, torch.dtype], ...]
"""Names of values in one part of a model, and the dtype that each one is returned in."""


class Recorder:
    """Keeps the wanted ones of the values that a part of a model offers.

    Args:
        wanted: names and dtypes of the values to keep.
        stops: whether the pass may end as soon as all of them are there.
    """

    def __init__(self, wanted: Wanted, stops: bool) -> None:
        self._dtypes = dict(wanted)
        self._stops = stops
        self.found: dict[str, torch.Tensor] = {}

    @property
    def is_done(self) -> bool:
        """Whether nothing after this point is needed."""
        return self._stops and len(self.found) == len(self._dtypes)

    def wants(self, name: str) -> bool:
        """Whether a value of this name is to be kept."""
        return name in self._dtypes

    def dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        """The dtype that a value of this name is returned in."""
        return self._dtypes.get(name, default)

    def offer(self, name: str, value: torch.Tensor) -> None:
        """Keep a value if one of this name is wanted."""
        if name in self._dtypes:
            self.found[name] = value.to(self._dtypes[name]).contiguous()
