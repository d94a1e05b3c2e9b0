"""
All figures from the rows measured so far.

Of everything the latest measurement counts, and ratios are taken between contenders of one run
only. Each device has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from benchmarks.cases import CASES
from benchmarks.report import active, title_of
from benchmarks.rows import FIGURES, RESULTS, SPARSE, Frame, latest, of_contenders, ratios, slug
from benchmarks.run_figure import draw_runs
from benchmarks.sweeps import draw_sweep
from saelens_sparse.profile.pictures import PHASE_COLORS
from saelens_sparse.profile.roofline import draw_roofline
from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    caption,
    label_of,
    milliseconds,
    new_figure,
    save_png,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "gemma2b": "Gemma-2-2B",
    "gemma2b_dead30": "Gemma-2-2B, 30% dead",
    "gpt2": "GPT-2",
    "llama8b": "Llama-3.1-8B",
    "wide": "262k latents",
    "million": "1M latents",
    "seed1": "16k latents",
    "batchtopk": "Gemma-2-2B",
    "matryoshka": "Gemma-2-2B",
    "batchtopk_dead30": "Gemma-2-2B, 30% dead",
    "batchtopk_wide": "262k latents",
    "batchtopk_million": "1M latents",
    "batchtopk_gpt2": "GPT-2",
    **{f"jumprelu_l0_{l0}": "Gemma-2-2B" for l0 in (64, 200, 1000, 3000)},
}
"""What the headline cases stand for; other cases go by their own names."""
BREAKDOWN_CASES = (
    "gemma2b", "gpt2", "llama8b", "wide", "batchtopk", "matryoshka", "jumprelu_l0_64",
    "cpu", "cpu_batchtopk", "cpu_matryoshka", "cpu_jumprelu",
)  # fmt: skip
"""Those of which a step is taken apart; where none of them was measured, all are."""
CONTENDERS = ("stock", *SPARSE)
BAR = 0.36


def draw(frame: Frame, folder: Path) -> list[Path]:
    """
    Draw what there are rows for, into a folder of each device.

    Args:
        frame: Of `rows.frame_of`, of any devices and benchmarks.
        folder: In which the devices' folders are made.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    written: list[Path] = []
    for device, rows in frame.groupby("device", sort=False):
        drawings: dict[str, Callable[[Frame], Any]] = {
            "runs": draw_runs,
            "overview": draw_overview,
            "step_breakdown": draw_breakdown,
            "roofline": draw_operations,
            **{
                sweep: partial(draw_sweep, sweep=sweep) for sweep in rows["sweep"].dropna().unique()
            },
        }
        for name, drawing in drawings.items():
            figure = drawing(rows)
            if figure is not None:
                written.append(folder / slug(str(device)) / f"{name}.png")
                save_png(figure, written[-1])
    return written


def folder_for(results: Path) -> Path:
    """Where figures of a file of rows go: the project's for the project's own, else beside it."""
    in_results = results.resolve().parent == RESULTS.resolve()
    return FIGURES if in_results else results.parent / "figures"


def draw_overview(rows: Frame) -> Any:
    """Speed-ups of whole steps against stock; None where there are none."""
    found = ratios(_whole_steps(rows))
    found = found[
        (found["arm_other"] == "stock")
        & found["faster"].notna()
        & found["precision"].isin(["float32", "autocast"])
    ]
    if not len(found):
        return None
    found = found.sort_values("case", key=lambda names: names.map(_place), kind="stable")
    cases = {row["case"]: _label(row) for row in found.to_dict("records")}
    precisions = [p for p in ("float32", "autocast") if (found["precision"] == p).any()]
    figure, panels = new_figure(
        columns=len(precisions), width=5.4 * len(precisions) + 1.2, height=1.3 + 0.62 * len(cases)
    )
    both = found.groupby("case")["arm"].nunique() > 1
    for panel, precision in zip(panels, precisions, strict=True):
        shown = found[found["precision"] == precision]
        places = (
            shown["case"].map(list(cases).index)
            + shown["case"].map(both) * (shown["arm"].map(SPARSE.index) - 0.5) * BAR
        )
        _draw_speedup_bars(panel, shown.assign(place=places.astype(float)))
        panel.set_title(precision)
        panel.set_yticks(range(len(cases)), list(cases.values()) if panel is panels[0] else [])
        panel.set_ylim(len(cases) - 0.45, -0.55)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    caption(figure, found.to_dict("records"))
    return figure


def _draw_speedup_bars(panel: Axes, found: Frame) -> None:
    longest = found["faster"].max()
    for arm, bars in found.groupby("arm", sort=True):
        name = str(arm)
        panel.barh(
            bars["place"], bars["faster"], 0.92 * BAR, color=style_of(name).color,
            label=label_of(name),
        )  # fmt: skip
    for row in found.to_dict("records"):
        end = (row["faster"] + 0.012 * longest, row["place"])
        panel.text(*end, f"{row['faster']:.1f}x", va="center", fontsize=9, weight="bold")
        panel.annotate(
            f"{milliseconds(row['ms_other'])} to {milliseconds(row['ms'])} ms", end,
            xytext=(36, 0), textcoords="offset points", va="center", fontsize=7.5,
            color=NOTE_COLOR,
        )  # fmt: skip
    panel.axvline(1.0, color=style_of("stock").color, linewidth=1.5, label=label_of("stock"))
    panel.set_xlim(0, 1.62 * longest)
    panel.set_xlabel("times faster than stock")
    panel.grid(visible=False, axis="y")


def draw_breakdown(rows: Frame) -> Any:
    """Shares of a step's time by phase; None where there are none."""
    timed = latest(_whole_steps(rows))
    timed = timed[
        (timed["status"] == "ok") & timed["phases_ms"].notna() & timed["arm"].isin(CONTENDERS)
    ]
    headline = timed["case"].isin(BREAKDOWN_CASES)
    timed = timed[headline] if headline.any() else timed
    if not len(timed):
        return None
    order: Frame = pd.DataFrame(
        {
            "case": timed["case"].map(_place),
            "precision": timed["precision"] != "float32",
            "contender": timed["arm"].map(CONTENDERS.index),
        }
    )
    timed = timed.loc[order.sort_values(list(order)).index]
    is_first = ~timed.duplicated(["case", "precision"])
    places = (1.0 + 1.1 * is_first).cumsum()
    ms = pd.DataFrame(timed["phases_ms"].tolist(), index=timed.index).fillna(0.0)
    shares = 100 * ms.div(ms.sum(axis=1), axis=0)

    figure, (panel,) = new_figure(width=9.0, height=1.6 + 0.27 * places.iloc[-1])
    left = shares.cumsum(axis=1) - shares
    for phase in ms:
        color = PHASE_COLORS[str(phase)]
        panel.barh(places, shares[phase], 0.86, left=left[phase], color=color, label=phase)
        for place, start, share, time in zip(
            places, left[phase], shares[phase], ms[phase], strict=True
        ):
            if share > 6:
                panel.text(
                    start + share / 2, place, milliseconds(time), ha="center", va="center",
                    fontsize=8, color=_ink_on(color),
                )  # fmt: skip
    for place, first, row in zip(places, is_first, timed.to_dict("records"), strict=True):
        panel.text(
            101, place, f"{milliseconds(row['ms'])} ms", va="center", fontsize=9, weight="bold"
        )
        if first:
            title = f"{_label(row)}, {row['precision']}".replace("\n", ", ")
            panel.text(0, place - 0.95, title, va="center", fontsize=9)
    panel.set_yticks(places, timed["arm"].map(label_of))
    panel.set_ylim(places.iloc[-1] + 0.7, places.iloc[0] - 1.6)
    panel.set_xlim(0, 112)
    panel.set_xticks(range(0, 101, 25))
    panel.set_xlabel(
        "share of the phases in %, timed one by one; numbers are milliseconds,\n"
        "at the right of whole steps, which are timed apart"
    )
    panel.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=min(len(ms.columns), 5))
    caption(figure, timed.to_dict("records"))
    return figure


def draw_operations(rows: Frame) -> Any:
    """
    The latest measurement of kernels against the limits of the device; None where there is none.

    A point is an operation: its floating point operations over the bytes that it cannot avoid,
    and the rate that it reaches. Caches may lift a point above the line of memory.
    """
    kernels = rows[rows["kernel"].notna() & rows["bytes"].notna()]
    if not len(kernels):
        return None
    shape = kernels["shape"].iloc[-1]
    kernels = kernels[kernels["shape"] == shape]
    kernels = kernels.drop_duplicates(["dtype", "kernel", "side"], keep="last")
    dtypes = list(kernels["dtype"].unique())
    figure, panels = new_figure(columns=len(dtypes), width=7.2 * len(dtypes), height=5.4)
    d_in, d_sae, k, n_rows = (int(part) for part in shape.split(","))
    figure.suptitle(
        f"Operations of a step, d_in {d_in:,}, d_sae {d_sae:,}, k {k}, batch {n_rows:,}"
    )
    caption(figure, kernels.to_dict("records"))
    for panel, dtype in zip(panels, dtypes, strict=True):
        points = kernels[(kernels["dtype"] == dtype) & (kernels["flops"] > 0)]
        first = points.iloc[0]
        ceilings = {f"{dtype} products": 1e12 * first["product_tflops"]}
        if first["screen_tflops"] > 1.5 * first["product_tflops"]:
            ceilings["float16 products"] = 1e12 * first["screen_tflops"]
        side = points["side"].where(points["side"] == "stock", "sparse")
        times = points["ms"].map(milliseconds)
        points = points.astype(dict.fromkeys(("flops", "bytes", "ms"), float)).assign(
            label=points["kernel"] + ", " + times + " ms",
            series=side,
            color=side.map(lambda name: style_of(name).color),
            marker=side.map(lambda name: style_of(name).marker),
        )
        draw_roofline(panel, 1e12 * first["copy_tb_s"], ceilings, points)
        panel.set_title(dtype)
    return figure


def _whole_steps(rows: Frame) -> Frame:
    """Rows of whole steps, but for sweeps and tests."""
    rows = of_contenders(rows)
    is_tiny = rows["case"].str.startswith("tiny").astype(bool)
    return rows[(rows["operation"] == "step") & rows["sweep"].isna() & ~is_tiny]


def _place(case: str) -> int:
    """Orders cases as they are registered."""
    names: Sequence[str] = list(CASES)
    return names.index(case) if case in names else len(names)


def _label(row: dict[Any, Any]) -> str:
    """A case in two lines: what it stands for, and its sizes."""
    architecture = "" if row["architecture"] == "topk" else f"{title_of(row)}, "
    name = NAMES.get(row["case"], row["case"])
    sizes = f"{row['d_in']:,} \N{RIGHTWARDS ARROW} {row['d_sae']:,}"
    return f"{name}\n{sizes}, {architecture}{active(row)}"


def _ink_on(color: str) -> str:
    """Black or white, whichever is legible on it."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
