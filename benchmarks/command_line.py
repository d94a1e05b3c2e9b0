"""The options that commands of `python -m benchmarks` have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.cases import CASES, groups_of
from benchmarks.contenders import SPARSE, SPARSE_RUNNER
from benchmarks.harness import Benchmark
from benchmarks.rows import RESULTS, Frame, frame_of, load_rows
from benchmarks.run_cases import CASES as RUN_CASES
from benchmarks.run_cases import RUN_PRECISIONS
from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.cases import PRECISIONS
from saelens_sparse.reports.command_line import (
    DEFAULT_STEPS,
    Parser,
    add_measuring_options,
    default_device,
    device_name,
    whole_number,
    writable_folder,
)


class CommandParser(Parser):
    """Options of a command of `python -m benchmarks`."""

    def __init__(self, command: str, description: str | None):
        super().__init__(command, description)
        self.prog = f"python -m benchmarks {command}".strip()

    def add_running_options(self, *, training: bool = True, resumes: bool = True) -> None:
        """Those of commands that append rows: `training` weights, or passing over earlier rows."""
        add_measuring_options(self, training=training)
        self.add_output_options()
        if resumes:
            self.add_argument(
                "--again", action="store_true", help="measure even what the file has good rows of"
            )

    def add_output_options(self) -> None:
        """Where rows go, and what they say of the checkout."""
        self.add_argument(
            "--out",
            type=Path,
            help=f"JSON Lines file that rows are appended to; by default the device's in {RESULTS}",
        )
        self.add_argument("--commit", help="recorded with the rows; read from git by default")

    def add_turn_options(self, rounds: int) -> None:
        """Those of commands whose contenders read a data set from disk and take turns."""
        self.add_argument(
            "--device",
            type=device_name,
            choices=tuple(DEFAULT_STEPS),
            default=default_device(),
            help="by default the GPU if there is one",
        )
        self.add_argument(
            "--rounds",
            type=whole_number(1),
            default=rounds,
            help="turns of each contender; by default %(default)s",
        )
        self.add_argument(
            "--cache",
            type=writable_folder,
            metavar="FOLDER",
            help="keeps the data sets; by default they go into a temporary folder",
        )
        self.add_output_options()

    def add_cases(
        self, cases: Iterable[str], groups: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Which cases, of a command that has its own."""
        cases = [*cases]
        self.add_argument(
            "--cases",
            type=names_of(cases, groups),
            help=f"separated by commas: {', '.join(cases)}; by default those of the device",
        )

    def add_whole_run_options(self, precision: str) -> None:
        """Those of commands that time whole runs.

        Args:
            precision: What is the default, in words.
        """
        self.add_cases(RUN_CASES)
        self.add_argument(
            "--precision",
            type=names_of(RUN_PRECISIONS),
            default=[],
            help=f"{', '.join(RUN_PRECISIONS)}; by default {precision}",
        )
        self.add_argument(
            "--tiny",
            action="store_true",
            help="the same cases so small that a CPU runs them in seconds",
        )
        self.add_argument(
            "--windows",
            type=whole_number(1),
            default=2,
            help="timed windows of a run; by default %(default)s",
        )
        self.add_turn_options(rounds=1)

    def add_case_options(self, benchmark: Benchmark, contenders: Iterable[str]) -> None:
        """Which cases, in which precisions, and who takes part by default."""
        groups = groups_of(benchmark.name)
        cases = {name: one for name, one in CASES.items() if benchmark.name in one.benchmarks}
        single = [name for name, case in cases.items() if case.sweep is None]
        self.add_argument(
            "--cases",
            type=names_of(cases, groups),
            default=[],
            help=f"separated by commas: {', '.join(single)}, or a group: {', '.join(groups)}; "
            "by default those of the device",
        )
        self.add_argument(
            "--precision",
            type=names_of(PRECISIONS),
            default=[],
            help=f"{', '.join(PRECISIONS)}; by default each case's own",
        )
        allowed = list(contenders)
        self.add_argument(
            "--contenders",
            "--arms",
            type=names_of(allowed, {"all": tuple(allowed)}),
            default=[one.name for one in (SPARSE, SPARSE_RUNNER) if one.name in allowed],
            help=f"{', '.join(allowed)}, or all; by default the sparse ones",
        )

    def parse_files(self, argv: Sequence[str]) -> tuple[argparse.Namespace, Frame]:
        """Options of a command that reads files, and the rows of these."""
        self.add_argument("files", nargs="*", type=Path, help=f"by default all in {RESULTS}")
        args = self.parse_args(argv)
        rows = load_rows(args.files or sorted(RESULTS.glob("*.jsonl")))
        if not rows:
            raise UsageError("there are no rows; python -m benchmarks measures some")
        return args, frame_of(rows)


def names_of(
    allowed: Iterable[str], groups: Mapping[str, tuple[str, ...]] | None = None
) -> Callable[[str], list[str]]:
    """argparse type: names separated by commas; those of groups stand for their members."""
    members = {**{name: (name,) for name in allowed}, **(groups or {})}

    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in members]:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; known: {', '.join(members)}"
            )
        return list(dict.fromkeys(member for name in asked for member in members[name]))

    return parse
