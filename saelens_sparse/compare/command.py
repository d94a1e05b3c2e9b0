"""`saelens-sparse compare`: trains two architectures side by side and reports on both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare import dictionaries
from saelens_sparse.compare.comparison import (
    CHECKPOINTS,
    FINAL,
    INITIAL_DECODER,
    LOG,
    SAE,
    STATE_FILE,
    Comparison,
)
from saelens_sparse.compare.embedded_inputs import INPUT_FIELDS, damage_of_inputs, prepare
from saelens_sparse.compare.options import parse_comparison
from saelens_sparse.compare.report import report
from saelens_sparse.compare.side import FINISHED, train_side
from saelens_sparse.compare.state import State, damage_of_results, open_output, read_state
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.files import enter_output_folder

EXIT_STATUS = {"complete": 0, "failed": 1, "interrupted": 130}
GOODBYE_SECONDS = 20
"""For a side to end its step and log out, once the comparison is interrupted."""
PROCESSES = get_context("spawn")  # no state of this process's is theirs


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
    config = comparison.config
    if not comparison.embedded:
        return
    if (problem := damage_of_inputs(config)) is not None:
        raise ComparisonError(problem)
    os.environ["HF_HUB_OFFLINE"] = "1"  # here and in all processes: everything is local
    if all(Path(config[field]).exists() for field in INPUT_FIELDS):
        return
    print("Preparing SmolLM2-135M and its activations on Python's documentation (once)", flush=True)
    process = PROCESSES.Process(target=prepare, args=(config, comparison.settings.text_tokens))
    process.start()
    process.join()
    if process.exitcode:
        raise ComparisonError("the inputs could not be prepared; the error is above")


def train(comparison: Comparison, state: State) -> None:
    """Train, save and evaluate both sides in turn, from where the state says."""
    n_steps, done = comparison.n_steps, state.checkpoint_step
    names = " and ".join(comparison.settings.arms)
    print(f"Training {names} in turn, {n_steps} steps each", flush=True)
    with ExitStack() as running:
        sides = [
            running.enter_context(closing(SideProcess(folder, comparison, state)))
            for folder in comparison.folders
        ]
        for side in sides:
            side.hear()
        with tqdm(total=n_steps, initial=done, unit="step", dynamic_ncols=True) as bar:
            for _ in range(done, n_steps):
                said = [side.take_turn() for side in sides]
                bar.set_postfix_str(" | ".join(said), refresh=False)
                bar.update()
        saving = tqdm(sides, desc="Saving and evaluating", unit="SAE", dynamic_ncols=True)
        said = {side: side.take_turn() for side in saving}
        with tqdm(desc="Timing whole runs", unit="window", dynamic_ncols=True) as bar:
            while timing := [side for side in sides if said[side] != FINISHED]:
                for side in timing:
                    said[side] = side.take_turn()
                    bar.update()
    if (problem := damage_of_results(comparison)) is not None:
        raise ComparisonError(f"the training has ended, but {problem}")
    state.trained = True
    state.save(comparison.output)


class SideProcess:
    """A process that trains the side in a folder by `train_side`, from where the state says."""

    def __init__(self, folder: Path, comparison: Comparison, state: State) -> None:
        self._folder = folder
        samples = state.checkpoint_step * comparison.config["train_batch_size_tokens"]
        checkpoint = folder / CHECKPOINTS / str(samples) if samples else None
        environment: dict[str, str] = {}
        if comparison.config["logger"].get("log_to_wandb", True):
            environment["WANDB_RUN_GROUP"] = os.environ.get("WANDB_RUN_GROUP", state.run)
            # A resumed side goes on in its own run.
            environment |= {"WANDB_RUN_ID": f"{state.run}-{folder.name}", "WANDB_RESUME": "allow"}
        runner = comparison.settings.runners[folder.name]
        self._turns, of_side = PROCESSES.Pipe()
        args = (folder, runner, checkpoint, comparison.windows, environment, of_side)
        self._process = PROCESSES.Process(target=train_side, args=args)
        self._process.start()
        of_side.close()

    def take_turn(self) -> str:
        """Let the side train one step and get its next batch, or save; returns what it says."""
        with suppress(BrokenPipeError):  # it has said why
            self._turns.send("go on")
        return self.hear()

    def hear(self) -> str:
        """Return what the side says once it only waits for its turn."""
        try:
            said = self._turns.recv()
        except EOFError:
            self._process.join()
            said = RuntimeError(f"exit status {self._process.exitcode}")
        if isinstance(said, Exception):
            log = f"The whole log: {self._folder / LOG}"
            raise ComparisonError(f"training {self._folder.name} failed: {said}\n{log}")
        return said

    def close(self) -> None:
        """Let the side go: where it is not at its end, it ends at its next turn."""
        self._turns.close()
        self._process.join(GOODBYE_SECONDS)
        self._process.kill()


def check_in_stock_saelens(comparison: Comparison) -> str | None:
    """Open the sparse SAE where the plugin cannot be imported; one line on it."""
    folder = next((f for f in reversed(comparison.folders) if f.name in ARCHITECTURES), None)
    if folder is None:
        return None
    script = str(Path(__file__).with_name("open_in_stock_saelens.py"))
    # -P keeps this package's modules out of the path.
    command = [sys.executable, "-P", script, str(folder / SAE), str(folder / FINAL)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        error = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
        raise ComparisonError(f"stock SAELens could not open {folder / SAE}: {error}")
    return process.stdout.strip().splitlines()[-1]


def match_dictionaries(comparison: Comparison) -> dict[str, Any]:
    """Match the latents of both sides."""
    folders = comparison.folders
    try:
        return dictionaries.share(
            [load_file(folder / SAE / SAE_WEIGHTS_FILENAME)["W_dec"] for folder in folders],
            [load_file(folder / FINAL)["alive"] for folder in folders],
            [load_file(folder / INITIAL_DECODER)["W_dec"] for folder in folders],
            comparison.config["device"],
        )
    except (OSError, SafetensorError, RuntimeError, LookupError) as error:
        raise ComparisonError(f"the dictionaries could not be matched: {error}") from error
