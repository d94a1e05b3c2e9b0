"""A run taken apart, as a sentence, a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saelens_sparse.reports.presentation import Rows, milliseconds, new_figure, save_png
from saelens_sparse.whole_run.record import RunRecord
from saelens_sparse.whole_run.windows import (
    EVALS,
    LOGGING,
    MODEL,
    PARTS,
    REST,
    STEP,
    STORE,
)

# Okabe and Ito's colours.
COLORS = {
    MODEL: "#0072B2",
    STORE: "#E69F00",
    STEP: "#009E73",
    EVALS: "#CC79A7",
    LOGGING: "#F0E442",
    REST: "0.6",
}
_DARK = (MODEL, STEP)
MAX_SPREAD = 1.15
"""Of the times of one language model, beyond which a reader is warned."""


def label_of_run(record: RunRecord) -> str:
    """How it is named in tables and pictures."""
    return f"{record.architecture}, {record.runner}"


def faster(record: RunRecord, other: RunRecord) -> str:
    """Such as "2.31x as fast": how the run compares with the other."""
    return f"{other.ms / record.ms:.2f}x as fast"


def run_sentence(record: RunRecord) -> str:
    """How fast a run is, and what takes its time."""
    order = sorted(PARTS, key=record.share, reverse=True)
    parts = [f"{part} {record.share(part):.0%}" for part in order if record.share(part) >= 0.005]
    busy = record.busy_share
    device = "" if busy is None else f"; the device is busy {busy:.0%} of the time"
    return f"The run trains {record.tokens_per_second:,.0f} tokens/s: {', '.join(parts)}{device}"


def run_table(records: Sequence[RunRecord]) -> Rows:
    """Milliseconds by 4,096 tokens of each part, with its share, a column for each run."""
    rows = [["ms per 4,096 tokens", *map(label_of_run, records)]]
    for part in PARTS:
        if any(record.parts_ms[part] >= 0.0005 for record in records):
            cells = [f"{milliseconds(r.parts_ms[part])} ({r.share(part):.0%})" for r in records]
            rows.append([part, *cells])
    rows.append(["whole run", *(milliseconds(record.ms) for record in records)])
    spreads = [f"{milliseconds(r.ms_min)} to {milliseconds(r.ms_max)}" for r in records]
    if any(record.ms_min != record.ms_max for record in records):
        rows.append(["  fastest and slowest window", *spreads])
    rows.append(["tokens/s", *(f"{record.tokens_per_second:,.0f}" for record in records)])
    if any(record.busy_share is not None for record in records):
        busy = ["-" if r.busy_share is None else f"{r.busy_share:.0%}" for r in records]
        rows.append(["device is busy", *busy])
    if len(records) > 1:
        first = records[0]
        rows.append(["whole run is", "", *(faster(record, first) for record in records[1:])])
        rows.append(["  SAE step is", "", *(_step_is(record, first) for record in records[1:])])
    return rows


def _step_is(record: RunRecord, other: RunRecord) -> str:
    return f"{other.parts_ms[STEP] / record.parts_ms[STEP]:.2f}x as fast"


def run_notes(records: Sequence[RunRecord], device: str) -> list[str]:
    """What a reader must know of the numbers."""
    how = (
        "Parts are timed in the real loop, over whole fillings of the activation buffer, without "
        "waiting for the device between them."
    )
    notes = [how]
    if device == "cpu":
        notes.append("On a CPU there is no separate device whose busy share could be told.")
    if any(record.eval_seconds is None for record in records):
        notes.append("No evals or logs count where Weights & Biases is off or evals failed.")
    same = [milliseconds(r.parts_ms[MODEL]) for r in records if r.runner == records[0].runner]
    times = [r.parts_ms[MODEL] for r in records if r.runner == records[0].runner]
    if max(times) > MAX_SPREAD * min(times):
        notes.append(
            f"{records[0].runner} computes the language model in one way, and yet it took "
            f"{' and '.join(same)} ms: other load disturbed the times."
        )
    for record in records:
        if record.eval_seconds is not None:
            notes.append(
                f"{label_of_run(record)}: one eval takes {record.eval_seconds:.2f} s, every "
                f"{record.steps_between_evals:,} steps."
            )
        if record.model_reason is not None:
            path = "SAELens's path" if record.model_path == "saelens" else "the fast path"
            notes.append(
                f"{label_of_run(record)}: the language model is on {path} ({record.model_reason})."
            )
        if not record.whole_fillings:
            notes.append(
                f"{label_of_run(record)}: the buffer serves so many steps that windows ended "
                "between two fillings; the language model's share is rough."
            )
    return notes


def draw_runs(records: Sequence[RunRecord], path: Path) -> None:
    """Draw a stacked bar for each run into a PNG."""
    figure, (axes,) = new_figure(width=7.6, height=1.5 + 0.62 * len(records))
    widest = max(record.ms for record in records)
    names = [label_of_run(record).replace(", ", "\n") for record in records]
    left = [0.0] * len(records)
    for part in PARTS:
        ms = [record.parts_ms[part] for record in records]
        if not any(one > 0.002 * widest for one in ms):
            continue
        color = COLORS[part]
        bars = axes.barh(names, ms, 0.68, left, color=color, edgecolor="white", label=part)
        texts = [milliseconds(one) if one > 0.09 * widest else "" for one in ms]
        look: Any = {"color": "white" if part in _DARK else "black", "fontsize": 8.5}
        axes.bar_label(bars, texts, label_type="center", **look)
        left = [begin + one for begin, one in zip(left, ms, strict=True)]
    for name, record in zip(names, records, strict=True):
        text = f" {milliseconds(record.ms)} ms"
        axes.annotate(text, (record.ms, name), va="center", fontsize=9.5)
    axes.set_xlim(0, 1.2 * widest)
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.set_xlabel("milliseconds of the whole run per 4,096 tokens")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save_png(figure, path)
