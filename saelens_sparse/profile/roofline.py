"""The roofline: rates of kernels or operations against what the device can do."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from saelens_sparse.profile.tables import quantity
from saelens_sparse.profile.trace import Frame
from saelens_sparse.reports.presentation import NOTE_COLOR


def draw_roofline(
    axis: Any, bandwidth: float, ceilings: Mapping[str, float], points: Frame
) -> None:
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
    top, bottom = max(*ceilings.values(), points.y.max()), points.y.min()
    unit, unit_name = (1e12, "TFLOP/s") if top > 1e12 else (1e9, "GFLOP/s")
    points["y"] /= unit
    left, right = points.x.min() / 4, 10 * max(top / bandwidth, points.x.max())
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylabel=unit_name)
    axis.set(ylim=(bottom / unit / 4, 4 * top / unit), xlabel="operations per byte asked for")
    line: dict[str, Any] = {"color": "0.2", "linewidth": 1.3}
    note = {"textcoords": "offset points", "fontsize": 9, "color": NOTE_COLOR, "ha": "right"}
    ridge = max(ceilings.values()) / bandwidth
    axis.plot([left, ridge], [left * bandwidth / unit, ridge * bandwidth / unit], **line)
    place = (ridge / 4, ridge / 4 * bandwidth / unit)
    axis.annotate(f"copy {quantity(bandwidth, 'B/s')}", place, (-6, 6), **note)
    drawn = float("inf")
    for name, flops in sorted(ceilings.items(), key=lambda ceiling: -ceiling[1]):
        if flops < 0.75 * drawn:  # else its line and name would lie on the last one
            drawn = flops
            axis.plot([flops / bandwidth, right], [flops / unit] * 2, **line)
            text = f"{name} {flops / unit:.3g} {unit_name}"
            axis.annotate(text, (right, flops / unit), (-2, 5), **note)
    for series, rows in points.groupby("series", sort=False):
        look = {"color": rows.color.iloc[0], "marker": rows.marker.iloc[0], "label": series}
        sizes = 25 + 700 * rows.ms / rows.ms.sum()
        axis.scatter(rows.x, rows.y, sizes, alpha=0.65, edgecolors="white", **look)
    for handle in axis.legend(loc="lower right").legend_handles:
        handle.set_sizes([60])
    _write_names(axis, points)


def _write_names(axis: Any, points: Frame) -> None:
    """Name points beside them, clear of notes, points and other names as far as there is room."""
    from matplotlib.transforms import Bbox

    axis.figure.draw_without_rendering()  # settles the layout, by which names find room
    frame, to_data = axis.get_window_extent(), axis.transData.inverted()
    places = axis.transData.transform(points[["x", "y"]])
    taken = [text.get_window_extent() for text in axis.texts]
    taken += [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in places]
    for point in points[points.label != ""].sort_values("y", ascending=False).itertuples():
        look = {"textcoords": "offset points", "color": point.color, "fontsize": 8.5}
        name = axis.annotate(point.label, (point.x, point.y), (0, 0), va="center", **look)

        def move(right: int, up: int, name: Any = name) -> Any:
            name.set(position=(right, up), ha="left" if right > 0 else "right")
            return name.get_window_extent()

        def cost(option: tuple[int, int]) -> float:
            box = move(*option)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1
            return 10 * outside + box.count_overlaps(taken) + abs(option[1]) / 100

        right, up = min(itertools.product((9, -9), range(-61, 62, 11)), key=cost)
        box = move(right, up)
        taken.append(box)
        if abs(up) > 11:
            x, y = to_data.transform((box.x0 if right > 0 else box.x1, (box.y0 + box.y1) / 2))
            axis.plot([point.x, x], [point.y, y], color="0.6", linewidth=0.6)
