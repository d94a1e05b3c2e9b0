"""
One side of a comparison: a process that trains with SAELens's runner, a step at a time.

    python -m saelens_sparse.compare.side FOLDER RUNNER [CHECKPOINT]

FOLDER holds a runner config; see `state` for what is added. Each side has its own process, so that
its memory and its random numbers are its own. Before each step, and once more before the SAE is
saved and evaluated, it writes a line to standard output and waits for one on standard input: the
sides take turns, so that they never run at the same time and other load on the machine slows both
alike.
"""

from __future__ import annotations

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
from safetensors.torch import save
from typing_extensions import override

import saelens_sparse
from saelens_sparse.compare.evaluate import evaluate
from saelens_sparse.compare.process_memory import ProcessMemory
from saelens_sparse.compare.state import CONFIG, EVALUATION, FINAL, INITIAL_DECODER, STEPS
from saelens_sparse.compare.steps import Step, load_steps
from saelens_sparse.reports.files import lock_folder, sync, write_whole
from saelens_sparse.training import SparseSAETrainer

SAMPLE_ROWS = 1024
"""Activations kept, to try the saved SAE on."""


class MeasuredSteps:
    """
    Makes every step of a trainer wait for its turn, measures it, and writes it to the side's file.

    Works on any `SAETrainer`, by standing in front of its `step` and its data provider.

    Args:
        trainer: Stands where it goes on, perhaps at a checkpoint.
        file: Where a line is written for each step; what it has of later steps goes.
        driver: Is told when the side is ready.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], file: Path, driver: TextIO) -> None:
        self.trainer, self._driver = trainer, driver
        self._said = "ready"
        before = load_steps(file)[: self.taken]
        write_whole(file, "".join(step.model_dump_json() + "\n" for step in before))
        self._file = file.open("a", buffering=1)
        self._memory = ProcessMemory(torch.device(trainer.cfg.device))
        self._data_seconds = 0.0
        self.sample = torch.empty(0)
        self._step, self._batches = trainer.step, trainer.data_provider
        trainer.step, trainer.data_provider = self.take, self._timed_batches()

    @property
    def taken(self) -> int:
        """Steps since the beginning; SAELens's own count is one behind in a resumed training."""
        return self.trainer.n_training_samples // self.trainer.cfg.train_batch_size_samples

    def wait_for_turn(self) -> None:
        """Say what the last step gave, and return when the side may go on."""
        print(self._said, file=self._driver, flush=True)
        if not sys.stdin.readline():
            raise SystemExit("the comparison has ended")

    def take(self, batch: torch.Tensor) -> TrainStepOutput:
        """What `SAETrainer.fit` calls instead of `SAETrainer.step`."""
        trainer, memory = self.trainer, self._memory
        data_seconds, self._data_seconds = self._data_seconds, 0.0
        # A reference to the batch would keep the buffer alive that it is a part of.
        on_host = batch.contiguous().cpu()
        self.sample = on_host[:SAMPLE_ROWS].clone()
        crc32 = zlib.crc32(on_host.view(torch.uint8).numpy().tobytes())
        del on_host
        self.wait_for_turn()
        # Of a sparse SAE; what it is may change from step to step.
        with trainer.autocast_if_enabled:
            choice = getattr(trainer.sae, "implementation", None)
        with memory.of_step():
            synchronize(memory.device)
            start = time.perf_counter()
            output = self._step(batch)
            synchronize(memory.device)
            seconds = time.perf_counter() - start
        metrics = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
        step = Step(
            step=self.taken,
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
        self._file.write(step.model_dump_json() + "\n")
        self._said = f"MSE {step.mse:.4g} in {1e3 * seconds:.0f} ms"
        return output

    def final_state(self) -> dict[str, torch.Tensor]:
        """Which latents fired of late, `[d_sae]`, and some activations `[rows, d_in]`."""
        trainer = self.trainer
        window = min(trainer.cfg.dead_feature_window, max(0, trainer.n_training_steps - 1))
        alive = (trainer.n_forward_passes_since_fired <= window).cpu()
        return {"alive": alive, "activations": self.sample}

    def _timed_batches(self) -> Iterator[torch.Tensor]:
        while True:
            start = time.perf_counter()
            batch = next(self._batches)
            synchronize(batch.device)
            self._data_seconds += time.perf_counter() - start
            yield batch


class Side(LanguageModelSAETrainingRunner):
    """The stock runner with measured steps, with seeded weights and batches, and a last word."""

    steps: MeasuredSteps
    folder: Path
    driver: TextIO

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
        torch.manual_seed(cfg.seed)
        super().__init__(cfg)

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        before = trainer.n_training_samples
        # What a resumed trainer has passed, SAELens would save again with each of its steps.
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= before]
        if before == 0:
            decoder = trainer.sae.W_dec.detach().to("cpu", torch.float16).contiguous()
            write_whole(self.folder / INITIAL_DECODER, save({"W_dec": decoder}))
        self.steps = MeasuredSteps(trainer, self.folder / STEPS, self.driver)
        # Once more, for the batches: sides may draw different numbers of values for their weights.
        torch.manual_seed(self.cfg.seed + self.steps.taken)
        return super().run_trainer_with_interruption_handling(trainer)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        if checkpoint_path is not None:
            sync(*checkpoint_path.iterdir(), checkpoint_path)

    @override
    def save_final_sae(
        self, sae: Any, output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        self.steps.wait_for_turn()
        super().save_final_sae(sae, output_path, log_feature_sparsity)
        sync(*Path(output_path).iterdir(), Path(output_path))
        write_whole(self.folder / FINAL, save(self.steps.final_state()))
        write_whole(self.folder / EVALUATION, json.dumps(evaluate(self, sae), indent=2) + "\n")


class OwnSide(Side, saelens_sparse.SparseTrainingRunner):
    """The same, with the step of `SparseTrainingRunner`."""

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        own = SparseSAETrainer.taking_over(trainer)  # before its step is measured
        return super().run_trainer_with_interruption_handling(own)


def synchronize(device: torch.device) -> None:
    """Return once a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(folder: Path, runner: str, checkpoint: str | None = None) -> None:
    """Train the side in `folder` by SAELens's runner ("stock") or `SparseTrainingRunner` ("own")."""
    # Whatever a library prints goes to the log, standard output belongs to the driver alone.
    driver = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    saelens_sparse.register()
    cfg = LanguageModelSAERunnerConfig.from_dict(json.loads((folder / CONFIG).read_text()))
    cfg.resume_from_checkpoint = checkpoint
    # A side may outlive its comparison for a step, or while it saves.
    with lock_folder(folder):
        side = (OwnSide if runner == "own" else Side)(cfg)
        side.folder, side.driver = folder, driver
        side.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
