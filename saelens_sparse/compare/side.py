"""
One side of a comparison: a process that trains with SAELens's runner, a step at a time.

Each side has its own process, so that its memory and its random numbers are its own. Before each
step, and once more before the SAE is saved and evaluated, it waits for its turn: sides never run at
the same time, and other load on the machine slows both alike.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save
from typing_extensions import override

import saelens_sparse
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare.comparison import CONFIG, EVALUATION, FINAL, INITIAL_DECODER, LOG, STEPS
from saelens_sparse.compare.steps import Step, load_steps
from saelens_sparse.reports.files import lock_folder
from saelens_sparse.training import SparseSAETrainer
from saelens_sparse.whole_files import sync, write_whole

SAMPLE_ROWS = 1024
"""Activations kept, to try the saved SAE on."""
TIMED_MODEL_BATCHES = 2
CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def train_side(
    folder: Path,
    runner: str,
    checkpoint: Path | None,
    environment: Mapping[str, str],
    turns: Connection,
) -> None:
    """
    Train the side of a folder: what its process runs.

    Args:
        folder: Holds a runner config; see `comparison` for what is added.
        runner: "stock" for SAELens's, "own" for `SparseTrainingRunner`.
        checkpoint: Where to go on from.
        environment: Environment variables of its Weights & Biases run.
        turns: To the driver, which hears of the last step whenever the side waits for its turn, and
            of an error that ends it.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is the driver's: it lets the sides end
    with (folder / LOG).open("a" if checkpoint else "w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    os.environ |= environment
    try:
        cfg = LanguageModelSAERunnerConfig.from_dict(json.loads((folder / CONFIG).read_text()))
        cfg.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        # A side may outlive its comparison for a step, or while it saves.
        with lock_folder(folder):
            side = (OwnSide if runner == "own" else Side)(cfg)
            side.folder, side.turns = folder, turns
            side.run()
        turns.send("finished")
    except EOFError:
        print("the comparison has ended", file=sys.stderr)
    except Exception as error:
        traceback.print_exc()
        turns.send(RuntimeError(f"{type(error).__name__}: {error}"))


class Side(LanguageModelSAETrainingRunner):
    """The stock runner with seeded weights and batches, measured steps, and a last word."""

    folder: Path
    turns: Connection
    steps: MeasuredSteps

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
        torch.manual_seed(cfg.seed)
        super().__init__(cfg)
        is_sparse = cfg.sae.architecture() in ARCHITECTURES
        # SAELens's store begins its data anew when it resumes. Both sides must do the same.
        if is_sparse and cfg.resume_from_checkpoint is None:
            saelens_sparse.use_fast_activations_store(
                self, save_buffer=False, language_model="saelens"
            )

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        before = trainer.n_training_samples
        # What a resumed trainer has passed, SAELens would save again with each of its steps.
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= before]
        if before == 0:
            decoder = trainer.sae.W_dec.detach().to("cpu", torch.float16).contiguous()
            write_whole(self.folder / INITIAL_DECODER, save({"W_dec": decoder}))
        self.steps = MeasuredSteps(trainer, self.folder / STEPS, self.turns)
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
        trainer = self.steps.trainer
        window = min(trainer.cfg.dead_feature_window, max(0, trainer.n_training_steps - 1))
        alive = (trainer.n_forward_passes_since_fired <= window).cpu()
        tensors = {"alive": alive, "activations": self.steps.sample}
        write_whole(self.folder / FINAL, save(tensors))
        write_whole(self.folder / EVALUATION, json.dumps(evaluate(self, sae), indent=2) + "\n")


class OwnSide(Side, saelens_sparse.SparseTrainingRunner):
    """The same, with the step of `SparseTrainingRunner`."""

    @override
    def prepare_store(self) -> None:
        """The side has chosen its store."""

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        own = SparseSAETrainer.taking_over(trainer)  # before its step is measured
        return super().run_trainer_with_interruption_handling(own)


class MeasuredSteps:
    """
    Makes every step of a trainer wait for its turn, measures it, and writes it to a file.

    Works on any `SAETrainer`, by standing in front of its `step` and its data provider.

    Args:
        trainer: Stands where it goes on, perhaps at a checkpoint.
        file: Gets a line for each step; what it has of later steps goes.
        turns: To the driver.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], file: Path, turns: Connection) -> None:
        self.trainer, self._turns = trainer, turns
        self._device = torch.device(trainer.cfg.device)
        before = load_steps(file)[: self.taken]
        write_whole(file, "".join(step.model_dump_json() + "\n" for step in before))
        self._file = file.open("a", buffering=1)
        self._said, self._data_seconds = "", 0.0
        self._held_before = self._peak = 0
        self.sample = torch.empty(0)
        """Some activations of the last batch, `[rows, d_in]`."""
        self._step, self._batches = trainer.step, trainer.data_provider
        trainer.step, trainer.data_provider = self.take, self._timed_batches()

    @property
    def taken(self) -> int:
        """Steps since the beginning; SAELens's own count is one behind in a resumed training."""
        return self.trainer.n_training_samples // self.trainer.cfg.train_batch_size_samples

    def wait_for_turn(self) -> None:
        """Say what the last step gave, and return when the side may go on."""
        self._turns.send(self._said)
        self._turns.recv()

    def take(self, batch: torch.Tensor) -> TrainStepOutput:
        """What `SAETrainer.fit` calls instead of `SAETrainer.step`."""
        trainer, device = self.trainer, self._device
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
        reset_peak(device)
        self._held_before = self._held_before or peak_bytes(device)
        synchronize(device)
        start = time.perf_counter()
        output = self._step(batch)
        synchronize(device)
        seconds = time.perf_counter() - start
        self._peak = max(self._peak, peak_bytes(device))
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
            added_memory_bytes=self._peak - self._held_before if self._peak else None,
            peak_memory_bytes=self._peak or None,
            batch_crc32=crc32,
        )
        self._file.write(step.model_dump_json() + "\n")
        self._said = f"MSE {step.losses['mse_loss']:.4g} in {1e3 * seconds:.0f} ms"
        return output

    def _timed_batches(self) -> Iterator[torch.Tensor]:
        while True:
            start = time.perf_counter()
            batch = next(self._batches)
            synchronize(batch.device)
            self._data_seconds += time.perf_counter() - start
            yield batch


def reset_peak(device: torch.device) -> None:
    """Forget what memory was held before, where that can be told: see `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """
    Most memory held since `reset_peak`.

    On CUDA this is PyTorch's own count, on Linux the kernel's count of the process's resident
    set; elsewhere it is 0.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    known = device.type == "cpu" and CLEAR_PEAK.exists()
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if known else None
    return 1024 * int(found[1]) if found else 0


def synchronize(device: torch.device) -> None:
    """Return once a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def evaluate(runner: LanguageModelSAETrainingRunner, sae: Any) -> dict[str, Any]:
    """
    SAELens's evals of a trained SAE on `n_eval_batches` of the runner's text.

    Returns:
        SAELens's metrics by name, `llm_tokens_per_second` (of the language model, where the
        training has read activations from a cache; else None) and `skipped`, which is None or says
        why there are no metrics. What is missing costs a reason, never the trained SAE.
    """
    store = runner.activations_store
    if runner.cfg.n_eval_batches == 0:
        return {"skipped": "n_eval_batches is 0"}
    if store.dataset is None:
        return {"skipped": "there is no text, only activations"}
    sae.eval()
    try:
        pace = _language_model_pace(store) if runner.cfg.use_cached_activations else None
        # The scaling of activations is folded into the weights.
        groups = runner.evaluator(sae, store, ActivationScaler())
    except (RuntimeError, ValueError, AssertionError, KeyError, AttributeError) as error:
        # The training is done and saved; SAELens's evals do not work for every model and hook.
        reason = str(error).strip().split("\n")[0]
        return {"skipped": f"SAELens's evals failed: {type(error).__name__}: {reason}"}
    metrics = {name: float(value) for group in groups.values() for name, value in group.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return {"skipped": None, "llm_tokens_per_second": pace, **finite}


@torch.no_grad()
def _language_model_pace(store: Any) -> float:
    """Tokens a second for which the model gives activations, the first batch left out."""
    start, tokens = 0.0, 0
    for batch in range(1 + TIMED_MODEL_BATCHES):
        text = store.get_batch_tokens()
        synchronize(store.get_activations(text).device)
        if batch == 0:
            start = time.perf_counter()
        else:
            tokens += text[:, slice(*store.seqpos_slice)].numel()
    return tokens / (time.perf_counter() - start)
