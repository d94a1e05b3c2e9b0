"""What the benchmark's figures share: their axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


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
