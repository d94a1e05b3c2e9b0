"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelens_sparse.compare.metrics import Deviation, l0_varies, terms
from saelens_sparse.compare.records import AUX_LOSS, MSE, Step
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

Arms = Mapping[str, Sequence[Step]]
Draw = Callable[["Axes"], None]

# A broad line for the first arm under a thin one: both stay visible where they coincide.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": STOCK_COLOR, "linewidth": 4.5, "alpha": 0.5},
    {"color": SPARSE_COLOR, "linewidth": 1.5},
)
EXPLAINED_VARIANCE = "explained variance"
BEHIND_TEXT = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
TERM_LABELS = {
    MSE: "MSE (squared error per token)",
    AUX_LOSS: "AuxK loss (per token)",
    "l0_loss": "L0 loss",
    "l1_loss": "L1 loss",
    "pre_act_loss": "pre-activation loss",
}


def draw_all(
    arms: Arms,
    apart: Deviation,
    shared: Mapping[str, Any] | None,
    title: str,
    folder: Path,
) -> dict[str, Path]:
    """
    Draw every picture as a PNG, and the most telling ones beside each other in `curves.png`.

    Args:
        arms: The steps of both, by architecture.
        apart: How far their MSE is apart.
        shared: Of `dictionaries.share`, if there are two dictionaries.
        title: Stands above `curves.png`.
        folder: Where they go.

    Returns:
        The single pictures by what they show.
    """
    panels: dict[str, Draw] = {}

    def over_steps_and_seconds(name: str, value: Callable[[Step], float], label: str) -> None:
        panels[f"{name}_over_steps"] = lambda axes: _over_steps(axes, arms, value, label)
        panels[f"{name}_over_seconds"] = lambda axes: _over_seconds(axes, arms, value, label)

    over_steps_and_seconds("mse", lambda step: step.mse, TERM_LABELS[MSE])
    panels["mse_deviation"] = lambda axes: _deviation(axes, arms, apart)
    panels["step_time"] = lambda axes: _over_steps(
        axes, arms, lambda step: 1e3 * step.seconds, "time of an SAE step (ms)"
    )
    over_steps_and_seconds("loss", lambda step: step.loss, "loss (sum of its terms)")
    for term in terms([step for steps in arms.values() for step in steps]):
        if term != MSE:
            label = TERM_LABELS.get(term, term.replace("_", " "))
            over_steps_and_seconds(term, lambda step, term=term: step.losses.get(term, 0.0), label)
    others: dict[str, tuple[Callable[[Step], float], str]] = {
        "explained_variance": (lambda step: step.explained_variance, EXPLAINED_VARIANCE),
        "l0": (lambda step: step.l0, "L0 (active latents per token)"),
        "dead_latents": (lambda step: step.dead_latents, "dead latents"),
    }
    for name, (value, label) in others.items():
        panels[name] = lambda axes, value=value, label=label: _over_steps(axes, arms, value, label)
    if shared is not None and "histogram" in shared:
        panels["shared_latents"] = lambda axes: _histogram(axes, list(arms), shared)

    paths: dict[str, Path] = {}
    for name, draw in panels.items():
        figure, (axes,) = new_figure()
        draw(axes)
        paths[name] = folder / f"{name}.png"
        save_png(figure, paths[name])
    _overview(arms, apart, title, folder / "curves.png")
    return paths


def _overview(arms: Arms, apart: Deviation, title: str, path: Path) -> None:
    """MSE over steps and over seconds, and the most telling third: L0 if it varies."""
    figure, (by_step, by_second, third) = new_figure(columns=3, width=12.6, height=4.6)

    def value(step: Step) -> float:
        return step.mse

    by_second.sharey(by_step)
    _over_steps(by_step, arms, value, TERM_LABELS[MSE])
    _over_seconds(by_second, arms, value, TERM_LABELS[MSE])
    if any(l0_varies(steps) for steps in arms.values()):
        _over_steps(third, arms, lambda step: step.l0, "L0 (active latents per token)")
    else:
        _deviation(third, arms, apart)
    by_step.set_title(f"Over steps: at most {percent(apart.largest)} apart")
    by_second.set(title="Over time", ylabel="")
    third.set_title(third.get_title() or "Active latents")
    figure.suptitle(title.replace("; ", "\n"), fontweight="bold")
    save_png(figure, path)


def _over_steps(axes: Axes, arms: Arms, value: Callable[[Step], float], label: str) -> None:
    for (architecture, steps), style in zip(arms.items(), STYLES, strict=True):
        axes.plot(
            [step.step for step in steps],
            [value(step) for step in steps],
            label=architecture,
            **style,
        )
    _step_axis(axes)
    axes.set_ylabel(label)
    _scale(axes, [value(step) for steps in arms.values() for step in steps])
    _mark_changes(axes, arms)
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, loc="upper right")


def _over_seconds(axes: Axes, arms: Arms, value: Callable[[Step], float], label: str) -> None:
    ends: list[float] = []
    for steps, style in zip(arms.values(), STYLES, strict=True):
        seconds = list(accumulate(step.seconds for step in steps))
        axes.plot(seconds, [value(step) for step in steps], **style)
        axes.axvline(seconds[-1], color=style["color"], linestyle=":", linewidth=1)
        ends.append(seconds[-1])
    axes.set(xlabel="time in SAE training steps (s)", ylabel=label)
    _scale(axes, [value(step) for steps in arms.values() for step in steps])
    close = abs(ends[0] - ends[1]) < 0.3 * max(ends)
    for index, (architecture, style, end) in enumerate(zip(arms, STYLES, ends, strict=True)):
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


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values span more than one, and room above the curves for text."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    positive = [value for value in values if value > 0]
    logarithmic = (
        len(positive) == len(values)
        and max(positive) > 3 * min(positive)
        # A share of 1 is no matter of magnitudes.
        and axes.get_ylabel() != EXPLAINED_VARIANCE
    )
    if logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.25)
        decades = max(positive) / min(positive)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 300 else (1,)))
        if max(positive) < 1e6 and min(positive) >= 1e-3:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        low, high = axes.get_ylim() if any(values) else (0, 1)
        axes.set_ylim(low, high + 0.25 * (high - low))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _deviation(axes: Axes, arms: Arms, apart: Deviation) -> None:
    from matplotlib.ticker import StrMethodFormatter

    first = next(iter(arms))
    steps = [step.step for step in next(iter(arms.values()))]
    in_percent = [100 * value for value in apart.by_step]
    axes.axhline(0, color=STOCK_COLOR, linewidth=4.5, alpha=0.5)
    axes.plot(steps, in_percent, color=SPARSE_COLOR, linewidth=1.2)
    axes.set(
        title=f"Median {percent(apart.median)}, largest {percent(apart.largest)} apart",
        ylabel=f"MSE relative to {first} (%)",
    )
    _step_axis(axes)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    bound = 1.15 * max(map(abs, in_percent)) or 1e-6
    axes.set_ylim(-bound, bound)


def _histogram(axes: Axes, names: Sequence[str], shared: Mapping[str, Any]) -> None:
    counts: list[int] = shared["histogram"]
    edges = [index / len(counts) for index in range(len(counts))]
    axes.bar(edges, counts, width=1 / len(counts), align="edge", color=SPARSE_COLOR)
    axes.set(
        xlabel=f"cosine with the nearest latent of {names[1]}",
        ylabel=f"latents of {names[0]} that are alive",
        xlim=(0, 1),
    )


def _mark_changes(axes: Axes, arms: Arms) -> None:
    """Say from which step dead latents are trained, and where the second arm turned sparse."""
    steps = list(arms.values())[1]
    first_aux = next(
        (s.step for taken in arms.values() for s in taken if s.losses.get(AUX_LOSS)), None
    )
    if first_aux is not None and first_aux > steps[0].step:
        _mark(axes, first_aux, steps[-1].step, "dead latents are\ntrained too (AuxK)")
    switch = next((step.step for step in steps if step.implementation != "fused"), None)
    if switch is not None and switch > steps[0].step:
        _mark(axes, switch, steps[-1].step, "only what is active\nis computed")


def _mark(axes: Axes, step: int, last: int, text: str) -> None:
    axes.axvline(step, color=NOTE_COLOR, linestyle=":", linewidth=1)
    in_left_half = step < last / 2
    axes.text(
        step,
        0.5,
        "\n".join(f" {line} " for line in text.split("\n")),
        transform=axes.get_xaxis_transform(),
        ha="left" if in_left_half else "right",
        va="center",
        color=NOTE_COLOR,
        fontsize="small",
        bbox=BEHIND_TEXT,
    )
