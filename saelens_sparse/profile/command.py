"""
`saelens-sparse profile`: where the time and the memory of one training step go.

Takes a step of a stock and a sparse SAE apart, on weights and inputs that fire like those of a
real training: time by phase, kernels against what the device can do, memory, idle time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

import saelens_sparse
from saelens_sparse.config.files import UsageError, load_config, usage_errors
from saelens_sparse.config.outputs import check_writable
from saelens_sparse.profile.arm import (
    Measurement,
    measure_arm,
    pieces_of,
    problem_of,
)
from saelens_sparse.profile.cases import FLOAT32, PRECISIONS, SPARSE_SUFFIX, Arm
from saelens_sparse.profile.ceilings import Ceilings, measure_ceilings
from saelens_sparse.profile.counters import why_not
from saelens_sparse.profile.report import (
    REPORT_FILE,
    RESULTS_FILE,
    read_results,
    terminal_text,
    write_report,
    write_results,
)
from saelens_sparse.profile.settings import (
    ARMS,
    Settings,
    architectures,
    case_of_config,
    case_of_shape,
    parse_arms,
    precision_of_config,
)
from saelens_sparse.profile.tables import Record
from saelens_sparse.profile.trainers import prepare_inputs
from saelens_sparse.reports.command_line import (
    DEFAULT_STEPS,
    Parser,
    add_measuring_options,
    parse_shape,
    writable_folder,
)
from saelens_sparse.reports.output_folder import enter_output_folder
from saelens_sparse.reports.presentation import label_of
from saelens_sparse.reports.results import (
    describe_failure,
    environment,
    same_source,
)

_BAR = "{desc:20} {percentage:3.0f}% |{bar:30}| {elapsed}"


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    saelens_sparse.register()
    options = _parser().parse_args(args)
    settings, arms = _settings(options), parse_arms(options.arms)
    folder = options.output or Path(_folder_name(settings, options.config))
    with usage_errors():
        check_writable("--output", folder, 0)
    with ExitStack() as lock:
        try:
            results = _results_to_continue(settings, folder)
            lock.enter_context(enter_output_folder(folder, RESULTS_FILE))
        except OSError as error:
            raise UsageError(f"--output: {folder} cannot be used: {error}") from error
        return _profile(arms, settings, results, folder)


def _profile(arms: Sequence[Arm], settings: Settings, results: Record, folder: Path) -> int:
    """Measure the arms that the results lack, and report; returns the exit status."""
    missing = [arm for arm in arms if results["arms"].get(arm.name, {}).get("status") != "ok"]
    interrupted = False
    if missing:
        try:
            _measure(missing, settings, results, folder)
        except KeyboardInterrupt:
            interrupted = True
    wanted = [arm.name for arm in arms if arm.name in results["arms"]]
    shown = {**results, "arms": {name: results["arms"][name] for name in wanted}}
    if wanted:
        write_report(shown, folder)
        print(f"\n{terminal_text(shown)}\n\nThe report is {folder / REPORT_FILE}.")
    if interrupted:
        print(
            "Interrupted. Arms that were finished are kept; the same command measures the others.",
            file=sys.stderr,
        )
        return 130
    return 0 if all(shown["arms"][name]["status"] == "ok" for name in wanted) else 1


def _parser() -> Parser:
    parser = Parser("profile", __doc__)
    parser.add_argument(
        "config", nargs="?", help="runner config (JSON) whose SAE, batch size and precision to take"
    )
    parser.add_argument(
        "--shape",
        type=parse_shape,
        metavar="D_IN,D_SAE,K,BATCH",
        help="these instead of a config",
    )
    parser.add_argument(
        "--architecture",
        help=f"{', '.join(name + SPARSE_SUFFIX for name in architectures())}; "
        "by default the config's, with --shape topk_sparse",
    )
    parser.add_argument(
        "--l0",
        type=float,
        help="mean number of active latents where the architecture has no k; by default the "
        "config's target_l0 or 64, with --shape its K",
    )
    parser.add_argument(
        "--precision",
        choices=list(PRECISIONS),
        help="by default the config's, with --shape float32",
    )
    parser.add_argument("--arms", default=",".join(ARMS), help=f"by default all: {', '.join(ARMS)}")
    parser.add_argument(
        "--dead-fraction", type=float, default=0.0, help="share of latents held dead; default 0"
    )
    add_measuring_options(parser)
    parser.add_argument(
        "--output",
        type=writable_folder,
        help="folder of the results; by default named by the problem",
    )
    parser.add_argument(
        "--ncu",
        choices=("auto", "never"),
        default="auto",
        help="whether to read hardware counters with Nsight Compute where it is installed",
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """
    What the options ask for.

    Raises:
        UsageError: they cannot be used; the message names the option, its value and what can.
    """
    if (options.config is None) == (options.shape is None):
        raise UsageError("profile: give either a config file or --shape D_IN,D_SAE,K,BATCH")
    if options.shape is not None:
        architecture = options.architecture or "topk_sparse"
        case = case_of_shape(options.shape, architecture, options.l0, options.dead_fraction)
        precision = PRECISIONS[options.precision or FLOAT32.name]
    else:
        cfg = load_config(options.config)
        case = case_of_config(cfg, options.architecture, options.l0, options.dead_fraction)
        asked = options.precision
        precision = precision_of_config(cfg) if asked is None else PRECISIONS[asked]
    device = options.device
    steps = options.steps or DEFAULT_STEPS[device]
    counters = options.ncu == "auto" and why_not(device, wanted=True) is None
    return Settings(case, precision, device, steps, options.warmup_train, counters)


def _folder_name(settings: Settings, config: str | None) -> str:
    case = settings.case
    name = f"{case.architecture}_{case.d_in}_{case.d_sae}" if config is None else Path(config).stem
    return f"profile_output/{name}_{settings.precision.name}"


def _results_to_continue(settings: Settings, folder: Path) -> Record:
    """The folder's results if they are of the same settings, code and machine; else new ones."""
    here: Record = {
        "settings": settings.to_json(),
        "environment": environment(settings.device, None),
        "arms": {},
    }
    earlier = read_results(folder)
    if earlier is None:
        return here
    differing = [
        name for name, value in here["settings"].items() if earlier["settings"].get(name) != value
    ]
    if not same_source(earlier["environment"], here["environment"]):
        differing.append("device, code or versions")
    if differing:
        print(f"{folder} has results of other settings ({', '.join(differing)}): measured again")
        return here
    kept = [label_of(name) for name, arm in earlier["arms"].items() if arm["status"] == "ok"]
    if kept:
        print(f"kept from {earlier['environment']['date']}: {'; '.join(kept)} (in {folder})")
    return earlier


def _measure(arms: Sequence[Arm], settings: Settings, results: Record, folder: Path) -> None:
    """Measure the arms one after the other; `results` has and keeps each as soon as it is done."""
    total = len(arms) * pieces_of(settings) + 2
    with tqdm(total=total, desc="inputs", bar_format=_BAR) as bar:
        inputs = prepare_inputs(
            settings.case, settings.precision, settings.device, settings.warmup_train
        )
        bar.update()
        problem = problem_of(settings)
        if "ceilings" not in results:
            bar.set_description("ceilings")
            found = measure_ceilings(problem, settings.device)
            results["ceilings"] = asdict(found)
            results["floor_ms"] = found.floor_ms(problem)
        write_results(results, folder)  # before traces: the folder is known by it
        ceilings = Ceilings(**results["ceilings"])
        bar.update()
        measurement = Measurement(settings, inputs, folder)
        for arm in arms:
            bar.set_description(label_of(arm.name))
            results["arms"][arm.name] = _record_of(arm, measurement, ceilings, bar)
            write_results(results, folder)


def _record_of(arm: Arm, measurement: Measurement, ceilings: Ceilings, bar: Any) -> dict[str, Any]:
    begun = bar.n
    try:
        record = measure_arm(arm, measurement, ceilings, bar.update)
    except Exception as error:
        # The other arms go on: what fails may be memory that only this one needs.
        record = describe_failure(error)
    bar.update(begun + pieces_of(measurement.settings) - bar.n)
    return record
