"""Runs the arms of a comparison: two processes that take turns, a step each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from saelens_sparse.compare.records import ArmFolder, Step, load_steps
from saelens_sparse.reports.whole_files import write_whole

GOODBYE_SECONDS = 20
"""For an arm to end its step and log out, once the comparison is interrupted."""


class ComparisonError(Exception):
    """A part of the comparison failed; the message says which one, and where to look."""


class ArmProcess:
    """
    A training process of `arm.py`, which takes a step whenever it is asked to.

    Args:
        folder: Holds the runner config.
        runner: "stock" or "own", SAELens's runner or `SparseTrainingRunner`.
        environment: The process's environment variables.
        checkpoint: The checkpoint to resume from.
        steps_before: How many of the recorded steps came before it; later ones are taken again.
    """

    def __init__(
        self,
        folder: ArmFolder,
        runner: str,
        environment: Mapping[str, str],
        checkpoint: str | None = None,
        steps_before: int = 0,
    ) -> None:
        self.folder = folder
        self.steps: list[Step] = load_steps(folder.steps)[:steps_before]
        self.checkpoint = checkpoint
        self.taken = steps_before
        write_whole(folder.steps, "".join(step.to_json() + "\n" for step in self.steps))
        self._steps_file = folder.steps.open("a", buffering=1)
        command = [sys.executable, "-m", "saelens_sparse.compare.arm", str(folder.path)]
        command += ["--runner", runner]
        command += [] if checkpoint is None else ["--resume", checkpoint]
        with folder.log.open("w" if checkpoint is None else "a") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                # Ctrl-C is the driver's: it lets the arms end.
                start_new_session=True,
            )

    @property
    def architecture(self) -> str:
        return self.folder.architecture

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exception is not None:
            self._dismiss()
        with self._process:  # closes its pipes, and waits for its end
            self._steps_file.close()

    def _dismiss(self) -> None:
        """An arm that can hear no more ends at its next turn."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def wait_until_ready(self) -> None:
        """Return when the arm has its next batch, and does nothing but wait for its turn."""
        message = self._read("ready")
        self.checkpoint = message["checkpoint"]
        self.taken = message["steps"]

    def take_step(self) -> Step:
        """Let the arm train one step."""
        self._give_turn()
        line = self._read("step")["record"]
        self._steps_file.write(line + "\n")
        step = Step(**json.loads(line))
        self.steps.append(step)
        return step

    def sync_steps(self) -> None:
        """Return once the steps so far are on the disk."""
        os.fsync(self._steps_file.fileno())

    def finish(self) -> None:
        """Let the arm, ready after its last step, save and evaluate its SAE."""
        self._give_turn()
        self._read("finished")
        if self._process.wait():
            self._raise_failed()

    def _give_turn(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
        except BrokenPipeError:
            self._raise_failed()

    def _read(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline() or self._raise_failed()
        message: dict[str, Any] = json.loads(line)
        assert message["event"] == event, line
        return message

    def _raise_failed(self) -> NoReturn:
        self._process.wait()
        log = self.folder.log
        errors = [line for line in log.read_text().splitlines() if re.match(r"[\w.]+Error: ", line)]
        reason = errors[-1] if errors else f"exit status {self._process.returncode}"
        raise ComparisonError(
            f"training {self.architecture} failed: {reason}\nThe whole log: {log}"
        )


def train_in_turn(
    arms: Sequence[ArmProcess], n_steps: int, on_checkpoint: Callable[[int], None]
) -> None:
    """
    Give the arms their turns, a step each, until all have taken `n_steps`; then let them finish.

    Args:
        arms: Stand at the same step.
        n_steps: Of the whole training.
        on_checkpoint: Called with a number of steps when all arms have a checkpoint after so many.
    """
    for arm in arms:
        arm.wait_until_ready()
    done = arms[0].taken
    if any(arm.taken != done for arm in arms):
        taken = " and ".join(f"{arm.architecture} after step {arm.taken}" for arm in arms)
        raise ComparisonError(f"the arms stand at different steps: {taken}")
    recorded = [arm.checkpoint for arm in arms]
    with tqdm(total=n_steps, initial=done, unit="step", dynamic_ncols=True) as bar:
        for index in range(done, n_steps):
            for arm in arms:
                arm.take_step()
                arm.wait_until_ready()
            checkpoints = [arm.checkpoint for arm in arms]
            if None not in checkpoints and checkpoints != recorded:
                for arm in arms:
                    arm.sync_steps()
                on_checkpoint(index + 1)
                recorded = checkpoints
            bar.set_postfix_str(_progress(arms), refresh=False)
            bar.update()
    for arm in arms:
        arm.sync_steps()
    for arm in tqdm(arms, desc="Saving and evaluating", unit="SAE", dynamic_ncols=True):
        arm.finish()


def _progress(arms: Sequence[ArmProcess]) -> str:
    """What the progress bar says: the arms' latest losses and times."""
    losses = " | ".join(f"{arm.steps[-1].mse:.4g}" for arm in arms)
    times = " | ".join(f"{1e3 * arm.steps[-1].seconds:.0f}" for arm in arms)
    return f"MSE {losses}, ms {times}"


def arm_environment(
    offline: bool, wandb_group: str | None = None, architecture: str = ""
) -> dict[str, str]:
    """
    The environment of an arm, or of another process that must see what the arms see.

    Args:
        offline: Everything is local: no library needs to ask a hub.
        wandb_group: Group of the arms' Weights & Biases runs, unless WANDB_RUN_GROUP names one.
        architecture: Of the arm, which goes on in its own run when it is resumed.
    """
    environment = dict(os.environ)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    if wandb_group is not None:
        environment.setdefault("WANDB_RUN_GROUP", wandb_group)
        environment |= {"WANDB_RUN_ID": f"{wandb_group}-{architecture}", "WANDB_RESUME": "allow"}
    return environment
