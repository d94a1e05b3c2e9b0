"""One arm of the demo: a process that trains with SAELens's stock runner, a step at a time.

    python scripts/demo_arm.py CONFIG.json

takes a runner config. Before each step it writes `ready` to standard output and waits for a line
on standard input; after the step it writes one JSON object about it. The demo gives its two arms
their turns, so that they never run at the same time and other load on the machine slows both
alike. Each arm has its own process, so that its memory and its random numbers are its own.
"""

import json
import os
import sys
import time
import zlib
from pathlib import Path
from typing import Any, TextIO

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

import saelens_sparse


class TurnTakingTrainer(SAETrainer[Any, Any]):
    """The stock trainer, whose every step waits for its turn, is measured and is reported."""

    def __init__(self, trainer: SAETrainer[Any, Any], demo: TextIO) -> None:
        super().__init__(
            cfg=trainer.cfg,
            sae=trainer.sae,
            data_provider=trainer.data_provider,
            evaluator=trainer.evaluator,
            save_checkpoint_fn=trainer.save_checkpoint_fn,
        )
        self.demo = demo
        self.memory = PeakMemory(torch.device(trainer.cfg.device))
        self.batches_crc32 = 0

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        self.batches_crc32 = zlib.crc32(batch.cpu().numpy().tobytes(), self.batches_crc32)
        self.wait_for_turn()
        # Of a sparse SAE; what it is may change from step to step.
        choice = getattr(self.sae, "implementation", None)

        self.memory.begin_step()
        self.synchronize()
        start = time.perf_counter()
        output = super().step(batch)
        self.synchronize()
        seconds = time.perf_counter() - start
        self.memory.end_step()

        metrics = self.build_train_step_log_dict(output, self.n_training_samples)
        self.tell(
            json.dumps(
                {
                    "step": self.n_training_steps + 1,
                    "seconds": seconds,
                    "loss": metrics["losses/overall_loss"],
                    "mse_loss": metrics["losses/mse_loss"],
                    "aux_loss": metrics.get("losses/auxiliary_reconstruction_loss", 0.0),
                    "explained_variance": metrics["metrics/explained_variance"],
                    "l0": metrics["metrics/l0"],
                    "dead_latents": metrics["sparsity/dead_features"],
                    "implementation": None if choice is None else choice.name,
                    "peak_memory_bytes": self.memory.peak_bytes,
                    "batches_crc32": self.batches_crc32,
                    "threads": torch.get_num_threads(),
                }
            )
        )
        return output

    def wait_for_turn(self) -> None:
        """Return when the demo says so; end the process if the demo is gone."""
        self.tell("ready")
        if not sys.stdin.readline():
            raise SystemExit("the demo has ended")

    def tell(self, line: str) -> None:
        """Send the demo one line."""
        print(line, file=self.demo, flush=True)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.memory.device.type == "cuda":
            torch.cuda.synchronize(self.memory.device)


class PeakMemory:
    """The most memory that the training steps held above what was held before the first of them.

    On CUDA this is PyTorch's own count, on Linux the kernel's count of the process's resident
    set; elsewhere `peak_bytes` stays None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes: int | None = None
        self._held_before: int | None = None

    def begin_step(self) -> None:
        """Forget the peaks of whatever came before, such as loading activations."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        if self._held_before is None:
            self._held_before = self._peak_since_reset()

    def end_step(self) -> None:
        """Take the step's peak into account."""
        peak = self._peak_since_reset()
        if peak is not None and self._held_before is not None:
            self.peak_bytes = max(self.peak_bytes or 0, peak - self._held_before)

    def _peak_since_reset(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type != "cpu" or not Path("/proc/self/clear_refs").exists():
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None


class DemoRunner(LanguageModelSAETrainingRunner):
    """The stock runner with a TurnTakingTrainer, and with seeded weights and batches."""

    trainer: TurnTakingTrainer

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], demo: TextIO) -> None:
        torch.manual_seed(cfg.seed)
        super().__init__(cfg)
        self.demo = demo

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.trainer = TurnTakingTrainer(trainer, self.demo)
        # Once more, for the batches: an arm may draw another number of values for its weights.
        torch.manual_seed(self.cfg.seed)
        return super().run_trainer_with_interruption_handling(self.trainer)

    @override
    def save_final_sae(
        self, sae: Any, output_path: str, log_feature_sparsity: torch.Tensor | None = None
    ) -> None:
        super().save_final_sae(sae, output_path, self.trainer.log_feature_sparsity)


def main(config: Path) -> None:
    """Entry point."""
    # Whatever a library prints goes to the log, standard output belongs to the demo alone.
    demo = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    saelens_sparse.register()
    DemoRunner(LanguageModelSAERunnerConfig.from_dict(json.loads(config.read_text())), demo).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
