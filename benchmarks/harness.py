"""The course of a benchmark of contenders: prepare, check, measure, record."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.agreement import (
    Differences,
    Trajectory,
    differences,
    first_step,
    require_agreement,
)
from benchmarks.cases import REFERENCE_PRECISION, NamedCase
from benchmarks.contenders import (
    DICTIONARY_LEARNING,
    SPARSE,
    SPARSE_RUNNER,
    SPARSIFY,
    STOCK,
    STOCK_COMPILE,
    STOCK_TF32,
    TRADE_OFFS,
    Contender,
)
from benchmarks.models import Model
from benchmarks.rows import ResultsFile, Row
from saelens_sparse.profile.cases import Precision
from saelens_sparse.profile.measure import time_calls
from saelens_sparse.profile.trainers import Inputs, prepare_inputs, release_memory
from saelens_sparse.reports.results import describe_failure


@dataclass(frozen=True)
class Benchmark:
    """
    What contenders are measured by.

    Attributes:
        name: its command.
        operations: names of what is timed.
        contenders: who can take part, stock first.
        observe: takes a fresh model; gives what it is compared by.
        of_peers: the part of that which peers are compared by.
        measure: times one of the operations, on so many steps or calls at most.
    """

    name: str
    operations: tuple[str, ...]
    contenders: tuple[Contender, ...]
    observe: Callable[[Model], Trajectory]
    of_peers: Callable[[Trajectory], Trajectory]
    measure: Callable[[Model, str, int], Row]


def without_gradients(model: Model, call: Callable[..., Any], *args: Any) -> Any:
    """What the model's method gives, in its precision."""
    with torch.no_grad(), model.autocast():
        return call(*args)


def observe_passes(model: Model) -> Trajectory:
    """Reconstructions of a batch, and the gradients of their error."""
    x = model.x
    model.forward_backward(x)
    trajectory = {
        f"gradient of {name}": model.gradient(name)
        for name, parameter in model.parameters.items()
        if parameter.grad is not None
    }
    activations = without_gradients(model, model.encode, x)
    trajectory["decoded"] = without_gradients(model, model.decode, activations)
    trajectory["reconstruction"] = without_gradients(model, model.forward, x)
    return {name: value.cpu() for name, value in trajectory.items()}


def measure_pass(model: Model, operation: str, steps: int) -> Row:
    """Time decoding, a forward pass, or one with its backward pass."""
    x = model.x
    model.forget_gradients()
    if operation == "decode":
        activations = without_gradients(model, model.encode, x)
        call = partial(without_gradients, model, model.decode, activations)
    elif operation == "forward":
        call = partial(without_gradients, model, model.forward, x)
    else:
        call = partial(model.forward_backward, x)
    timed = time_calls(call, model.device, steps)
    return {"implementation": model.implementation, **timed.to_row()}


STEP = Benchmark(
    "step",
    operations=("step",),
    contenders=(
        STOCK,
        STOCK_TF32,
        STOCK_COMPILE,
        SPARSE,
        SPARSE_RUNNER,
        *TRADE_OFFS,
        replace(SPARSIFY, matmul_precision="high"),  # as its trainer has it
        DICTIONARY_LEARNING,
    ),
    observe=lambda model: model.rehearse(),
    of_peers=first_step,
    measure=lambda model, _operation, steps: model.time_training(steps),
)
FORWARD = Benchmark(
    "forward",
    operations=("decode", "forward", "forward_backward"),
    contenders=(STOCK, STOCK_TF32, SPARSE, SPARSIFY, DICTIONARY_LEARNING),
    observe=observe_passes,
    of_peers=lambda trajectory: trajectory,
    measure=measure_pass,
)


@dataclass
class Session:
    """
    Runs contenders one after the other on the same inputs, each alone on the device.

    Stock comes first: its distance from the reference (itself, in a higher precision) bounds that
    of the others, which are timed only if they keep to it. What fails becomes a row that says so,
    and the rest goes on.

    Attributes:
        benchmark: what is measured.
        results: where rows go, and where those of earlier runs are looked up.
        device: "cuda" or "cpu".
        steps: timed steps or calls, at most.
        warmup_train: training steps that lead from planted features to the weights used.
        again: whether to measure again what `results` has from this device, commit and versions.
    """

    benchmark: Benchmark
    results: ResultsFile
    device: str
    steps: int
    warmup_train: int
    again: bool = False

    def takes(self, contender: Contender, case: NamedCase, precision: Precision) -> bool:
        """Whether the contender can take part."""
        peer = contender.peer
        if not contender.takes(case, precision) or not contender.runs_on(self.device):
            return False
        return peer is None or (
            peer.problem(self.device) is None
            and (self.benchmark.name != STEP.name or peer.trains_in(precision, self.device))
        )

    def pending(
        self, case: NamedCase, precision: Precision, contenders: Sequence[Contender]
    ) -> list[Contender]:
        """
        Those that are to be measured: those without a good row for each operation. Stock is
        measured beside them again, unless its rows are from this very machine: machines of one
        kind differ, and ratios are what counts.
        """
        entered = [one for one in contenders if self.takes(one, case, precision)]
        if self.again:
            return entered

        def is_done(contender: Contender, **more: Any) -> bool:
            return all(
                self._measured(case, precision, contender, operation=operation, **more)
                for operation in self.benchmark.operations
            )

        machine = self.results.environment["machine"]
        pending = [contender for contender in entered if not is_done(contender)]
        if pending and STOCK in entered and STOCK not in pending:
            pending = pending if is_done(STOCK, machine=machine) else [STOCK, *pending]
        return pending

    def run(self, case: NamedCase, precision: Precision, contenders: Sequence[Contender]) -> None:
        """Measure the pending of them and record a row for each and operation."""
        pending = self.pending(case, precision, contenders)
        entered = [one for one in contenders if self.takes(one, case, precision)]
        skipped = [contender.name for contender in entered if contender not in pending]
        if skipped:
            say(f"{case.name} {precision.name}: {', '.join(skipped)} measured already")
        if not pending:
            return
        try:
            release_memory(self.device)
            inputs = prepare_inputs(case, precision, self.device, self.warmup_train)
        except Exception as error:
            self._record(case, precision, SPARSE, self._failed(error))
            return

        reference = self._observe_reference(case, precision, inputs)
        earlier = self._measured(
            case, precision, STOCK, operation=self.benchmark.operations[0]
        )  # fmt: skip
        bound: Differences | None = earlier and earlier["differences"]
        for contender in pending:
            torch.set_float32_matmul_precision(contender.matmul_precision)
            rows = self._measure(contender, case, precision, inputs, reference, bound)
            torch.set_float32_matmul_precision("highest")
            self._record(case, precision, contender, rows)
            if contender == STOCK:
                bound = rows[0]["differences"]

    def _measured(
        self, case: NamedCase, precision: Precision, contender: Contender, **key: Any
    ) -> Row | None:
        return self.results.measured(
            case=case.name, precision=precision.name, arm=contender.name, **key
        )

    def _observe_reference(
        self, case: NamedCase, precision: Precision, inputs: Inputs
    ) -> Trajectory | None:
        """What stock does in a higher precision; where that fails, None, and none is checked."""
        higher = REFERENCE_PRECISION[precision.name]
        try:
            release_memory(self.device)
            return self.benchmark.observe(STOCK.build(case, higher, self.device, inputs))
        except Exception as error:
            say(f"{case.name}: no {higher.name} reference: {describe(error)['message']}")
            return None

    def _measure(
        self,
        contender: Contender,
        case: NamedCase,
        precision: Precision,
        inputs: Inputs,
        reference: Trajectory | None,
        bound: Differences | None,
    ) -> list[Row]:
        """Check the contender, within `bound` if there is one, and time its operations."""
        found: Row = {"differences": None, "checked": False}
        try:
            release_memory(self.device)
            model = contender.build(case, precision, self.device, inputs)
            if contender.peer is not None:
                found |= {"peer": contender.peer.version(), "note": model.note}
                reference = reference and self.benchmark.of_peers(reference)
            trajectory = self.benchmark.observe(model)
            if reference is not None:
                found["differences"] = differences(trajectory, reference, self.device)
                if bound is not None and (contender.sparse or contender.peer is not None):
                    require_agreement(found["differences"], bound)
                    found["checked"] = True
            del trajectory
        except Exception as error:
            return [{**found, **row} for row in self._failed(error)]

        rows: list[Row] = []
        for operation in self.benchmark.operations:
            try:
                row = {"status": "ok", **self.benchmark.measure(model, operation, self.steps)}
            except Exception as error:
                row = describe(error)
            rows.append({**found, "operation": operation, **row})
        return rows

    def _failed(self, error: Exception) -> list[Row]:
        failure = describe(error)
        return [{"operation": operation, **failure} for operation in self.benchmark.operations]

    def _record(
        self, case: NamedCase, precision: Precision, contender: Contender, rows: Sequence[Row]
    ) -> None:
        for row in rows:
            self.results.append(
                {
                    "case": case.name,
                    "precision": precision.name,
                    "arm": contender.name,
                    **sizes_of(case),
                    **row,
                }
            )
            outcome = f"{row['ms']:.2f} ms" if row["status"] == "ok" else row["message"]
            say(f"{case.name} {precision.name} {row['operation']} {contender.name}: {outcome}")


def sizes_of(case: NamedCase) -> Row:
    """A case's keys in its rows."""
    has_k = case.registered.sparsity_field is not None
    return {
        "architecture": case.registered.stock,
        "d_in": case.d_in,
        "d_sae": case.d_sae,
        "k": case.sparsity if has_k else None,
        "l0": None if has_k else case.sparsity,
        "batch": case.batch,
        "dead_fraction": case.dead_fraction,
        "sweep": case.sweep,
    }


def say(message: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(message)


def describe(error: Exception) -> Row:
    """The status and message of a measurement that raised; shows the traceback of a surprise."""
    row = describe_failure(error)
    if row["status"] == "failed":
        traceback.print_exception(error)
    return row
