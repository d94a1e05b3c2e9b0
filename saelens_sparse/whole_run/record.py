"""What timed windows say of a run: where its time goes, and how fast it is as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from saelens_sparse.language_model import PathChoice
from saelens_sparse.whole_run.clock import PER_TOKENS
from saelens_sparse.whole_run.windows import EVALS, LOGGING, PARTS, Windows

SAELENS_RUNNER, SPARSE_RUNNER = "SAELens's runner", "SparseTrainingRunner"


class RunRecord(BaseModel):
    """
    A way to run a training, measured. Times are milliseconds by 4,096 tokens.

    Attributes:
        architecture: SAELens's name of what is trained.
        runner: what trains it.
        batch: tokens of a training step.
        steps: how many were timed.
        parts_ms: by part, for all of `PARTS`. Evals and logs are spread over the steps between two
            of them.
        ms_min: of the fastest window, evals and logs included.
        ms_max: of the slowest.
        eval_seconds: of one eval; None if the run has none, or it failed.
        steps_between_evals: None if the run has none.
        busy_share: part of the time in which the SAE's device is busy; None on a CPU.
        model_path: "fast" or "saelens"; None where activations come from a cache.
        model_reason: why.
        whole_fillings: whether windows held whole fillings of the buffer.
        l0: mean number of active latents in the last step.
    """

    model_config = ConfigDict(protected_namespaces=())

    architecture: str
    runner: str
    batch: int
    steps: int
    parts_ms: dict[str, float]
    ms_min: float
    ms_max: float
    eval_seconds: float | None
    steps_between_evals: int | None
    busy_share: float | None
    model_path: str | None
    model_reason: str | None
    whole_fillings: bool
    l0: float | None

    @computed_field
    @property
    def ms(self) -> float:
        """Of the whole run."""
        return sum(self.parts_ms.values())

    @computed_field
    @property
    def tokens_per_second(self) -> float:
        return 1e3 * PER_TOKENS / self.ms

    def share(self, part: str) -> float:
        """Of the whole run's time."""
        return self.parts_ms[part] / self.ms


def record_of(
    windows: Windows,
    architecture: str,
    runner: str,
    cfg: Mapping[str, Any],
    *,
    eval_seconds: float | None = None,
    logging_ms: float = 0.0,
    choice: PathChoice | None = None,
) -> RunRecord:
    """
    What the windows of a run say.

    Args:
        windows: That are timed.
        architecture: What was trained.
        runner: `SAELENS_RUNNER` or `SPARSE_RUNNER`.
        cfg: The runner config as a dict.
        eval_seconds: Of one eval.
        logging_ms: Milliseconds of a step that logging takes, where windows have none.
        choice: What computes the activations.

    Raises:
        ValueError: no window is whole.
    """
    if not windows.times:
        raise ValueError("the run ended before a window was timed; training_tokens is too small")
    batch, logger = cfg["train_batch_size_tokens"], cfg["logger"]
    scale = PER_TOKENS / batch
    between = logger["wandb_log_frequency"] * logger["eval_every_n_wandb_logs"]
    n_steps = sum(steps for _, steps in windows.times)
    sums = {part: sum(ms.get(part, 0.0) for ms, _ in windows.times) for part in PARTS}
    # How many evals and logs fell into the windows is chance.
    spread = {EVALS: 0.0, LOGGING: scale * logging_ms}
    if eval_seconds is not None:
        spread[EVALS] = scale * 1e3 * eval_seconds / between
    if windows.logs:
        spread[LOGGING] = scale * sums[LOGGING] / windows.logs / logger["wandb_log_frequency"]
    parts = {part: scale * ms / n_steps for part, ms in sums.items()} | spread
    by_window = [
        scale * sum(ms for part, ms in of.items() if part not in spread) / steps
        + sum(spread.values())
        for of, steps in windows.times
    ]
    busy = windows.busy_ms
    window_ms = sum(ms for part, ms in sums.items() if part != EVALS) / n_steps
    return RunRecord(
        architecture=architecture,
        runner=runner,
        batch=batch,
        steps=n_steps,
        parts_ms=parts,
        ms_min=min(by_window),
        ms_max=max(by_window),
        eval_seconds=eval_seconds,
        steps_between_evals=between if eval_seconds is not None else None,
        busy_share=None if busy is None else min(1.0, busy / window_ms),
        model_path=None if choice is None else choice.path,
        model_reason=None if choice is None else choice.reason,
        whole_fillings=windows.whole_fillings,
        l0=windows.l0,
    )
