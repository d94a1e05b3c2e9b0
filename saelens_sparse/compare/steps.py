"""The training steps of both sides in numbers: what each trained and cost, how far they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from saelens_sparse.architectures.dead_losses import GHOST_LOSS

LOSS = "losses."
"""Before SAELens's name of a term of the loss, in the columns of a table of steps."""
MSE = LOSS + "mse_loss"
AUX_LOSSES = (LOSS + "auxiliary_reconstruction_loss", LOSS + GHOST_LOSS)
"""Those that train dead latents: AuxK, ghost gradients."""
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
    steps in which no dead latents are trained, if there are any, `ms_per_final_step` of the last
    tenth, where L0 varies.
    """
    final = last_tenth(steps)
    timed = steps.iloc[min(WARM_UP_STEPS, len(steps) // 2) :]
    with_aux = timed[trains_dead_latents(timed)]
    plain = timed.drop(with_aux.index)
    means, sums = (
        of.to_dict()
        for of in (final.mean(skipna=False, numeric_only=True), steps.sum(numeric_only=True))
    )
    most = steps.max(numeric_only=True).to_dict()
    seconds, tokens = sums["seconds"], batch_size * len(steps)
    return {
        "architecture": architecture,
        "steps": len(steps),
        "first_loss": steps.loss.tolist()[0],
        "final_loss": means["loss"],
        "final_losses": {
            name.removeprefix(LOSS): mean for name, mean in means.items() if name.startswith(LOSS)
        },
        "final_mse": means[MSE],
        "explained_variance": means["explained_variance"],
        "l0": means["l0"],
        "dead_latents": steps.dead_latents.tolist()[-1],
        "ms_per_step": _median_ms(plain if len(plain) else with_aux),
        "ms_per_step_with_aux_loss": _median_ms(with_aux),
        "ms_per_final_step": _median_ms(final) if l0_varies(steps) else None,
        "step_seconds": seconds,
        "data_seconds": sums["data_seconds"],
        "tokens_per_second_of_step": tokens / seconds,
        "tokens_per_second_end_to_end": tokens / (seconds + sums["data_seconds"]),
        "added_memory_mib": _mib(most.get("added_memory_bytes")),
        "peak_memory_mib": _mib(most.get("peak_memory_bytes")),
    }


def trains_dead_latents(steps: pd.DataFrame) -> Any:
    """Which steps have a loss of dead latents: a Series of bool."""
    losses = steps[[name for name in AUX_LOSSES if name in steps]]
    return (losses != 0).any(axis=1)


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
    by_step = _relative(a[MSE], b[MSE])
    sizes = by_step.abs().fillna(math.inf).tolist()
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    return {
        "by_step": by_step.tolist(),
        "median": median(sizes),
        "largest": sizes[largest],
        "largest_at": 1 + largest,
        "final": _relative(
            *(last_tenth(side)[[MSE]].mean(skipna=False) for side in (a, b))
        ).tolist()[0],
        "same_batches": a.batch_crc32.tolist() == b.batch_crc32.tolist(),
    }


def _relative(a: Any, b: Any) -> Any:
    return (b / a - 1).where(a != b, 0.0)


def _median_ms(steps: pd.DataFrame) -> float | None:
    return 1e3 * median(steps.seconds) if len(steps) else None


def _mib(count: float | None) -> float | None:
    return None if count is None else count / 2**20
