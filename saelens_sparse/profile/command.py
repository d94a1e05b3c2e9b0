"""
`saelens-sparse profile`: where the time and the memory of one training step go.

Takes a step of a stock and a sparse SAE apart, on weights and inputs that fire like those of a
real training: time by phase, kernels against what the device can do, memory, idle time.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

import saelens_sparse
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.config.files import UsageError, load_config, usage_errors
from saelens_sparse.config.outputs import check_writable
from saelens_sparse.profile import report
from saelens_sparse.profile.cases import FLOAT32, PRECISIONS, Case
from saelens_sparse.profile.ceilings import measure_ceilings
from saelens_sparse.profile.contender import CONTENDERS, Record, measure_contender
from saelens_sparse.profile.trainers import prepare_inputs
from saelens_sparse.reports import command_line
from saelens_sparse.reports.files import enter_output_folder
from saelens_sparse.reports.presentation import label_of
from saelens_sparse.reports.results import describe_failure, environment, same_source

DEFAULT_ARCHITECTURE, DEFAULT_L0 = "topk_sparse", 64.0
# Fields of an SAE's config that the case states itself, or that say nothing about a step.
_NOT_OPTIONS = {"d_in", "d_sae", "dtype", "device", "metadata"}
_BAR = "{desc:20} {percentage:3.0f}% |{bar:30}| {elapsed}"


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    saelens_sparse.register()
    options = _parser().parse_args(args)
    case = case_of(options)
    asked = {name.strip() for name in options.arms.split(",")}
    if unknown := asked - {*CONTENDERS}:
        allowed = ", ".join(CONTENDERS)
        raise UsageError(f"--arms: unknown {', '.join(sorted(unknown))}; allowed: {allowed}")
    names = [name for name in CONTENDERS if name in asked]
    precision = case.precisions[0].name
    folder = options.output or Path("profile_output", f"{case.name}_{precision}")
    settings: Record = {
        "architecture": case.registered.stock,
        **{name: getattr(case, name) for name in ("d_in", "d_sae", "batch", "dead_fraction")},
        "sparsity": case.label,
        "options": dict(case.options),
        "precision": precision,
        "device": options.device,
        "steps": options.steps or command_line.DEFAULT_STEPS[options.device],
        "warmup_train": options.warmup_train,
    }
    with usage_errors():
        check_writable("--output", folder, 0)
    with ExitStack() as lock:
        try:
            results = _results_to_continue(settings, folder)
            lock.enter_context(enter_output_folder(folder, report.RESULTS_FILE))
        except OSError as error:
            raise UsageError(f"--output: {folder} cannot be used: {error}") from error
        return _profile(names, case, results, folder)


def _profile(names: Sequence[str], case: Case, results: Record, folder: Path) -> int:
    """Measure the contenders that the results lack, and report; returns the exit status."""
    arms, interrupted = results["arms"], False
    try:
        if missing := [n for n in names if arms.get(n, {}).get("status") != "ok"]:
            _measure(missing, case, results, folder)
    except KeyboardInterrupt:
        interrupted = True
    shown = {**results, "arms": {name: arms[name] for name in names if name in arms}}
    if shown["arms"]:
        report.write_report(shown, folder)
        page = folder / report.REPORT_FILE
        print(f"\n{report.terminal_text(shown)}\n\nThe report is {page}.")
    if interrupted:
        print("Interrupted. What is finished is kept; the same command goes on.", file=sys.stderr)
        return 130
    return int(any(record["status"] != "ok" for record in shown["arms"].values()))


def _parser() -> command_line.Parser:
    parser = command_line.Parser("profile", __doc__)
    add, sizes, folder = parser.add_argument, command_line.parse_shape, command_line.writable_folder
    names = ", ".join(ARCHITECTURES)
    without_k = (
        "mean L0 of an architecture without k; by default the config's target_l0 or 64, or K"
    )
    add("config", nargs="?", help="runner config (JSON) whose SAE, batch and precision to take")
    add("--shape", type=sizes, metavar="D_IN,D_SAE,K,BATCH", help="these instead of a config")
    add("--architecture", help=f"{names}; by default the config's or {DEFAULT_ARCHITECTURE}")
    add("--l0", type=float, help=without_k)
    add("--precision", choices=list(PRECISIONS), help="by default the config's or float32")
    add("--arms", default=",".join(CONTENDERS), help="what is measured; default %(default)s")
    add("--dead-fraction", type=float, default=0.0, help="share of latents held dead; default 0")
    command_line.add_measuring_options(parser)
    add("--output", type=folder, help="folder of the results; by default named by the problem")
    return parser


def case_of(options: argparse.Namespace) -> Case:
    """
    The problem that the options ask for, with its precision.

    Raises:
        UsageError: they cannot be used; the message names the option, its value and what can.
    """
    if (options.config is None) == (options.shape is None):
        raise UsageError("profile: give either a config file or --shape D_IN,D_SAE,K,BATCH")
    cfg = None if options.config is None else load_config(options.config)
    name = options.architecture or (cfg.sae.architecture() if cfg else DEFAULT_ARCHITECTURE)
    found = next((a for a in ARCHITECTURES.values() if name in (a.name, a.stock)), None)
    if found is None:
        option = "--architecture" if options.architecture else "sae.architecture"
        allowed = ", ".join(ARCHITECTURES)
        raise UsageError(f"{option}: {name!r} has no sparse counterpart; allowed: {allowed}")
    field = found.sparsity_field
    if field and options.l0 is not None:
        raise UsageError(f"--l0: {options.l0:g} has no use here, for this architecture has {field}")
    precision, given = options.precision or FLOAT32.name, dict[str, Any]()
    if cfg is None:
        d_in, d_sae, sparsity, batch = options.shape
        option, name = "--shape", f"{found.stock}_{d_in}_{d_sae}"
    else:
        option, name = "the config", Path(str(options.config)).stem
        precision = options.precision or _precision_of(cfg)
        values = cfg.sae.to_dict()
        stock = {part.name for part in dataclasses.fields(found.stock_config)}
        given = {n: v for n, v in values.items() if n in stock - {*_NOT_OPTIONS, field}}
        d_in, d_sae, batch = cfg.sae.d_in, cfg.sae.d_sae, cfg.train_batch_size_tokens
        sparsity = values.get(field or "target_l0") or DEFAULT_L0
    sparsity = sparsity if options.l0 is None else options.l0
    precisions, dead = (PRECISIONS[precision],), options.dead_fraction
    case = Case(name, found.name, d_in, d_sae, sparsity, batch, precisions, dead, given)
    with usage_errors(f"{option}: "):
        found.config(d_in=d_in, d_sae=d_sae, **case.sae_options)
        if batch < 1:
            raise ValueError(f"batch must be at least 1; got {batch}")
    if not 0 < sparsity <= d_sae:
        raise UsageError(f"--l0: must be above 0 and at most d_sae={d_sae}; got {sparsity:g}")
    if not 0 <= dead < 1:
        raise UsageError(f"--dead-fraction: must be at least 0 and below 1; got {dead:g}")
    return case


def _precision_of(cfg: Any) -> str:
    """The precision that a runner config trains in; autocast leaves bfloat16 as it is."""
    name = str(cfg.sae.dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise UsageError(f"sae.dtype: {name!r} is not measured; allowed: float32, bfloat16")
    return "autocast" if cfg.autocast and name == "float32" else name


def _results_to_continue(settings: Record, folder: Path) -> Record:
    """The folder's results if they are of the same settings, code and machine; else new ones."""
    here = {"settings": settings, "environment": environment(settings["device"], None), "arms": {}}
    earlier = report.read_results(folder)
    if earlier is None:
        return here
    differing = [name for name in settings if earlier["settings"].get(name) != settings[name]]
    if not same_source(earlier["environment"], here["environment"]):
        differing.append("device, code or versions")
    if differing:
        print(f"{folder} has results of other settings ({', '.join(differing)}): measured again")
        return here
    if kept := [label_of(n) for n, record in earlier["arms"].items() if record["status"] == "ok"]:
        print(f"kept from {earlier['environment']['date']}: {'; '.join(kept)} (in {folder})")
    return earlier


def _measure(names: Sequence[str], case: Case, results: Record, folder: Path) -> None:
    """Measure contenders one after the other; `results` has and keeps each once it is done."""
    settings = results["settings"]
    device, steps = settings["device"], settings["steps"]
    with tqdm(total=len(names) * steps, desc="inputs", bar_format=_BAR) as bar:
        inputs = prepare_inputs(case, case.precisions[0], device, settings["warmup_train"])
        if "ceilings" not in results:
            bar.set_description("ceilings")
            results |= measure_ceilings(case, inputs, device)
        report.write_results(results, folder)  # before traces: the folder is known by it
        for index, name in enumerate(names):
            bar.set_description(label_of(name))
            try:
                record = measure_contender(name, case, device, inputs, steps, folder, bar.update)
            except Exception as error:
                # The others go on: what fails may be memory that only this one needs.
                record = describe_failure(error)
            bar.update((index + 1) * steps - bar.n)
            results["arms"][name] = record
            report.write_results(results, folder)
