"""Tables from the rows that the benchmarks have appended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from benchmarks.agreement import kind_of
from benchmarks.rows import Frame, latest, of_contenders, ratios
from saelens_sparse.reports.results import SOURCE

WHO: dict[str, Callable[[Any], str]] = {
    "case": lambda row: row["case"],
    "precision": lambda row: row["precision"],
    "contender": lambda row: row["arm"],
}
KINDS = ("loss", "reconstruction", "firing counts", "gradient", "change")
Render = Callable[[Frame], str]


def tables(frame: Frame, render: Render | None = None) -> str:
    """
    For each device what the contenders trained, the phases of a step, single kernels, stores, whole
    runs and, last, what is gained by step; each table only where there are rows for it.

    Args:
        frame: Of `rows.frame_of`.
        render: Writes a table; by default `plain`.
    """
    sections: list[str] = []
    for device, rows in frame.groupby("device", sort=False):
        sections.append(f"### {device}")
        measured = of_contenders(rows)
        found = (
            agreement_table(measured),
            phase_table(measured),
            kernel_table(rows[rows["kernel"].notna()]),
            store_table(rows[rows["operation"] == "store"]),
            cache_table(rows[rows["operation"] == "cache"]),
            run_table(rows[rows["operation"] == "run"]),
            speed_table(measured),
        )
        sections += [(render or plain)(table) for table in found if len(table)]
    return "\n\n".join(sections)


def plain(table: Frame) -> str:
    """The table for a terminal: the first column to the left, everything else to the right."""
    first = table.columns[0]
    width = max(len(first), *table[first].str.len())
    table = table.rename(columns={first: first.ljust(width)})
    text = table.assign(**{first.ljust(width): table.iloc[:, 0].str.ljust(width)})
    return text.to_string(index=False)


def markdown(table: Frame) -> str:
    """The table in Markdown."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [list(table.columns), rule, *table.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def speed_table(rows: Frame) -> Frame:
    """Time and peak memory of each sparse contender beside each other one's in the same run."""
    return _table(
        ratios(rows),
        {
            "case": lambda row: row["case"],
            "d_in -> d_sae, active, batch": lambda row: (
                f"{row['d_in']} -> {row['d_sae']:,}, {active(row)}, {row['batch']}"
            ),
            "precision": lambda row: row["precision"],
            "operation": lambda row: row["operation"],
            "against": lambda row: row["arm_other"],
            "its ms": lambda row: _result(row, "_other"),
            "contender": lambda row: row["arm"],
            "ms": _result,
            "faster": _faster,
            "its GiB": lambda row: _number(row["peak_gib_other"]),
            "GiB": lambda row: _number(row["peak_gib"]),
            "memory": lambda row: "-" if pd.isna(row["memory"]) else f"{row['memory']:.0%}",
        },
    )


def agreement_table(rows: Frame) -> Frame:
    """Each contender's relative differences from the reference, and how its latents fired."""
    compared = rows[(rows["operation"] == "step") & rows["differences"].notna()]
    columns = dict(WHO)
    for kind in KINDS:
        columns[f"{kind} off by"] = lambda row, kind=kind: _largest(row["differences"], kind)
    for title, key, digits in (("L0", "l0", ".1f"), ("busiest latent", "max_fraction", ".0%"),
                               ("never firing", "never", ".0%")):  # fmt: skip
        columns[title] = lambda row, key=key, digits=digits: (
            "-" if row["firing"] is None else format(row["firing"][key], digits)
        )
    return _table(latest(compared), columns)


def phase_table(rows: Frame) -> Frame:
    """Milliseconds by phase of each contender's training steps."""
    timed = latest(rows[(rows["status"] == "ok") & rows["phases_ms"].notna()])
    columns = dict(WHO)
    for phase in dict.fromkeys(phase for phases in timed["phases_ms"] for phase in phases):
        columns[f"{phase} ms"] = lambda row, phase=phase: _number(row["phases_ms"].get(phase))
    return _table(timed, {**columns, "whole step ms": lambda row: f"{row['ms']:.2f}"})


def kernel_table(rows: Frame) -> Frame:
    """Milliseconds of single kernels, and the rates that they reach."""
    return _table(
        rows.drop_duplicates(["shape", "dtype", "kernel", "side"], keep="last"),
        {
            "kernel": lambda row: "- " * bool(row["part_of"]) + row["kernel"],
            "of": lambda row: row["side"],
            "d_in, d_sae, k, rows": lambda row: row["shape"],
            "dtype": lambda row: row["dtype"],
            "ms": lambda row: f"{row['ms']:.3f}",
            "moving its bytes once takes ms": lambda row: _rate(
                row["bytes"], row["copy_tb_s"] * 1e9, 3
            ),
            "GB/s": lambda row: _rate(row["bytes"], row["ms"] * 1e6, 0),
            "TFLOP/s": lambda row: _rate(row["flops"], row["ms"] * 1e9, 3),
        },
    )


def store_table(rows: Frame) -> Frame:
    """Time and memory of each activation store alone, by 4,096 tokens."""
    return _table(
        _beside_stock(rows),
        {
            "case": lambda row: row["case"],
            "buffer": lambda row: f"{row['buffer_prompts'] * row['context']:,} x {row['d_in']}",
            "context": lambda row: str(row["context"]),
            **_OF_BATCHES,
        },
    )


def cache_table(rows: Frame) -> Frame:
    """What each part of writing, reading and training from a cache takes, by 4,096 tokens."""
    return _table(
        rows.drop_duplicates(["case", "contender"], keep="last"),
        {
            "case": lambda row: row["case"],
            "d_in": lambda row: str(row["d_in"]),
            "dtype": lambda row: row["dtype"],
            "what": lambda row: row["contender"],
            "ms": _result,
            "GB/s": lambda row: _number(row["gb_s"]),
        },
    )


def run_table(rows: Frame) -> Frame:
    """Time and memory of each way to run a training, by 4,096 tokens."""
    return _table(
        _beside_stock(rows),
        {
            "case": lambda row: row["case"],
            "d_in -> d_sae, active, context": lambda row: (
                f"{row['d_in']} -> {row['d_sae']:,}, {active(row)}, {row['context']}"
            ),
            "precision": lambda row: row["precision"],
            "model": lambda row: row["library"] or "TL",
            **_OF_BATCHES,
            "ms without evals": lambda row: _number(row["ms_without_evals"]),
            "GiB without evals": lambda row: _number(row["peak_gib_without_evals"]),
            "model alone": lambda row: _number(row["model_ms"], 3),
            "store alone": lambda row: _number(row["store_ms"], 3),
            "step alone": lambda row: _number(row["step_ms"], 3),
            "of the sum": lambda row: _share(row["ms_without_evals"], row["floor_ms"]),
            "idle": lambda row: _share(row["idle"], 1),
            "first step s": lambda row: _number(row["first_step_s"], 1),
            "first model call s": lambda row: _number(row["first_model_call_s"], 1),
        },
    )


def active(row: Mapping[str, Any]) -> str:
    """How many latents are active on a row of the inputs, and whether always or on average."""
    return f"k {row['k']}" if row["k"] is not None else f"L0 {row['l0']:g}"


def title_of(row: Mapping[str, Any]) -> str:
    """What people call the row's architecture."""
    name: str = row["architecture"]
    names = {
        "topk": "Top-K",
        "batchtopk": "BatchTopK",
        "matryoshka_batchtopk": "Matryoshka BatchTopK",
        "jumprelu": "JumpReLU",
    }
    return names.get(name, name)


def _table(rows: Frame, columns: Mapping[str, Callable[[Any], str]]) -> Frame:
    """A column of text for each title, made from each row."""
    records = rows.to_dict("records")
    return pd.DataFrame({title: [cell(row) for row in records] for title, cell in columns.items()})


def _beside_stock(rows: Frame) -> Frame:
    """The last row of each contender in each case and precision, with how many times stock's speed
    it has; that is NaN where stock was not timed in the same run.
    """
    case = ["operation", "case", "precision", "library"]
    rows = rows.drop_duplicates([*case, "contender"], keep="last")
    timed = rows[(rows["contender"] == "stock") & (rows["status"] == "ok")]
    of_run = [*case, *SOURCE, "machine", "date"]
    rows = rows.merge(timed[[*of_run, "ms"]], on=of_run, how="left", suffixes=("", "_stock"))
    return rows.assign(faster=rows["ms_stock"].astype(float) / rows["ms"].astype(float))


_OF_BATCHES: dict[str, Callable[[Any], str]] = {
    "contender": lambda row: row["contender"],
    "ms": lambda row: f"{row['ms']:.3f}" if row["status"] == "ok" else row["message"],
    "range": lambda row: (
        f"{row['ms_min']:.3f} to {row['ms_max']:.3f}" if row["status"] == "ok" else "-"
    ),
    "faster": lambda row: "-" if pd.isna(row["faster"]) else f"{row['faster']:.2f}x",
    "device busy ms": lambda row: _number(row["busy_ms"], 3),
    "GiB": lambda row: _number(row["peak_gib"]),
}
"""Columns of whatever makes or trains on batches; times are by 4,096 tokens."""


def _result(row: Mapping[str, Any], suffix: str = "") -> str:
    status = row[f"status{suffix}"]
    return f"{row[f'ms{suffix}']:.2f}" if status == "ok" else status


def _faster(row: Mapping[str, Any]) -> str:
    if pd.isna(row["faster"]):
        return "-"
    checked = row["checked"] and (row["peer_other"] is None or row["checked_other"])
    return f"{row['faster']:.2f}x{'' if checked else ', unchecked'}"


def _largest(differences: Mapping[str, float], kind: str) -> str:
    values = [value for name, value in differences.items() if kind_of(name) == kind]
    return f"{max(values):.1e}" if values else "-"


def _rate(amount: float | None, per: float, digits: int) -> str:
    return "-" if amount is None else _number(amount / per, digits)


def _share(value: float | None, whole: float | None) -> str:
    return "-" if value is None or whole is None else f"{value / whole:.0%}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.{digits}f}"
