"""
`saelens-sparse profile`: where the time and the memory of one training step go.

Takes a step of a stock and a sparse SAE apart, on weights and inputs that fire like those of a
real training: time by phase, kernels against what the device can do, memory, idle time.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import saelens_sparse
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.config.files import UsageError, load_config, usage_errors
from saelens_sparse.profile import report
from saelens_sparse.profile.cases import FLOAT32, PRECISIONS, Case
from saelens_sparse.profile.ceilings import measure_ceilings
from saelens_sparse.profile.contender import CONTENDERS, Record, measure_contender
from saelens_sparse.profile.trainers import prepare_inputs
from saelens_sparse.reports import command_line
from saelens_sparse.reports.files import damage, enter_output_folder
from saelens_sparse.reports.presentation import label_of
from saelens_sparse.reports.results import describe_failure, environment

DEFAULT_ARCHITECTURE, DEFAULT_L0 = "topk_sparse", 64.0
# Fields of an SAE's config that the case states itself, or that say nothing about a step.
_NOT_OPTIONS = {"d_in", "d_sae", "dtype", "device", "metadata"}


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    saelens_sparse.register()
    options = _parser().parse_args(args)
    case = case_of(options)
    folder = options.output or Path("profile_output", f"{case.name}_{case.precisions[0].name}")
    earlier = folder / report.RESULTS_FILE
    # Results of a comparison have no ceilings.
    if earlier.exists() and (problem := damage(earlier, "ceilings")):
        raise UsageError(f"--output: {problem}; name another folder")
    try:
        lock = enter_output_folder(folder, report.RESULTS_FILE)
    except OSError as error:
        raise UsageError(f"--output: {folder} cannot be used: {error}") from error
    with lock:
        results = _measure(case, options, folder)
        report.write_report(results, folder)
    page = folder / report.REPORT_FILE
    print(f"\n{report.terminal_text(results)}\n\nThe report is {page}.")
    return int(any(record["status"] != "ok" for record in results["arms"].values()))


def _measure(case: Case, options: argparse.Namespace, folder: Path) -> Record:
    """Measure what is asked for, one after the other; `results.json` always has what is done."""
    device, precision = options.device, case.precisions[0]
    settings = {name: getattr(case, name) for name in ("d_in", "d_sae", "batch", "dead_fraction")}
    settings |= {
        "architecture": case.registered.stock,
        "sparsity": case.label,
        "options": dict(case.options),
        "precision": precision.name,
        "device": device,
        "steps": options.steps or command_line.DEFAULT_STEPS[device],
        "warmup_train": options.warmup_train,
    }
    inputs = prepare_inputs(case, precision, device, options.warmup_train)
    results: Record = {
        "settings": settings,
        "environment": environment(device, None),
        **measure_ceilings(case, inputs, device),
        "arms": {},
    }
    for name in (bar := tqdm(options.arms)):
        bar.set_description(label_of(name))
        # Also before the first trace: the folder is known by it.
        report.write_results(results, folder)
        try:
            record = measure_contender(name, case, device, inputs, settings["steps"], folder)
        except Exception as error:
            # The others go on: what fails may be memory that only this one needs.
            record = describe_failure(error)
        results["arms"][name] = record
    report.write_results(results, folder)
    return results


def _arms(text: str) -> list[str]:
    """argparse type: some of the contenders, in their order."""
    asked = {name.strip() for name in text.split(",")}
    if unknown := asked - {*CONTENDERS}:
        allowed = ", ".join(CONTENDERS)
        raise argparse.ArgumentTypeError(
            f"unknown {', '.join(sorted(unknown))}; allowed: {allowed}"
        )
    return [name for name in CONTENDERS if name in asked]


def _parser() -> command_line.Parser:
    parser = command_line.Parser("profile", __doc__)
    add, arms = parser.add_argument, ",".join(CONTENDERS)
    add("config", nargs="?", help="runner config (JSON) whose SAE, batch and precision to take")
    add(
        "--shape",
        type=command_line.parse_shape,
        metavar="D_IN,D_SAE,K,BATCH",
        help="these instead of a config",
    )
    names = ", ".join(ARCHITECTURES)
    add("--architecture", help=f"{names}; by default the config's or {DEFAULT_ARCHITECTURE}")
    without_k = (
        "mean L0 of an architecture without k; by default the config's target_l0 or 64, or K"
    )
    add("--l0", type=float, help=without_k)
    add("--precision", choices=list(PRECISIONS), help="by default the config's or float32")
    add("--arms", type=_arms, default=arms, help="what is measured; default %(default)s")
    add("--dead-fraction", type=float, default=0.0, help="share of latents held dead; default 0")
    command_line.add_measuring_options(parser)
    where = "folder of the results; by default named by the problem"
    add("--output", type=command_line.writable_folder, help=where)
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
        dtype = str(cfg.sae.dtype).removeprefix("torch.")
        # Autocast leaves bfloat16 as it is.
        own = "autocast" if cfg.autocast and dtype == "float32" else dtype
        precision = options.precision or own
        if precision not in PRECISIONS:
            allowed = "float32, bfloat16"
            raise UsageError(f"sae.dtype: {dtype!r} is not measured; allowed: {allowed}")
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
