"""
Rows of measurements: one JSON object a line, appended as soon as it exists.

Tables and figures read them as a pandas frame with one row for each, and `None` where a row lacks
a key. The key of a contender's name is "arm".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.results import SOURCE, Row, same_source

CHECKOUT = Path(__file__).parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results"
FIGURES = CHECKOUT / "docs" / "figures"

MEASURED = ["case", "precision", "operation"]
"""What is measured, whoever does it."""
SPARSE = ["sparse", "sparse_runner"]
"""The contenders that others are compared with."""

Frame = Any
"""A `pandas.DataFrame`, which without stubs has a union of types for every column."""


class DisagreementError(Exception):
    """A contender does not train the same model as stock."""

    status = "disagrees"


class ResultsFile:
    """
    Appends rows to a file and keeps this run's.

    Args:
        path: JSON Lines file, made where there is none; None for the device's in `RESULTS`.
        environment: Of `reports.results.environment`, recorded with every row.

    Raises:
        UsageError: Rows cannot be appended to the file, or it has other content than rows.
    """

    def __init__(self, path: Path | None, environment: Row):
        self.environment = environment
        self.path = path or RESULTS / f"{slug(self.environment['device'])}.jsonl"
        self.rows: list[Row] = []
        self._good = [
            row
            for row in _rows_or_error(self.path)
            if same_source(row, environment) and row.get("status") == "ok"
        ]

    def append(self, row: Row) -> None:
        row = {**row, **self.environment}
        self.rows.append(row)
        if row.get("status") == "ok":
            self._good.append(row)
        with self.path.open("a+b") as file:
            # A run that was killed while it wrote has left half a line.
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def measured(self, **key: Any) -> Row | None:
        """The last good row with these values from the same device, commit and versions."""
        found = (r for r in reversed(self._good) if all(r.get(name) == key[name] for name in key))
        return next(found, None)


def load_rows(paths: Iterable[Path]) -> list[Row]:
    """
    The rows of the files, but for those of `pair`, which compare checkouts. Older ones do not name
    the only architecture that there was. Half a line, left by a run that was killed while it wrote,
    is passed over.

    Raises:
        UsageError: A file cannot be read.
    """
    try:
        lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the rows: {error}") from error
    rows = [{"architecture": "topk", **row} for line in lines if (row := _parse(line)) is not None]
    return [row for row in rows if "other_checkout" not in row]


def slug(text: str) -> str:
    """The text in lower case, with one underscore for everything that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def frame_of(rows: Sequence[Row]) -> Frame:
    """Rows as a frame, by date; what a row lacks is None."""
    frame: Frame = pd.DataFrame([{**dict.fromkeys(_KEYS), **row} for row in rows], dtype=object)
    return frame.sort_values("date", kind="stable") if rows else frame


def of_contenders(frame: Frame) -> Frame:
    """The rows of contenders; those of single kernels have none."""
    return frame[frame["arm"].notna()]


def latest(frame: Frame) -> Frame:
    """The last row of each contender in each case, precision and operation."""
    return frame.drop_duplicates([*MEASURED, "arm"], keep="last")


def ratios(frame: Frame) -> Frame:
    """
    Each other contender's row beside each sparse contender's of the same run, in columns that end
    in `_other`; of several such runs the latest.

    Of one run are rows from one machine, commit and set of versions, though it was interrupted in
    between. Rows that do not name their machine are of one run if they began together.

    Returns:
        With the columns `faster`, how many times faster the sparse contender is, and `memory`, its
        share of the other's peak memory; NaN where that is not known.
    """
    frame = of_contenders(frame)
    frame = frame.assign(run=frame["machine"].where(frame["machine"].notna(), frame["date"]))
    key = [*MEASURED, *SOURCE, "run"]
    frame = frame.drop_duplicates([*key, "arm"], keep="last")
    is_sparse = frame["arm"].isin(SPARSE)
    both = frame[~is_sparse].merge(frame[is_sparse], on=key, suffixes=("_other", ""))
    both = both.sort_values("date", kind="stable")
    both = both.drop_duplicates([*MEASURED, "arm_other", "arm"], keep="last")
    timed = (both["status"] == "ok") & (both["status_other"] == "ok")
    numbers = both[["ms", "ms_other", "peak_gib", "peak_gib_other"]].astype(float)
    return both.assign(
        faster=(numbers["ms_other"] / numbers["ms"]).where(timed),
        memory=numbers["peak_gib"] / numbers["peak_gib_other"],
    )


_KEYS = (
    *MEASURED, "arm", "sweep", "status", "message", "architecture", "d_in", "d_sae", "k", "l0",
    "batch", "ms", "peak_gib", "checked", "differences", "firing", "phases_ms", "peer", "kernel",
    "side", "part_of", "shape", "dtype", "bytes", "flops", "copy_tb_s", "product_tflops",
    "screen_tflops", "contender", "context", "buffer_prompts", "ms_min", "ms_max", "busy_ms",
    "ms_without_evals", "peak_gib_without_evals", "library", "model_ms", "store_ms", "step_ms",
    "gb_s", "floor_ms", "idle", "first_step_s", "first_model_call_s", *SOURCE, "machine", "date",
)  # fmt: skip


def _rows_or_error(path: Path) -> list[Row]:
    """The rows of the file that more are to be appended to."""
    if path.is_dir():
        raise UsageError(f"--out must name a JSON Lines file; {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        rows = load_rows([path])
    except (OSError, UsageError) as error:
        raise UsageError(f"--out: {path} cannot be used: {error}") from error
    if path.stat().st_size and not any("device" in row for row in rows):
        raise UsageError(f"--out: {path} holds something else than rows; name another file")
    return rows


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None
