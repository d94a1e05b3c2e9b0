"""What a search gives: pairs, and a check that they are all, which is on its way to the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from saelens_sparse.ops.common.host_copy import HostCopy, HostCount
from saelens_sparse.ops.pairs import ActivePairs


class Check(Protocol):
    """Something that a step relies on before it is known."""

    def passed(self) -> bool:
        """Whether it is so. Waits until the device has got there."""
        ...

    def renewed(self) -> Self:
        """The same of what the replay of a CUDA graph has written into the same memory."""
        ...


@dataclass(frozen=True)
class NoneUncertain:
    """That a screen could vouch for every row.

    Attributes:
        n_uncertain: number of rows for which it could not.
    """

    n_uncertain: HostCount

    def passed(self) -> bool:
        return self.n_uncertain.wait() == 0

    def renewed(self) -> NoneUncertain:
        return NoneUncertain(self.n_uncertain.renewed())


@dataclass(frozen=True)
class EnoughRoom:
    """That a list had room for all pairs.

    Attributes:
        totals: `[2]` int64, number of pairs, and of active ones.
        capacity: number of pairs that there was room for.
    """

    totals: HostCopy
    capacity: int

    def passed(self) -> bool:
        return int(self.totals.values()[0]) <= self.capacity

    def renewed(self) -> EnoughRoom:
        return EnoughRoom(self.totals.renewed(), self.capacity)


@dataclass(frozen=True)
class FoundPairs:
    """Pairs that are queued on the device.

    Work that is queued before the check is asked hides the wait for it.

    Attributes:
        pairs: all pairs if the check passes.
        check: None if there is nothing to check.
        find_again: finds them all if it does not.
        totals: `[2]` int64, number of pairs, and of active ones; None if those are known before.
    """

    pairs: ActivePairs
    check: Check | None = None
    find_again: Callable[[], FoundPairs] | None = None
    totals: HostCopy | None = None

    @torch.no_grad()
    def complete(self) -> FoundPairs:
        """This itself, or what finds all pairs. Waits for the check."""
        if self.check is None or self.check.passed():
            return self
        assert self.find_again is not None
        return self.find_again()


def threshold_and_edge(
    threshold: torch.Tensor, bandwidth: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds as compared with pre-activations of a dtype, and the window's lower edges.

    The edges err downwards by more than rounding, so that nothing inside falls below them.
    """
    rounded = threshold.to(dtype)
    slack = 2 * torch.finfo(dtype).eps
    edge = rounded - (bandwidth / 2 + slack * bandwidth)
    return rounded, edge.sub_(rounded.abs(), alpha=slack)
