"""The course of every benchmark of arms against each other: prepare, check, measure, record."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from tqdm import tqdm

from benchmarks.agreement import (
    Differences,
    Trajectory,
    differences,
    require_agreement,
)
from benchmarks.peers import Peer, build_peer, peer_problem, peer_version
from saelens_sparse.profile.cases import (
    REFERENCE_PRECISION,
    SPARSE,
    STOCK,
    Arm,
    Case,
    Precision,
)
from saelens_sparse.profile.trainers import Inputs, prepare_inputs, release_memory
from saelens_sparse.reports.results import ResultsFile, Row, describe_failure

Contender = TypeVar("Contender")


@dataclass(frozen=True)
class Heat:
    """One case in one precision: what all arms have in common."""

    case: Case
    precision: Precision
    inputs: Inputs


class Contest(ABC, Generic[Contender]):
    """
    Runs arms one after the other on the same inputs, each alone on the device.

    Stock comes first: its distance from the reference (itself, in a higher precision) bounds that
    of the other arms, which are timed only if they keep to it. What fails becomes a row that says
    so, and the rest goes on.

    Args:
        results: Where rows go, and where those of earlier runs are looked up.
        device: "cuda" or "cpu".
        steps: Timed steps or calls, at most.
        warmup_train: Training steps that lead from planted features to the weights used.
        again: Whether to measure again what `results` has from this device, commit and versions.
    """

    operations: ClassVar[tuple[str, ...]]
    """Names of what `measure` times."""
    cases: ClassVar[Mapping[str, Case]]
    groups: ClassVar[Mapping[str, tuple[str, ...]]]
    """Names that stand for several cases; that of the device for those to run by default."""
    arms: ClassVar[tuple[Arm, ...]]

    def __init__(
        self,
        results: ResultsFile,
        device: str,
        steps: int,
        warmup_train: int,
        again: bool = False,
    ):
        self.results = results
        self.device = device
        self.steps = steps
        self.warmup_train = warmup_train
        self.again = again
        self.absent_peers = {
            arm: problem
            for arm in self.arms
            if arm.peer is not None and (problem := peer_problem(arm, device)) is not None
        }

    @abstractmethod
    def build(self, arm: Arm, precision: Precision, heat: Heat) -> Contender:
        """What SAELens's or our arm brings to the heat, in `precision`, not the heat's own."""

    @abstractmethod
    def build_peer(self, peer: Peer, heat: Heat) -> Contender:
        """What another library's arm brings to the heat."""

    @abstractmethod
    def observe(self, contender: Contender, heat: Heat) -> Trajectory:
        """What the arms are compared by."""

    @abstractmethod
    def measure(self, contender: Contender, operation: str, heat: Heat) -> Row:
        """Time one of `operations`."""

    def expected_of_peers(self, trajectory: Trajectory) -> Trajectory:
        """The part of a trajectory that peers are compared by."""
        return trajectory

    def takes(self, arm: Arm, case: Case, precision: Precision) -> bool:
        """Whether the arm takes part in the heat."""
        return arm not in self.absent_peers and arm.takes(case, precision)

    def pending(self, case: Case, precision: Precision, arms: Sequence[Arm]) -> list[Arm]:
        """
        The arms that are to be measured: those without a good row for each operation. Stock is
        measured beside them again, unless its rows are from this very machine: machines of one
        kind differ, and ratios are what counts.
        """
        entered = [arm for arm in arms if self.takes(arm, case, precision)]
        if self.again:
            return entered

        def done(arm: Arm, **more: Any) -> bool:
            key = {"case": case.name, "precision": precision.name, "arm": arm.name, **more}
            return all(self.results.measured(**key, operation=name) for name in self.operations)

        machine = self.results.environment["machine"]
        pending = [arm for arm in entered if not done(arm)]
        if pending and STOCK in entered and STOCK not in pending:
            pending = pending if done(STOCK, machine=machine) else [STOCK, *pending]
        return pending

    def run(
        self,
        case: Case,
        precision: Precision,
        arms: Sequence[Arm],
        progress: tqdm[Any] | None = None,
    ) -> None:
        """Measure the pending of these arms and record a row for each of them and operation."""
        pending = self.pending(case, precision, arms)
        entered = [arm.name for arm in arms if self.takes(arm, case, precision)]
        skipped = [name for name in entered if name not in {arm.name for arm in pending}]
        if skipped:
            say(f"{case.name} {precision.name}: {', '.join(skipped)} measured already")
        if not pending:
            return
        try:
            release_memory(self.device)
            inputs = prepare_inputs(case, precision, self.device, self.warmup_train)
        except Exception as error:
            for row in self._failed(error):
                self._record(case, precision, SPARSE, row)
            if progress is not None:
                progress.update(len(pending))
            return

        heat = Heat(case, precision, inputs)
        reference = self._observe_reference(heat)
        bound = self._earlier_stock_differences(heat)
        for arm in pending:
            torch.set_float32_matmul_precision(arm.matmul_precision)
            rows = self._measure_arm(arm, heat, reference, bound)
            torch.set_float32_matmul_precision("highest")
            for row in rows:
                self._record(case, precision, arm, row)
            if arm == STOCK:
                bound = rows[0]["differences"]
            if progress is not None:
                progress.update()

    def _observe_reference(self, heat: Heat) -> Trajectory | None:
        """What stock does in a higher precision; where that fails, None, and arms go unchecked."""
        precision = REFERENCE_PRECISION[heat.precision.name]
        try:
            release_memory(self.device)
            return self.observe(self.build(STOCK, precision, heat), heat)
        except Exception as error:
            say(f"{heat.case.name}: no {precision.name} reference: {_describe(error)['message']}")
            return None

    def _earlier_stock_differences(self, heat: Heat) -> Differences | None:
        row = self.results.measured(
            case=heat.case.name,
            precision=heat.precision.name,
            arm=STOCK.name,
            operation=self.operations[0],
        )
        return row and row["differences"]

    def _measure_arm(
        self, arm: Arm, heat: Heat, reference: Trajectory | None, bound: Differences | None
    ) -> list[Row]:
        """Check the arm, within `bound` if there is one, and time its operations."""
        found: Row = {"differences": None, "checked": False}
        try:
            release_memory(self.device)
            if arm.peer is None:
                contender = self.build(arm, heat.precision, heat)
            else:
                peer = build_peer(arm, heat.case, heat.precision, self.device, heat.inputs)
                contender = self.build_peer(peer, heat)
                found |= {"peer": peer_version(arm), "note": peer.note}
                reference = reference and self.expected_of_peers(reference)
            trajectory = self.observe(contender, heat)
            if reference is not None:
                found["differences"] = differences(trajectory, reference, self.device)
                if bound is not None and (arm.sparse or arm.peer is not None):
                    require_agreement(found["differences"], bound)
                    found["checked"] = True
            del trajectory
        except Exception as error:
            return [{**found, **row} for row in self._failed(error)]

        rows: list[Row] = []
        for operation in self.operations:
            try:
                row = {"status": "ok", **self.measure(contender, operation, heat)}
            except Exception as error:
                row = _describe(error)
            rows.append({**found, "operation": operation, **row})
        return rows

    def _failed(self, error: Exception) -> list[Row]:
        failure = _describe(error)
        return [{"operation": operation, **failure} for operation in self.operations]

    def _record(self, case: Case, precision: Precision, arm: Arm, row: Row) -> None:
        self.results.append(
            {
                "case": case.name,
                "precision": precision.name,
                "arm": arm.name,
                "architecture": case.architecture,
                "d_in": case.d_in,
                "d_sae": case.d_sae,
                "k": case.k,
                "l0": case.l0,
                "batch": case.batch,
                "dead_fraction": case.dead_fraction,
                "sweep": case.sweep,
                **row,
            }
        )
        outcome = f"{row['ms']:.2f} ms" if row["status"] == "ok" else row["message"]
        say(f"{case.name} {precision.name} {row['operation']} {arm.name}: {outcome}")


def say(message: str) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(message)


def _describe(error: Exception) -> Row:
    row = describe_failure(error)
    if row["status"] == "failed":
        traceback.print_exception(error)
    return row
