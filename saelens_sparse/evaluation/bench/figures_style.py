"""What the benchmark's figures share: how arms look, and which rows a figure was drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from saelens_sparse.evaluation.presentation import (
    NOTE_COLOR,
    PALETTE,
    SPARSE_COLOR,
    STOCK_COLOR,
)
from saelens_sparse.evaluation.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = {
    "stock": STOCK_COLOR,
    "stock_tf32": "#E69F00",
    "stock_compile": "#CC79A7",
    "sparse": SPARSE_COLOR,
    "sparse_runner": "#009E73",
    "sparsify": "#56B4E9",
    "dictionary_learning": "#000000",
}
LABELS = {
    "stock": "stock",
    "stock_tf32": "stock, TF32",
    "stock_compile": "stock, compiled",
    "sparse": "sparse",
    "sparse_runner": "sparse, own runner",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
MARKERS = {"sparse": "o", "sparse_runner": "s", "stock": "^"}


def color_of(arm: str) -> str:
    """The arm's colour in every figure."""
    return COLORS.get(arm, PALETTE[-1])


def label_of(arm: str) -> str:
    """The arm's name in every figure."""
    return LABELS.get(arm, arm)


def short_ms(value: float) -> str:
    """Milliseconds in three digits or so."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


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
