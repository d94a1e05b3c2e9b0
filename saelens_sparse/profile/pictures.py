"""Pictures of a profile: where each contender's step goes, and its kernels against ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from saelens_sparse.profile.contender import Record
from saelens_sparse.profile.roofline import draw_roofline
from saelens_sparse.profile.tables import measured
from saelens_sparse.profile.trace import Frame
from saelens_sparse.reports import presentation as reports
from saelens_sparse.reports.presentation import label_of, milliseconds, style_of

# Okabe and Ito's colours, grey for what is no work on the SAE's numbers. "forward", "select" and
# "loss" are names in older results.
PHASE_COLORS = {
    "encode": "#0072B2",
    "forward": "#0072B2",
    "search": "#56B4E9",
    "select": "#56B4E9",
    "decode": "#009E73",
    "losses": "#F0E442",
    "loss": "#F0E442",
    "statistics": "#E69F00",
    "backward": "#D55E00",
    "clip": "#CC79A7",
    "optimizer": "0.25",
    "other": "0.65",
    "idle": "0.92",
}
_DARK = ("encode", "forward", "decode", "backward", "optimizer")
_NAMED_KERNELS = 4


def draw(results: Record, folder: Path) -> dict[str, dict[str, Path]]:
    """The pictures by the heading that they belong under and what they show, if any can be made."""
    if not reports.can_draw():
        return {}
    drawn: dict[str, dict[str, Path]] = {}
    for heading, shown, file, drawing in (
        ("Where a step goes", "Milliseconds by phase", "breakdown.png", _draw_breakdown),
        ("Ceilings", "Rates of kernels over operations per byte", "roofline.png", _draw_roofline),
    ):
        if (figure := drawing(results)) is not None:
            reports.caption(figure, [results["environment"]])
            reports.save_png(figure, folder / file)
            drawn[heading] = {shown: folder / file}
    return drawn


def _draw_breakdown(results: Record) -> Any:
    """All contenders on one scale; where that leaves some too small to read, these again."""
    columns = {n: {**r["phases_ms"], "idle": r["idle_ms"]} for n, r in measured(results).items()}
    times: Frame = pd.DataFrame(columns)
    longest = times.sum().max()
    times = times[(times > 0.001 * times.sum()).any(axis=1)]
    small = times.loc[:, times.sum() < longest / 2.5]
    panels = [times, small] if small.shape[1] else [times]
    height = (0.5 * times.shape[1] + 0.8) * len(panels) + 1.2
    figure, axes = reports.new_figure(rows=len(panels), width=6.4, height=height)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_bars(axis, panel, results["floor_ms"]["total"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    axes[-1].set_xlabel("milliseconds of a training step")
    return figure


def _draw_bars(axis: Any, times: Frame, floor_ms: float) -> None:
    """A bar for each column."""
    widest, left = times.sum().max(), 0.0 * times.sum()
    names = [label_of(name) for name in times]
    for phase, ms in times.iterrows():
        color = PHASE_COLORS[str(phase)]
        bars = axis.barh(names, ms, 0.66, left, color=color, edgecolor="white", label=phase)
        texts = [milliseconds(part) if part > 0.1 * widest else "" for part in ms]
        look = {"color": "white" if phase in _DARK else "black", "fontsize": 8.5, "zorder": 5}
        box = {"facecolor": color, "edgecolor": "none", "pad": 0.8}
        axis.bar_label(bars, texts, label_type="center", bbox=box, **look)
        left = left + ms
    for name, end in zip(names, left, strict=True):
        axis.annotate(f" {milliseconds(end)} ms", (end, name), va="center", fontsize=9.5)
    axis.axvline(floor_ms, color="black", linestyle=":", linewidth=1.4, label="floor")
    axis.set_xlim(0, 1.22 * widest)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")


def _draw_roofline(results: Record) -> Any:
    """The kernels whose bytes and operations are known; the longest of each contender are named."""
    points: list[Record] = []
    for name, record in measured(results).items():
        style = style_of(name)
        rows = [r for r in record["kernels"] if r["flops"] and r["ms"] > 0.004 * record["busy_ms"]]
        for index, row in enumerate(rows):
            label = row["name"].split(":")[0].strip("_").removesuffix("_kernel")
            is_named = index < _NAMED_KERNELS and all(label != point["label"] for point in points)
            look = {"series": style.label, "color": style.color, "marker": style.marker}
            points.append({**row, **look, "label": label if is_named else ""})
    if not points:
        return None
    figure, (axis,) = reports.new_figure(width=6.4, height=5.2)
    ceilings = results["ceilings"]
    gemms = {f"{dtype} GEMM": flops for dtype, flops in ceilings["gemm_flops"].items()}
    draw_roofline(axis, ceilings["copy_bytes"], gemms, pd.DataFrame(points))
    return figure
