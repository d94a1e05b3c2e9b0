"""Figures of speed-up and memory as one size varies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.report import active, title_of
from benchmarks.rows import SPARSE, Frame, latest, ratios
from saelens_sparse.reports.presentation import NOTE_COLOR, caption, new_figure, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

AXES = {
    "d_sae": "latents, d_sae",
    "k": "active latents, k",
    "batch": "rows in a batch",
    "l0": "mean active latents, L0",
}
RATIOS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100, 200)


class Crossing(NamedTuple):
    """Where a speed-up becomes a loss, or a loss a speed-up."""

    value: float
    rises: bool


def draw_sweep(rows: Frame, sweep: str) -> Any:
    """The sweep's figure; None where there is nothing to compare."""
    size = sweep.rpartition("sweep_")[2]
    rows = rows[rows["sweep"] == sweep]
    found = ratios(rows)
    found = found[(found["arm_other"] == "stock") & found["faster"].notna()]
    if found[size].nunique() < 2:
        return None
    last = latest(rows)
    timed = last[(last["status"] == "ok") & last["arm"].isin(["stock", *SPARSE])]
    quantity = "peak_gib" if timed["peak_gib"].notna().any() else "ms"
    figure, (left, right) = new_figure(columns=2)

    left.set_yscale("log")
    left.axhline(1.0, color=NOTE_COLOR, linewidth=1)
    lines = _draw_lines(left, found, size, "faster")
    for arm, line in lines.items():
        _mark_break_even(left, line, arm)
    low, high = found["faster"].min(), found["faster"].max()
    left.set_ylim(min(low / 1.25, 0.8), high * 1.35)
    _label_at(left.yaxis, RATIOS, lambda value: f"{value:g}x")
    left.set_ylabel("times faster than stock")
    left.set_title("Speed-up of a training step")

    right.set_yscale("log", base=2)
    _draw_lines(right, timed, size, quantity)
    powers = [2.0**i for i in range(-6, 15)]
    bottom, top = right.get_ylim()
    if sum(bottom <= power <= top for power in powers) < 3:
        powers += [1.5 * power for power in powers]
    _label_at(right.yaxis, powers, lambda value: f"{value:,g}")
    right.set_ylabel("peak memory, GiB" if quantity == "peak_gib" else "milliseconds a step")
    right.set_title("Peak memory of a step" if quantity == "peak_gib" else "Time of a step")
    for panel in (left, right):
        panel.set_xlabel(AXES[size])
        panel.set_xscale("log", base=2)
        _label_at(panel.xaxis, _spaced(sorted(last[size].unique())), partial(_short, size=size))
        panel.legend()
    figure.suptitle(_title(last.iloc[0], size))
    caption(figure, last.to_dict("records"))
    return figure


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


def _draw_lines(
    panel: Axes, rows: Frame, size: str, quantity: str
) -> dict[str, list[tuple[float, float]]]:
    """A line for each contender, whose points are returned."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in ("stock", *SPARSE):
        line = rows[(rows["arm"] == arm) & rows[quantity].notna()].sort_values(size)
        if len(line):
            style = style_of(arm)
            panel.plot(
                line[size], line[quantity], color=style.color, marker=style.marker, markersize=5,
                label=style.label,
            )  # fmt: skip
            lines[arm] = list(zip(line[size], line[quantity], strict=True))
    return lines


def _mark_break_even(panel: Axes, line: Sequence[tuple[float, float]], arm: str) -> None:
    """Mark crossings; labels go below, on the side where no line is, those of an arm in a row."""
    labelled = 0.0
    for crossing in break_even(line):
        color = style_of(arm).color
        panel.plot([crossing.value], [1.0], "D", color=color, markersize=8, fillstyle="none")
        if crossing.value < 1.5 * labelled:
            continue  # noise around one: the labels would lie on each other
        labelled = crossing.value
        # Two digits: what a crossing between two measurements is good for.
        unit = 10 ** max(0, math.floor(math.log10(crossing.value)) - 1)
        panel.annotate(
            f"even at {round(crossing.value / unit) * unit:,}",
            (crossing.value, 1.0),
            xytext=(8 if crossing.rises else -8, -14 - 13 * SPARSE.index(arm)),
            textcoords="offset points",
            ha="left" if crossing.rises else "right",
            fontsize=9,
            color=color,
        )


def _label_at(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Label a logarithmic axis at those of the values that it shows, and nowhere else."""
    low, high = sorted(axis.get_view_interval())
    shown = [value for value in values if low <= value <= high]
    axis.set_ticks(shown, [text(value) for value in shown])
    axis.set_ticks([], minor=True)


def _title(row: Any, size: str) -> str:
    sizes = {"d_in": f"d_in {row['d_in']:,}", "d_sae": f"d_sae {row['d_sae']:,}"}
    sizes |= {"l0" if row["k"] is None else "k": active(row), "batch": f"batch {row['batch']:,}"}
    fixed = ", ".join(text for name, text in sizes.items() if name != size)
    return f"{title_of(row)}, {fixed}, {row['precision']}"


def _short(value: float, size: str) -> str:
    """A size as people write it: 64 or 3,000 active ones, but 8k or 1M latents or rows."""
    if size in ("d_sae", "batch"):
        for unit, text in ((2**20, "M"), (2**10, "k")):
            if value >= unit and value % unit == 0:
                return f"{value / unit:g}{text}"
    return f"{value:,.0f}"


def _spaced(values: Sequence[float]) -> list[float]:
    """Of ascending values, those far enough apart for labels of a logarithmic axis."""
    kept = [values[0]]
    for value in values[1:]:
        if value / kept[-1] >= 1.9:
            kept.append(value)
    return kept
