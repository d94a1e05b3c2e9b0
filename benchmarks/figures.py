"""
Draw all figures from the rows measured so far.

    saelens-sparse bench figures [FILE.jsonl ...]

Of everything the latest measurement counts, and ratios are taken between arms of one run only.
Each device has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.figures_overview import draw_breakdown, draw_overview
from benchmarks.figures_roofline import draw_roofline
from benchmarks.figures_sweep import draw_sweep
from benchmarks.report import rows_of_files
from benchmarks.selection import devices_of
from saelens_sparse.reports.command_line import Parser
from saelens_sparse.reports.presentation import can_draw
from saelens_sparse.reports.results import FIGURES, RESULTS, Row, slug


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """
    Draw what there are rows for, into a folder of each device.

    Args:
        rows: Of any devices and benchmarks.
        folder: In which the devices' folders are made.

    Returns:
        The files written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    return [
        path
        for device in devices_of(rows)
        for path in _draw_device(
            [row for row in rows if row["device"] == device], folder / slug(device)
        )
    ]


def folder_for(results: Path) -> Path:
    """Where figures of a file of rows go: the project's for the project's own, else beside it."""
    in_results = results.resolve().parent == RESULTS.resolve()
    return FIGURES if in_results else results.parent / "figures"


def _draw_device(rows: Sequence[Row], folder: Path) -> Iterable[Path]:
    drawings: list[Callable[[Sequence[Row], Path], Path | None]] = [
        draw_overview,
        draw_breakdown,
        draw_roofline,
    ]
    found = [draw(rows, folder) for draw in drawings]
    sweeps = dict.fromkeys(row["sweep"] for row in rows if row.get("sweep"))
    found += [draw_sweep(rows, sweep, folder) for sweep in sweeps]
    return [path for path in found if path is not None]


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench figures", __doc__)
    parser.add_argument("files", nargs="*", type=Path, help=f"by default all in {RESULTS}")
    parser.add_argument(
        "--to", type=Path, help="folder to draw into; by default the project's or one beside FILE"
    )
    args = parser.parse_args(argv)
    rows = rows_of_files(args.files)
    if not can_draw():
        return 1
    folder = args.to or (folder_for(args.files[0]) if args.files else FIGURES)
    for path in draw(rows, folder):
        print(f"drawn: {path}")
    return 0
