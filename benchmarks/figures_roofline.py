"""The operations of a step against the limits of the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    SPARSE_COLOR,
    STOCK_COLOR,
    caption,
    milliseconds,
    new_figure,
    save_png,
)
from saelens_sparse.reports.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CEILINGS = ("product_tflops", "screen_tflops")
SIDES = {"sparse": (SPARSE_COLOR, "o"), "stock": (STOCK_COLOR, "^")}


def draw_roofline(rows: Sequence[Row], folder: Path) -> Path | None:
    """
    Draw the latest measurement of kernels as `roofline.png`; None where there is none.

    A point is an operation: its floating point operations over the bytes that it cannot avoid,
    and the rate that it reaches. Caches may lift a point above the line of memory.
    """
    kernels = [row for row in rows if row.get("kernel") and row.get("bytes")]
    if not kernels:
        return None
    newest = max(kernels, key=lambda row: row["date"])
    shape = newest["shape"]
    of_shape = [row for row in kernels if row["shape"] == shape]
    last = {(row["dtype"], row["kernel"], row["side"]): row for row in of_shape}
    dtypes = list(dict.fromkeys(dtype for dtype, _, _ in last))
    figure, panels = new_figure(columns=len(dtypes), width=7.2 * len(dtypes), height=5.4)
    for panel, dtype in zip(panels, dtypes, strict=True):
        _draw_panel(panel, [row for row in last.values() if row["dtype"] == dtype])
        panel.set_title(dtype, fontsize=11)
    d_in, d_sae, k, n_rows = (int(part) for part in shape.split(","))
    figure.suptitle(
        f"Operations of a step, d_in {d_in:,}, d_sae {d_sae:,}, k {k}, batch {n_rows:,}",
        fontsize=11,
    )
    caption(figure, list(last.values()))
    figure.draw_without_rendering()  # settles the layout, by which names find room
    for panel, dtype in zip(panels, dtypes, strict=True):
        _label_points(panel, _points([row for row in last.values() if row["dtype"] == dtype]))
    path = folder / "roofline.png"
    save_png(figure, path)
    return path


def _points(rows: Sequence[Row]) -> list[tuple[float, float, Row]]:
    """Operations per byte and TFLOP/s of each row that has operations."""
    return [(r["flops"] / r["bytes"], r["flops"] / r["ms"] / 1e9, r) for r in rows if r["flops"]]


def _draw_panel(panel: Axes, rows: Sequence[Row]) -> None:
    row, points = rows[0], _points(rows)
    bandwidth = row["copy_tb_s"]
    right = 30 * max(intensity for intensity, _, _ in points)
    ceilings = {"product_tflops": f"{row['dtype']} products"}
    if row["screen_tflops"] > 1.5 * row["product_tflops"]:
        ceilings["screen_tflops"] = "float16 products"
    top = max(row[name] for name in ceilings)
    left = 0.5 * min(intensity for intensity, _, _ in points)
    panel.plot(
        [left, top / bandwidth], [left * bandwidth, top], color=NOTE_COLOR, linewidth=1.2
    )  # fmt: skip
    for name, label in ceilings.items():
        rate = row[name]
        panel.plot([rate / bandwidth, right], [rate, rate], color=NOTE_COLOR, linewidth=1.2)
        panel.text(
            right, rate * 1.08, f"{label}, {_rate(rate)}", ha="right", fontsize=8.5,
            color=NOTE_COLOR,
        )  # fmt: skip
    panel.set_xscale("log")
    panel.set_yscale("log")
    bottom = 0.4 * min(rate for _, rate, _ in points)
    panel.set_xlim(left, right)
    panel.set_ylim(min(bottom, left * bandwidth), 2.5 * top)
    _label_slope(panel, left, bandwidth, top)
    for side, (color, marker) in SIDES.items():
        of_side = [point for point in points if point[2]["side"] in (side, "both")]
        if side == "stock":
            of_side = [point for point in of_side if point[2]["side"] == side]
        panel.plot(
            [x for x, _, _ in of_side], [y for _, y, _ in of_side], marker, color=color,
            markersize=8, label=side,
        )  # fmt: skip
    panel.set_xlabel("floating point operations per byte that must move")
    panel.set_ylabel("TFLOP/s reached")
    panel.legend(loc="lower right", fontsize=9, frameon=False)


def _label_slope(panel: Axes, left: float, bandwidth: float, top: float) -> None:
    high = left * (top / bandwidth / left) ** 0.75
    rate = f"{bandwidth:.2g} TB/s" if bandwidth >= 1 else f"{1e3 * bandwidth:.0f} GB/s"
    panel.annotate(
        f"memory, {rate}",
        (high, high * bandwidth),
        xytext=(-7, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=NOTE_COLOR,
    )


@dataclass(frozen=True)
class _Box:
    """A rectangle on the canvas, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )


def _label_points(panel: Axes, points: Sequence[tuple[float, float, Row]]) -> None:
    """Name each point beside it, clear of other names and points as far as there is room."""
    per_point = 72 / panel.figure.dpi  # canvas units to points
    canvas = [per_point * panel.transData.transform((x, y)) for x, y, _ in points]
    edges = per_point * panel.transAxes.transform([(0, 0), (1, 1)])
    frame = _Box(*edges[0], *edges[1])
    taken = [_Box(x - 4, y - 4, x + 4, y + 4) for x, y in canvas]
    for name in CEILINGS:
        _, height = per_point * panel.transData.transform((1, points[0][2][name]))
        taken.append(_Box(frame.left, height - 1, frame.right, height + 12))
    names: list[tuple[str, tuple[float, float], tuple[float, float], str]] = []
    for (x, y), (x_data, y_data, row) in zip(canvas, points, strict=True):
        text = f"{row['kernel']}, {milliseconds(row['ms'])} ms"
        width = 4.6 * len(text)
        best, place, least = taken[0], (9.0, 0.0), math.inf
        for shift in (0, -11, 11, -22, 22, -33, 33, -44, 44):
            for offset in (9.0, -9.0):
                start = x + offset - (width if offset < 0 else 0)
                box = _Box(start, y + shift - 5, start + width, y + shift + 5)
                outside = box.left < frame.left or box.right > frame.right
                cost = 10 * outside + sum(box.meets(other) for other in taken) + abs(shift) / 100
                if cost < least:
                    best, place, least = box, (offset, float(shift)), cost
        taken.append(best)
        color = SIDES.get(row["side"], SIDES["sparse"])[0]
        names.append((text, (x_data, y_data), place, color))
    # Lines first, so that none strikes through a name.
    for is_line, (text, point, place, color) in itertools.product((True, False), names):
        far = abs(place[1]) > 11
        panel.annotate(
            "" if is_line else text,
            point,
            xytext=place,
            textcoords="offset points",
            ha="left" if place[0] > 0 else "right",
            va="center",
            fontsize=8.5,
            color=color,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.4},
            arrowprops={"arrowstyle": "-", "color": "0.75", "lw": 0.6} if is_line and far else None,
        )


def _rate(tflops: float) -> str:
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:.0f} GFLOP/s"
