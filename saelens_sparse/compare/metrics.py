"""The steps of both arms in numbers: what each trained and cost, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from saelens_sparse.compare.records import AUX_LOSS, Step

WARM_UP_STEPS = 5
"""The first steps allocate and compile; they are left out of medians of time."""
FINAL_PART = 0.1
"""Final values are means over this part of the steps, the last one."""


@dataclass(frozen=True)
class Summary:
    """
    One arm in a few numbers; what is called final is a mean over the last tenth of the steps.

    Args:
        final_losses: Every term of the loss by SAELens's name, coefficients included.
        ms_per_step: Median of the SAE's step, of those without AuxK if there are any.
        ms_per_step_with_aux_loss: The same of the steps that train dead latents too.
        ms_per_final_step: Median of the last tenth, where L0 varies: there it sets the cost.
        step_seconds: Of all the SAE's steps.
        data_seconds: Spent waiting for batches.
        tokens_per_second_of_step: The SAE's steps alone.
        tokens_per_second_end_to_end: Steps and waiting for batches together.
        added_memory_mib: Most held above what was held before the first step.
        peak_memory_mib: Most held in a step, language model and buffers included.
    """

    architecture: str
    steps: int
    first_loss: float
    final_loss: float
    final_losses: dict[str, float]
    final_mse: float
    explained_variance: float
    l0: float
    dead_latents: int
    ms_per_step: float
    ms_per_step_with_aux_loss: float | None
    ms_per_final_step: float | None
    step_seconds: float
    data_seconds: float
    tokens_per_second_of_step: float
    tokens_per_second_end_to_end: float
    added_memory_mib: float | None
    peak_memory_mib: float | None


def summarize(architecture: str, steps: Sequence[Step], batch_size: int) -> Summary:
    """Reduce an arm's steps, of which there is at least one, to what the tables show."""
    final = steps[-n_final(len(steps)) :]
    timed = steps[min(WARM_UP_STEPS, len(steps) // 2) :]
    with_aux_loss = [step.seconds for step in timed if step.losses.get(AUX_LOSS)]
    plain = [step.seconds for step in timed if not step.losses.get(AUX_LOSS)]
    step_seconds = sum(step.seconds for step in steps)
    data_seconds = sum(step.data_seconds for step in steps)
    tokens = batch_size * len(steps)
    return Summary(
        architecture=architecture,
        steps=len(steps),
        first_loss=steps[0].loss,
        final_loss=fmean(step.loss for step in final),
        final_losses={
            name: fmean(step.losses.get(name, 0.0) for step in final) for name in terms(steps)
        },
        final_mse=fmean(step.mse for step in final),
        explained_variance=fmean(step.explained_variance for step in final),
        l0=fmean(step.l0 for step in final),
        dead_latents=steps[-1].dead_latents,
        ms_per_step=1e3 * median(plain or with_aux_loss),
        ms_per_step_with_aux_loss=1e3 * median(with_aux_loss) if with_aux_loss else None,
        ms_per_final_step=1e3 * median(step.seconds for step in final)
        if l0_varies(steps)
        else None,
        step_seconds=step_seconds,
        data_seconds=data_seconds,
        tokens_per_second_of_step=tokens / step_seconds,
        tokens_per_second_end_to_end=tokens / (step_seconds + data_seconds),
        added_memory_mib=_mib(max((step.added_memory_bytes or 0 for step in steps), default=0)),
        peak_memory_mib=_mib(max((step.peak_memory_bytes or 0 for step in steps), default=0)),
    )


def n_final(n_steps: int) -> int:
    """How many of the steps final values are taken over."""
    return max(1, round(FINAL_PART * n_steps))


def terms(steps: Sequence[Step]) -> list[str]:
    """Names of the loss terms of any of the steps, in SAELens's order."""
    return list(dict.fromkeys(name for step in steps for name in step.losses))


def l0_varies(steps: Sequence[Step]) -> bool:
    """Whether the number of active latents is not fixed by the architecture."""
    return max(step.l0 for step in steps) > 2 * min(step.l0 for step in steps)


def with_language_model(tokens_per_second: float, llm_tokens_per_second: float) -> float:
    """Tokens a second if each one also took the language model its time."""
    return 1 / (1 / tokens_per_second + 1 / llm_tokens_per_second)


@dataclass(frozen=True)
class Deviation:
    """
    How far the second arm's MSE is from the first one's, relative to it.

    Args:
        by_step: Signed, of each step.
        median: Of its size over all steps.
        largest: The largest size.
        largest_at: The step of the largest.
        final: Signed, of the means over the last tenth of the steps.
        same_batches: Whether both arms were given the same batches in the same order.
    """

    by_step: list[float]
    median: float
    largest: float
    largest_at: int
    final: float
    same_batches: bool


def deviation(a: Sequence[Step], b: Sequence[Step]) -> Deviation:
    """Hold the steps of `b` against as many steps of `a`."""
    by_step = [_relative(first.mse, second.mse) for first, second in zip(a, b, strict=True)]
    sizes = [abs(value) if math.isfinite(value) else math.inf for value in by_step]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    count = n_final(len(a))
    final = _relative(*(fmean(step.mse for step in steps[-count:]) for steps in (a, b)))
    return Deviation(
        by_step=by_step,
        median=median(sizes),
        largest=sizes[largest],
        largest_at=a[largest].step,
        final=final,
        same_batches=all(
            first.batch_crc32 == second.batch_crc32 for first, second in zip(a, b, strict=True)
        ),
    )


def _relative(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return b / a - 1 if a else math.inf


def _mib(count: int) -> float | None:
    return count / 2**20 if count else None
