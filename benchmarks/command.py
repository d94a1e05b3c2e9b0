"""
Measure registered problem sizes against stock SAELens and other libraries.

    saelens-sparse bench [--quick]      the default cases of the device; tables and figures
    saelens-sparse bench step           whole training steps
    saelens-sparse bench forward        decode, forward, forward with backward
    saelens-sparse bench kernels        each operation of a step beside what the device can do
    saelens-sparse bench report         tables from the rows measured so far
    saelens-sparse bench figures        figures from the rows measured so far

Rows are appended to a JSON Lines file as they come. An interrupted run goes on with the same
command: what the file has from the same device, commit and versions is passed over. `--help` after
a command lists its options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks import figures, forward, kernels, report, train_step
from benchmarks.session import (
    add_common_options,
    open_results,
    run_contest,
)
from saelens_sparse.reports.command_line import Parser
from saelens_sparse.reports.presentation import can_draw
from saelens_sparse.reports.results import load_rows

CONTESTS = (train_step.StepContest, forward.ForwardContest)
COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "step": train_step.main,
    "forward": forward.main,
    "kernels": kernels.main,
    "report": report.main,
    "figures": figures.main,
}


def run_default(argv: Sequence[str]) -> int:
    """`saelens-sparse bench [OPTIONS]`: everything meant for the device, tables and figures."""
    parser = Parser("bench", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small cases and few steps: a minute on two CPU cores"
    )
    add_common_options(parser)
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(steps=3, warmup_train=10)
        args = parser.parse_args(argv)
    results = open_results(args)
    for contest in CONTESTS:
        args.cases = list(contest.groups["quick"] if args.quick else contest.groups[args.device])
        args.precision = []
        args.arms = [arm.name for arm in contest.arms if arm.sparse or not args.quick]
        run_contest(contest, results, args)

    rows = load_rows([results.path])
    of_device = [row for row in rows if row["device"] == results.environment["device"]]
    print(f"\n{report.tables(of_device)}\n\nRows are in {results.path}.")
    if can_draw():
        for path in figures.draw(of_device, figures.folder_for(results.path)):
            print(f"drawn: {path}")
    return 0


def main(args: Sequence[str]) -> int:
    """`saelens-sparse bench ARGS`; returns the exit status."""
    try:
        if args and args[0] in COMMANDS:
            return COMMANDS[args[0]](args[1:])
        return run_default(args)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished rows are kept; the same command goes on from there.")
        return 130
