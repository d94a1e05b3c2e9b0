"""One training step: what it computes with, and what it leaves.

A step has two phases. The forward pass computes, and changes nothing. When it is known to be
complete, `commit` of the SAE changes what a step changes besides gradients. If a search has missed
something, the pass is dropped and taken again with checks that are asked at once.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from saelens_sparse.choice.availability import Choice
from saelens_sparse.choice.policy import PairTotals
from saelens_sparse.codes.dead import DeadLatents
from saelens_sparse.measured import MAX_PAIRS_PER_LATENT
from saelens_sparse.ops.common.host_copy import HostCount
from saelens_sparse.ops.common.precision import ScreenDtype
from saelens_sparse.ops.decode import Comparison
from saelens_sparse.ops.pairs import LatentOrder
from saelens_sparse.ops.search.found import Check, FoundPairs
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.weight_cache import WeightCache


@dataclass
class RowGradients:
    """Gradients of weights as sums over pairs, which a driver takes during a step.

    Attributes:
        parts: the sums, by name of the parameter.
        is_open: whether the step is still being taken. What is encoded or decoded later sends its
            gradients to `.grad`.
    """

    parts: dict[str, list[RowGradient]] = field(default_factory=dict[str, list[RowGradient]])
    is_open: bool = True

    def clear(self) -> None:
        """Let go of the sums. Autograd's nodes hold the lists as long as an output lives."""
        for part in self.parts.values():
            part.clear()


@dataclass(frozen=True)
class Offer:
    """
    What a driver offers to the steps of an SAE.

    Attributes:
        row_gradients: where gradients of weights go instead of to `.grad`; None if they do not.
        weights: what the last update has written of the weights; None if none writes anything.
    """

    row_gradients: RowGradients | None = None
    weights: WeightCache | None = None


@dataclass
class StepContext:
    """
    One training step of one SAE, made by whoever drives it.

    Attributes:
        choice: what it runs on, decided once.
        asks_at_once: whether each search is asked at once if it found all, instead of after the
            step is queued.
        offer: what the driver offers.
        dead_count: the dead latents that its losses ask for, and their number.
        n_training_steps: number of steps before it; None for a call that is no training step.
        screen_dtype: in what searches may screen.
        measures_recall: whether to compare what a search has found with what there is.
        checks: what it relies on and nobody has asked yet.
        was_complete: whether all that was asked at once had been found at once.
        pair_totals: how many pairs its batch had, where the next choice depends on that.
        needed: how many pairs the step had that was dropped for it; None if none was dropped.
        target: `[..., d_in]`, what its loss compares the reconstruction with; None if a function of
            somebody else's does that.
        comparison: of the last reconstruction with `target`, if its decoder has made one.
        seen: what the forward pass has found out for `commit`, on the device, by name.
    """

    choice: Choice
    asks_at_once: bool
    offer: Offer = Offer()
    dead_count: HostCount | None = None
    n_training_steps: int | None = None
    screen_dtype: ScreenDtype = "auto"
    measures_recall: bool = False
    checks: list[Check] = field(default_factory=list[Check])
    was_complete: bool = True
    pair_totals: PairTotals | None = None
    needed: PairTotals | None = None
    target: torch.Tensor | None = None
    comparison: Comparison | None = None
    seen: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def is_complete(self) -> bool:
        """Whether its searches have missed nothing. Waits for the device."""
        return all(check.passed() for check in self.checks)

    def settled(self, found: FoundPairs, d_sae: int) -> tuple[FoundPairs, LatentOrder]:
        """What to go on with, and its pairs by latent."""
        # Sorting keeps the device busy if the host waits for the check.
        order = LatentOrder.of(found.pairs, d_sae)
        if found.check is None:
            return found, order
        if not self.asks_at_once:
            self.checks.append(found.check)
            return found, order
        if found.check.passed():
            return found, order
        self.was_complete = False
        found = found.complete()
        return found, LatentOrder.of(found.pairs, d_sae)

    def count_pairs(self, totals: PairTotals) -> None:
        """Keep how many pairs the step's batch had. What is encoded after it is something else."""
        if self.pair_totals is None:
            self.pair_totals = totals

    def dead_latents(self) -> DeadLatents | None:
        """The dead latents, if a loss asks for them. Waits for their number."""
        return None if self.dead_count is None else DeadLatents.of(self.dead_count)

    def row_gradients_of(self, name: str, order: LatentOrder) -> list[RowGradient] | None:
        """Where the gradient of a weight over such pairs goes; None if to its `.grad`."""
        row_gradients = self.offer.row_gradients
        if row_gradients is None or not row_gradients.is_open or self.choice.backend != "triton":
            return None
        if order.pairs.numel() > MAX_PAIRS_PER_LATENT * order.d_sae:
            return None
        return row_gradients.parts.setdefault(name, [])


# Each thread has its own, so that passes of one SAE may run at once.
_current: ContextVar[tuple[object, StepContext] | None] = ContextVar("step", default=None)
_offered: ContextVar[tuple[object, Offer] | None] = ContextVar("offer", default=None)


@contextmanager
def in_progress(sae: object, step: StepContext) -> Generator[None]:
    """Make `step` the one that calls of `sae` in this thread belong to.

    When it ends, nothing is compared any more. Outputs hold the step, which lets go of the batch.
    """
    token = _current.set((sae, step))
    try:
        yield
    finally:
        _current.reset(token)
        step.target = step.comparison = None


def step_in_progress() -> StepContext | None:
    """The training step, of whichever SAE, that the present thread is in."""
    # What is compiled is dense, and asks for no step. Dynamo traces no context variable.
    current = None if torch.compiler.is_compiling() else _current.get()
    return None if current is None else current[1]


def current_step(sae: object) -> StepContext | None:
    """The training step of this SAE that the present thread is in."""
    current = None if torch.compiler.is_compiling() else _current.get()
    return current[1] if current is not None and current[0] is sae else None


@contextmanager
def offered(sae: object, offer: Offer) -> Generator[None]:
    """Offer this to the steps of `sae` that begin in this thread, whoever begins them.

    When it ends, so does what its gradients may go to.
    """
    token = _offered.set((sae, offer))
    try:
        yield
    finally:
        _offered.reset(token)
        if offer.row_gradients is not None:
            offer.row_gradients.is_open = False


def offer_to(sae: object) -> Offer:
    """What is offered to steps of this SAE in the present thread."""
    current = _offered.get()
    return current[1] if current is not None and current[0] is sae else Offer()
