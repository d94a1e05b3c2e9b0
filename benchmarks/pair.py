"""
Whole steps of two checkouts of this package, in turn on one device.

Each checkout takes its steps in a process of its own (`timed_steps.py`), from the same weights and
batches, which this checkout makes. Both processes stay alive, and rounds alternate between them:
what the device does meanwhile meets both alike. Their first losses are compared before anything is
timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import IO, Any, cast

import pandas as pd
import torch

from benchmarks.agreement import CHECK_STEPS, FLOORS
from benchmarks.cases import NamedCase
from benchmarks.contenders import Contender
from benchmarks.harness import say, sizes_of
from benchmarks.rows import CHECKOUT, DisagreementError, Frame, ResultsFile, Row
from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.cases import Precision
from saelens_sparse.profile.trainers import prepare_inputs, release_memory
from saelens_sparse.reports.results import describe_failure, git_commit

SCRIPT = Path(__file__).with_name("timed_steps.py")


class Worker:
    """A process that times steps of a checkout."""

    def __init__(self, process: subprocess.Popen[str], checkout: Path):
        self.process = process
        self.checkout = checkout

    def ask(self, request: str = "") -> Any:
        """Send a line, if one is given, and wait for the answer."""
        if request:
            stdin = cast(IO[str], self.process.stdin)
            stdin.write(f"{request}\n")
            stdin.flush()
        answer = cast(IO[str], self.process.stdout).readline()
        if not answer:
            raise RuntimeError(f"the process of {self.checkout} ended; its message is above")
        return json.loads(answer)


@contextmanager
def running(checkout: Path, inputs: Path, runner: str) -> Generator[Worker]:
    """A worker, until the context ends."""
    path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        # Files beside the script are no modules of its own.
        [sys.executable, "-P", SCRIPT, checkout, inputs, runner],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield Worker(process, checkout)
        finally:
            process.kill()


def write_inputs(
    case: NamedCase, precision: Precision, device: str, warmup_train: int, file: Path
) -> None:
    """Write what both workers train: configs, weights and batches."""
    inputs = prepare_inputs(case, precision, device, warmup_train)
    torch.save(
        {
            "sae": {
                "architecture": case.architecture,
                "d_in": case.d_in,
                "d_sae": case.d_sae,
                "dtype": str(precision.dtype).removeprefix("torch."),
                "device": device,
                **case.sae_options,
            },
            "trainer": {
                "total_training_samples": 1_000_000 * case.batch,
                "train_batch_size_samples": case.batch,
                "lr": case.learning_rate,
                "lr_end": case.learning_rate / 10,
                "device": device,
                "autocast": precision.autocast,
            },
            "batches": [batch.cpu() for batch in inputs.batches],
            "weights": inputs.weights,
            "dead_latents": None if inputs.dead_latents is None else inputs.dead_latents.cpu(),
        },
        file,
    )
    del inputs
    release_memory(device)


def compare(contender: Contender, inputs: Path, other: Path, steps: int, rounds: int) -> Row:
    """Check and time both checkouts in turn, `rounds` times."""
    runner = "sparse" if contender.sparse_runner else "stock"
    with running(other, inputs, runner) as before, running(CHECKOUT, inputs, runner) as after:
        first = [before.ask(), after.ask()]
        require_same_losses([answer["losses"][:CHECK_STEPS] for answer in first])
        timed = [[worker.ask(str(steps)) for worker in (before, after)] for _ in range(rounds)]
        ran_on = [worker.ask("implementation") for worker in (before, after)]
    ratios = [median(after) / median(before) for before, after in timed]
    ms_other, ms = ([time for pair in timed for time in pair[side]] for side in (0, 1))
    return {
        "status": "ok",
        "ms": median(ms),
        "ms_other": median(ms_other),
        # Of rounds, each of which is one after the other: a change of the machine meets both sides.
        "ratio": median(ratios),
        "ratio_by_round": ratios,
        "same_losses": first[0]["losses"] == first[1]["losses"],
        "implementation": ran_on[1],
        "implementation_other": ran_on[0],
        "steps": steps * rounds,
    }


def require_same_losses(losses: Sequence[Sequence[float]]) -> None:
    """
    Raises:
        DisagreementError: The checkouts' first losses differ by more than rounding.
    """
    for step, (before, after) in enumerate(zip(*losses, strict=True), start=1):
        if not abs(after - before) <= FLOORS["loss"] * abs(before):
            raise DisagreementError(f"the loss of step {step} is {before} there, {after} here")


def run(
    results: ResultsFile,
    measured: Iterable[tuple[NamedCase, Precision]],
    contenders: Sequence[Contender],
    args: Namespace,
) -> int:
    """
    Compare contenders in each case and print a table; returns 1 if any could not be compared.

    Args:
        results: Where a row for each goes.
        measured: Cases and their precisions.
        contenders: Sparse ones.
        args: The options `other`, `device`, `steps`, `rounds` and `warmup_train`.

    Raises:
        UsageError: `other` is no checkout.
    """
    other = args.other.resolve()
    if not (other / "saelens_sparse").is_dir():
        raise UsageError(f"OTHER_CHECKOUT: {args.other} is no checkout of this package")
    for case, precision in measured:
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder) / "inputs.pt"
            write_inputs(case, precision, args.device, args.warmup_train, inputs)
            for contender in contenders:
                try:
                    row = compare(contender, inputs, other, args.steps, args.rounds)
                    said = f"{row['ms_other']:.3f} ms there, {row['ms']:.3f} ms here"
                except Exception as error:
                    row = describe_failure(error)
                    said = row["message"]
                say(f"{case.name} {precision.name} {contender.name}: {said}")
                key = {"case": case.name, "precision": precision.name, "contender": contender.name}
                key["other_checkout"] = git_commit(other) or other.name
                results.append({**key, **sizes_of(case), **row})
    print(f"\n{table(results.rows).to_string(index=False)}")
    return int(any(row["status"] != "ok" for row in results.rows))


def table(rows: Sequence[Row]) -> Frame:
    """Medians of both checkouts, the median ratio of the rounds, and its range over them."""
    return pd.DataFrame(
        [
            {
                "case": row["case"],
                "precision": row["precision"],
                "contender": row["contender"],
                **(_numbers(row) if row["status"] == "ok" else {"here / other": row["message"]}),
            }
            for row in rows
        ]
    ).fillna("-")


def _numbers(row: Row) -> Row:
    return {
        "other ms": f"{row['ms_other']:.3f}",
        "this ms": f"{row['ms']:.3f}",
        "here / other": f"{row['ratio']:.4f}",
        "by round": f"{min(row['ratio_by_round']):.4f} to {max(row['ratio_by_round']):.4f}",
        "first losses": "same bits" if row["same_losses"] else "same up to rounding",
        "ran on": "{implementation_other}, {implementation}".format_map(row),
    }
