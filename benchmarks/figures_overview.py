"""The headline cases in one figure, and where a step's time goes in another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.selection import (
    SPARSE_ARMS,
    latest,
    of_contests,
    pairs,
    speedup,
)
from saelens_sparse.profile.cases import STEP_CASES, STOCK
from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    PALETTE,
    caption,
    label_of,
    milliseconds,
    new_figure,
    save_png,
    style_of,
)
from saelens_sparse.reports.results import Row

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
    "jumprelu_l0_64": "Gemma-2-2B",
    "jumprelu_l0_200": "Gemma-2-2B",
    "jumprelu_l0_1000": "Gemma-2-2B",
    "jumprelu_l0_3000": "Gemma-2-2B",
}
"""What the headline cases stand for; other cases go by their own names."""

BREAKDOWN_CASES = ("gemma2b", "gpt2", "llama8b", "wide", "jumprelu_l0_64", "cpu", "cpu_jumprelu")
"""Those of which a step is taken apart; where none of them was measured, all are."""

BAR = 0.36


def draw_overview(rows: Sequence[Row], folder: Path) -> Path | None:
    """Speed-ups of whole steps against stock as `overview.png`; None where there are none."""
    found = [
        (stock, sparse)
        for stock, sparse in pairs(_whole_steps(rows))
        if stock["arm"] == STOCK.name and speedup(stock, sparse) is not None
    ]
    if not found:
        return None
    found.sort(key=lambda pair: _place(pair[0]))
    precisions = [p for p in ("float32", "autocast") if any(s["precision"] == p for s, _ in found)]
    cases = list(dict.fromkeys(s["case"] for s, _ in found if s["precision"] in precisions))
    figure, panels = new_figure(
        columns=len(precisions), width=5.4 * len(precisions) + 1.2, height=1.3 + 0.62 * len(cases)
    )
    by_case = {stock["case"]: stock for stock, _ in found}
    for panel, precision in zip(panels, precisions, strict=True):
        shown = [pair for pair in found if pair[0]["precision"] == precision]
        _draw_speedup_bars(panel, shown, cases)
        panel.set_title(precision, fontsize=11)
        labels = (
            [_label(by_case[case]) for case in cases] if panel is panels[0] else [""] * len(cases)
        )
        panel.set_yticks(range(len(cases)), labels, fontsize=9)
        panel.set_ylim(len(cases) - 0.45, -0.55)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    caption(figure, [row for pair in found for row in pair])
    path = folder / "overview.png"
    save_png(figure, path)
    return path


def _draw_speedup_bars(panel: Axes, found: Sequence[tuple[Row, Row]], cases: Sequence[str]) -> None:
    longest = max(speedup(*pair) or 0 for pair in found)
    n_arms = Counter(stock["case"] for stock, _ in found)
    for index, arm in enumerate(SPARSE_ARMS):
        of_arm = [pair for pair in found if pair[1]["arm"] == arm]
        places = [
            cases.index(stock["case"]) + (index - 0.5) * BAR * (n_arms[stock["case"]] > 1)
            for stock, _ in of_arm
        ]
        ratios = [speedup(*pair) or 0.0 for pair in of_arm]
        panel.barh(places, ratios, BAR * 0.92, color=style_of(arm).color, label=label_of(arm))
        for place, ratio, (stock, sparse) in zip(places, ratios, of_arm, strict=True):
            times = f"{milliseconds(stock['ms'])} to {milliseconds(sparse['ms'])} ms"
            panel.text(
                ratio + 0.012 * longest, place, f"{ratio:.1f}x  ", va="center", fontsize=9,
                weight="bold",
            )  # fmt: skip
            panel.annotate(
                times, (ratio + 0.012 * longest, place), xytext=(36, 0),
                textcoords="offset points", va="center", fontsize=7.5, color=NOTE_COLOR,
            )  # fmt: skip
    panel.axvline(1.0, color=style_of(STOCK.name).color, linewidth=1.5, label=label_of(STOCK.name))
    panel.set_xlim(0, 1.62 * longest)
    panel.set_xlabel("times faster than stock")
    panel.grid(visible=False, axis="y")


def draw_breakdown(rows: Sequence[Row], folder: Path) -> Path | None:
    """Shares of a step's time by phase as `step_breakdown.png`; None where there are none."""
    arms = (STOCK.name, *SPARSE_ARMS)
    timed = [
        row
        for row in latest(_whole_steps(rows))
        if row["status"] == "ok" and row.get("phases_ms") and row["arm"] in arms
    ]
    timed = [row for row in timed if row["case"] in BREAKDOWN_CASES] or timed
    if not timed:
        return None
    timed.sort(key=_place)
    heats = list(dict.fromkeys((row["case"], row["precision"]) for row in timed))
    timed.sort(key=lambda r: (heats.index((r["case"], r["precision"])), arms.index(r["arm"])))
    phases = list(dict.fromkeys(phase for row in timed for phase in row["phases_ms"]))

    # A gap between heats.
    places: list[float] = []
    for row, before in zip(timed, [None, *timed], strict=False):
        same = before is not None and (before["case"], before["precision"]) == (
            row["case"],
            row["precision"],
        )
        places.append((places[-1] if places else 0.0) + (1.0 if same else 2.1))

    figure, (panel,) = new_figure(width=9.0, height=1.6 + 0.27 * places[-1])
    left = [0.0] * len(timed)
    for phase, color in zip(phases, PALETTE, strict=False):
        totals = [sum(row["phases_ms"].values()) for row in timed]
        times = [row["phases_ms"].get(phase, 0.0) for row in timed]
        shares = [100 * ms / total for ms, total in zip(times, totals, strict=True)]
        panel.barh(places, shares, 0.86, left=left, color=color, label=phase)
        for place, start, share, ms in zip(places, left, shares, times, strict=True):
            if share > 6:
                ink = "white" if color in (PALETTE[0], PALETTE[1], PALETTE[2]) else "black"
                middle = start + share / 2
                panel.text(
                    middle, place, milliseconds(ms), ha="center", va="center", fontsize=8, color=ink
                )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for place, row in zip(places, timed, strict=True):
        panel.text(
            101, place, f"{milliseconds(row['ms'])} ms", va="center", fontsize=9, weight="bold"
        )
    for heat in heats:
        first = next(i for i, r in enumerate(timed) if (r["case"], r["precision"]) == heat)
        title = f"{_label(timed[first]).replace(chr(10), ', ')}, {heat[1]}"
        panel.text(0, places[first] - 0.95, title, va="center", fontsize=9)
    panel.set_yticks(places, [label_of(row["arm"]) for row in timed], fontsize=9)
    panel.set_ylim(places[-1] + 0.7, places[0] - 1.6)
    panel.set_xlim(0, 112)
    panel.set_xticks(range(0, 101, 25))
    panel.set_xlabel(
        "share of the phases in %, timed one by one; numbers are milliseconds,\n"
        "at the right of whole steps, which are timed apart"
    )
    panel.grid(visible=False, axis="y")
    figure.legend(loc="outside upper center", ncols=len(phases), frameon=False, fontsize=9)
    caption(figure, timed)
    path = folder / "step_breakdown.png"
    save_png(figure, path)
    return path


def _whole_steps(rows: Sequence[Row]) -> list[Row]:
    """Rows of whole steps, but for sweeps and tests."""
    return [
        row
        for row in of_contests(rows)
        if row["operation"] == "step"
        and not row.get("sweep")
        and not row["case"].startswith("tiny")
    ]


def _place(row: Row) -> int:
    """Orders cases as they are registered."""
    names = list(STEP_CASES)
    return names.index(row["case"]) if row["case"] in names else len(names)


def _label(row: Row) -> str:
    """A case in two lines: what it stands for, and its sizes."""
    active = f"k {row['k']}" if row["architecture"] == "topk" else f"JumpReLU, L0 {row['l0']:g}"
    name = NAMES.get(row["case"], row["case"])
    return f"{name}\n{row['d_in']:,} \N{RIGHTWARDS ARROW} {row['d_sae']:,}, {active}"
