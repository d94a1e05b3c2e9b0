"""How results are shown: colours, figures, tables of text, and a page that is one file.

Tables are sequences of rows of cells; the first row is the header, and the cells of the first
column are labels. Figures need matplotlib, which is optional: ask `can_draw` first.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saelens_sparse.reports.whole_files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: distinct in every common form of colour blindness.
STOCK_COLOR, SPARSE_COLOR = "#D55E00", "#0072B2"
PALETTE = (SPARSE_COLOR, STOCK_COLOR, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours of the lines or bars of a figure that compares more than the two arms."""
NOTE_COLOR = "0.35"
"""Of remarks and marks inside a figure."""


@dataclass(frozen=True)
class ArmStyle:
    """How an arm is named in tables and figures, and how it is drawn."""

    label: str
    color: str
    marker: str = "o"


_ARM_STYLES = {
    "stock": ArmStyle("stock", STOCK_COLOR, "^"),
    "stock_tf32": ArmStyle("stock, TF32", "#E69F00"),
    "stock_compile": ArmStyle("stock, compiled", "#CC79A7"),
    "sparse": ArmStyle("sparse", SPARSE_COLOR, "o"),
    "sparse_runner": ArmStyle("sparse, own runner", "#009E73", "s"),
    "sparsify": ArmStyle("sparsify", "#56B4E9"),
}


def style_of(arm: str) -> ArmStyle:
    """How the arm of that name is shown, wherever it is."""
    return _ARM_STYLES.get(arm, ArmStyle(arm, "#000000"))


def label_of(arm: str) -> str:
    """The arm's name in tables and figures."""
    return style_of(arm).label


Rows = Sequence[Sequence[str]]

DOTS_PER_INCH = 150
PANEL_WIDTH, PANEL_HEIGHT = 5.4, 4.0
"""Inches of one panel: its text is legible across the width of a telephone."""


@cache
def can_draw() -> bool:
    """Whether figures can be made here; where not, the first call says what to install."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    print(
        "No pictures: matplotlib is missing; pip install 'saelens-sparse[evaluation]'",
        file=sys.stderr,
    )
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
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width or PANEL_WIDTH * columns, height or PANEL_HEIGHT * rows),
        layout="constrained",
    )
    axes: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(visible=True, color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def caption(figure: Figure, rows: Iterable[Mapping[str, Any]]) -> None:
    """Say below the figure which device and versions its numbers are from."""
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


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG, which appears only once it is whole."""
    png = io.BytesIO()
    figure.savefig(png, dpi=DOTS_PER_INCH, format="png", facecolor="white")
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
    for bound, digits in ((1, 3), (10, 2), (1000, 1)):
        if ms < bound:
            return f"{ms:.{digits}f}"
    return f"{ms:,.0f}"


def plain_table(rows: Rows) -> str:
    """The table for a terminal: labels to the left, everything else to the right."""
    widths = _widths(rows)
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def markdown_table(rows: Rows) -> str:
    """The table in Markdown."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join([line(rows[0]), line(rule), *map(line, rows[1:])])


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Args:
        heading: Plain text; empty for none.
        html: The content, as made by the functions below.
    """

    heading: str
    html: str


def html_text(*paragraphs: str) -> str:
    """Paragraphs of plain text."""
    return "\n".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs)


def html_table(rows: Rows) -> str:
    """The table, which scrolls sideways where the screen is narrower."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, body = line(rows[0], "th"), "\n".join(line(row, "td") for row in rows[1:])
    return (
        '<div class="scroll"><table>\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def html_image(png_path: Path, alt: str) -> str:
    """The picture, embedded; `alt` describes it to those who cannot see it."""
    data = base64.b64encode(png_path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" '
        'loading="lazy"></figure>'
    )


def html_gallery(images: Iterable[str]) -> str:
    """Images of `html_image`, side by side as far as there is room."""
    return '<div class="gallery">\n' + "\n".join(images) + "\n</div>"


def html_details(summary: str, text: str) -> str:
    """Plain text with its line breaks, which unfolds below its summary."""
    return (
        f"<details><summary>{html.escape(summary)}</summary>"
        f"<pre>{html.escape(text)}</pre></details>"
    )


def html_page(title: str, sections: Iterable[Section]) -> str:
    """A page that needs no other file, for screens of any width."""
    body = "\n".join(
        "<section>\n"
        + (f"<h2>{html.escape(section.heading)}</h2>\n" if section.heading else "")
        + f"{section.html}\n</section>"
        for section in sections
    )
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

_STYLE = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 16px; }
h2 { font-size: 1.2rem; margin: 40px 0 12px; }
p { max-width: 75ch; margin: 0 0 12px; overflow-wrap: break-word; }
.scroll { overflow-x: auto; margin: 0 0 16px; }
table { border-collapse: collapse; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid #e4e4e4;
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; min-width: 9rem; }
th { border-bottom: 2px solid #1a1a1a; }
.gallery { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
figure { margin: 0; }
pre { overflow-x: auto; font-size: .85rem; background: #f6f6f6; padding: 12px; }
summary { cursor: pointer; padding: 4px 0; }
@media (max-width: 600px) {
  h1 { font-size: 1.2rem; }
  table { font-size: .8rem; }
  th, td { padding-right: 8px; }
  th:first-child, td:first-child { position: sticky; left: 0; background: #fff; min-width: 7.5rem; }
}
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
"""
