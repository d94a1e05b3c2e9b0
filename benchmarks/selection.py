"""Which of all rows count: the latest, and for ratios only rows of one run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from saelens_sparse.profile.cases import SPARSE, SPARSE_RUNNER
from saelens_sparse.reports.results import SOURCE, Row

SPARSE_ARMS = (SPARSE.name, SPARSE_RUNNER.name)

Key = tuple[str, ...]


def contest_key(row: Row) -> Key:
    """What is measured, whoever does it."""
    return tuple(row[name] for name in ("case", "precision", "operation"))


def of_contests(rows: Iterable[Row]) -> list[Row]:
    """The rows of arms against each other; those of single kernels have no arms."""
    return [row for row in rows if "arm" in row]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each arm in each contest, in the order in which they were measured."""
    last: dict[Key, Row] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        key = (*contest_key(row), row["arm"])
        last.pop(key, None)
        last[key] = row
    return list(last.values())


def pairs(rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """
    Each other arm's row with each sparse arm's of the same run: the latest run that has both.

    Of one run are rows from one machine, commit and set of versions, though it was interrupted in
    between. Rows that do not name their machine are of one run if they began together.
    """
    by_arms: dict[tuple[Key, str], dict[Key, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["date"]):
        by_arms[contest_key(row), row["arm"]][_run_of(row)] = row
    found: list[tuple[Row, Row]] = []
    for (key, other), others in by_arms.items():
        if other in SPARSE_ARMS:
            continue
        for arm in SPARSE_ARMS:
            ours = by_arms.get((key, arm), {})
            common = [run for run in ours if run in others]
            if common:
                run = max(common, key=lambda run: ours[run]["date"])
                found.append((others[run], ours[run]))
    return found


def devices_of(rows: Sequence[Row]) -> list[str]:
    """The devices that rows are from, in the order in which they appear."""
    return list(dict.fromkeys(row["device"] for row in rows))


def speedup(other: Row, sparse: Row) -> float | None:
    """How many times faster the sparse arm is; None where one of them was not timed."""
    if other["status"] != "ok" or sparse["status"] != "ok":
        return None
    return other["ms"] / sparse["ms"]


def memory_share(other: Row, sparse: Row) -> float | None:
    """The sparse arm's peak memory over the other's; None where that is not known."""
    if not (other.get("peak_gib") and sparse.get("peak_gib")):
        return None
    return sparse["peak_gib"] / other["peak_gib"]


def _run_of(row: Row) -> Key:
    source = tuple(str(row.get(name)) for name in SOURCE)
    return (*source, row.get("machine") or row["date"])
