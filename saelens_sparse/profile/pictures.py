"""Pictures of a profile: where each arm's step goes, and how close its kernels come to ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelens_sparse.profile.phases import PHASES
from saelens_sparse.profile.tables import (
    Record,
    measured,
    quantity,
)
from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    can_draw,
    caption,
    label_of,
    milliseconds,
    new_figure,
    save_png,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, grey for what is no work on the SAE's numbers.
_PHASE_COLORS = {
    "encode": "#0072B2",
    "select": "#56B4E9",
    "decode": "#009E73",
    "loss": "#F0E442",
    "statistics": "#E69F00",
    "backward": "#D55E00",
    "clip": "#CC79A7",
    "optimizer": "0.25",
    "other": "0.65",
}
_IDLE = "idle"
_NAMED_KERNELS = 4
_WIDTH = 6.4


def draw(results: Record, folder: Path) -> dict[str, Path]:
    """The pictures that can be drawn, by what they show."""
    if not measured(results) or not can_draw():
        return {}
    pictures = {"breakdown": _draw_breakdown(results, folder / "breakdown.png")}
    roofline = _draw_roofline(results, folder / "roofline.png")
    if roofline is not None:
        pictures["roofline"] = roofline
    return pictures


def _draw_breakdown(results: Record, path: Path) -> Path:
    """All arms on one scale; where that leaves the sparse ones too small to read, these again."""
    arms = measured(results)
    longest = max(arm["divided_ms"] for arm in arms.values())
    small = {name: arm for name, arm in arms.items() if arm["divided_ms"] < longest / 2.5}
    panels = [arms, small] if small and len(small) < len(arms) else [arms]
    heights = [0.5 * len(panel) + 0.8 for panel in panels]
    figure, axes = new_figure(rows=len(panels), width=_WIDTH, height=sum(heights) + 1.2)
    grid = axes[0].get_gridspec()
    if grid is not None:
        grid.set_height_ratios(heights)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_bars(axis, panel, results["floor_ms"]["total"])
    on_device = results["settings"]["device"] == "cuda"
    under = "" if on_device else " under the profiler"
    axes[-1].set_xlabel(f"milliseconds of a training step{under}")
    shown = [
        phase for phase in (*PHASES, _IDLE)
        if any(_time_of(arm, phase) > 0.001 * arm["ms"] for arm in arms.values())
    ]  # fmt: skip
    handles, labels = axes[0].get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    kept = [label for label in (*shown, "floor") if label in by_label]
    idle = "idle" if on_device else "outside of operations"
    figure.legend(
        [by_label[label] for label in kept],
        [idle if label == _IDLE else label for label in kept],
        loc="outside upper center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    caption(figure, [results["environment"]])
    save_png(figure, path)
    return path


def _time_of(arm: Record, phase: str) -> float:
    return arm["idle_ms"] if phase == _IDLE else arm["phases_ms"][phase]


def _draw_bars(axis: Axes, arms: dict[str, Record], floor_ms: float) -> None:
    names = list(arms)
    widest = max(sum(_time_of(arm, phase) for phase in (*PHASES, _IDLE)) for arm in arms.values())
    starts = [0.0] * len(names)
    for phase in (*PHASES, _IDLE):
        times = [_time_of(arm, phase) for arm in arms.values()]
        style: dict[str, Any] = (
            {"color": "white", "hatch": "////", "edgecolor": "0.6"}
            if phase == _IDLE
            else {"color": _PHASE_COLORS[phase], "edgecolor": "white"}
        )
        bars = axis.barh(
            range(len(names)), times, left=starts, height=0.66, linewidth=0.6, label=phase, **style
        )
        for bar, time in zip(bars, times, strict=True):
            if time > 0.1 * widest and phase != _IDLE:
                dark = phase in ("encode", "decode", "backward", "optimizer")
                axis.text(
                    bar.get_x() + bar.get_width() / 2,
                    bar.get_y() + bar.get_height() / 2,
                    milliseconds(time),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if dark else "black",
                    zorder=5,
                    bbox={"facecolor": _PHASE_COLORS[phase], "edgecolor": "none", "pad": 0.8},
                )
        starts = [start + time for start, time in zip(starts, times, strict=True)]
    for place, (arm, end) in enumerate(zip(arms.values(), starts, strict=True)):
        axis.annotate(
            f"{milliseconds(arm['divided_ms'])} ms",
            (end, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
        )
    axis.axvline(floor_ms, color="black", linestyle=":", linewidth=1.4, label="floor")
    axis.set_yticks(range(len(names)), [label_of(name) for name in names])
    axis.set_xlim(0, 1.22 * widest)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def _draw_roofline(results: Record, path: Path) -> Path | None:
    """Each kernel's rate over its intensity; larger marks take longer."""
    arms = measured(results)
    points = [
        (name, row) for name, arm in arms.items() for row in arm["kernels"]
        if row["flops"] and row["bytes"] and row["ms"] > 0.004 * arm["busy_ms"]
    ]  # fmt: skip
    if not points:
        return None
    figure, (axis,) = new_figure(width=_WIDTH, height=5.2)
    ceilings = results["ceilings"]
    bandwidth = ceilings["copy_bytes"]
    intensities = [row["flops"] / row["bytes"] for _, row in points]
    left, right = min(intensities) / 4, max(max(ceilings["gemm_flops"].values()) / bandwidth,
                                            *intensities) * 6  # fmt: skip
    rates = [1e3 * row["flops"] / row["ms"] for _, row in points]
    top = max(*ceilings["gemm_flops"].values(), *rates)
    unit, name_of_unit = (1e12, "TFLOP/s") if top > 1e12 else (1e9, "GFLOP/s")
    _draw_ceilings(axis, ceilings, left, right, unit)
    for name, arm in arms.items():
        style = style_of(name)
        rows = [row for of, row in points if of == name]
        axis.scatter(
            [row["flops"] / row["bytes"] for row in rows],
            [1e3 * row["flops"] / row["ms"] / unit for row in rows],
            [25 + 700 * row["ms"] / arm["busy_ms"] for row in rows],
            color=style.color,
            marker=style.marker,
            alpha=0.65,
            edgecolors="white",
            label=style.label,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(left, right)
    axis.set_ylim(min(rates) / unit / 4, 4 * top / unit)
    _name_kernels(axis, points, unit)
    axis.set_xlabel("operations per byte asked for")
    axis.set_ylabel(name_of_unit)
    legend = axis.legend(loc="lower right", frameon=False)
    for handle in legend.legend_handles:
        if handle is not None and hasattr(handle, "set_sizes"):
            handle.set_sizes([60])  # pyright: ignore[reportAttributeAccessIssue]
    caption(figure, [results["environment"]])
    save_png(figure, path)
    return path


def _draw_ceilings(axis: Axes, ceilings: Record, left: float, right: float, unit: float) -> None:
    bandwidth = ceilings["copy_bytes"]
    top = max(ceilings["gemm_flops"].values())
    ridge = top / bandwidth
    axis.plot([left, ridge], [left * bandwidth / unit, top / unit], color="0.2", linewidth=1.3)
    axis.annotate(
        f"copy {quantity(bandwidth, 'B/s')}",
        (ridge / 4, top / unit / 4),
        xytext=(-6, 6),
        textcoords="offset points",
        fontsize=9,
        color=NOTE_COLOR,
        ha="right",
    )
    drawn: list[float] = []
    for dtype, flops in sorted(ceilings["gemm_flops"].items(), key=lambda pair: -pair[1]):
        if any(abs(flops / other - 1) < 0.3 for other in drawn):
            continue
        drawn.append(flops)
        ridge = flops / bandwidth
        axis.plot([ridge, right], [flops / unit] * 2, color="0.2", linewidth=1.3)
        is_short = math.log(right / ridge) < 0.3 * math.log(right / left)
        axis.annotate(
            f"{dtype} GEMM {flops / unit:.3g}",
            (right if is_short else ridge, flops / unit),
            xytext=(-2 if is_short else 20, 5),
            textcoords="offset points",
            fontsize=9,
            color=NOTE_COLOR,
            ha="right" if is_short else "left",
        )


def _name_kernels(axis: Axes, points: Sequence[tuple[str, Record]], unit: float) -> None:
    """Name the longest kernels of each arm, each name once, none over another."""
    chosen: list[tuple[float, float, str]] = []
    for arm in dict.fromkeys(name for name, _ in points):
        rows = sorted((row for name, row in points if name == arm), key=lambda row: -row["ms"])
        for row in rows[:_NAMED_KERNELS]:
            # An operation's name, or that of one of this package's kernels.
            label = row["name"].split(":")[0].strip("_").removesuffix("_kernel")
            if all(label != other for *_, other in chosen):
                x, y = row["flops"] / row["bytes"], 1e3 * row["flops"] / row["ms"] / unit
                chosen.append((x, y, label))
    taken: list[tuple[float, float]] = []
    for x, y, label in sorted(chosen, key=lambda point: -point[1]):
        offset = 9.0
        while any(
            abs(math.log(x / other_x)) < 1.2 and abs(math.log(y) + offset / 40 - other) < 0.28
            for other_x, other in taken
        ):
            offset += 11
        taken.append((x, math.log(y) + offset / 40))
        axis.annotate(
            label,
            (x, y),
            xytext=(8, offset),
            textcoords="offset points",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": "0.5", "linewidth": 0.6},
        )
