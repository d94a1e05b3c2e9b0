"""The training steps of both sides in numbers: what each trained and cost, how far they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

LOSS = "losses."
"""Before SAELens's name of a term of the loss, in the columns of a table of steps."""
MSE, AUX_LOSS = LOSS + "mse_loss", LOSS + "auxiliary_reconstruction_loss"
WARM_UP_STEPS = 5
"""The first steps allocate and compile; they are left out of medians of time."""


class Step(BaseModel):
    """One training step of one side: a line of `steps.jsonl`, a row of a table of steps."""

    model_config = ConfigDict(strict=True, ser_json_inf_nan="constants")

    step: int  # from 1, as in SAELens's checkpoints
    seconds: float  # forward, loss, statistics, backward, clipping, optimizer
    data_seconds: float  # waiting for the batch, and at first for those that set the scaling
    loss: float
    losses: dict[str, float]  # its terms by SAELens's names, coefficients included
    explained_variance: float
    l0: float  # mean number of active latents per token
    dead_latents: int
    implementation: str | None  # what the step of a sparse SAE ran on
    added_memory_bytes: int | None  # most that steps so far held above what was held before them
    peak_memory_bytes: int | None  # most that steps so far held, with language model and buffers
    batch_crc32: int


def load_steps(path: Path) -> list[Step]:
    """
    The steps of a file, up to the first line that is not the next step.

    A machine that goes down cuts the last line short.
    """
    steps: list[Step] = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            step = Step.model_validate_json(line)
        except ValidationError:
            break
        if step.step != len(steps) + 1 or MSE.removeprefix(LOSS) not in step.losses:
            break
        steps.append(step)
    return steps


def table_of(steps: Sequence[Step]) -> pd.DataFrame:
    """A row for each step; each term of the losses is a column of its own, 0 where it is not."""
    terms = dict.fromkeys(term for step in steps for term in step.losses)
    rows = [
        step.model_dump(exclude={"losses"}) | {LOSS + t: step.losses.get(t, 0.0) for t in terms}
        for step in steps
    ]
    return pd.DataFrame(rows)


def summarize(architecture: str, steps: pd.DataFrame, batch_size: int) -> dict[str, Any]:
    """
    What the report says of one side, from at least one step of so many tokens.

    What is called final is a mean over the last tenth of the steps. Times are medians or sums,
    memory is the most of all steps; None stands for what was not measured. `ms_per_step` is of the
    steps without AuxK if there are any, `ms_per_final_step` of the last tenth, where L0 varies.
    """
    final = last_tenth(steps)
    timed = steps.iloc[min(WARM_UP_STEPS, len(steps) // 2) :]
    with_aux = timed.seconds[timed[AUX_LOSS] != 0] if AUX_LOSS in timed else timed.seconds[:0]
    plain = timed.seconds.drop(with_aux.index)
    seconds, data_seconds = float(steps.seconds.sum()), float(steps.data_seconds.sum())
    tokens = batch_size * len(steps)
    terms = [column for column in steps if column.startswith(LOSS)]
    return {
        "architecture": architecture,
        "steps": len(steps),
        "first_loss": float(steps.loss.iloc[0]),
        "final_loss": float(final.loss.mean()),
        "final_losses": {term.removeprefix(LOSS): float(final[term].mean()) for term in terms},
        "final_mse": float(final[MSE].mean()),
        "explained_variance": float(final.explained_variance.mean()),
        "l0": float(final.l0.mean()),
        "dead_latents": int(steps.dead_latents.iloc[-1]),
        "ms_per_step": _median_ms(plain if len(plain) else with_aux),
        "ms_per_step_with_aux_loss": _median_ms(with_aux),
        "ms_per_final_step": _median_ms(final.seconds) if l0_varies(steps) else None,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "tokens_per_second_of_step": tokens / seconds,
        "tokens_per_second_end_to_end": tokens / (seconds + data_seconds),
        "added_memory_mib": _most_mib(steps.added_memory_bytes),
        "peak_memory_mib": _most_mib(steps.peak_memory_bytes),
    }


def last_tenth(steps: pd.DataFrame) -> pd.DataFrame:
    """The steps over which final values are means: at least one."""
    return steps.tail(max(1, round(0.1 * len(steps))))


def l0_varies(steps: pd.DataFrame) -> bool:
    """Whether the number of active latents is not fixed by the architecture."""
    return bool(steps.l0.max() > 2 * steps.l0.min())


def deviation(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, Any]:
    """
    How far the MSE of side `b` is from that of side `a`, relative to it, in as many steps.

    `by_step` and `final`, that of the means over the last tenth, are signed; `median` and `largest`
    are of the size of `by_step`.
    """
    by_step = _relative(a[MSE].to_numpy(), b[MSE].to_numpy())
    sizes = np.nan_to_num(np.abs(by_step), nan=math.inf, posinf=math.inf)
    largest = int(sizes.argmax())
    final = _relative(*(np.array([last_tenth(side)[MSE].mean()]) for side in (a, b)))
    return {
        "by_step": by_step.tolist(),
        "median": float(np.median(sizes)),
        "largest": float(sizes[largest]),
        "largest_at": int(a.step.iloc[largest]),
        "final": float(final[0]),
        "same_batches": bool((a.batch_crc32 == b.batch_crc32).all()),
    }


def _relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == b, 0.0, np.where(a == 0, math.inf, b / a - 1))


def _median_ms(seconds: pd.Series[float]) -> float | None:
    return 1e3 * float(seconds.median()) if len(seconds) else None


def _most_mib(counts: pd.Series[float]) -> float | None:
    return float(counts.max()) / 2**20 if counts.notna().any() else None
