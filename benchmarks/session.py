"""A contest as its command line asks for it: which cases, which arms, what is measured already."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.contest import Contest, say
from benchmarks.report import tables
from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.cases import PRECISIONS, STOCK, Arm, Case, Precision
from saelens_sparse.reports.command_line import (
    DEFAULT_STEPS,
    Parser,
    add_measuring_options,
)
from saelens_sparse.reports.results import RESULTS, ResultsFile, environment, load_rows


def main_of(name: str, contest_class: type[Contest[Any]], argv: Sequence[str]) -> int:
    """Run a contest as `saelens-sparse bench NAME ARGV` and print its tables."""
    args = _parser(name, contest_class).parse_args(argv)
    results = open_results(args)
    run_contest(contest_class, results, args)
    if results.rows:
        print(f"\n{tables(results.rows)}")
    print(f"\nRows are in {results.path}.")
    return 0


def run_contest(
    contest_class: type[Contest[Any]], results: ResultsFile, args: argparse.Namespace
) -> None:
    """Measure what `args` asks for and `results` lacks; rows are appended as they come."""
    contest = contest_class(
        results,
        device=args.device,
        steps=args.steps or DEFAULT_STEPS[args.device],
        warmup_train=args.warmup_train,
        again=args.again,
    )
    arms = [arm for arm in contest_class.arms if arm.name in {STOCK.name, *args.arms}]
    for arm in arms:
        if arm in contest.absent_peers:
            say(f"{arm.name} is left out: {contest.absent_peers[arm]}")
    names = args.cases or contest_class.groups[args.device]
    heats: list[tuple[Case, Precision]] = [
        (case, precision)
        for case in (contest_class.cases[name] for name in dict.fromkeys(names))
        for precision in [PRECISIONS[name] for name in args.precision] or case.precisions
    ]
    total = sum(len(contest.pending(*heat, arms)) for heat in heats)
    progress: tqdm[Any] = tqdm(total=total, unit="arm", disable=not total or None)
    with progress:
        for case, precision in heats:
            progress.set_description(f"{case.name} {precision.name}")
            contest.run(case, precision, arms, progress)
    if total < sum(contest.takes(arm, *heat) for heat in heats for arm in arms):
        print("What was measured already is in the file; --again measures it again.")


def open_results(args: argparse.Namespace) -> ResultsFile:
    """The file that rows go to; says where it is before anything is measured."""
    if args.out is not None:
        _check_out(args.out)
    results = ResultsFile(args.out, environment(args.device, args.commit))
    print(f"{results.environment['device']}; rows go to {results.path}", flush=True)
    return results


def add_common_options(parser: Parser, *, training: bool = True) -> None:
    """Options of all commands that append rows."""
    add_measuring_options(parser, training=training)
    parser.add_argument(
        "--out",
        type=Path,
        help=f"JSON Lines file that rows are appended to; by default the device's in {RESULTS}",
    )
    parser.add_argument("--commit", help="recorded with the rows; read from git by default")
    parser.add_argument(
        "--again", action="store_true", help="measure even what the file has good rows of"
    )


def names_of(
    allowed: Iterable[str], groups: dict[str, tuple[str, ...]] | None = None
) -> Callable[[str], list[str]]:
    """Parser of names separated by commas, of which those of groups stand for their members."""
    groups = groups or {}
    allowed = list(allowed)

    def parse(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := [name for name in asked if name not in allowed and name not in groups]:
            known = ", ".join([*allowed, *groups])
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {known}")
        return [member for name in asked for member in groups.get(name, (name,))]

    return parse


def _check_out(path: Path) -> None:
    """Refuse a file that rows cannot be appended to, or that has other content than rows."""
    if path.is_dir():
        raise UsageError(f"--out must name a JSON Lines file; {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        rows = load_rows([path])
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--out: {path} cannot be used: {error}") from error
    if path.stat().st_size and not any("device" in row for row in rows):
        raise UsageError(f"--out: {path} holds something else than rows; name another file")


def _parser(name: str, contest_class: type[Contest[Any]]) -> Parser:
    arms: Sequence[Arm] = contest_class.arms
    parser = Parser(f"bench {name}", sys.modules[contest_class.__module__].__doc__)
    groups = dict(contest_class.groups)
    single = [name for name, case in contest_class.cases.items() if case.sweep is None]
    parser.add_argument(
        "--cases",
        type=names_of(contest_class.cases, groups),
        default=[],
        help=f"separated by commas: {', '.join(single)}, or a group: {', '.join(groups)}; "
        "by default those of the device",
    )
    parser.add_argument(
        "--precision",
        type=names_of(PRECISIONS),
        default=[],
        help=f"{', '.join(PRECISIONS)}; by default each case's own",
    )
    parser.add_argument(
        "--arms",
        type=names_of([arm.name for arm in arms], {"all": tuple(arm.name for arm in arms)}),
        default=[arm.name for arm in arms if arm.sparse],
        help=f"{', '.join(arm.name for arm in arms)}, or all; by default the sparse ones; "
        f"{STOCK.name} is always run",
    )
    add_common_options(parser)
    return parser
