"""The tables of a comparison and the sentence that it ends with, from its `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saelens_sparse.reports.presentation import Rows, percent

Results = Mapping[str, Any]

# A label, a name in a side's numbers, a format, and how the second side's is held against the
# first's: as a format of the difference, or by `_compared`.
QUALITY = (
    ("explained variance", "explained_variance", "{:.4f}", "{:+.4f}"),
    ("L0", "l0", "{:.2f}", "{:+.2f}"),
    ("dead latents", "dead_latents", "{:,}", "{:+,}"),
    ("CE loss recovered", "ce_loss_score", "{:.4f}", "{:+.4f}"),
)
TIME = (
    ("ms per SAE step (median)", "ms_per_step", "{:.1f}", "time"),
    ("  with dead latents (AuxK)", "ms_per_step_with_aux_loss", "{:.1f}", "time"),
    ("  at the final L0", "ms_per_final_step", "{:.1f}", "time"),
    ("all SAE steps, s", "step_seconds", "{:.1f}", "time"),
    ("waiting for batches, s", "data_seconds", "{:.1f}", ""),
    ("tokens/s, SAE steps alone", "tokens_per_second_of_step", "{:,.0f}", "pace"),
)
MEMORY = (
    ("memory that training adds, MiB", "added_memory_mib", "{:,.0f}", "share"),
    ("peak memory in all, MiB", "peak_memory_mib", "{:,.0f}", "share"),
)
EVALUATION = (
    ("CE loss recovered", "ce_loss_score", "{:.4f}", "{:+.4g}"),
    ("CE loss with the SAE", "ce_loss_with_sae", "{:.4f}", "{:+.4g}"),
    ("  without it", "ce_loss_without_sae", "{:.4f}", "{:+.4g}"),
    ("  with zeros instead", "ce_loss_with_ablation", "{:.4f}", "{:+.4g}"),
    ("explained variance", "explained_variance", "{:.4f}", "{:+.4g}"),
    ("MSE", "mse", "{:.4g}", "{:+.4g}"),
    ("cosine of output and input", "cossim", "{:.4f}", "{:+.4g}"),
    ("norm of output / norm of input", "l2_ratio", "{:.4f}", "{:+.4g}"),
    ("L0", "l0", "{:.2f}", "{:+.4g}"),
)


def config_of(results: Results) -> Mapping[str, Any]:
    """The first side's runner config, for what both have in common."""
    return next(iter(results["settings"]["arms"].values()))


def main_table(results: Results) -> Rows:
    """The table of the terminal: a column for each side, and one that compares them."""
    apart = results["mse_deviation"]
    numbers = [
        {**(evaluation or {}), **summary}
        for summary, evaluation in zip(results["arms"], results["evaluations"], strict=True)
    ]
    paces = end_to_end(results)
    for side, of_side in zip(numbers, zip(*paces.values(), strict=True), strict=True):
        side |= dict(zip(paces, of_side, strict=True))
    with_source = [(f"tokens/s with {source}", source, "{:,.0f}", "pace") for source in paces]
    losses = [("loss of the first step", "first_loss", "{:.4f}", "percent")]
    losses += [("final MSE", "final_mse", "{:.4f}", "percent")]
    return [
        _header("", results),
        *_rows(numbers, losses),
        ("  MSE of a step, median apart", "", "", percent(apart["median"])),
        (f"  at most (step {apart['largest_at']})", "", "", percent(apart["largest"])),
        *_rows(numbers, (*QUALITY, *TIME, *with_source, *MEMORY)),
    ]


def end_to_end(results: Results) -> dict[str, tuple[float, float]]:
    """Tokens/s of each side by its source of activations; the language model, if known, is last."""
    a, b = results["arms"]
    measured = (a["tokens_per_second_end_to_end"], b["tokens_per_second_end_to_end"])
    if not config_of(results).get("use_cached_activations"):
        return {"language model": measured}
    paces = [
        (evaluation or {}).get("llm_tokens_per_second") for evaluation in results["evaluations"]
    ]
    if not all(paces):
        return {"cached activations": measured}
    # The model is one: both sides have run it on the same text.
    of_model = sum(paces) / len(paces)
    first, second = (1 / (1 / side["tokens_per_second_of_step"] + 1 / of_model) for side in (a, b))
    return {"cached activations": measured, "language model": (first, second)}


def loss_table(results: Results) -> Rows:
    """Every term of the loss, as a mean over the last tenth of the steps."""
    losses = [{"loss": side["final_loss"], **side["final_losses"]} for side in results["arms"]]
    rows = [_header("final value of", results)]
    for name in {**losses[0], **losses[1]}:
        values = [side.get(name) for side in losses]
        cells = ["-" if value is None else f"{value:.6g}" for value in values]
        rows.append((name, *cells, "" if "-" in cells else _compared("percent", *values)))
    return rows


def evaluation_table(results: Results) -> Rows:
    """What SAELens's evals say about both; a header alone where they were skipped."""
    evaluations = [evaluation or {} for evaluation in results["evaluations"]]
    return [(*_header("", results)[:3], "difference"), *_rows(evaluations, EVALUATION)]


def dictionary_table(results: Results) -> Rows:
    """How many latents are shared, by how alike they must be."""
    a, b = results["settings"]["arms"]
    shared = results["shared_latents"]
    alive = shared["alive"]
    counts = list(shared["thresholds"].values())
    rows = [("of the latents that are alive", *(f"cosine >= {t}" for t in shared["thresholds"]))]
    for label, found, total in (
        (f"{a}'s with a match in {b}", [c["a_in_b"] for c in counts], alive[0]),
        (f"{b}'s with a match in {a}", [c["b_in_a"] for c in counts], alive[1]),
        ("one-to-one (each other's nearest)", [c["one_to_one"] for c in counts], min(alive)),
        (
            "matched at the same index",
            [c["same_index"] for c in counts],
            shared.get("alive_in_both", 0),
        ),
        (f"{a}'s like their own initial value", [c["near_start"][0] for c in counts], alive[0]),
        (f"{b}'s like their own initial value", [c["near_start"][1] for c in counts], alive[1]),
    ):
        if found:
            rows.append((label, *(f"{n:,} ({n / max(1, total):.1%})" for n in found)))
    return rows


def headline(results: Results) -> str:
    """One sentence on how the sides compare, from what was measured."""
    a, b = results["arms"]
    apart, config = results["mse_deviation"], config_of(results)
    if not apart["same_batches"]:
        return "The sides were given different batches: they cannot be compared"
    n_steps = -(-config["training_tokens"] // config["train_batch_size_tokens"])
    so_far = "" if a["steps"] >= n_steps else f"After {a['steps']} of {n_steps} steps: "
    source, (first, second) = list(end_to_end(results).items())[-1]
    return (
        f"{so_far}{b['architecture']} trains {a['step_seconds'] / b['step_seconds']:.2f}x as fast "
        f"as {a['architecture']} in its SAE steps, {second / first:.2f}x with the {source}; final "
        f"MSE {percent(apart['final'], '+')}, at most {percent(apart['largest'])} apart on any step"
    )


def _header(label: str, results: Results) -> tuple[str, ...]:
    a, b = results["settings"]["arms"]
    return (label, a, b, f"{b} is")


def _rows(
    sides: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[str, str, str, str]]
) -> list[tuple[str, ...]]:
    """A row for each of the wanted that both sides have."""
    rows: list[tuple[str, ...]] = []
    for label, name, pattern, how in wanted:
        values = [side.get(name) for side in sides]
        if None not in values:
            rows.append((label, *map(pattern.format, values), _compared(how, *values)))
    return rows


def _compared(how: str, a: Any, b: Any) -> str:
    """The second side's number, held against the first's."""
    if how.startswith("{"):
        return how.format(round(b - a, 4) + 0)  # adding 0 leaves no negative zero
    if how == "percent":
        if a == b:
            return percent(0.0)
        return percent(b / a - 1, "+") if a and math.isfinite(a) else ""
    if how in ("time", "pace"):
        return f"{a / b if how == 'time' else b / a:.2f}x as fast"
    return f"{b / a:.0%} of it" if how == "share" and a else ""
