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

from saelens_sparse.evaluation.compare import embedded_inputs, open_in_stock_saelens
from saelens_sparse.evaluation.compare.dictionaries import compare_dictionaries, has_dictionary
from saelens_sparse.evaluation.compare.driver import (
    ArmProcess,
    ComparisonError,
    arm_environment,
    train_in_turn,
)
from saelens_sparse.evaluation.compare.options import Comparison, is_sparse, parse_comparison
from saelens_sparse.evaluation.compare.report import collect, write_report
from saelens_sparse.evaluation.compare.state import State, open_output
from saelens_sparse.evaluation.results import write_whole

EXIT_STATUS = {"complete": 0, "failed": 1, "interrupted": 130}


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    comparison = parse_comparison(args)
    comparison.output.mkdir(parents=True, exist_ok=True)
    state, message = open_output(comparison)
    if message:
        print(message, flush=True)
    # SIGTERM, like Ctrl-C, keeps what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

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
        print("\nInterrupted; reporting what there is", file=sys.stderr)
    except ComparisonError as error:
        status = "failed"
        print(f"compare: {error}", file=sys.stderr)
    findings = collect(comparison, state, status, shared, opened)
    if findings is None:
        results = {"status": status, "settings": state.settings}
        text = json.dumps(results, indent=2) + "\n"
        write_whole(comparison.output / "results.json", text)
    else:
        write_report(comparison, state, findings)
    return EXIT_STATUS[status]


def prepare_inputs(comparison: Comparison) -> None:
    """Make the embedded model, text and activations, unless an earlier run has left them."""
    config = comparison.shared
    if all(Path(config[name]).exists() for name in embedded_inputs.INPUT_FIELDS):
        return
    print("Preparing SmolLM2-135M and its activations on Python's documentation (once)", flush=True)
    module = "saelens_sparse.evaluation.compare.embedded_inputs"
    command = [sys.executable, "-m", module, str(comparison.folders[0].config)]
    if comparison.text_tokens is not None:
        command += ["--text-tokens", str(comparison.text_tokens)]
    if subprocess.run(command, env=arm_environment(offline=True), check=False).returncode:
        raise ComparisonError("the inputs could not be prepared; the error is above")


def train(comparison: Comparison, state: State) -> None:
    """Train, save and evaluate both arms, from their checkpoints where the state has some."""
    logs = comparison.shared["logger"].get("log_to_wandb", True)
    names = list(comparison.configs)
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
                    checkpoint=state.checkpoints.get(folder.architecture),
                    steps_before=state.checkpoint_step,
                )
            )
            for folder in comparison.folders
        ]

        def on_checkpoint(step: int, paths: list[str]) -> None:
            state.record_checkpoint(step, names, paths)
            state.save(comparison.output)

        train_in_turn(arms, comparison.n_steps, on_checkpoint)
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
        raise ComparisonError(f"stock SAELens could not open the SAE:\n{process.stderr}")
    return process.stdout.strip().splitlines()[-1]


def match_dictionaries(comparison: Comparison) -> dict[str, Any] | None:
    """Match the latents of both arms, once: the result is kept."""
    kept = comparison.output / "dictionaries.json"
    if kept.exists():
        return json.loads(kept.read_text())
    try:
        if not all(map(has_dictionary, comparison.folders)):
            return None
        shared = compare_dictionaries(comparison.folders, comparison.shared["device"])
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ComparisonError(f"the dictionaries could not be matched: {error}") from error
    write_whole(kept, json.dumps(shared) + "\n")
    return shared
