"""The tables of a comparison, and the sentence that it ends with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saelens_sparse.compare.metrics import Deviation, Summary, with_language_model
from saelens_sparse.reports.presentation import percent

Cells = tuple[str, ...]

EVALUATION_ROWS = (
    ("CE loss recovered", "ce_loss_score", "{:.4f}"),
    ("CE loss with the SAE", "ce_loss_with_sae", "{:.4f}"),
    ("  without it", "ce_loss_without_sae", "{:.4f}"),
    ("  with zeros instead", "ce_loss_with_ablation", "{:.4f}"),
    ("explained variance", "explained_variance", "{:.4f}"),
    ("MSE", "mse", "{:.4g}"),
    ("cosine of output and input", "cossim", "{:.4f}"),
    ("norm of output / norm of input", "l2_ratio", "{:.4f}"),
    ("L0", "l0", "{:.2f}"),
)
"""What is shown of SAELens's evals: a label, SAELens's name, a format."""

Evaluations = Sequence[Mapping[str, Any] | None]


def main_table(
    a: Summary, b: Summary, apart: Deviation, evaluations: Evaluations, cached: bool
) -> list[Cells]:
    """The table of the terminal: a column for each arm, and one that compares them."""
    rows: list[Cells] = [("", a.architecture, b.architecture, f"{b.architecture} is")]

    def add(
        label: str, first: Any, second: Any, pattern: str, compare: Callable[[Any, Any], str]
    ) -> None:
        if first is not None and second is not None:
            rows.append(
                (label, pattern.format(first), pattern.format(second), compare(first, second))
            )

    def of_summary(
        label: str, field: str, pattern: str, compare: Callable[[Any, Any], str]
    ) -> None:
        add(label, getattr(a, field), getattr(b, field), pattern, compare)

    of_summary("loss of the first step", "first_loss", "{:.4f}", _in_percent)
    of_summary("final MSE", "final_mse", "{:.4f}", _in_percent)
    rows += [
        ("  MSE of a step, median apart", "", "", percent(apart.median)),
        (f"  at most (step {apart.largest_at})", "", "", percent(apart.largest)),
    ]
    of_summary("explained variance", "explained_variance", "{:.4f}", _difference("{:+.4f}"))
    of_summary("L0", "l0", "{:.2f}", _difference("{:+.2f}"))
    of_summary("dead latents", "dead_latents", "{:,}", _difference("{:+,}"))
    first, second = (_value(evaluation, "ce_loss_score") for evaluation in evaluations)
    add("CE loss recovered", first, second, "{:.4f}", _difference("{:+.4f}"))
    of_summary("ms per SAE step (median)", "ms_per_step", "{:.1f}", _speed)
    of_summary("  with dead latents (AuxK)", "ms_per_step_with_aux_loss", "{:.1f}", _speed)
    of_summary("  at the final L0", "ms_per_final_step", "{:.1f}", _speed)
    of_summary("all SAE steps, s", "step_seconds", "{:.1f}", _speed)
    of_summary("waiting for batches, s", "data_seconds", "{:.1f}", lambda _a, _b: "")
    of_summary("tokens/s, SAE steps alone", "tokens_per_second_of_step", "{:,.0f}", _pace)
    for source, first, second in end_to_end(a, b, evaluations, cached):
        add(f"tokens/s with {source}", first, second, "{:,.0f}", _pace)
    of_summary("memory that training adds, MiB", "added_memory_mib", "{:,.0f}", _share)
    of_summary("peak memory in all, MiB", "peak_memory_mib", "{:,.0f}", _share)
    return rows


def end_to_end(
    a: Summary, b: Summary, evaluations: Evaluations, cached: bool
) -> list[tuple[str, float, float]]:
    """Tokens a second of each arm with its source of activations; the language model is last."""
    measured = (a.tokens_per_second_end_to_end, b.tokens_per_second_end_to_end)
    if not cached:
        return [("language model", *measured)]
    paces = [_value(evaluation, "llm_tokens_per_second") for evaluation in evaluations]
    if not all(paces):
        return [("cached activations", *measured)]
    # The model is one: both arms have run it on the same text.
    pace = sum(paces) / len(paces)
    first, second = (with_language_model(arm.tokens_per_second_of_step, pace) for arm in (a, b))
    return [("cached activations", *measured), ("language model", first, second)]


def loss_table(a: Summary, b: Summary) -> list[Cells]:
    """Every term of the loss, as a mean over the last tenth of the steps."""
    rows: list[Cells] = [("final value of", a.architecture, b.architecture, f"{b.architecture} is")]
    losses_a, losses_b = ({"loss": arm.final_loss, **arm.final_losses} for arm in (a, b))
    for name in {**losses_a, **losses_b}:
        if name in losses_a and name in losses_b:
            compared = _in_percent(losses_a[name], losses_b[name])
        else:
            compared = ""
        values = [
            f"{losses[name]:.6g}" if name in losses else "-" for losses in (losses_a, losses_b)
        ]
        rows.append((name, *values, compared))
    return rows


def evaluation_table(names: Sequence[str], evaluations: Evaluations) -> list[Cells]:
    """What SAELens's evals say about both; a header alone where they were skipped."""
    rows: list[Cells] = [("", *names, "difference")]
    for label, key, pattern in EVALUATION_ROWS:
        values = [_value(evaluation, key) for evaluation in evaluations]
        if None not in values:
            first, second = values
            texts = [pattern.format(value) for value in values]
            rows.append((label, *texts, f"{second - first:+.4g}"))
    return rows


def dictionary_table(names: Sequence[str], shared: Mapping[str, Any]) -> list[Cells]:
    """How many latents are shared, by how alike they must be."""
    a, b = names
    rows: list[Cells] = [("of the latents that are alive", *_headers(shared))]
    alive = shared["alive"]

    def line(label: str, key: str, total: int, index: int | None = None) -> None:
        counts = [entry[key] for entry in shared["thresholds"].values()]
        counts = [count[index] for count in counts] if index is not None else counts
        if None not in counts and counts:
            rows.append((label, *(f"{n:,} ({n / max(1, total):.1%})" for n in counts)))

    line(f"{a}'s with a match in {b}", "a_in_b", alive[0])
    line(f"{b}'s with a match in {a}", "b_in_a", alive[1])
    line("one-to-one (each other's nearest)", "one_to_one", min(alive))
    line("matched at the same index", "same_index", shared.get("alive_in_both", 0))
    line(f"{a}'s like their own initial value", "near_start", alive[0], 0)
    line(f"{b}'s like their own initial value", "near_start", alive[1], 1)
    return rows


def _headers(shared: Mapping[str, Any]) -> list[str]:
    return [f"cosine >= {threshold}" for threshold in shared["thresholds"]]


def headline(
    a: Summary,
    b: Summary,
    apart: Deviation,
    evaluations: Evaluations,
    cached: bool,
    n_steps: int,
) -> str:
    """One sentence on how the arms compare, from what was measured."""
    if not apart.same_batches:
        return "The arms were given different batches: they cannot be compared"
    so_far = "" if a.steps >= n_steps else f"After {a.steps} of {n_steps} steps: "
    source, first, second = end_to_end(a, b, evaluations, cached)[-1]
    difference = f"{percent(apart.final, '+')}, at most {percent(apart.largest)} apart on any step"
    return (
        f"{so_far}{b.architecture} trains {a.step_seconds / b.step_seconds:.2f}x as fast as "
        f"{a.architecture} in its SAE steps, {second / first:.2f}x with the {source}; "
        f"final MSE {difference}"
    )


def _value(evaluation: Mapping[str, Any] | None, key: str) -> Any:
    return None if evaluation is None else evaluation.get(key)


def _in_percent(a: float, b: float) -> str:
    if a == b:
        return percent(0.0)
    return percent(b / a - 1, "+") if a and math.isfinite(a) else ""


def _difference(pattern: str) -> Callable[[Any, Any], str]:
    # Adding 0 leaves no negative zero.
    return lambda a, b: pattern.format(round(b - a, 4) + 0)


def _speed(a: float, b: float) -> str:
    return f"{a / b:.2f}x as fast"


def _pace(a: float, b: float) -> str:
    return _speed(b, a)


def _share(a: float, b: float) -> str:
    return f"{b / a:.0%} of it" if a else ""
