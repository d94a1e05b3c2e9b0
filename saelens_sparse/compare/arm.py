"""
One arm of a comparison: a process that trains with SAELens's runner, a step at a time.

    python -m saelens_sparse.compare.arm FOLDER [--runner own] [--resume CHECKPOINT]

FOLDER holds a runner config, `config.json`; see `records.ArmFolder` for what is added. Each arm has
its own process, so that its memory and its random numbers are its own. Before each step, and once
more before the SAE is saved and evaluated, it says on standard output that it is ready and waits
for a line on standard input: the driver gives its arms their turns, so that they never run at the
same time and other load on the machine slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from typing_extensions import override

import saelens_sparse
from saelens_sparse.compare.evaluate import evaluate
from saelens_sparse.compare.process_memory import ProcessMemory
from saelens_sparse.compare.records import ArmFolder, Step
from saelens_sparse.reports.output_folder import lock_folder
from saelens_sparse.reports.whole_files import sync_folder, whole_file, write_whole
from saelens_sparse.training.trainer import SparseSAETrainer

SAMPLE_ROWS = 1024
"""Activations kept, to try the saved SAE on."""


class Turns:
    """The arm's end of the conversation with the driver: one JSON object a line."""

    def __init__(self, driver: TextIO) -> None:
        self._driver = driver

    def wait(self, **message: Any) -> None:
        """Say that the arm is ready, and return when it is its turn; end if the driver is gone."""
        self.tell(event="ready", **message)
        if not sys.stdin.readline():
            raise SystemExit("the comparison has ended")

    def tell(self, **message: Any) -> None:
        print(json.dumps(message), file=self._driver, flush=True)


class TimedBatches(Iterator[torch.Tensor]):
    """Batches of another iterator, and the seconds spent waiting for them."""

    def __init__(self, batches: Iterator[torch.Tensor]) -> None:
        self._batches = batches
        self._seconds = 0.0

    @override
    def __next__(self) -> torch.Tensor:
        start = time.perf_counter()
        batch = next(self._batches)
        if batch.is_cuda:
            torch.cuda.synchronize(batch.device)
        self._seconds += time.perf_counter() - start
        return batch

    def take_seconds(self) -> float:
        """The seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class MeasuredSteps:
    """
    Makes every step of a trainer wait for its turn, measures it, and tells the driver about it.

    Works on any `SAETrainer`, by standing in front of its `step` and its data provider.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], turns: Turns) -> None:
        self.trainer = trainer
        self.turns = turns
        self.memory = ProcessMemory(torch.device(trainer.cfg.device))
        self.batches = TimedBatches(trainer.data_provider)
        self.checkpoint: str | None = None
        self.sample = torch.empty(0, trainer.sae.cfg.d_in)
        self._step = trainer.step
        trainer.data_provider = self.batches
        trainer.step = self.take

    @property
    def steps_taken(self) -> int:
        """Steps since the beginning; SAELens's own count is one behind in a resumed training."""
        return self.trainer.n_training_samples // self.trainer.cfg.train_batch_size_samples

    def wait_for_turn(self) -> None:
        """Say how far the arm is, and return when it may go on."""
        self.turns.wait(steps=self.steps_taken, checkpoint=self.checkpoint)

    def take(self, batch: torch.Tensor) -> TrainStepOutput:
        """What `SAETrainer.fit` calls instead of `SAETrainer.step`."""
        trainer, memory = self.trainer, self.memory
        data_seconds = self.batches.take_seconds()
        # A reference to the batch would keep the buffer alive that it is a part of.
        on_host = batch.contiguous().cpu()
        self.sample = on_host[:SAMPLE_ROWS].clone()
        crc32 = zlib.crc32(on_host.view(torch.uint8).numpy().tobytes())
        del on_host
        self.wait_for_turn()
        # Of a sparse SAE; what it is may change from step to step.
        with trainer.autocast_if_enabled:
            choice = getattr(trainer.sae, "implementation", None)

        memory.begin_step()
        self._synchronize()
        start = time.perf_counter()
        output = self._step(batch)
        self._synchronize()
        seconds = time.perf_counter() - start
        memory.end_step()

        metrics = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        step = Step(
            step=self.steps_taken,
            seconds=seconds,
            data_seconds=data_seconds,
            loss=metrics["losses/overall_loss"],
            losses={name: metrics[f"losses/{name}"] for name in output.losses},
            explained_variance=metrics["metrics/explained_variance"],
            l0=metrics["metrics/l0"],
            dead_latents=metrics["sparsity/dead_features"],
            implementation=None if choice is None else choice.name,
            added_memory_bytes=memory.added_bytes,
            peak_memory_bytes=memory.peak_bytes,
            batch_crc32=crc32,
        )
        self.turns.tell(event="step", record=step.to_json())
        return output

    def final_state(self) -> dict[str, torch.Tensor]:
        """Which latents fired within the window after which they count as dead, and a sample."""
        trainer = self.trainer
        window = min(trainer.cfg.dead_feature_window, max(0, trainer.n_training_steps - 1))
        return {
            "alive": (trainer.n_forward_passes_since_fired <= window).cpu(),
            "activations": self.sample,
        }

    def _synchronize(self) -> None:
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)


class ArmRunner(LanguageModelSAETrainingRunner):
    """The stock runner with measured steps, with seeded weights and batches, and a last word."""

    steps: MeasuredSteps
    folder: ArmFolder
    turns: Turns

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
        torch.manual_seed(cfg.seed)
        super().__init__(cfg)

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        # What a resumed trainer has passed, SAELens would save again with each of its steps.
        trainer.checkpoint_thresholds = [
            samples
            for samples in trainer.checkpoint_thresholds
            if samples >= trainer.n_training_samples
        ]
        if trainer.n_training_samples == 0 and hasattr(trainer.sae, "W_dec"):
            decoder = trainer.sae.W_dec.detach().to("cpu", torch.float16).contiguous()
            with whole_file(self.folder.initial_decoder) as scratch:
                save_file({"W_dec": decoder}, scratch)
        self.steps = MeasuredSteps(trainer, self.turns)
        # Once more, for the batches: an arm may draw another number of values for its weights.
        torch.manual_seed(self.cfg.seed + self.steps.steps_taken)
        return super().run_trainer_with_interruption_handling(trainer)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            sync_folder(checkpoint_path)
        self.steps.checkpoint = None if checkpoint_path is None else str(checkpoint_path)

    @override
    def save_final_sae(
        self, sae: Any, output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        self.steps.wait_for_turn()
        super().save_final_sae(sae, output_path, log_feature_sparsity)
        sync_folder(Path(output_path))
        with whole_file(self.folder.latents) as scratch:
            save_file(self.steps.final_state(), scratch)
        write_whole(self.folder.evaluation, json.dumps(evaluate(self, sae), indent=2) + "\n")
        self.turns.tell(event="finished")


class OwnArmRunner(ArmRunner, saelens_sparse.SparseTrainingRunner):
    """The same, with the step of `SparseTrainingRunner`."""

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        own = SparseSAETrainer.taking_over(trainer)  # before its step is measured
        return super().run_trainer_with_interruption_handling(own)


def main(args: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runner", choices=("stock", "own"), default="stock")
    parser.add_argument("--resume")
    options = parser.parse_args(args)
    # Whatever a library prints goes to the log, standard output belongs to the driver alone.
    driver = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    saelens_sparse.register()
    folder = ArmFolder(options.folder)
    cfg = LanguageModelSAERunnerConfig.from_dict(json.loads(folder.config.read_text()))
    if options.resume is not None:
        cfg.resume_from_checkpoint = options.resume
    # An arm may outlive its comparison for a step, or while it saves.
    with lock_folder(folder.path):
        runner = (OwnArmRunner if options.runner == "own" else ArmRunner)(cfg)
        runner.folder = folder
        runner.turns = Turns(driver)
        runner.run()


if __name__ == "__main__":
    main(sys.argv[1:])
