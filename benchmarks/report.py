"""
Tables from the rows that the benchmarks have appended.

    saelens-sparse bench report [FILE.jsonl ...]

Ratios are taken between arms of one run only; of several runs the latest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.agreement import Differences, kind_of
from benchmarks.selection import (
    devices_of,
    latest,
    memory_share,
    of_contests,
    pairs,
    speedup,
)
from saelens_sparse.config.files import UsageError
from saelens_sparse.reports.command_line import Parser
from saelens_sparse.reports.presentation import Rows, markdown_table, plain_table
from saelens_sparse.reports.results import RESULTS, Row, load_rows

KINDS = ("loss", "reconstruction", "firing counts", "gradient", "change")


def tables(rows: Sequence[Row], render: Callable[[Rows], str] = plain_table) -> str:
    """
    For each device what the arms trained, the phases of a step, single kernels and, last, what is
    gained; each table only where there are rows for it.
    """
    sections: list[str] = []
    for device in devices_of(rows):
        of_device = [row for row in rows if row["device"] == device]
        contests = of_contests(of_device)
        sections.append(f"### {device}")
        found = (
            agreement_table(contests),
            phase_table(contests),
            kernel_table([row for row in of_device if "kernel" in row]),
            speed_table(contests),
        )
        sections += [render(table) for table in found if len(table) > 1]
    return "\n\n".join(sections)


def speed_table(rows: Sequence[Row]) -> Rows:
    """Time and peak memory of each sparse arm beside each other arm's in the same run."""
    header = [
        "case", "d_in -> d_sae, active, batch", "precision", "operation", "against", "its ms",
        "arm", "ms", "faster", "its GiB", "GiB", "memory",
    ]  # fmt: skip
    return [
        header,
        *(
            [
                sparse["case"],
                f"{sparse['d_in']} -> {sparse['d_sae']:,}, {active(sparse)}, {sparse['batch']}",
                sparse["precision"],
                sparse["operation"],
                other["arm"],
                _result(other),
                sparse["arm"],
                _result(sparse),
                _speedup(other, sparse),
                _gib(other),
                _gib(sparse),
                _memory(other, sparse),
            ]
            for other, sparse in pairs(rows)
        ),
    ]


def agreement_table(rows: Sequence[Row]) -> Rows:
    """Each arm's relative differences from the reference, and how its latents fired."""
    compared = latest(row for row in rows if row["operation"] == "step" and row.get("differences"))
    header = ["case", "precision", "arm", *(f"{kind} off by" for kind in KINDS)]
    return [
        [*header, "L0", "busiest latent", "never firing"],
        *(
            [row["case"], row["precision"], row["arm"]]
            + [_largest(row["differences"], kind) for kind in KINDS]
            + _firing(row)
            for row in compared
        ),
    ]


def phase_table(rows: Sequence[Row]) -> Rows:
    """Milliseconds by phase of each arm's training steps."""
    timed = latest(row for row in rows if row["status"] == "ok" and "phases_ms" in row)
    phases = list(dict.fromkeys(phase for row in timed for phase in row["phases_ms"]))
    return [
        ["case", "precision", "arm", *(f"{phase} ms" for phase in phases), "whole step ms"],
        *(
            [row["case"], row["precision"], row["arm"]]
            + [_number(row["phases_ms"].get(phase)) for phase in phases]
            + [f"{row['ms']:.2f}"]
            for row in timed
        ),
    ]


def kernel_table(rows: Sequence[Row]) -> Rows:
    """Milliseconds of single kernels, and the rates that they reach."""
    last = {(row["shape"], row["dtype"], row["kernel"], row["side"]): row for row in rows}
    header = [
        "kernel",
        "of",
        "d_in, d_sae, k, rows",
        "dtype",
        "ms",
        "moving its bytes once takes ms",
    ]
    return [
        [*header, "GB/s", "TFLOP/s"],
        *(
            [
                f"- {row['kernel']}" if row.get("part_of") else row["kernel"],
                row["side"],
                row["shape"],
                row["dtype"],
                f"{row['ms']:.3f}",
                _number(row["bytes"] and row["bytes"] / row["copy_tb_s"] / 1e9, 3),
                _number(row["bytes"] and row["bytes"] / row["ms"] / 1e6, 0),
                _number(row["flops"] and row["flops"] / row["ms"] / 1e9, 3),
            ]
            for row in last.values()
        ),
    ]


def active(row: Row) -> str:
    """How many latents are active on a row of the inputs, and whether always or on average."""
    return f"k {row['k']}" if row["architecture"] == "topk" else f"L0 {row['l0']:g}"


def _result(row: Row) -> str:
    return f"{row['ms']:.2f}" if row["status"] == "ok" else row["status"]


def _speedup(other: Row, sparse: Row) -> str:
    ratio = speedup(other, sparse)
    if ratio is None:
        return "-"
    checked = sparse["checked"] and (other.get("peer") is None or other["checked"])
    return f"{ratio:.2f}x{'' if checked else ', unchecked'}"


def _memory(other: Row, sparse: Row) -> str:
    share = memory_share(other, sparse)
    return "-" if share is None else f"{share:.0%}"


def _largest(differences: Differences, kind: str) -> str:
    values = [value for name, value in differences.items() if kind_of(name) == kind]
    return f"{max(values):.1e}" if values else "-"


def _firing(row: Row) -> list[str]:
    if "firing" not in row:
        return ["-"] * 3
    firing = row["firing"]
    return [f"{firing['l0']:.1f}", f"{firing['max_fraction']:.0%}", f"{firing['never']:.0%}"]


def _gib(row: Row) -> str:
    return f"{row['peak_gib']:.2f}" if row.get("peak_gib") else "-"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if not value and value != 0.0 else f"{value:.{digits}f}"


def rows_of_files(files: Sequence[Path]) -> list[Row]:
    """
    The rows of these files, or of all in the results folder.

    Raises:
        UsageError: A file cannot be read, or there is none.
    """
    files = files or sorted(RESULTS.glob("*.jsonl"))
    if not files:
        raise UsageError(f"there are no rows in {RESULTS}; saelens-sparse bench measures some")
    try:
        return load_rows(files)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the rows: {error}") from error


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench report", __doc__)
    parser.add_argument("files", nargs="*", type=Path, help=f"by default all in {RESULTS}")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    args = parser.parse_args(argv)
    rows = rows_of_files(args.files)
    print(tables(rows, markdown_table if args.markdown else plain_table))
    return 0
