"""The course of every benchmark of arms against each other: prepare, check, measure, record."""

from __future__ import annotations

import argparse
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch

from saelens_sparse.evaluation.bench.agreement import (
    Differences,
    Trajectory,
    differences,
    require_agreement,
)
from saelens_sparse.evaluation.bench.report import tables
from saelens_sparse.evaluation.cases import (
    PRECISIONS,
    REFERENCE_PRECISION,
    SPARSE,
    STOCK,
    Arm,
    Case,
    Precision,
)
from saelens_sparse.evaluation.results import ResultsFile, Row, describe_failure, environment
from saelens_sparse.evaluation.training import Inputs, prepare_inputs, release_memory

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
    of the sparse arm, which is timed only if it keeps to it. What fails becomes a row that says
    so, and the rest goes on.
    """

    operations: ClassVar[tuple[str, ...]]
    """Names of what `measure` times."""
    cases: ClassVar[Mapping[str, Case]]
    default_cases: ClassVar[Mapping[str, tuple[str, ...]]]
    """Names of the cases to run by device, where none are asked for."""
    arms: ClassVar[tuple[Arm, ...]]

    def __init__(self, results: ResultsFile, device: str, steps: int, warmup_train: int):
        self.results = results
        self.device = device
        self.steps = steps
        self.warmup_train = warmup_train

    @abstractmethod
    def build(self, arm: Arm, precision: Precision, heat: Heat) -> Contender:
        """What the arm brings to the heat, in `precision` rather than the heat's own."""

    @abstractmethod
    def observe(self, contender: Contender, heat: Heat) -> Trajectory:
        """What the arms are compared by."""

    @abstractmethod
    def measure(self, contender: Contender, operation: str, heat: Heat) -> Row:
        """Time one of `operations`."""

    def run(self, case: Case, precision: Precision, arms: Sequence[Arm]) -> None:
        """Measure the arms, stock first, and record a row for each of them and operation."""
        try:
            release_memory(self.device)
            inputs = prepare_inputs(case, precision, self.device, self.warmup_train)
        except Exception as error:
            for row in self._failed(error):
                self._record(case, precision, SPARSE, row)
            return

        heat = Heat(case, precision, inputs)
        reference = self._observe_reference(heat)
        stock_differences = None
        for arm in arms:
            if precision.name not in arm.precisions:
                continue
            bound = stock_differences if arm.sparse else None
            torch.set_float32_matmul_precision(arm.matmul_precision)
            rows = self._measure_arm(arm, heat, reference, bound)
            torch.set_float32_matmul_precision("highest")
            for row in rows:
                self._record(case, precision, arm, row)
            if arm == STOCK:
                stock_differences = rows[0]["differences"]

    def _observe_reference(self, heat: Heat) -> Trajectory | None:
        """What stock does in a higher precision; where that fails, None, and arms go unchecked."""
        precision = REFERENCE_PRECISION[heat.precision.name]
        try:
            release_memory(self.device)
            return self.observe(self.build(STOCK, precision, heat), heat)
        except Exception as error:
            message = _describe(error)["message"]
            print(f"{heat.case.name}: no {precision.name} reference: {message}", flush=True)
            return None

    def _measure_arm(
        self, arm: Arm, heat: Heat, reference: Trajectory | None, bound: Differences | None
    ) -> list[Row]:
        """Check the arm, within `bound` if there is one, and time its operations."""
        found: Row = {"differences": None, "checked": False}
        try:
            release_memory(self.device)
            contender = self.build(arm, heat.precision, heat)
            trajectory = self.observe(contender, heat)
            if reference is not None:
                found["differences"] = differences(trajectory, reference)
                if bound is not None:
                    require_agreement(found["differences"], bound)
                    found["checked"] = True
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
                **row,
            }
        )
        outcome = f"{row['ms']:.2f} ms" if row["status"] == "ok" else row["message"]
        heading = f"{case.name} {precision.name} {row['operation']} {arm.name}"
        print(f"{heading}: {outcome}", flush=True)


def _describe(error: Exception) -> Row:
    row = describe_failure(error)
    if row["status"] == "failed":
        traceback.print_exception(error)
    return row


def run_contest(contest_class: type[Contest[Any]], argv: Sequence[str] | None) -> list[Row]:
    """Run a contest as its command line asks, print its tables, and return its rows."""
    args = _parse(contest_class, argv)
    results = ResultsFile(args.out, environment(args.device, args.commit))
    contest = contest_class(
        results,
        device=args.device,
        steps=args.steps or (20 if args.device == "cuda" else 5),
        warmup_train=args.warmup_train,
    )
    arms = [arm for arm in contest_class.arms if arm.name in args.arms]
    for name in args.cases or contest_class.default_cases[args.device]:
        case = contest_class.cases[name]
        for precision in [PRECISIONS[name] for name in args.precision] or case.precisions:
            contest.run(case, precision, arms)
    print(f"\n{tables(results.rows)}\n\nRows are in {results.path}.")
    return results.rows


def _parse(contest_class: type[Contest[Any]], argv: Sequence[str] | None) -> argparse.Namespace:
    arms = [arm.name for arm in contest_class.arms]
    parser = argparse.ArgumentParser(
        description=sys.modules[contest_class.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = text.split(",")
            if unknown := set(chosen) - set(allowed):
                raise argparse.ArgumentTypeError(
                    f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(allowed)}"
                )
            return chosen

        return parse

    parser.add_argument(
        "--cases",
        type=names(contest_class.cases),
        default=[],
        help=f"{', '.join(contest_class.cases)}; by default those meant for the device",
    )
    parser.add_argument(
        "--precision",
        type=names(PRECISIONS),
        default=[],
        help=f"{', '.join(PRECISIONS)}; by default each case's own",
    )
    parser.add_argument(
        "--arms",
        type=names(arms),
        default=[arm.name for arm in contest_class.arms if arm.sparse],
        help=f"{', '.join(arms)}; by default the sparse ones; {STOCK.name} is always run",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, help="timed steps; by default 20, on a CPU 5")
    parser.add_argument(
        "--warmup-train",
        type=int,
        default=30,
        help="training steps that lead from planted features to the weights used",
    )
    parser.add_argument("--out", type=Path, help="JSON Lines file that rows are appended to")
    parser.add_argument("--commit", help="recorded with the rows; read from git by default")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.arms.append(STOCK.name)
    return args
