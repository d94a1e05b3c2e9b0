"""
`saelens-sparse profile`: where the time of a training run goes, and what to change to gain most.

With CONFIG, the run of `saelens-sparse train` begins and is timed: language model, store, SAE step,
evals, logging. It writes no SAE. Then a step of a stock and a sparse SAE is taken apart, on weights
and inputs that fire like those of a real training: time by phase, kernels against what the device
can do, memory, idle time.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from tqdm import tqdm

import saelens_sparse
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.config.files import UsageError, load_config, usage_errors
from saelens_sparse.profile import report
from saelens_sparse.profile.cases import FLOAT32, PRECISIONS, Case
from saelens_sparse.profile.ceilings import measure_ceilings
from saelens_sparse.profile.contender import CONTENDERS, Record, measure_contender
from saelens_sparse.profile.trainers import prepare_inputs, release_memory
from saelens_sparse.reports import command_line
from saelens_sparse.reports.files import damage, enter_output_folder
from saelens_sparse.reports.presentation import label_of
from saelens_sparse.reports.results import describe_failure, environment
from saelens_sparse.whole_run.clock import PER_TOKENS
from saelens_sparse.whole_run.profiled import ProfiledRun, profile_run
from saelens_sparse.whole_run.suggestions import Trial, suggestions
from saelens_sparse.whole_run.windows import STEP

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
        run = None if options.config is None or options.only == "step" else _measure_run(options)
        results = _measure(case, options, folder, run)
        report.write_report(results, folder)
    page = folder / report.REPORT_FILE
    print(f"\n{report.terminal_text(results)}\n\nThe report is {page}.")
    measured = [*results["arms"].values(), *([results["run"]] if results["run"] else [])]
    return int(any(record["status"] != "ok" for record in measured))


def _measure_run(options: argparse.Namespace) -> ProfiledRun | Record:
    """The run of the config, timed; what went wrong if it cannot be."""
    cfg = _on_device(load_config(options.config), options.device)
    windows = command_line.DEFAULT_WINDOWS[options.device]
    print(f"Timing the run of {options.config}", flush=True)
    try:
        return profile_run(cfg, options.windows or windows)
    except Exception as error:
        # The step can be measured without a language model and a dataset.
        return describe_failure(error)
    finally:
        release_memory(options.device)


def _on_device(
    cfg: LanguageModelSAERunnerConfig[Any], device: str
) -> LanguageModelSAERunnerConfig[Any]:
    """The config on a device of that type, which may be its own."""
    before = cfg.device
    if torch.device(before).type != device:
        for field in ("llm_device", "act_store_device"):
            if getattr(cfg, field) in (before, "with_model"):
                setattr(cfg, field, device)
        cfg.device = cfg.sae.device = device
    return cfg


def _run_results(run: ProfiledRun | Record, case: Case, options: Any, arms: Record) -> Record:
    """What `results.json` says of the run."""
    if not isinstance(run, ProfiledRun):
        return run
    cfg, trials = load_config(options.config).to_dict(), [*run.trials]
    stock, sparse = (arms.get(name, {}).get("ms") for name in ("stock", "sparse_runner"))
    if run.record.architecture == case.registered.stock and stock and sparse:
        scale = PER_TOKENS / case.batch
        change = f"sae.architecture={case.architecture}"
        trials.append(Trial(change, STEP, scale * stock, scale * sparse))
    found = suggestions(run.record, cfg, trials)
    return {
        "status": "ok",
        "record": run.record.model_dump(),
        "trials": [dataclasses.asdict(trial) for trial in trials],
        "suggestions": [str(suggestion) for suggestion in found],
        "eval_failure": run.eval_failure,
    }


def _measure(
    case: Case, options: argparse.Namespace, folder: Path, run: ProfiledRun | Record | None
) -> Record:
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
        "run": run and _run_results(run, case, options, {}),
        "arms": {},
    }
    for name in (bar := tqdm([] if options.only == "run" else options.arms)):
        bar.set_description(label_of(name))
        # Also before the first trace: the folder is known by it.
        report.write_results(results, folder)
        try:
            record = measure_contender(name, case, device, inputs, settings["steps"], folder)
        except Exception as error:
            # The others go on: what fails may be memory that only this one needs.
            record = describe_failure(error)
        results["arms"][name] = record
    results["run"] = run and _run_results(run, case, options, results["arms"])
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
    add("config", nargs="?", help="runner config (JSON): the run, and its SAE, batch and precision")
    only = "the run alone, or a step on made-up inputs, which needs no language model"
    add("--only", choices=("run", "step"), help=only)
    windows = "timed windows of the run; by default 2 on a GPU, 1 on a CPU"
    add("--windows", type=command_line.whole_number(1), help=windows)
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
    if options.only == "run" and options.config is None:
        raise UsageError("--only: 'run' needs a config file")
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
        if values.get("dead_latent_loss") == "ghost":
            stock |= {"dead_latent_loss", "aux_loss_coefficient"}  # SAELens passes them over
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
