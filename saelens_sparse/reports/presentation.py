"""
How results are shown: names, colours, numbers, tables of text, figures, and a page that is one
file.

Figures need matplotlib, which is optional: ask `can_draw` first.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

from saelens_sparse.whole_files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: distinct in every common form of colour blindness.
STOCK_COLOR, SPARSE_COLOR = "#D55E00", "#0072B2"
NOTE_COLOR = "0.35"
"""Of remarks and marks inside a figure."""
STYLE = Path(__file__).with_name("report.mplstyle")
"""Matplotlib's style sheet of all figures."""
PANEL_WIDTH, PANEL_HEIGHT = 5.4, 4.0
"""Inches of one panel: its text is legible across the width of a telephone."""

Rows = Sequence[Sequence[str]]
"""A table: the first row is the header, and the first cell of a row is its label."""


class Style(NamedTuple):
    """How a way to train is named in tables and figures, and how it is drawn."""

    label: str
    color: str
    marker: str = "o"


_STYLES = {
    "stock": Style("stock", STOCK_COLOR, "^"),
    "stock_tf32": Style("stock, TF32", "#E69F00"),
    "stock_compile": Style("stock, compiled", "#CC79A7"),
    "sparse": Style("sparse", SPARSE_COLOR),
    "sparse_runner": Style("sparse runner", "#009E73", "s"),
    "sparsify": Style("sparsify", "#56B4E9"),
}


def style_of(name: str) -> Style:
    """How the way to train of that name is shown, wherever it is."""
    return _STYLES.get(name, Style(name, "#000000"))


def label_of(name: str) -> str:
    """Its name in tables and figures."""
    return style_of(name).label


@cache
def can_draw() -> bool:
    """Whether figures can be made here; where not, the first call says what to install."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    needed = "pip install 'saelens-sparse[evaluation]'"
    print(f"No pictures: matplotlib is missing; {needed}", file=sys.stderr)
    return False


def new_figure(
    columns: int = 1, rows: int = 1, width: float | None = None, height: float | None = None
) -> tuple[Figure, list[Axes]]:
    """
    A figure of `rows` times `columns` panels with the project's look.

    Args:
        columns: Panels beside each other.
        rows: Panels below each other.
        width: Inches of the whole figure; by default `PANEL_WIDTH` a column.
        height: Inches of the whole figure; by default `PANEL_HEIGHT` a row.

    Returns:
        The figure, and its axes row by row.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    style.use(STYLE)  # from now on: some of it counts where things are drawn later
    figure = Figure(figsize=(width or PANEL_WIDTH * columns, height or PANEL_HEIGHT * rows))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def caption(figure: Figure, rows: Iterable[Mapping[str, Any]]) -> None:
    """Say below the figure which device and versions its numbers are from."""
    names = {"device": "", "torch": "PyTorch ", "triton": "Triton ", "sae_lens": "SAELens "}
    found, parts = list(rows), list[str]()
    for name, text in {**names, "commit": "commit "}.items():
        values = dict.fromkeys(str(row[name]).split("+cu")[0] for row in found if row.get(name))
        if values:
            parts.append(text + ", ".join(values))
    figure.supxlabel(" · ".join(parts), fontsize=7.5, color=NOTE_COLOR)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, which appears only once it is whole."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    write_whole(path, png.getvalue())


def percent(share: float, sign: str = "") -> str:
    """
    A share with two significant digits, and never more than two decimals unless it is tiny.

    Args:
        share: 0.0037 is 0.37%.
        sign: "+" to say so of positive ones too.
    """
    value = 100 * share
    size = abs(value)
    if size == 0:
        return "0%"
    if size < 0.1:
        return f"{value:{sign}.2g}%"
    digits = 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:{sign}.{digits}f}%"


def milliseconds(ms: float) -> str:
    """With as many decimals as a step's parts need."""
    digits = 3 if ms < 1 else 2 if ms < 10 else 1 if ms < 1000 else 0
    return f"{ms:,.{digits}f}"


def plain_table(rows: Rows) -> str:
    """The table for a terminal: labels to the left, everything else to the right."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "-" * (first + sum(widths) + 2 * len(widths)), *lines[1:]])


@dataclass(frozen=True)
class Section:
    """
    A part of a page: what there is of text, pictures, tables and details, in this order.

    Args:
        heading: Empty for none.
        text: Paragraphs.
        images: PNG files, each by what it shows for those who cannot see it.
        tables: Each scrolls sideways where the screen is narrower.
        details: Text with line breaks, each unfolding below its summary.
    """

    heading: str
    text: Sequence[str] = ()
    images: Mapping[str, Path] = field(default_factory=dict[str, Path])
    tables: Sequence[Rows] = ()
    details: Mapping[str, str] = field(default_factory=dict[str, str])


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write a page that needs no other file, for screens of any width."""
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, trim_blocks=True)
    pages.filters["png"] = _as_url
    page = pages.get_template("page.html.jinja").render(title=title, sections=sections)
    write_whole(path, page + "\n")


def _as_url(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
