"""The figure of whole runs beside steps: milliseconds of stock and of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from benchmarks.rows import Frame
from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    caption,
    label_of,
    milliseconds,
    new_figure,
    style_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR = 0.38
CONTENDERS = ("stock", "sparse_runner")
MODELS = {
    "GPT-2 small\nlayer 8 \N{RIGHTWARDS ARROW} 24,576": ("gpt2", "gpt2", "autocast"),
    "Gemma-2-2B\nlayer 12 \N{RIGHTWARDS ARROW} 65,536": ("gemma2", "gemma2b", "autocast"),
    "Llama-3.1-8B\nlayer 16 \N{RIGHTWARDS ARROW} 131,072": (
        "llama_8b", "llama8b", "bfloat16_model",
    ),
}  # fmt: skip
"""Names of the whole run's case and of the step's, and the run's precision."""


def draw_runs(rows: Frame) -> Any:
    """Whole runs with TransformerLens's models, and steps under autocast; None without runs."""
    runs = rows[(rows["operation"] == "run") & (rows["library"] == "TL")]
    steps = rows[(rows["operation"] == "step") & (rows["precision"] == "autocast")]
    titles = [title for title, names in MODELS.items() if (runs["case"] == names[0]).any()]
    if not titles:
        return None
    figure, panels = new_figure(columns=2, width=10.4, height=1.5 + 0.8 * len(titles))
    shown: list[dict[Any, Any]] = []
    for panel, heading in zip(panels, ("whole run", "SAE step alone"), strict=True):
        for place, title in enumerate(titles):
            run, step, precision = MODELS[title]
            if heading == "whole run":
                of_case = runs[(runs["case"] == run) & (runs["precision"] == precision)]
                found = _latest(of_case, "contender", "ms_without_evals")
            else:
                found = _latest(steps[steps["case"] == step], "arm", "ms")
            shown += found.to_dict("records")
            _draw_case(panel, place, dict(zip(found["name"], found["shown"], strict=True)))
        panel.set_title(heading)
        panel.set_yticks(range(len(titles)), titles if panel is panels[0] else [])
        panel.set_ylim(len(titles) - 0.45, -0.55)
        panel.set_xlim(0, 1.3 * panel.get_xlim()[1])
        panel.set_xlabel("milliseconds per 4,096 tokens")
        panel.grid(visible=False, axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=2)
    caption(figure, shown)
    return figure


def _latest(rows: Frame, name: str, ms: str) -> Frame:
    """The last good row of both contenders, with their `name` and the milliseconds `shown`."""
    good = rows[(rows["status"] == "ok") & rows[name].isin(CONTENDERS)]
    good = good.drop_duplicates(name, keep="last")
    return good.assign(name=good[name], shown=pd.to_numeric(good[ms]))


def _draw_case(panel: Axes, place: int, times: dict[str, float]) -> None:
    for index, (name, style) in enumerate((one, style_of(one)) for one in CONTENDERS):
        if name not in times:
            continue
        y = place + (index - 0.5) * BAR
        panel.barh(y, times[name], 0.92 * BAR, color=style.color, label=label_of(name))
        end, faster = (times[name], y), times.get("stock", 0.0) / times[name]
        text = f" {milliseconds(times[name])} ms"
        panel.text(*end, text, va="center", fontsize=8.5, color=NOTE_COLOR)
        if index and faster:
            panel.annotate(
                f"{faster:.1f}x", end, xytext=(52, 0), textcoords="offset points", va="center",
                fontsize=10, weight="bold",
            )  # fmt: skip
