"""The roofline: rates of kernels or operations against what the device can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saelens_sparse.reports.presentation import NOTE_COLOR


def draw_roofline(axis: Any, bandwidth: float, ceilings: Mapping[str, float], points: Any) -> None:
    """
    Draw rates over operations per byte; larger marks take longer.

    Args:
        axis: empty, of matplotlib.
        bandwidth: bytes per second of a copy.
        ceilings: FLOP/s of products, by name.
        points: data frame with `label` (empty for none), `series`, `color`, `marker`, `flops`,
            `bytes` and `ms` of each point, none of the numbers 0.
    """
    points = points.assign(x=points.flops / points.bytes, y=1e3 * points.flops / points.ms)
    top, lowest = max(*ceilings.values(), points.y.max()), points.y.min()
    unit, unit_name = (1e12, "TFLOP/s") if top > 1e12 else (1e9, "GFLOP/s")
    points["y"] /= unit
    left, right = points.x.min() / 4, 6 * max(top / bandwidth, points.x.max())
    axis.set(xscale="log", yscale="log", xlim=(left, right), xlabel="operations per byte asked for")
    axis.set(ylim=(lowest / unit / 4, 4 * top / unit), ylabel=unit_name)
    line: dict[str, Any] = {"color": "0.2", "linewidth": 1.3}
    note = {"textcoords": "offset points", "fontsize": 9, "color": NOTE_COLOR, "ha": "right"}
    ridge = max(ceilings.values()) / bandwidth
    axis.plot([left, ridge], [left * bandwidth / unit, ridge * bandwidth / unit], **line)
    place = (ridge / 4, ridge / 4 * bandwidth / unit)
    axis.annotate(f"copy {bandwidth / 1e9:,.4g} GB/s", place, (-6, 6), **note)
    drawn = float("inf")
    for name, flops in sorted(ceilings.items(), key=lambda ceiling: -ceiling[1]):
        if flops < 0.75 * drawn:  # else its line and name would lie on the last one
            drawn = flops
            axis.plot([flops / bandwidth, right], [flops / unit] * 2, **line)
            axis.annotate(f"{name} GEMM {flops / unit:.3g}", (right, drawn / unit), (-2, 5), **note)
    look = {"alpha": 0.65, "edgecolors": "white"}
    for series, rows in points.groupby("series", sort=False):
        sizes, first = 25 + 700 * rows.ms / rows.ms.sum(), rows.iloc[0]
        axis.scatter(rows.x, rows.y, sizes, first.color, first.marker, label=series, **look)
    _write_names(axis, points[points.label != ""].sort_values("y", ascending=False))
    for handle in axis.legend(loc="lower right", frameon=False).legend_handles:
        handle.set_sizes([60])


def _write_names(axis: Any, points: Any) -> None:
    """Name points above and to the right of them, none over another."""
    taken: list[tuple[float, float]] = []
    to_axes = axis.transData + axis.transAxes.inverted()
    line = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6}
    for point in points.itertuples():
        x, y = to_axes.transform((point.x, point.y)) + 0.02
        while any(abs(x - right) < 0.25 and abs(y - high) < 0.035 for right, high in taken):
            y += 0.01
        taken.append((x, y))
        place = {"xytext": (x, y), "textcoords": "axes fraction", "fontsize": 8.5}
        axis.annotate(point.label, (point.x, point.y), arrowprops=line, **place)
