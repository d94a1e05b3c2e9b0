"""The results of a profile as tables of text. Older results, which hold counters, are read too."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd

from saelens_sparse.profile.contender import Record
from saelens_sparse.profile.measure import GIB
from saelens_sparse.profile.trace import Frame
from saelens_sparse.reports.presentation import Rows, label_of, milliseconds

UNKNOWN = "-"


def measured(results: Record) -> dict[str, Record]:
    """The records of the contenders that could be measured, by name."""
    return {name: record for name, record in results["arms"].items() if record["status"] == "ok"}


def tables_of(results: Record, kernels: int) -> dict[str, Rows]:
    """All tables by heading, those without rows too; at most so many kernels in each."""
    arms = measured(results)

    def by_arm(title: str, cells: Callable[[Record], dict[str, str]]) -> Rows:
        columns = {label_of(name): cells(record) for name, record in arms.items()}
        return _rows(title, pd.DataFrame(columns))

    return {
        "": by_arm("", lambda record: _summary(results, record)),
        "Where a step goes": by_arm("phase, ms", _phases),
        "What holds the memory": by_arm("at the peak, GiB", _memory),
        "Where the host waits": by_arm("ms", _waits),
        "Ceilings": _ceilings(results["ceilings"], results["settings"]),
        **{
            f"Kernels: {label_of(name)}": kernel_table(results, record, kernels)
            for name, record in arms.items()
        },
    }


def _summary(results: Record, r: Record) -> dict[str, str]:
    """How long a contender's step takes, why, and what it holds."""
    on_gpu, stock = results["settings"]["device"] == "cuda", measured(results).get("stock")
    floor_ms, copy_bytes = results["floor_ms"]["total"], results["ceilings"]["copy_bytes"]
    hardware, memory = r["hardware"], r["memory"]
    waiting_ms = sum(call["ms"] for call in r["waiting_calls"].values())
    return {
        "step, ms": milliseconds(r["ms"]),
        "  fastest and slowest": f"{milliseconds(r['ms_min'])} to {milliseconds(r['ms_max'])}",
        "  faster than stock": f"{stock['ms'] / r['ms']:.2f}x" if stock else UNKNOWN,
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
        "peak memory, GiB": _gibibytes(memory["peak_bytes"] or memory["traced_peak_bytes"]),
        "mean L0": f"{r['l0']:.1f}",
        "implementation": r["implementation"],
    }


def _phases(record: Record) -> dict[str, str]:
    """Milliseconds by phase, of the backward pass also by the phase whose gradients it computes."""
    cells: dict[str, float] = {}
    for phase, ms in record["phases_ms"].items():
        parts = record["backward_ms"] if phase == "backward" else {}
        cells |= {phase: ms, **{f"  of {part}": part_ms for part, part_ms in parts.items()}}
    cells |= {"idle": record["idle_ms"], "whole step": record["divided_ms"]}
    return {name: milliseconds(ms) for name, ms in cells.items() if ms}


def _memory(record: Record) -> dict[str, str]:
    """GiB by what holds them when a step holds most."""
    memory = record["memory"]
    cells = {holder: _gibibytes(bytes_) for holder, bytes_ in memory["parts_bytes"].items()}
    total = _gibibytes(memory["traced_peak_bytes"])
    return {"all": total, "  reached in": memory["peak_phase"], **cells}


def _waits(record: Record) -> dict[str, str]:
    """Milliseconds in each of CUDA's calls that wait."""
    calls = record["waiting_calls"].items()
    return {call: f"{milliseconds(c['ms'])} in {c['count']:.1f} calls" for call, c in calls}


def _ceilings(ceilings: Record, sizes: Record) -> Rows:
    """What the device can do at most."""
    rows = [["ceiling", "measured", "encoder's product at it, ms"]]
    rows.append(["copy within memory", quantity(ceilings["copy_bytes"], "B/s"), ""])
    for dtype, flops in ceilings["gemm_flops"].items():
        product = milliseconds(2e3 * sizes["batch"] * sizes["d_in"] * sizes["d_sae"] / flops)
        rows.append([f"{dtype} GEMM", quantity(flops, "FLOP/s"), product])
    return rows


def kernel_table(results: Record, record: Record, limit: int) -> Rows:
    """The kernels of a contender that take longest, on a CPU operations, and all others as one."""
    copy_bytes = results["ceilings"]["copy_bytes"]
    gemm_flops = max(results["ceilings"]["gemm_flops"].values())

    def cells(row: Record) -> dict[str, str]:
        def rate(what: str) -> float | None:
            return None if row.get(what) is None else 1e3 * row[what] / row["ms"]

        is_product = row["name"].split(":")[0] in ("mm", "addmm", "bmm")
        return {
            "phase": row["phases"][0] + (" ..." if len(row["phases"]) > 1 else ""),
            "x": f"{row['launches']:.0f}",
            "ms": milliseconds(row["ms"]),
            "bytes asked": quantity(row["bytes"], "B"),
            "per second": quantity(rate("bytes"), "B/s"),
            "of copy": share(rate("bytes"), copy_bytes),
            "of GEMM": share(rate("flops") if is_product else None, gemm_flops),
            "tensor cores": "yes" if row["tensor_cores"] else UNKNOWN,
            "tensor pipe": share(row.get("tensor_pipe_share"), 100),
            "occupancy": share(row.get("occupancy") or row["estimated_occupancy"], 100),
            "DRAM of copy": share(rate("dram_bytes"), copy_bytes),
        }

    kernels, left = record["kernels"][:limit], record["kernels"][limit:]
    frame: Frame = pd.DataFrame(map(cells, kernels), index=[row["name"][:40] for row in kernels])
    if left:
        launches, ms = (sum(row[name] for row in left) for name in ("launches", "ms"))
        rest = {"x": f"{launches:.0f}", "ms": milliseconds(ms)}
        frame = pd.concat([frame, pd.DataFrame(rest, index=[f"{len(left)} more"])])
    return _rows("kernel" if results["settings"]["device"] == "cuda" else "operation", frame)


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
    return f"{scaled:.{'0f' if scaled >= 100 else '3g'}} {prefix}{unit}"


def _gibibytes(bytes_: float | None) -> str:
    return UNKNOWN if bytes_ is None else f"{bytes_ / GIB:.{2 if bytes_ > GIB / 10 else 4}f}"


def _rows(title: str, frame: Frame) -> Rows:
    """The table with its index as labels, without rows and columns that hold nothing."""
    frame = frame.fillna(UNKNOWN)
    known = frame != UNKNOWN
    frame = frame.loc[known.any(axis=1), known.any()]
    return [[title, *frame], *([name, *cells] for name, *cells in frame.itertuples())]
