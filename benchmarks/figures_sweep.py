"""Speed-up and memory as one size varies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.figures_style import plain_numbers, readable_ratios
from benchmarks.selection import SPARSE_ARMS, latest, pairs, speedup
from saelens_sparse.profile.cases import STOCK
from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    caption,
    new_figure,
    save_png,
    style_of,
)
from saelens_sparse.reports.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXES = {
    "d_sae": "latents, d_sae",
    "k": "active latents, k",
    "batch": "rows in a batch",
    "l0": "mean active latents, L0",
}


@dataclass(frozen=True)
class Point:
    """A sparse arm beside stock at one value of the size that varies."""

    value: float
    arm: str
    ratio: float


def draw_sweep(rows: Sequence[Row], sweep: str, folder: Path) -> Path | None:
    """Draw a sweep as `SWEEP.png`; None where there is nothing to compare."""
    size = sweep.removeprefix("cpu_").removeprefix("sweep_")
    of_sweep = [row for row in rows if row.get("sweep") == sweep]
    points = speedups(of_sweep, size)
    if len({point.value for point in points}) < 2:
        return None
    last = latest(of_sweep)
    with_memory = any(row.get("peak_gib") for row in last)
    figure, (left, right) = new_figure(columns=2)
    _draw_speedups(left, points)
    _draw_lines(right, last, size, "peak_gib" if with_memory else "ms")
    right.set_ylabel("peak memory, GiB" if with_memory else "milliseconds a step")
    right.set_title("Peak memory of a step" if with_memory else "Time of a step", fontsize=11)

    values = sorted({row[size] for row in last})
    for panel in (left, right):
        panel.set_xlabel(AXES[size])
        panel.set_xscale("log", base=2)
        plain_numbers(panel.xaxis, _spaced(values), partial(_short, size=size))
    figure.suptitle(_title(last[0], size), fontsize=11)
    caption(figure, last)
    path = folder / f"{sweep}.png"
    save_png(figure, path)
    return path


def speedups(rows: Sequence[Row], size: str) -> list[Point]:
    """The sparse arms' speed-ups against stock."""
    return [
        Point(sparse[size], sparse["arm"], ratio)
        for other, sparse in pairs(rows)
        if other["arm"] == STOCK.name and (ratio := speedup(other, sparse)) is not None
    ]


@dataclass(frozen=True)
class Crossing:
    """Where a speed-up becomes a loss, or a loss a speed-up."""

    value: float
    rises: bool


def break_even(points: Sequence[tuple[float, float]]) -> list[Crossing]:
    """
    Where a line through (value, ratio), straight in logarithms, crosses a ratio of one.

    Args:
        points: By ascending value; both numbers positive.
    """
    crossings: list[Crossing] = []
    for (value, ratio), (next_value, next_ratio) in pairwise(points):
        low, high = math.log(ratio), math.log(next_ratio)
        if low * high < 0:
            crossing = value * (next_value / value) ** (low / (low - high))
            crossings.append(Crossing(crossing, rises=high > low))
    return crossings


def _draw_speedups(panel: Axes, points: Sequence[Point]) -> None:
    ratios = [point.ratio for point in points]
    readable_ratios(panel, min(ratios), max(ratios))
    panel.axhline(1.0, color=NOTE_COLOR, linewidth=1)
    for arm in SPARSE_ARMS:
        line = sorted((point.value, point.ratio) for point in points if point.arm == arm)
        if not line:
            continue
        _draw_line(panel, line, arm)
        _mark_break_even(panel, line, arm)
    panel.set_ylabel("times faster than stock")
    panel.set_title("Speed-up of a training step", fontsize=11)
    panel.legend(fontsize=9, frameon=False)


def _draw_line(panel: Axes, line: Sequence[tuple[float, float]], arm: str) -> None:
    style = style_of(arm)
    values, numbers = zip(*line, strict=True)
    panel.plot(
        values, numbers, color=style.color, marker=style.marker, markersize=5, label=style.label
    )


def _mark_break_even(panel: Axes, line: Sequence[tuple[float, float]], arm: str) -> None:
    """Mark crossings; labels go below, on the side where no line is, those of an arm in a row."""
    labelled = 0.0
    for crossing in break_even(line):
        color = style_of(arm).color
        panel.plot([crossing.value], [1.0], "D", color=color, markersize=8, fillstyle="none")
        if crossing.value < 1.5 * labelled:
            continue  # noise around one: the labels would lie on each other
        labelled = crossing.value
        panel.annotate(
            f"even at {_roughly(crossing.value)}",
            (crossing.value, 1.0),
            xytext=(8 if crossing.rises else -8, -14 - 13 * SPARSE_ARMS.index(arm)),
            textcoords="offset points",
            ha="left" if crossing.rises else "right",
            fontsize=9,
            color=color,
        )


def _draw_lines(panel: Axes, rows: Sequence[Row], size: str, quantity: str) -> None:
    for arm in (STOCK.name, *SPARSE_ARMS):
        line = sorted(
            (row[size], row[quantity])
            for row in rows
            if row["arm"] == arm and row["status"] == "ok" and row.get(quantity)
        )
        if line:
            _draw_line(panel, line, arm)
    panel.set_yscale("log", base=2)
    bottom, top = panel.get_ylim()
    powers = [2.0**i for i in range(-6, 15)]
    shown = [power for power in powers if bottom <= power <= top]
    if len(shown) < 3:
        shown += [1.5 * power for power in powers if bottom <= 1.5 * power <= top]
    plain_numbers(panel.yaxis, shown, lambda value: f"{value:,g}")
    panel.legend(fontsize=9, frameon=False)


def _title(row: Row, size: str) -> str:
    fixed = {"d_in": f"d_in {row['d_in']:,}", "d_sae": f"d_sae {row['d_sae']:,}"}
    fixed |= {"k": f"k {row['k']}"} if row["k"] is not None else {"l0": f"L0 {row['l0']:g}"}
    fixed["batch"] = f"batch {row['batch']:,}"
    named = {"topk": "Top-K", "jumprelu": "JumpReLU"}[row["architecture"]]
    sizes = ", ".join(text for name, text in fixed.items() if name != size)
    return f"{named}, {sizes}, {row['precision']}"


def _short(value: float, size: str) -> str:
    """A size as people write it: 64 or 3,000 active ones, but 8k or 1M latents or rows."""
    if size in ("d_sae", "batch"):
        for unit, text in ((2**20, "M"), (2**10, "k")):
            if value >= unit and value % unit == 0:
                return f"{value / unit:g}{text}"
    return f"{value:,.0f}"


def _roughly(value: float) -> str:
    """Two digits: what a crossing between two measurements is good for."""
    unit = 10 ** max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value / unit) * unit:,}"


def _spaced(values: Sequence[float]) -> list[float]:
    """Of ascending values, those far enough apart for labels of a logarithmic axis."""
    kept = [values[0]]
    for value in values[1:]:
        if value / kept[-1] >= 1.9:
            kept.append(value)
    return kept
