"""The tables of a comparison and the sentence that it ends with, from its `results.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saelens_sparse.reports.presentation import Rows, percent
from saelens_sparse.whole_run.record import RunRecord
from saelens_sparse.whole_run.shown import faster
from saelens_sparse.whole_run.windows import STEP

Results = Mapping[str, Any]

# A label, a name in a side's numbers, a format, and how the second side's is held against the
# first's: the format of the difference, or a word that `_compared` knows.
FIRST = (
    ("loss of the first step", "first_loss", "{:.4f}", "percent"),
    ("final MSE", "final_mse", "{:.4f}", "percent"),
)
MAIN = (
    ("explained variance", "explained_variance", "{:.4f}", "{:+.4f}"),
    ("L0", "l0", "{:.2f}", "{:+.2f}"),
    ("dead latents", "dead_latents", "{:,}", "{:+,}"),
    ("CE loss recovered", "ce_loss_score", "{:.4f}", "{:+.4f}"),
    ("ms per SAE step (median)", "ms_per_step", "{:.1f}", "time"),
    ("  with dead latents trained", "ms_per_step_with_aux_loss", "{:.1f}", "time"),
    ("  at the final L0", "ms_per_final_step", "{:.1f}", "time"),
    ("all SAE steps, s", "step_seconds", "{:.1f}", "time"),
    ("waiting for batches, s", "data_seconds", "{:.1f}", ""),
    ("tokens/s, SAE steps alone", "tokens_per_second_of_step", "{:,.0f}", "pace"),
    ("tokens/s with cached activations", "cached activations", "{:,.0f}", "pace"),
    ("tokens/s with language model", "language model", "{:,.0f}", "pace"),
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


def main_table(results: Results) -> Rows:
    """The table of the terminal: a column for each side, and one that compares them."""
    apart, paces = results["mse_deviation"], end_to_end(results)
    sides = [
        {**(evaluation or {}), **summary, **dict(zip(paces, pace, strict=True))}
        for summary, evaluation, pace in zip(
            results["arms"], results["evaluations"], zip(*paces.values(), strict=True), strict=True
        )
    ]
    return [
        _header("", results),
        *_rows(sides, FIRST),
        ("  MSE of a step, median apart", "", "", percent(apart["median"])),
        (f"  at most (step {apart['largest_at']})", "", "", percent(apart["largest"])),
        *_rows(sides, MAIN),
    ]


def end_to_end(results: Results) -> dict[str, list[float]]:
    """Tokens/s of both sides by the source of activations; the language model is last."""
    sides, config = results["arms"], next(iter(results["settings"]["arms"].values()))
    measured = [side["tokens_per_second_end_to_end"] for side in sides]
    if not config.get("use_cached_activations"):
        return {"language model": measured}
    of_model = [(found or {}).get("llm_tokens_per_second") for found in results["evaluations"]]
    if not all(of_model):
        return {"cached activations": measured}
    # The model is one: both sides have run it on the same text.
    per_token = len(of_model) / sum(map(float, filter(None, of_model)))
    alone = [side["tokens_per_second_of_step"] for side in sides]
    together = [1 / (1 / pace + per_token) for pace in alone]
    return {"cached activations": measured, "language model": together}


def loss_table(results: Results) -> Rows:
    """Every term of the loss, as a mean over the last tenth of the steps."""
    losses = [{"loss": side["final_loss"], **side["final_losses"]} for side in results["arms"]]
    rows = [_header("final value of", results)]
    for name in {**losses[0], **losses[1]}:
        cells = [f"{side[name]:.6g}" if name in side else "-" for side in losses]
        both = all(name in side for side in losses)
        compared = _compared("percent", *(side[name] for side in losses)) if both else ""
        rows.append((name, *cells, compared))
    return rows


def evaluation_table(results: Results) -> Rows:
    """What SAELens's evals say about both; a header alone where they were skipped."""
    found = [evaluation or {} for evaluation in results["evaluations"]]
    return [(*_header("", results)[:3], "difference"), *_rows(found, EVALUATION)]


def dictionary_table(results: Results) -> Rows:
    """How many latents are shared, by how alike they must be."""
    a, b = results["settings"]["arms"]
    shared = results["shared_latents"]
    alive_a, alive_b = shared["alive"]
    wanted = {
        f"{a}'s with a match in {b}": ("a_in_b", alive_a),
        f"{b}'s with a match in {a}": ("b_in_a", alive_b),
        "one-to-one (each other's nearest)": ("one_to_one", min(alive_a, alive_b)),
        "matched at the same index": ("same_index", shared.get("alive_in_both", 0)),
        f"{a}'s like their own initial value": (0, alive_a),
        f"{b}'s like their own initial value": (1, alive_b),
    }
    rows = [("of the latents that are alive", *(f"cosine >= {t}" for t in shared["thresholds"]))]
    for label, (key, total) in wanted.items():
        found = [
            {**c, **dict(enumerate(c["near_start"]))}[key] for c in shared["thresholds"].values()
        ]
        if found and None not in found:
            rows.append((label, *(f"{n:,} ({n / max(1, total):.1%})" for n in found)))
    return rows


def headline(results: Results) -> str:
    """One sentence on how the sides compare, from what was measured."""
    (a, b), apart = results["arms"], results["mse_deviation"]
    if not apart["same_batches"]:
        return "The sides were given different batches: they cannot be compared"
    config = next(iter(results["settings"]["arms"].values()))
    n_steps = -(-config["training_tokens"] // config["train_batch_size_tokens"])
    so_far = "" if a["steps"] >= n_steps else f"After {a['steps']} of {n_steps} steps: "
    quality = (
        f"final MSE {percent(apart['final'], '+')}, at most {percent(apart['largest'])} apart on "
        "any step"
    )
    runs = [RunRecord.model_validate(run) for run in results.get("whole_runs", [])]
    if runs:
        return f"{so_far}{of_whole_runs(runs)}; {quality}"
    source, (first, second) = list(end_to_end(results).items())[-1]
    return (
        f"{so_far}{b['architecture']} trains {a['step_seconds'] / b['step_seconds']:.2f}x as fast "
        f"as {a['architecture']} in its SAE steps, {second / first:.2f}x with the {source}; "
        f"{quality}"
    )


def of_whole_runs(runs: Sequence[RunRecord]) -> str:
    """How the last run compares with the first, and those between with it."""
    first, *between, last = runs
    whole = (
        f"A whole run of {last.architecture} with {last.runner} is {faster(last, first)} as one of "
        f"{first.architecture} ({last.tokens_per_second:,.0f} instead of "
        f"{first.tokens_per_second:,.0f} tokens/s)"
    )
    same = [run for run in between if run.architecture == last.architecture]
    others = [f"{first.ms / run.ms:.2f}x with {run.runner}" for run in same]
    steps = first.parts_ms[STEP] / last.parts_ms[STEP]
    return ", ".join([whole, *others, f"its SAE step {steps:.2f}x"])


def _header(label: str, results: Results) -> tuple[str, ...]:
    a, b = results["settings"]["arms"]
    return (label, a, b, f"{b} is")


def _rows(sides: Sequence[Results], wanted: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
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
        relative = 0.0 if a == b else b / a - 1 if a and math.isfinite(a) else None
        return "" if relative is None else percent(relative, "+")
    if how in ("time", "pace"):
        return f"{a / b if how == 'time' else b / a:.2f}x as fast"
    return f"{b / a:.0%} of it" if how == "share" and a else ""
