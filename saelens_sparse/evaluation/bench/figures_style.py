"""What the benchmark's figures share: their axes, and which rows a figure was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saelens_sparse.evaluation.presentation import NOTE_COLOR
from saelens_sparse.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


def caption(figure: Figure, rows: Iterable[Row]) -> None:
    """Say below the figure which device and versions its rows are from."""
    parts: list[str] = []
    found = list(rows)
    for name, text in (
        ("device", "{}"),
        ("torch", "PyTorch {}"),
        ("triton", "Triton {}"),
        ("sae_lens", "SAELens {}"),
        ("commit", "commit {}"),
    ):
        values = dict.fromkeys(str(row[name]).split("+cu")[0] for row in found if row.get(name))
        if values:
            parts.append(text.format(", ".join(values)))
    figure.supxlabel(" · ".join(parts), fontsize=7.5, color=NOTE_COLOR)


def plain_numbers(axis: Axis, values: Sequence[float], text: Callable[[float], str]) -> None:
    """Label a logarithmic axis at these values, and nowhere else."""
    axis.set_major_locator(_fixed(values))
    axis.set_minor_locator(_fixed([]))
    axis.set_major_formatter(lambda value, _position: text(value))


def readable_ratios(panel: Axes, low: float, high: float) -> None:
    """A logarithmic y axis of ratios, labelled 0.5x, 1x, 2x, ... as far as there are any."""
    panel.set_yscale("log")
    steps = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200]
    panel.set_ylim(min(low / 1.25, 0.8), high * 1.35)
    bottom, top = panel.get_ylim()
    shown = [step for step in steps if bottom <= step <= top]
    plain_numbers(panel.yaxis, shown, lambda value: f"{value:g}x")


def _fixed(values: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(list(values))
