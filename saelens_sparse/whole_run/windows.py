"""Windows of a training run that are timed, without a change to what the run does in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.whole_run.clock import PartClock, busy_ms, device_profile

MODEL, STORE, STEP = "language model", "store", "SAE step"
EVALS, LOGGING, REST = "evals", "logging", "rest of the loop"
PARTS = (MODEL, STORE, STEP, EVALS, LOGGING, REST)
MIN_STEPS = {"cuda": 40, "cpu": 8}
"""Of a window. It ends at the next filling of the buffer."""
MAX_STEPS = {"cuda": 400, "cpu": 100}
"""Of a window, and of the warm-up. A buffer that serves more steps ends it early."""
SAMPLE_ROWS = 64


class EndOfWindows(Exception):
    """What a run is stopped with when all windows are timed. It is no error."""


@dataclass
class Windows:
    """
    Divides a run into a warm-up and timed windows, then ends it.

    A window lasts from one filling of the buffer to a later one, so that it holds the language
    model's share whole. The warm-up holds the first filling. On a GPU one more window follows
    under PyTorch's profiler; it says how much of the time the device is busy.

    Attributes:
        device: of the SAE.
        count: how many windows are timed.
        between: called before each window. The clock stands still.
        times: milliseconds of each part, and the number of steps, by window.
        logs: how many logs the timed windows hold.
        busy_ms: milliseconds of a step in which this device is busy; None on a CPU.
        whole_fillings: whether every window ended where it should.
        sample: first rows `[SAMPLE_ROWS, d_in]` of the first batch, float32 on the host.
        l0: mean number of active latents in the last step; None before it.
    """

    device: str
    count: int
    between: Callable[[], object] = lambda: None
    times: list[tuple[dict[str, float], int]] = field(
        default_factory=list[tuple[dict[str, float], int]]
    )
    logs: int = 0
    busy_ms: float | None = None
    whole_fillings: bool = True
    sample: torch.Tensor | None = None
    l0: float | None = None

    def __post_init__(self) -> None:
        self.clock = PartClock(self.device, REST)
        self._kind = torch.device(self.device).type
        self._steps = self._served = 0  # of this window; since the buffer was filled
        self._is_open = self._is_over = False
        self._profile: Any = None
        self._output: TrainStepOutput | None = None

    def attach(self, trainer: SAETrainer[Any, Any]) -> None:
        """Let the clock see a trainer's steps, logs and evals. Its store is one of `stores`."""
        step, log, evaluator = trainer.step, trainer.build_train_step_log_dict, trainer.evaluator

        def timed_step(batch: torch.Tensor) -> TrainStepOutput:
            with self.clock.part(STEP):
                self._output = step(batch)
            return self._output

        def timed_log(*args: Any, **kwargs: Any) -> dict[str, Any]:
            self.clock.rest_is(LOGGING)  # until the next batch is asked for
            self.logs += self._is_open and self._profile is None
            return log(*args, **kwargs)

        def timed_evaluator(*args: Any, **kwargs: Any) -> dict[str, Any]:
            assert evaluator is not None
            with self.clock.part(EVALS):
                return evaluator(*args, **kwargs)

        trainer.step = timed_step
        trainer.build_train_step_log_dict = timed_log
        trainer.evaluator = evaluator and timed_evaluator

    def before_batch(self) -> None:
        """A training batch is asked for."""
        self.clock.rest_is(REST)
        is_full = self._steps >= MAX_STEPS.get(self._kind, 100)
        if is_full and self._output is not None and not self._is_over:
            self.whole_fillings = False
            self._turn()

    def before_source_batch(self) -> None:
        """The store is about to ask for activations of a batch of the language model."""
        began, self._served = self._served, 0
        is_enough = not self._is_open or self._steps >= MIN_STEPS.get(self._kind, 8)
        if began and is_enough and self._output is not None and not self._is_over:
            self._turn()

    def after_batch(self, batch: torch.Tensor) -> None:
        """The store gives a training batch."""
        if self.sample is None:
            self.sample = batch[:SAMPLE_ROWS].float().cpu().clone()
        self._steps += 1
        self._served += 1

    def _turn(self) -> None:
        """End the window, or the warm-up, and begin the next window or end the run."""
        if self._is_open:
            ms = self.clock.stop()
            if self._profile is not None:
                self._profile.stop()
                index = self.device.partition(":")[2] or torch.cuda.current_device()
                self.busy_ms = busy_ms(self._profile, int(index)) / self._steps
                self._end()
            self.times.append((ms, self._steps))
        self._is_open, self._steps = True, 0
        is_last = len(self.times) == self.count
        if is_last and self._kind != "cuda":
            self._end()
        self.between()
        if is_last:
            self._profile = device_profile()
            self._profile.start()
        self.clock.start()

    def _end(self) -> None:
        assert self._output is not None
        acts = self._output.feature_acts.detach()
        self.l0 = acts.bool().float().sum(-1).to_dense().mean().item()
        self._output, self._is_over = None, True
        raise EndOfWindows
