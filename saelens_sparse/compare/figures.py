"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from saelens_sparse.compare.steps import AUX_LOSS, LOSS, MSE, l0_varies
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
BEHIND_TEXT = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
LABELS = {
    MSE: "MSE (squared error per token)",
    "seconds": "time of an SAE step (s)",
    "loss": "loss (sum of its terms)",
    AUX_LOSS: "AuxK loss (per token)",
    "explained_variance": "explained variance",
    "l0": "L0 (active latents per token)",
    "dead_latents": "dead latents",
    LOSS + "pre_act_loss": "pre-activation loss",
}


def draw_all(sides: Sides, results: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """
    Draw every picture as a PNG in `folder`/figures, and the overview as `folder`/curves.png.

    Args:
        sides: The tables of steps of both, by architecture.
        results: With the keys of `results.json`.
        folder: Where they go.

    Returns:
        The single pictures by what they show.
    """
    apart, shared = results["mse_deviation"], results["shared_latents"]
    panels: dict[str, Callable[[Axes], None]] = {}
    columns = dict.fromkeys(column for steps in sides.values() for column in steps)
    for column in (MSE, "loss", *(c for c in columns if c.startswith(LOSS) and c != MSE)):
        name = "mse" if column == MSE else column.removeprefix(LOSS)
        panels[f"{name}_over_steps"] = partial(_over_steps, sides=sides, column=column)
        panels[f"{name}_over_seconds"] = partial(_over_seconds, sides=sides, column=column)
    panels["mse_deviation"] = partial(_deviation, sides=sides, apart=apart)
    panels["step_time"] = partial(_over_steps, sides=sides, column="seconds")
    for column in ("explained_variance", "l0", "dead_latents"):
        panels[column] = partial(_over_steps, sides=sides, column=column)
    if shared is not None and "histogram" in shared:
        panels["shared_latents"] = partial(_histogram, sides=sides, counts=shared["histogram"])

    paths = {name: folder / "figures" / f"{name}.png" for name in panels}
    for name, draw in panels.items():
        figure, (axes,) = new_figure()
        draw(axes)
        save_png(figure, paths[name])

    figure, (by_step, by_second, third) = new_figure(columns=3, width=12.6, height=4.6)
    by_second.sharey(by_step)
    _over_steps(by_step, sides, MSE)
    _over_seconds(by_second, sides, MSE)
    if any(map(l0_varies, sides.values())):
        _over_steps(third, sides, "l0")
        third.set_title("Active latents")
    else:
        _deviation(third, sides, apart)
    by_step.set_title(f"Over steps: at most {percent(apart['largest'])} apart")
    by_second.set(title="Over time", ylabel="")
    figure.suptitle(results["headline"].replace("; ", "\n"), fontweight="bold")
    save_png(figure, folder / "curves.png")
    return paths


def _over_steps(axes: Axes, sides: Sides, column: str) -> None:
    for (architecture, steps), style in zip(sides.items(), STYLES, strict=True):
        if column in steps:
            axes.plot(steps.step, steps[column], label=architecture, **style)
    axes.set(xlabel="training step")
    _finish(axes, sides, column)
    _mark_changes(axes, *sides.values())
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, loc="upper right")


def _over_seconds(axes: Axes, sides: Sides, column: str) -> None:
    ends = [steps.seconds.sum() for steps in sides.values()]
    close = abs(ends[0] - ends[1]) < 0.3 * max(ends)
    for index, (architecture, steps) in enumerate(sides.items()):
        style, end = STYLES[index], ends[index]
        if column in steps:
            axes.plot(steps.seconds.cumsum(), steps[column], **style)
        axes.axvline(end, color=style["color"], linestyle=":", linewidth=1)
        axes.text(
            end,
            0.98 - (0.14 if close and index else 0),
            f"{architecture} \n{end:.3g} s ",
            transform=axes.get_xaxis_transform(),
            ha="right" if end > 0.35 * max(ends) else "left",
            va="top",
            color=style["color"],
            fontweight="bold",
            bbox=BEHIND_TEXT,
        )
    axes.set(xlabel="time in SAE training steps (s)")
    _finish(axes, sides, column)


def _finish(axes: Axes, sides: Sides, column: str) -> None:
    """A logarithmic axis where values span more than one, and room above the curves for text."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_ylabel(LABELS.get(column, column.removeprefix(LOSS).replace("_", " ")))
    values = pd.concat([steps[column] for steps in sides.values() if column in steps])
    low, high = axes.get_ylim() if values.any() else (0.0, 1.0)
    if column != "explained_variance" and values.max() > 3 * values.min() > 0:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.25)
        decades = values.max() / values.min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 300 else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        if values.max() >= 1e6 or values.min() < 1e-3:
            return
    else:
        axes.set_ylim(low, high + 0.25 * (high - low))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _deviation(axes: Axes, sides: Sides, apart: Mapping[str, Any]) -> None:
    first, steps = next(iter(sides.items()))
    in_percent = 100 * pd.Series(apart["by_step"])
    axes.axhline(0, color=STOCK_COLOR, linewidth=4.5, alpha=0.5)
    axes.plot(steps.step, in_percent, color=SPARSE_COLOR, linewidth=1.2)
    bound = 1.15 * in_percent.abs().max() or 1e-6
    axes.set(
        title=f"Median {percent(apart['median'])}, largest {percent(apart['largest'])} apart",
        xlabel="training step",
        ylabel=f"MSE relative to {first} (%)",
        ylim=(-bound, bound),
    )
    axes.yaxis.set_major_formatter("{x:,g}")


def _histogram(axes: Axes, sides: Sides, counts: list[int]) -> None:
    edges = [index / len(counts) for index in range(len(counts))]
    axes.bar(edges, counts, width=1 / len(counts), align="edge", color=SPARSE_COLOR)
    a, b = sides
    axes.set(
        xlabel=f"cosine with the nearest latent of {b}",
        ylabel=f"latents of {a} that are alive",
        xlim=(0, 1),
    )


def _mark_changes(axes: Axes, first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Say from which step dead latents are trained, and where the second side turned sparse."""
    changes = {"only what is active\nis computed": second.step[second.implementation != "fused"]}
    for steps in (second, first):
        if AUX_LOSS in steps and steps[AUX_LOSS].any():
            changes["dead latents are\ntrained too (AuxK)"] = steps.step[steps[AUX_LOSS] != 0]
    for text, found in changes.items():
        if len(found) and (step := found.iloc[0]) > second.step.iloc[0]:
            axes.axvline(step, color=NOTE_COLOR, linestyle=":", linewidth=1)
            axes.text(
                step,
                0.5,
                "\n".join(f" {line} " for line in text.split("\n")),
                transform=axes.get_xaxis_transform(),
                ha="left" if step < second.step.iloc[-1] / 2 else "right",
                va="center",
                color=NOTE_COLOR,
                fontsize="small",
                bbox=BEHIND_TEXT,
            )
