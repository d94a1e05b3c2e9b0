"""The results of a profile as tables of text. Older results, which hold counters, are read too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from saelens_sparse.profile.contender import Record
from saelens_sparse.profile.measure import GIB
from saelens_sparse.profile.trace import Frame
from saelens_sparse.reports.presentation import Rows, label_of, milliseconds

UNKNOWN = "-"


def measured(results: Record) -> dict[str, Record]:
    """The records of the contenders that could be measured, by name."""
    return {name: record for name, record in results["arms"].items() if record["status"] == "ok"}


def summary_table(results: Record) -> Rows:
    """One column for each contender: how long its step takes, why, and what it holds."""
    arms, on_gpu = measured(results), results["settings"]["device"] == "cuda"
    stock_ms = arms["stock"]["ms"] if "stock" in arms else None
    floor_ms, copy_bytes = results["floor_ms"]["total"], results["ceilings"]["copy_bytes"]

    def cells(r: Record) -> dict[str, str]:
        hardware, memory = r["hardware"], r["memory"]
        waiting_ms = sum(call["ms"] for call in (r["waiting_calls"] or {}).values())
        return {
            "step, ms": milliseconds(r["ms"]),
            "  fastest and slowest": f"{milliseconds(r['ms_min'])} to {milliseconds(r['ms_max'])}",
            "  faster than stock": f"{stock_ms / r['ms']:.2f}x" if stock_ms else UNKNOWN,
            "tokens per second": f"{r['tokens_per_second']:,.0f}",
            "floor, ms": milliseconds(floor_ms),
            "  step over floor": f"{r['ms'] / floor_ms:.2f}x",
            "under the profiler, ms": UNKNOWN if on_gpu else milliseconds(r["divided_ms"]),
            "busy, ms": milliseconds(r["busy_ms"]),
            "idle": share(r["idle_ms"], r["divided_ms"]),
            "launches" if on_gpu else "operations": f"{r['launches']:.0f}",
            "waits of the host, ms": milliseconds(waiting_ms) if on_gpu else UNKNOWN,
            "time on tensor cores": share(r["tensor_core_ms"] if on_gpu else None, r["busy_ms"]),
            "SM occupancy, estimated": share(hardware["estimated_occupancy"], 100),
            "SM occupancy, counted": share(hardware.get("occupancy"), 100),
            "DRAM traffic": quantity(hardware.get("dram_bytes"), "B"),
            "  of a copy's rate": share(hardware.get("dram_bytes_per_second"), copy_bytes),
            "peak memory, GiB": gibibytes(memory["peak_bytes"] or memory["traced_peak_bytes"]),
            "mean L0": f"{r['l0']:.1f}",
            "implementation": r["implementation"],
        }

    frame: Frame = pd.DataFrame({label_of(name): cells(record) for name, record in arms.items()})
    return [["", *frame], *_rows(frame[(frame != UNKNOWN).any(axis=1)])]


def phase_table(results: Record) -> Rows:
    """Milliseconds by phase, of the backward pass also by the phase whose gradients it computes."""

    def times(record: Record) -> dict[str, float]:
        found: dict[str, float] = {}
        for phase, ms in record["phases_ms"].items():
            parts = record["backward_ms"] if phase == "backward" else {}
            found |= {phase: ms, **{f"  of {part}": part_ms for part, part_ms in parts.items()}}
        return {**found, "idle": record["idle_ms"], "whole step": record["divided_ms"]}

    return _numbers("phase, ms", results, times, milliseconds)


def memory_table(results: Record) -> Rows:
    """GiB by what holds them when a step holds most."""
    memory = [record["memory"] for record in measured(results).values()]
    rows = _numbers("at the peak, GiB", results, lambda r: r["memory"]["parts_bytes"], gibibytes)
    rows.append(["all", *(gibibytes(held["traced_peak_bytes"]) for held in memory)])
    return [*rows, ["reached in", *(str(held["peak_phase"]) for held in memory)]]


def kernel_table(results: Record, record: Record, limit: int) -> Rows:
    """The kernels of a contender that take longest, on a CPU operations, and all others as one."""
    ceilings, on_gpu = results["ceilings"], results["settings"]["device"] == "cuda"
    copy_bytes, gemm_flops = ceilings["copy_bytes"], max(ceilings["gemm_flops"].values())

    def cells(row: Record) -> dict[str, str]:
        def rate(what: str) -> float | None:
            return None if row.get(what) is None else 1e3 * row[what] / row["ms"]

        is_product = row["name"].split(":")[0] in ("mm", "addmm", "bmm")
        flops = rate("flops") if is_product else None
        return {
            "kernel" if on_gpu else "operation": row["name"][:40],
            "phase": row["phases"][0] + (" ..." if len(row["phases"]) > 1 else ""),
            "x": f"{row['launches']:.0f}",
            "ms": milliseconds(row["ms"]),
            "bytes asked": quantity(row["bytes"], "B"),
            "per second": quantity(rate("bytes"), "B/s"),
            "of copy": share(rate("bytes"), copy_bytes),
            "of GEMM": share(flops, gemm_flops),
            "tensor cores": "yes" if row["tensor_cores"] else UNKNOWN,
            "tensor pipe": share(row.get("tensor_pipe_share"), 100),
            "occupancy": share(row.get("occupancy") or row["estimated_occupancy"], 100),
            "DRAM of copy": share(rate("dram_bytes"), copy_bytes),
        }

    frame: Frame = pd.DataFrame([cells(row) for row in record["kernels"]])
    frame = frame.loc[:, (frame != UNKNOWN).any()]
    rows = [[*frame], *frame.head(limit).to_numpy().tolist()]
    if left := record["kernels"][limit:]:
        launches, ms = (sum(row[name] for row in left) for name in ("launches", "ms"))
        rest = [f"{len(left)} more", "", f"{launches:.0f}", milliseconds(ms)]
        rows.append(rest + [""] * (len(frame.columns) - len(rest)))
    return rows


def ceilings_table(results: Record) -> Rows:
    """What the device can do at most."""
    ceilings = results["ceilings"]
    rows = [["ceiling", "measured", "encoder's product, ms"]]
    rows.append(["copy within memory", quantity(ceilings["copy_bytes"], "B/s"), ""])
    for dtype, flops in ceilings["gemm_flops"].items():
        product = milliseconds(ceilings["encoder_ms"][dtype])
        rows.append([f"{dtype} GEMM", quantity(flops, "FLOP/s"), product])
    return rows


def waits_table(results: Record) -> Rows:
    """In which of CUDA's calls the host waits."""
    rows = [["", "where", "times", "ms"]]
    for name, record in measured(results).items():
        for call, cost in (record["waiting_calls"] or {}).items():
            rows.append([label_of(name), call, f"{cost['count']:.1f}", milliseconds(cost["ms"])])
    return rows


def gibibytes(bytes_: float | None) -> str:
    """GiB with two decimals, more for small sizes."""
    if bytes_ is None:
        return UNKNOWN
    return f"{bytes_ / GIB:.2f}" if bytes_ >= GIB / 10 else f"{bytes_ / GIB:.4f}"


def share(part: float | None, whole: float) -> str:
    """`part` as percent of `whole`."""
    return UNKNOWN if part is None or not whole else f"{part / whole:.0%}"


def quantity(value: float | None, unit: str) -> str:
    """Three digits with the prefix that suits them, such as 4.31 TB/s."""
    if value is None:
        return UNKNOWN
    prefixes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
    prefix = next((name for name, factor in prefixes.items() if value >= 0.9995 * factor), "")
    scaled = value / prefixes[prefix]
    digits = f"{scaled:.0f}" if scaled >= 100 else f"{scaled:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()


def _numbers(
    title: str,
    results: Record,
    column: Callable[[Record], dict[str, float]],
    text: Callable[[float], str],
) -> list[list[Any]]:
    """A column of numbers for each contender, without rows of nothing."""
    columns = {label_of(name): column(record) for name, record in measured(results).items()}
    frame: Frame = pd.DataFrame(columns).fillna(0.0)
    frame = frame[frame.max(axis=1) > frame.max(axis=None) / 1e4]
    return [[title, *frame], *_rows(frame.map(lambda value: text(value) if value else UNKNOWN))]


def _rows(frame: Frame) -> list[list[Any]]:
    return [[name, *cells] for name, *cells in frame.itertuples()]
