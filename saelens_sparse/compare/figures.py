"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from saelens_sparse.compare.steps import AUX_LOSSES, LOSS, MSE, l0_varies, trains_dead_latents
from saelens_sparse.reports.presentation import (
    NOTE_COLOR,
    SPARSE_COLOR,
    STOCK_COLOR,
    new_figure,
    percent,
    save_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Sides = Mapping[str, pd.DataFrame]

# A broad line for the first side under a thin one: both stay visible where they coincide.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": STOCK_COLOR, "linewidth": 4.5, "alpha": 0.5},
    {"color": SPARSE_COLOR, "linewidth": 1.5},
)
LABELS = {
    MSE: "MSE (squared error per token)",
    AUX_LOSSES[0]: "AuxK loss (per token)",
    AUX_LOSSES[1]: "ghost gradients' loss (per token)",
    "loss": "loss (sum of its terms)",
    "seconds": "time of an SAE step (s)",
    "l0": "L0 (active latents per token)",
}


def draw_all(sides: Sides, results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """
    Draw `curves.png` and, in `figures`, a PNG of each quantity; returns the latter by name.

    Args:
        sides: The tables of steps of both, by architecture.
        results: With the keys of `results.json`.
        folder: Where they go.
    """
    apart, shared = results["mse_deviation"], results["shared_latents"] or {}
    terms = dict.fromkeys(column for steps in sides.values() for column in steps if LOSS in column)
    panels: dict[str, tuple[Any, ...]] = {}
    for column in (*terms, "loss"):
        name = "mse" if column == MSE else column.removeprefix(LOSS)
        panels[f"{name}_over_steps"] = (_curves, column)
        panels[f"{name}_over_seconds"] = (_curves, column, True)
    panels |= {"mse_deviation": (_deviation, apart), "step_time": (_curves, "seconds")}
    panels |= {name: (_curves, name) for name in ("explained_variance", "l0", "dead_latents")}
    if "histogram" in shared:
        panels["shared_latents"] = (_histogram, shared["histogram"])
    paths = {name: folder / "figures" / f"{name}.png" for name in panels}
    for name, (draw, *what) in panels.items():
        figure, (axes,) = new_figure()
        draw(axes, sides, *what)
        save_png(figure, paths[name])

    figure, (by_step, by_second, third) = new_figure(columns=3, width=12.6, height=4.6)
    _curves(by_step, sides, MSE)
    _curves(by_second, sides, MSE, timed=True)
    if any(map(l0_varies, sides.values())):
        _curves(third, sides, "l0")
    else:
        _deviation(third, sides, apart)
    by_step.set_title(f"Over steps: at most {percent(apart['largest'])} apart")
    by_second.set(title="Over time", ylabel="")
    figure.suptitle(results["headline"].replace("; ", "\n"), fontweight="bold")
    save_png(figure, folder / "curves.png")
    return paths


def _curves(axes: Axes, sides: Sides, column: str, timed: bool = False) -> None:
    """A column of both sides over steps, or over the time that these took."""
    from matplotlib.ticker import LogLocator, NullLocator

    values = [v for steps in sides.values() if column in steps for v in steps[column].tolist()]
    if column != "explained_variance" and max(values) > 3 * min(values) > 0:
        axes.set_yscale("log")
        few = max(values) < 300 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,g}")
    for (architecture, steps), style in zip(sides.items(), STYLES, strict=True):
        seconds = steps.seconds.cumsum()
        if column in steps:
            label = f"{architecture}, {seconds.iloc[-1]:.3g} s" if timed else architecture
            axes.plot(seconds if timed else steps.step, steps[column], label=label, **style)
    label = LABELS.get(column, column.removeprefix(LOSS).replace("_", " "))
    axes.set(xlabel="time in SAE steps (s)" if timed else "training step", ylabel=label)
    for text, step in ({} if timed else _changes(*sides.values())).items():
        axes.axvline(step, color=NOTE_COLOR, linestyle=":", linewidth=1, label=text)
    axes.legend()


def _changes(first: pd.DataFrame, second: pd.DataFrame) -> dict[str, int]:
    """From which step dead latents are trained, and the second side is sparse."""
    with_aux = [s for steps in (first, second) for s in steps.step[trains_dead_latents(steps)]]
    sparse = second.step[second.implementation != "fused"].tolist()
    found = {"only active latents computed": sparse, "dead latents trained": with_aux}
    return {text: min(steps) for text, steps in found.items() if steps and min(steps) > 1}


def _deviation(axes: Axes, sides: Sides, apart: Mapping[str, Any]) -> None:
    in_percent = 100 * pd.Series(apart["by_step"])
    axes.axhline(0, **STYLES[0])
    axes.plot(in_percent.index + 1, in_percent, **STYLES[1])
    axes.yaxis.set_major_formatter("{x:,g}")
    bound = 1.15 * in_percent.abs().max() or 1e-6
    axes.set(
        title=f"Median {percent(apart['median'])}, largest {percent(apart['largest'])} apart",
        xlabel="training step",
        ylabel=f"MSE relative to {next(iter(sides))} (%)",
        ylim=(-bound, bound),
    )


def _histogram(axes: Axes, sides: Sides, counts: list[int]) -> None:
    a, b = sides
    axes.stairs(
        counts, [i / len(counts) for i in range(len(counts) + 1)], fill=True, color=SPARSE_COLOR
    )
    axes.set(xlabel=f"cosine with the nearest latent of {b}", ylabel=f"latents of {a} (alive)")
