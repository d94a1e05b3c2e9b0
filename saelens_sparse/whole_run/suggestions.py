"""What to change in a run's config to gain most, estimated from what was measured of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saelens_sparse.whole_run.record import SAELENS_RUNNER, SPARSE_RUNNER, RunRecord
from saelens_sparse.whole_run.windows import EVALS, LOGGING, MODEL

MAX_SUGGESTIONS = 3
MIN_GAIN = 1.03
"""Below it a gain is within the spread of windows."""
WANTED_SHARE, RARE_SHARE = 0.01, 0.03
"""What evals and logs may take of a run; below the second they are left as they are."""
MODEL_DOMINATES = 0.5


@dataclass(frozen=True)
class Trial:
    """
    A part of a run that was timed alone, with the config's setting and with another.

    Attributes:
        change: the other setting.
        part: of `PARTS`.
        before_ms: milliseconds by 4,096 tokens with the config's.
        after_ms: with the other.
    """

    change: str
    part: str
    before_ms: float
    after_ms: float


@dataclass(frozen=True)
class Suggestion:
    """
    A change of the config.

    Attributes:
        change: what to set.
        reason: what was measured.
        gain: how many times as fast the whole run would be.
        is_bound: whether the gain is the most that it can be.
    """

    change: str
    reason: str
    gain: float
    is_bound: bool = False

    def __str__(self) -> str:
        most = "at most " if self.is_bound else ""
        return f"{self.change}: the run would be {most}{self.gain:.2f}x as fast. {self.reason}"


def suggestions(
    record: RunRecord,
    cfg: Mapping[str, Any],
    trials: Sequence[Trial] = (),
) -> list[Suggestion]:
    """
    The changes that gain most, at most three.

    Args:
        record: Of the run.
        cfg: Its runner config as a dict.
        trials: Parts of it that were tried with other settings.
    """
    found = [
        *_of_trials(record, trials),
        *_of_evals(record, cfg),
        *_of_logs(record, cfg),
        *_of_prefetching(record, cfg),
        *_of_cache(record, cfg),
    ]
    gains = [one for one in found if one.gain >= MIN_GAIN]
    return sorted(gains, key=lambda one: (one.is_bound, -one.gain))[:MAX_SUGGESTIONS]


def _of_trials(record: RunRecord, trials: Sequence[Trial]) -> Iterator[Suggestion]:
    for trial in trials:
        saved = record.parts_ms[trial.part] * (1 - trial.after_ms / trial.before_ms)
        reason = (
            f"Tried alone, the {trial.part} took {trial.after_ms:.1f} instead of "
            f"{trial.before_ms:.1f} ms per 4,096 tokens."
        )
        yield Suggestion(trial.change, reason, _gain(record, saved))


def of_runner(stock: RunRecord, own: RunRecord) -> list[Suggestion]:
    """To change from SAELens's runner to this package's, if that was a gain."""
    assert (stock.runner, own.runner) == (SAELENS_RUNNER, SPARSE_RUNNER)
    gain = stock.ms / own.ms
    reason = (
        f"Measured here: {own.tokens_per_second:,.0f} instead of "
        f"{stock.tokens_per_second:,.0f} tokens/s."
    )
    change = f"{SPARSE_RUNNER} or saelens-sparse train"
    return [Suggestion(change, reason, gain)] if gain >= MIN_GAIN else []


def _of_evals(record: RunRecord, cfg: Mapping[str, Any]) -> Iterator[Suggestion]:
    share, steps = record.share(EVALS), record.steps_between_evals
    if share > RARE_SHARE and steps is not None:
        factor = math.ceil(share / WANTED_SHARE)
        every = cfg["logger"]["eval_every_n_wandb_logs"] * factor
        reason = f"Evals every {steps:,} steps take {share:.0%} of the run."
        saved = record.parts_ms[EVALS] * (1 - 1 / factor)
        change = f"logger.eval_every_n_wandb_logs={every}"
        yield Suggestion(change, reason, _gain(record, saved))


def _of_logs(record: RunRecord, cfg: Mapping[str, Any]) -> Iterator[Suggestion]:
    share, every = record.share(LOGGING), cfg["logger"]["wandb_log_frequency"]
    if share > RARE_SHARE:
        factor = math.ceil(share / WANTED_SHARE)
        evals = max(1, round(cfg["logger"]["eval_every_n_wandb_logs"] / factor))
        reason = f"Logs every {every:,} steps take {share:.0%} of the run."
        saved = record.parts_ms[LOGGING] * (1 - 1 / factor)
        change = f"logger.wandb_log_frequency={every * factor}"
        change += f", logger.eval_every_n_wandb_logs={evals}"
        yield Suggestion(change, reason, _gain(record, saved))


def _of_prefetching(record: RunRecord, cfg: Mapping[str, Any]) -> Iterator[Suggestion]:
    model_ms = record.parts_ms[MODEL]
    apart = cfg.get("llm_device") not in (None, cfg["device"])
    if apart and not cfg["prefetch_llm_batches"] and model_ms:
        hidden = min(model_ms, record.ms - model_ms)
        reason = f"The language model has {cfg['llm_device']} to itself and waits for the steps."
        yield Suggestion("prefetch_llm_batches=true", reason, _gain(record, hidden), is_bound=True)


def _of_cache(record: RunRecord, cfg: Mapping[str, Any]) -> Iterator[Suggestion]:
    if record.share(MODEL) >= MODEL_DOMINATES and not cfg["use_cached_activations"]:
        reason = (
            f"The language model takes {record.share(MODEL):.0%} of the run. A cache pays from the "
            "second run or epoch on the same activations."
        )
        gain = _gain(record, record.parts_ms[MODEL])
        yield Suggestion("saelens-sparse cache CONFIG", reason, gain, is_bound=True)


def _gain(record: RunRecord, saved_ms: float) -> float:
    return record.ms / (record.ms - saved_ms)
