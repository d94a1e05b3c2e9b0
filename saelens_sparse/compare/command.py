"""`saelens-sparse compare`: trains two architectures side by side and reports on both."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from safetensors import SafetensorError
from tqdm import tqdm

from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare import open_in_stock_saelens
from saelens_sparse.compare.dictionaries import compare_dictionaries
from saelens_sparse.compare.embedded_inputs import INPUT_FIELDS, damage_of_inputs
from saelens_sparse.compare.options import Comparison, parse_comparison
from saelens_sparse.compare.report import report
from saelens_sparse.compare.state import (
    CHECKPOINTS,
    CONFIG,
    FINAL,
    LOG,
    SAE,
    STATE_FILE,
    State,
    damage_of_results,
    open_output,
    read_state,
)
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.files import enter_output_folder

EXIT_STATUS = {"complete": 0, "failed": 1, "interrupted": 130}
GOODBYE_SECONDS = 20
"""For a side to end its step and log out, once the comparison is interrupted."""


class ComparisonError(Exception):
    """A part of the comparison failed; the message says which one, and where to look."""


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


def prepare_inputs(comparison: Comparison) -> None:
    """Make the embedded model, text and activations, unless an earlier run has left them."""
    config, text_tokens = comparison.config, comparison.settings.text_tokens
    if (problem := damage_of_inputs(config)) is not None:
        raise ComparisonError(problem)
    if all(Path(config[field]).exists() for field in INPUT_FIELDS):
        return
    print("Preparing SmolLM2-135M and its activations on Python's documentation (once)", flush=True)
    module = "saelens_sparse.compare.embedded_inputs"
    command = [sys.executable, "-m", module, str(comparison.folders[0] / CONFIG)]
    command += [] if text_tokens is None else [str(text_tokens)]
    if subprocess.run(command, env=_environment(comparison), check=False).returncode:
        raise ComparisonError("the inputs could not be prepared; the error is above")


def train(comparison: Comparison, state: State) -> None:
    """Train, save and evaluate both sides in turn, from where the state says."""
    n_steps, done = comparison.n_steps, state.checkpoint_step
    names = " and ".join(comparison.settings.arms)
    print(f"Training {names} in turn, {n_steps} steps each", flush=True)
    with ExitStack() as running:
        sides = [
            running.enter_context(SideProcess(folder, comparison, state))
            for folder in comparison.folders
        ]
        for side in sides:
            side.wait_until_ready()
        with tqdm(total=n_steps, initial=done, unit="step", dynamic_ncols=True) as bar:
            for _ in range(done, n_steps):
                said = [side.take_turn() for side in sides]
                bar.set_postfix_str(" | ".join(said), refresh=False)
                bar.update()
        for side in tqdm(sides, desc="Saving and evaluating", unit="SAE", dynamic_ncols=True):
            side.finish()
    if (problem := damage_of_results(comparison)) is not None:
        raise ComparisonError(f"the training has ended, but {problem}")
    state.trained = True
    state.save(comparison.output)


class SideProcess:
    """
    A training process of `side.py`, which takes a step whenever it is asked to.

    Args:
        folder: Holds the runner config.
        comparison: Says which runner trains it.
        state: Says at which checkpoint it begins.
    """

    def __init__(self, folder: Path, comparison: Comparison, state: State) -> None:
        self.folder = folder
        runner = comparison.settings.runners[folder.name]
        command = [sys.executable, "-m", "saelens_sparse.compare.side", str(folder), runner]
        if samples := state.checkpoint_step * comparison.config["train_batch_size_tokens"]:
            command.append(str(folder / CHECKPOINTS / str(samples)))
        environment = _environment(comparison)
        if comparison.config["logger"].get("log_to_wandb", True):
            environment.setdefault("WANDB_RUN_GROUP", state.run)
            # A resumed side goes on in its own run.
            environment |= {"WANDB_RUN_ID": f"{state.run}-{folder.name}", "WANDB_RESUME": "allow"}
        with (folder / LOG).open("a" if samples else "w") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                # Ctrl-C is the driver's: it lets the sides end.
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def __enter__(self) -> SideProcess:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A side that can hear no more ends at its next turn.
        self._stdin.close()
        self._stdout.close()
        try:
            self._process.wait(GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_until_ready(self) -> str:
        """Return what the side says of its last step, once it only waits for its turn."""
        return self._stdout.readline().strip("\n") or self._raise_failed()

    def take_turn(self) -> str:
        """Let the side train one step and get its next batch; returns what it says of it."""
        self._give_turn()
        return self.wait_until_ready()

    def finish(self) -> None:
        """Let the side, ready after its last step, save and evaluate its SAE."""
        self._give_turn()
        self._stdout.read()
        if self._process.wait():
            self._raise_failed()

    def _give_turn(self) -> None:
        try:
            self._stdin.write("\n")
        except BrokenPipeError:
            self._raise_failed()

    def _raise_failed(self) -> NoReturn:
        self._process.wait()
        log = self.folder / LOG
        errors = [line for line in log.read_text().splitlines() if re.match(r"[\w.]+Error: ", line)]
        reason = errors[-1] if errors else f"exit status {self._process.returncode}"
        raise ComparisonError(f"training {self.folder.name} failed: {reason}\nThe whole log: {log}")


def _environment(comparison: Comparison) -> dict[str, str]:
    """Of the processes that load the inputs; embedded ones are local, no library asks a hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1"} if comparison.embedded else dict(os.environ)


def check_in_stock_saelens(comparison: Comparison) -> str | None:
    """Open the sparse SAE where the plugin cannot be imported; one line on it."""
    folder = next((f for f in reversed(comparison.folders) if f.name in ARCHITECTURES), None)
    if folder is None:
        return None
    script = str(open_in_stock_saelens.__file__)
    process = subprocess.run(
        # -P keeps this package's modules out of the path.
        [sys.executable, "-P", script, str(folder / SAE), str(folder / FINAL)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        error = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
        raise ComparisonError(f"stock SAELens could not open {folder / SAE}: {error}")
    return process.stdout.strip().splitlines()[-1]


def match_dictionaries(comparison: Comparison) -> dict[str, Any]:
    """Match the latents of both sides."""
    try:
        return compare_dictionaries(comparison.folders, comparison.config["device"])
    except (OSError, SafetensorError, RuntimeError, LookupError) as error:
        raise ComparisonError(f"the dictionaries could not be matched: {error}") from error
