"""
Markdown tables from the rows that the benchmarks have appended.

    python -m saelens_sparse.evaluation.bench.report [FILE.jsonl ...]

Ratios are taken between arms of one run only; of several runs the latest counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from saelens_sparse.evaluation.bench.agreement import Differences, kind_of
from saelens_sparse.evaluation.cases import SPARSE, SPARSE_RUNNER, STOCK, TARGETS, Target
from saelens_sparse.evaluation.measure import PHASES
from saelens_sparse.evaluation.results import RESULTS, Row, load_rows

SPARSE_ARMS = (SPARSE.name, SPARSE_RUNNER.name)


def tables(rows: Sequence[Row]) -> str:
    """For each device what the arms trained, the phases of a step and, last, what is gained."""
    devices = dict.fromkeys(row["device"] for row in rows)
    sections: list[str] = []
    for device in devices:
        of_device = [row for row in rows if row["device"] == device]
        sections += [f"### {device}", agreement_table(of_device)]
        sections += [phase_table(of_device), speed_table(of_device)]
    return "\n\n".join(section for section in sections if section)


def speed_table(rows: Sequence[Row]) -> str:
    """Time and peak memory of each sparse arm beside each stock arm's in the same run."""
    return _table(
        "case",
        "d_in -> d_sae, active, batch",
        "precision",
        "operation",
        "against",
        "ms",
        "arm",
        "its ms",
        "faster (target)",
        "GiB",
        "its GiB",
        "memory (target)",
        lines=[
            [
                sparse["case"],
                f"{sparse['d_in']} -> {sparse['d_sae']:,}, {_active(sparse)}, {sparse['batch']}",
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
            for other, sparse in _pairs(rows)
        ],
    )


def agreement_table(rows: Sequence[Row]) -> str:
    """Each arm's relative differences from the reference, and how its latents fired."""
    kinds = ("loss", "reconstruction", "firing counts", "gradient", "change")
    latest = _latest(row for row in rows if row["operation"] == "step" and row.get("differences"))
    return _table(
        "case",
        "precision",
        "arm",
        *(f"{kind} off by" for kind in kinds),
        "L0",
        "busiest latent",
        "never firing",
        lines=[
            [row["case"], row["precision"], row["arm"]]
            + [f"{_largest(row['differences'], kind):.1e}" for kind in kinds]
            + _firing(row)
            for row in latest
        ],
    )


def phase_table(rows: Sequence[Row]) -> str:
    """Milliseconds by phase of each arm's training steps."""
    latest = _latest(row for row in rows if row["status"] == "ok" and "phases_ms" in row)
    return _table(
        "case",
        "precision",
        "arm",
        *(f"{phase} ms" for phase in PHASES),
        lines=[
            [row["case"], row["precision"], row["arm"]]
            + [f"{row['phases_ms'][phase]:.2f}" for phase in PHASES]
            for row in latest
        ],
    )


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each stock arm's latest row with each sparse arm's of the same run."""

    def run_of(row: Row) -> tuple[str, ...]:
        return (*_contest_key(row), row["date"])

    sparse = [row for row in rows if row["arm"] in SPARSE_ARMS]
    runs = {run_of(row) for row in sparse}
    others = _latest(row for row in rows if row["arm"] not in SPARSE_ARMS and run_of(row) in runs)
    return [(other, row) for other in others for row in sparse if run_of(row) == run_of(other)]


def _latest(rows: Iterable[Row]) -> list[Row]:
    latest: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        key = (*_contest_key(row), row["arm"])
        latest.pop(key, None)
        latest[key] = row
    return list(latest.values())


def _contest_key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("case", "precision", "operation"))


def _active(row: Row) -> str:
    return f"k {row['k']}" if row["architecture"] == "topk" else f"L0 {row['l0']:g}"


def _result(row: Row) -> str:
    return f"{row['ms']:.2f}" if row["status"] == "ok" else row["status"]


def _speedup(other: Row, sparse: Row) -> str:
    target = _target(other)
    aim = f" ({target.speedup:g}x)" if target else ""
    if other["status"] != "ok" or sparse["status"] != "ok":
        return f"-{aim}"
    unchecked = "" if sparse["checked"] else ", unchecked"
    return f"{other['ms'] / sparse['ms']:.2f}x{aim}{unchecked}"


def _largest(differences: Differences, kind: str) -> float:
    return max(value for name, value in differences.items() if kind_of(name) == kind)


def _firing(row: Row) -> list[str]:
    if "firing" not in row:
        return ["-"] * 3
    firing = row["firing"]
    return [f"{firing['l0']:.1f}", f"{firing['max_fraction']:.0%}", f"{firing['never']:.0%}"]


def _gib(row: Row) -> str:
    return f"{row['peak_gib']:.2f}" if row.get("peak_gib") else "-"


def _memory(other: Row, sparse: Row) -> str:
    target = _target(other)
    aim = f" ({target.memory:.0%})" if target and target.memory else ""
    if not (other.get("peak_gib") and sparse.get("peak_gib")):
        return f"-{aim}"
    return f"{sparse['peak_gib'] / other['peak_gib']:.0%}{aim}"


def _target(other: Row) -> Target | None:
    """What is aimed at against this arm; targets are against plain stock."""
    if other["arm"] != STOCK.name:
        return None
    return TARGETS.get((other["case"], other["precision"], other["operation"]))


def _table(*header: str, lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded to be read as it is; empty without lines."""
    if not lines:
        return ""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    ruled = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in ruled)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="by default all in benchmarks/results")
    files = parser.parse_args(argv).files or sorted(RESULTS.glob("*.jsonl"))
    # Rows of saelens_sparse.evaluation.bench.kernels have no arms.
    print(tables([row for row in load_rows(files) if "arm" in row]))


if __name__ == "__main__":
    main()
