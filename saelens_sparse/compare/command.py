"""`saelens-sparse compare`: trains two architectures side by side and reports on both."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from saelens_sparse.compare import embedded_inputs, open_in_stock_saelens
from saelens_sparse.compare.dictionaries import compare_dictionaries, has_dictionary
from saelens_sparse.compare.driver import (
    ArmProcess,
    ComparisonError,
    arm_environment,
    train_in_turn,
)
from saelens_sparse.compare.options import Comparison, is_sparse, parse_comparison
from saelens_sparse.compare.report import collect, write_report
from saelens_sparse.compare.state import (
    STATE_FILE,
    State,
    damage_of_results,
    open_output,
    read_state,
)
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.output_folder import enter_output_folder
from saelens_sparse.reports.whole_files import damage, write_whole

INPUT_SUFFIXES = (".arrow", ".json", ".jsonl", ".safetensors")
EXIT_STATUS = {"complete": 0, "failed": 1, "interrupted": 130}


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    comparison = parse_comparison(args)
    with ExitStack() as lock:
        try:
            read_state(comparison.output)  # a folder that is refused is left as it is
            lock.enter_context(enter_output_folder(comparison.output, STATE_FILE))
            state, message = open_output(comparison)
        except OSError as error:
            raise UsageError(f"--output: {comparison.output} cannot be used: {error}") from error
        if message:
            print(message, flush=True)
        return run(comparison, state)


def run(comparison: Comparison, state: State) -> int:
    """Train what is not trained, and report; returns the exit status."""
    # SIGTERM, like Ctrl-C, keeps what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    finished_before = state.trained
    status, shared, opened = "complete", None, None
    try:
        if not state.trained:
            if comparison.embedded:
                prepare_inputs(comparison)
            train(comparison, state)
        opened = check_in_stock_saelens(comparison)
        shared = match_dictionaries(comparison)
    except KeyboardInterrupt:
        status = "interrupted"
        print("\nInterrupted; what there is stays", file=sys.stderr)
    except (ComparisonError, OSError) as error:
        status = "failed"
        print(f"compare: {error}", file=sys.stderr)
    if status == "complete" or not finished_before:
        try:
            report(comparison, state, status, shared, opened)
        except OSError as error:
            print(f"compare: the report cannot be written: {error}", file=sys.stderr)
            return EXIT_STATUS["failed"]
    return EXIT_STATUS[status]


def report(
    comparison: Comparison,
    state: State,
    status: str,
    shared: dict[str, Any] | None,
    opened: str | None,
) -> None:
    """Write and print what there is."""
    findings = collect(comparison, state, status, shared, opened)
    if findings is None:
        results = {"status": status, "settings": state.settings}
        text = json.dumps(results, indent=2) + "\n"
        write_whole(comparison.output / "results.json", text)
    else:
        write_report(comparison, state, findings)


def prepare_inputs(comparison: Comparison) -> None:
    """Make the embedded model, text and activations, unless an earlier run has left them."""
    config = comparison.shared
    folders = [Path(config[name]) for name in embedded_inputs.INPUT_FIELDS]
    for folder in filter(Path.exists, folders):
        files = [path for path in folder.glob("*") if path.suffix in INPUT_SUFFIXES]
        problems = (f"{path} {problem}" for path in files if (problem := damage(path)))
        if (problem := next(problems, None if files else f"{folder} has no files")) is not None:
            raise ComparisonError(f"{problem}; remove {folder}, or name another --cache")
    if all(folder.exists() for folder in folders):
        return
    print("Preparing SmolLM2-135M and its activations on Python's documentation (once)", flush=True)
    module = "saelens_sparse.compare.embedded_inputs"
    command = [sys.executable, "-m", module, str(comparison.folders[0].config)]
    if comparison.text_tokens is not None:
        command += ["--text-tokens", str(comparison.text_tokens)]
    if subprocess.run(command, env=arm_environment(offline=True), check=False).returncode:
        raise ComparisonError("the inputs could not be prepared; the error is above")


def train(comparison: Comparison, state: State) -> None:
    """Train, save and evaluate both arms, from their checkpoints where the state has some."""
    logs = comparison.shared["logger"].get("log_to_wandb", True)
    names = list(comparison.configs)
    samples = state.checkpoint_step * comparison.shared["train_batch_size_tokens"]
    print(f"Training {' and '.join(names)} in turn, {comparison.n_steps} steps each", flush=True)
    with ExitStack() as running:
        arms = [
            running.enter_context(
                ArmProcess(
                    folder,
                    comparison.runners[folder.architecture],
                    arm_environment(
                        offline=comparison.embedded,
                        wandb_group=state.run if logs else None,
                        architecture=folder.architecture,
                    ),
                    checkpoint=str(folder.checkpoint(samples)) if samples else None,
                    steps_before=state.checkpoint_step,
                )
            )
            for folder in comparison.folders
        ]

        def on_checkpoint(step: int) -> None:
            state.checkpoint_step = step
            state.save(comparison.output)

        train_in_turn(arms, comparison.n_steps, on_checkpoint)
    if (problem := damage_of_results(comparison)) is not None:
        raise ComparisonError(f"the training has ended, but {problem}")
    state.trained = True
    state.save(comparison.output)


def check_in_stock_saelens(comparison: Comparison) -> str | None:
    """Open the sparse SAE where the plugin cannot be imported; one line on it."""
    folder = next((f for f in reversed(comparison.folders) if is_sparse(f.architecture)), None)
    if folder is None:
        return None
    script = Path(open_in_stock_saelens.__file__)
    process = subprocess.run(
        # -P keeps this package's modules out of the path.
        [sys.executable, "-P", str(script), str(folder.sae), str(folder.latents)],
        env=arm_environment(offline=True),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        error = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
        raise ComparisonError(f"stock SAELens could not open {folder.sae}: {error}")
    return process.stdout.strip().splitlines()[-1]


def match_dictionaries(comparison: Comparison) -> dict[str, Any] | None:
    """Match the latents of both arms; None if one of them has no decoder."""
    if not all(map(has_dictionary, comparison.folders)):
        return None
    try:
        return compare_dictionaries(comparison.folders, comparison.shared["device"])
    except (OSError, SafetensorError, RuntimeError, LookupError) as error:
        raise ComparisonError(f"the dictionaries could not be matched: {error}") from error
