"""
Time `SAETrainer.step` of the sparse architectures against SAELens's own.

    saelens-sparse bench step --cases gemma2b,jumprelu_l0_64 --precision float32,autocast

For each case and precision, every arm in turn starts from the same trained-like weights, is
checked to train the same model as stock (see `agreement.py`), is timed, and is freed before the
next. The peers "sparsify" and "dictionary_learning" take steps of their own trainers. Rows are
appended as they come: the same command goes on where an interrupted one stopped, and passes over
what it finds measured on the same device, commit and versions. Tables are printed last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from typing_extensions import override

from benchmarks.agreement import Trajectory, first_step, rehearse
from benchmarks.contest import Contest, Heat
from benchmarks.peers import PEERS, Peer
from benchmarks.session import main_of
from saelens_sparse.profile.cases import (
    DICTIONARY_LEARNING,
    SPARSE,
    SPARSE_RUNNER,
    SPARSIFY,
    STEP_CASES,
    STEP_GROUPS,
    STOCK,
    STOCK_COMPILE,
    STOCK_TF32,
    Arm,
    Case,
    Precision,
)
from saelens_sparse.profile.measure import Stopwatch, measure_calls, measure_steps
from saelens_sparse.profile.trainers import Trainer, build_trainer, take_step
from saelens_sparse.reports.results import Row

TIMED_SECONDS = 1.5
"""Slow arms are timed for about as long, on `LEAST_STEPS` steps at least."""
LEAST_STEPS = 5


@dataclass
class PeerSteps:
    """A peer and the batches that its steps take in turn."""

    peer: Peer
    batches: Iterator[torch.Tensor]

    def step(self) -> None:
        self.peer.hold_dead()
        self.peer.train_step(next(self.batches))


class StepContest(Contest[Trainer | PeerSteps]):
    """Whole training steps, as `SAETrainer.fit` takes them."""

    operations = ("step",)
    cases = STEP_CASES
    groups = STEP_GROUPS
    arms = (
        STOCK,
        STOCK_TF32,
        STOCK_COMPILE,
        SPARSE,
        SPARSE_RUNNER,
        replace(SPARSIFY, matmul_precision="high"),  # as its trainer has it
        DICTIONARY_LEARNING,
    )

    @override
    def takes(self, arm: Arm, case: Case, precision: Precision) -> bool:
        return super().takes(arm, case, precision) and (
            arm.peer is None or PEERS[arm.name].trains_in(precision, self.device)
        )

    @override
    def build(self, arm: Arm, precision: Precision, heat: Heat) -> Trainer:
        return build_trainer(
            arm,
            heat.case,
            precision,
            self.device,
            heat.inputs.batches,
            heat.inputs.weights,
            heat.case.learning_rate,
        )

    @override
    def build_peer(self, peer: Peer, heat: Heat) -> PeerSteps:
        return PeerSteps(peer, itertools.cycle(heat.inputs.batches))

    @override
    def observe(self, contender: Trainer | PeerSteps, heat: Heat) -> Trajectory:
        if isinstance(contender, PeerSteps):
            return contender.peer.rehearse(heat.inputs.batches[0][: heat.case.check_rows])
        return rehearse(contender, heat.case, heat.inputs)

    @override
    def expected_of_peers(self, trajectory: Trajectory) -> Trajectory:
        return first_step(trajectory)

    @override
    def measure(self, contender: Trainer | PeerSteps, operation: str, heat: Heat) -> Row:
        if isinstance(contender, PeerSteps):
            steps = self._affordable(contender.step)
            return measure_calls(contender.step, self.device, steps)
        steps = self._affordable(partial(take_step, contender, heat.inputs))
        return measure_steps(contender, heat.inputs, steps)

    def _affordable(self, step: Callable[[], object]) -> int:
        """How many steps to time, by the time of one."""
        watch = Stopwatch(self.device)
        step()
        start = watch.mark()
        step()
        seconds = watch.milliseconds(start, watch.mark()) / 1e3
        return min(self.steps, max(LEAST_STEPS, round(TIMED_SECONDS / seconds)))


def main(argv: Sequence[str]) -> int:
    return main_of("step", StepContest, argv)
