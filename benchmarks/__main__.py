"""
Measure registered problem sizes against stock SAELens and other libraries.

    python -m benchmarks [--quick]      the default cases of the device; tables and figures
    python -m benchmarks step           whole training steps
    python -m benchmarks forward        decode, forward, forward with backward
    python -m benchmarks kernels        each operation of a step beside what the device can do
    python -m benchmarks pair OTHER     whole steps of another checkout and this one, in turn
    python -m benchmarks store          the activation store alone, SAELens's and this package's
    python -m benchmarks cache          caches of activations: writing, reading, training
    python -m benchmarks run            whole runs, with language model, store, logging and evals
    python -m benchmarks several        runs of several SAEs, and what their parts take alone
    python -m benchmarks dead_latents   AuxK, ghost gradients or neither on real activations
    python -m benchmarks report         tables from the rows measured so far
    python -m benchmarks figures        figures from the rows measured so far

Rows are appended to a JSON Lines file as they come. An interrupted run goes on with the same
command: what the file has from the same device, commit and versions is passed over. `--help` after
a command lists its options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import (
    cache,
    cache_cases,
    dead_latents,
    figures,
    kernels,
    pair,
    run,
    run_cases,
    several,
    store,
)
from benchmarks.cases import CASES, NamedCase, groups_of
from benchmarks.command_line import CommandParser, names_of
from benchmarks.contenders import SPARSE, SPARSE_RUNNER, STOCK
from benchmarks.harness import FORWARD, STEP, Benchmark, Session, say
from benchmarks.language_models import LIBRARIES
from benchmarks.report import (
    cache_table,
    kernel_table,
    markdown,
    plain,
    run_table,
    store_table,
    tables,
)
from benchmarks.rows import FIGURES, Frame, ResultsFile, frame_of, load_rows
from benchmarks.run_cases import RUN_PRECISIONS
from saelens_sparse.architectures import ARCHITECTURES
from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.cases import PRECISIONS, Precision
from saelens_sparse.reports.command_line import (
    DEFAULT_STEPS,
    default_device,
    parse_shape,
    whole_number,
)
from saelens_sparse.reports.presentation import can_draw
from saelens_sparse.reports.results import environment

HELP = {
    "step": """
Time `SAETrainer.step` of the sparse architectures against SAELens's own.

    python -m benchmarks step --cases gemma2b,jumprelu_l0_64 --precision float32,autocast

For each case and precision, every contender in turn starts from the same trained-like weights, is
checked to train the same model as stock (see `agreement.py`), is timed, and is freed before the
next. The peers "sparsify" and "dictionary_learning" take steps of their own trainers.
""",
    "forward": """
Time the parts of a sparse SAE that published kernels report, against SAELens's own.

    python -m benchmarks forward --cases flash_sae

`decode` is `sae.decode(feature_acts)` on activations encoded beforehand, `forward` is `sae(x)`,
both without gradients; `forward_backward` adds the backward of a mean squared error, and no
optimizer.
""",
}


def shape_of(text: str) -> kernels.Shape:
    """argparse type: the sizes of a problem."""
    d_in, d_sae, k, rows = parse_shape(text)
    if min(d_in, d_sae, k, rows) < 1 or k > d_sae:
        raise argparse.ArgumentTypeError(f"all must be above 0 and K at most D_SAE; got {text!r}")
    return kernels.Shape(d_in, d_sae, k, rows)


def open_results(args: argparse.Namespace) -> ResultsFile:
    """The file that rows go to; says where it is before anything is measured."""
    results = ResultsFile(args.out, environment(args.device, args.commit))
    print(f"{results.environment['device']}; rows go to {results.path}", flush=True)
    return results


def show(results: ResultsFile, table: Callable[[Frame], Frame]) -> None:
    """Print a table of the rows, and say where they are."""
    print(f"\n{plain(table(frame_of(results.rows)))}\n\nRows are in {results.path}.")


def asked_cases(benchmark: str, args: argparse.Namespace) -> list[tuple[NamedCase, Precision]]:
    """The cases that `args` asks for, each in its precisions."""
    return [
        (case, precision)
        for case in (CASES[name] for name in args.cases or groups_of(benchmark)[args.device])
        for precision in [PRECISIONS[name] for name in args.precision] or case.precisions
    ]


def run_session(benchmark: Benchmark, results: ResultsFile, args: argparse.Namespace) -> None:
    """Measure what `args` asks for and `results` lacks; rows are appended as they come."""
    steps = args.steps or DEFAULT_STEPS[args.device]
    session = Session(benchmark, results, args.device, steps, args.warmup_train, args.again)
    contenders = [one for one in benchmark.contenders if one.name in {STOCK.name, *args.contenders}]
    for contender in contenders:
        if contender.peer is not None and (problem := contender.peer.problem(args.device)):
            say(f"{contender.name} is left out: {problem}")
    asked = asked_cases(benchmark.name, args)
    pending = sum(len(session.pending(*measured, contenders)) for measured in asked)
    progress: tqdm[Any] = tqdm(asked, unit="case", disable=not pending or None)
    for case, precision in progress:
        progress.set_description(f"{case.name} {precision.name}")
        session.run(case, precision, contenders)
    if pending < sum(session.takes(one, *measured) for measured in asked for one in contenders):
        print("What was measured already is in the file; --again measures it again.")


def run_benchmark(benchmark: Benchmark, argv: Sequence[str]) -> int:
    """`python -m benchmarks step` or `forward`."""
    parser = CommandParser(benchmark.name, HELP[benchmark.name])
    parser.add_case_options(benchmark, [contender.name for contender in benchmark.contenders])
    parser.add_running_options()
    args = parser.parse_args(argv)
    results = open_results(args)
    run_session(benchmark, results, args)
    if results.rows:
        print(f"\n{tables(frame_of(results.rows))}")
    print(f"\nRows are in {results.path}.")
    return 0


def run_kernels(argv: Sequence[str]) -> int:
    """`python -m benchmarks kernels`."""
    parser = CommandParser("kernels", kernels.__doc__)
    parser.add_argument(
        "--shape",
        type=shape_of,
        metavar="D_IN,D_SAE,K,BATCH",
        help="by default {cuda}, on a CPU {cpu}".format_map(kernels.DEFAULT_SHAPE),
    )
    parser.add_argument("--dtype", default=kernels.DTYPES[0], choices=kernels.DTYPES)
    parser.add_running_options(training=False)
    args = parser.parse_args(argv)
    shape: kernels.Shape = args.shape or kernels.DEFAULT_SHAPE[args.device]
    results = open_results(args)
    # The last of the operations: with it, all have rows.
    last = {"kernel": "Adam on a weight", "side": "stock"}
    if not args.again and results.measured(shape=str(shape), dtype=args.dtype, **last):
        print(f"{shape} {args.dtype} is measured already; --again measures it again.")
        return 0
    try:
        steps = args.steps or DEFAULT_STEPS[args.device]
        for row in kernels.measure(shape, args.dtype, args.device, steps):
            results.append(row)
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--shape {shape} needs more memory than there is") from error
    show(results, kernel_table)
    if args.device == "cpu":
        print("On a CPU kernels have no stages, and caches are as the last call left them.")
    return 0


def run_pair(argv: Sequence[str]) -> int:
    """`python -m benchmarks pair OTHER_CHECKOUT`."""
    parser = CommandParser("pair", pair.__doc__)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_case_options(STEP, [SPARSE.name, SPARSE_RUNNER.name])
    parser.add_argument("--rounds", type=whole_number(1), default=10, help="by default %(default)s")
    parser.add_running_options(resumes=False)
    args = parser.parse_args(argv)
    args.steps = args.steps or DEFAULT_STEPS[args.device]
    contenders = [one for one in (SPARSE, SPARSE_RUNNER) if one.name in args.contenders]
    return pair.run(open_results(args), asked_cases(STEP.name, args), contenders, args)


def run_store(argv: Sequence[str]) -> int:
    """`python -m benchmarks store`."""
    parser = CommandParser("store", store.__doc__)
    parser.add_cases(store.CASES, store.GROUPS)
    parser.add_argument(
        "--refills",
        type=whole_number(1),
        default=3,
        help="refills of the buffer in a turn; by default %(default)s",
    )
    parser.add_turn_options(rounds=5)
    args = parser.parse_args(argv)
    results = open_results(args)
    names = args.cases or store.GROUPS[args.device]
    status = store.run(results, [store.CASES[name] for name in names], args)
    show(results, store_table)
    return status


def run_cache(argv: Sequence[str]) -> int:
    """`python -m benchmarks cache`."""
    parser = CommandParser("cache", cache.__doc__)
    parser.add_cases(cache_cases.CASES)
    parser.add_argument(
        "--parts",
        type=names_of(cache.PARTS),
        help=f"separated by commas: {', '.join(cache.PARTS)}; by default all",
    )
    parser.add_turn_options(rounds=3)
    args = parser.parse_args(argv)
    results = open_results(args)
    names = args.cases or cache_cases.DEFAULT_CASES[args.device]
    cases = [cache_cases.CASES[name] for name in names]
    status = cache.run(results, cases, args.parts or cache.PARTS, args)
    show(results, cache_table)
    return status


def run_run(argv: Sequence[str]) -> int:
    """`python -m benchmarks run`."""
    parser = CommandParser("run", run.__doc__)
    cases, contenders = run_cases.CASES, run_cases.CONTENDERS
    parser.add_whole_run_options(precision="each case's own")
    parser.add_argument(
        "--libraries",
        type=names_of(LIBRARIES),
        default=list(LIBRARIES),
        help="of the language model, TransformerLens or transformers; by default %(default)s",
    )
    parser.add_argument(
        "--contenders",
        type=names_of(contenders, {"all": tuple(contenders)}),
        default=run_cases.DEFAULT_CONTENDERS,
        help=f"{', '.join(contenders)}, or all; by default "
        f"{', '.join(run_cases.DEFAULT_CONTENDERS)}",
    )
    parser.add_argument(
        "--llm-device",
        help="of the language model, such as cuda:1 beside SAEs on cuda:0; by default the SAEs'",
    )
    args = parser.parse_args(argv)
    results = open_results(args)
    asked = [cases[name] for name in args.cases or run_cases.DEFAULT_CASES[args.device]]
    measured = [
        (case.tiny if args.tiny else case, precision, library)
        for case in asked
        for precision in [RUN_PRECISIONS[name] for name in args.precision] or case.precisions
        for library in args.libraries
        if library in case.libraries
    ]
    entered = [one for one in contenders.values() if one.name in {"stock", *args.contenders}]
    status = run.run(results, measured, entered, args)
    show(results, run_table)
    return status


def run_several(argv: Sequence[str]) -> int:
    """`python -m benchmarks several`."""
    parser = CommandParser("several", several.__doc__)
    parser.add_whole_run_options(precision="each case's first")
    parser.add_argument("--library", choices=LIBRARIES, default=LIBRARIES[0])
    parser.add_argument("--n-saes", type=whole_number(1), default=8, help="by default %(default)s")
    parser.add_argument(
        "--contenders",
        type=names_of(several.CONTENDERS),
        default=list(several.CONTENDERS),
        help=f"{', '.join(several.CONTENDERS)}; by default both",
    )
    args = parser.parse_args(argv)
    results = open_results(args)
    measured = [
        (case, precision, args.library)
        for case in several.cases_named(
            args.cases or several.DEFAULT_CASES[args.device], tiny=args.tiny
        )
        for precision in [RUN_PRECISIONS[name] for name in args.precision] or case.precisions[:1]
    ]
    contenders = [name for name in several.CONTENDERS if name in args.contenders]
    status = several.run(results, measured, contenders, args)
    print(f"\nRows are in {results.path}.")
    return status


def run_dead_latents(argv: Sequence[str]) -> int:
    """`python -m benchmarks dead_latents`."""
    parser = CommandParser("dead_latents", dead_latents.__doc__)
    add, default = parser.add_argument, "by default %(default)s"
    losses = dead_latents.LOSSES
    add("--losses", type=names_of(losses), default=list(losses), help=default)
    add("--activations", type=Path, default=dead_latents.DEFAULT_ACTIVATIONS, help=default)
    add(
        "--architecture",
        choices=[name for name, one in ARCHITECTURES.items() if one.sparsity_field],
        default="topk_sparse",
        help=default,
    )
    add("--precision", choices=list(PRECISIONS), default="float32", help=default)
    for name, value in {
        "d-sae": 32_768, "k": 32, "batch": 4096, "steps": 600, "window": 300, "seeds": 1,
    }.items():  # fmt: skip
        add(f"--{name}", type=whole_number(1), default=value, help=default)
    add("--lr", type=float, default=1e-3, help=default)
    of_losses = "aux_loss_coefficient of either loss; by default %(default)s"
    add("--coefficient", type=float, default=1.0, help=of_losses)
    add("--device", choices=tuple(DEFAULT_STEPS), default=default_device(), help=default)
    parser.add_output_options()
    args = parser.parse_args(argv)
    results = open_results(args)
    status = dead_latents.run(results, args)
    print(f"\nRows are in {results.path}.")
    return status


def run_report(argv: Sequence[str]) -> int:
    """`python -m benchmarks report`."""
    parser = CommandParser("report", "Tables from the rows that the benchmarks have appended.")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    args, rows = parser.parse_files(argv)
    print(tables(rows, markdown if args.markdown else plain))
    return 0


def run_figures(argv: Sequence[str]) -> int:
    """`python -m benchmarks figures`."""
    parser = CommandParser("figures", figures.__doc__)
    parser.add_argument(
        "--to", type=Path, help="folder to draw into; by default the project's or one beside FILE"
    )
    args, rows = parser.parse_files(argv)
    if not can_draw():
        return 1
    default = figures.folder_for(args.files[0]) if args.files else FIGURES
    return draw(rows, args.to or default)


def draw(rows: Frame, folder: Path) -> int:
    """Draw all figures and say where they are."""
    for path in figures.draw(rows, folder):
        print(f"drawn: {path}")
    return 0


def run_default(argv: Sequence[str]) -> int:
    """`python -m benchmarks [OPTIONS]`: everything meant for the device, tables and figures."""
    parser = CommandParser("", __doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small cases and few steps: a minute on two CPU cores"
    )
    parser.add_running_options()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(steps=3, warmup_train=10)
        args = parser.parse_args(argv)
    results = open_results(args)
    args.precision = []
    for benchmark in (STEP, FORWARD):
        args.cases = list(groups_of(benchmark.name)["quick" if args.quick else args.device])
        args.contenders = [
            one.name
            for one in benchmark.contenders
            if one in (SPARSE, SPARSE_RUNNER) or not args.quick
        ]
        run_session(benchmark, results, args)

    rows = frame_of(load_rows([results.path]))
    of_device = rows[rows["device"] == results.environment["device"]]
    print(f"\n{tables(of_device)}\n\nRows are in {results.path}.")
    return draw(of_device, figures.folder_for(results.path)) if can_draw() else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "step": lambda argv: run_benchmark(STEP, argv),
    "forward": lambda argv: run_benchmark(FORWARD, argv),
    "kernels": run_kernels,
    "pair": run_pair,
    "store": run_store,
    "cache": run_cache,
    "run": run_run,
    "several": run_several,
    "dead_latents": run_dead_latents,
    "report": run_report,
    "figures": run_figures,
}


def main(argv: Sequence[str]) -> int:
    """`python -m benchmarks ARGV`; returns the exit status."""
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        return run_default(argv)
    except UsageError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Finished rows are kept; the same command goes on from there.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
