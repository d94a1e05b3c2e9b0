"""The results of a profile as tables of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from saelens_sparse.profile.measure import GIB
from saelens_sparse.profile.phases import PARTS, PHASES
from saelens_sparse.reports.presentation import Rows, label_of, milliseconds

Record = dict[str, Any]

UNKNOWN = "-"
MANY_KERNELS = 14
"""Rows of a kernel table on a terminal; a page has `ALL_KERNELS`."""
ALL_KERNELS = 60
# Left out of a brief kernel table.
_FOLLOWING = ("per second", "FLOP/s", "DRAM bytes")


_ABOUT_PHASES = {
    "cuda": "Phases and kernels: PyTorch's profiler (CUPTI), mean of the traced steps. Idle is "
    "what they leave of the step.",
    "cpu": "Phases: operations under PyTorch's profiler, mean of the traced steps, without the "
    "Python between them. The profiler itself makes small operations slower.",
}
_ABOUT_BYTES = (
    "Bytes asked: inputs and outputs, from recorded shapes and stated formulas, counted as often "
    "as they are asked for (> where more depends on the data). Caches serve part of them, so that "
    "the rate can exceed a copy's."
)
_ESTIMATED = (
    "Occupancy is the profiler's estimate from launches, use of tensor cores follows from types "
    "and names, and DRAM traffic is not known."
)
_ABOUT_WAITS = (
    "Waits of the host: PyTorch's synchronising operations in a step (its sync debug mode); CUDA's "
    "calls that wait are those in the trace."
)
_NOT_ON_A_CPU = (
    "Not measurable on a CPU: SM occupancy, DRAM traffic, tensor cores, a device's idle time, "
    "waits for it. Memory is what PyTorch's allocator holds at the peak of a traced step, weights "
    "and moments included, not the process's resident set."
)


def measured(results: Record) -> dict[str, Record]:
    """The records of the arms that could be measured, by name."""
    return {name: arm for name, arm in results["arms"].items() if arm["status"] == "ok"}


def summary_table(results: Record) -> Rows:
    """One column for each arm: how long its step takes, why, and what it holds."""
    arms = results["arms"]
    on_device = results["settings"]["device"] == "cuda"
    rows = [["", *(label_of(name) for name in arms)]]

    def add(label: str, cell: Any) -> None:
        cells = [cell(arm) if arm["status"] == "ok" else UNKNOWN for arm in arms.values()]
        if any(text != UNKNOWN for text in cells):
            rows.append([label, *cells])

    if any(arm["status"] != "ok" for arm in arms.values()):
        rows.append(["status", *(arm["status"] for arm in arms.values())])
    add("step, ms", lambda arm: milliseconds(arm["ms"]))
    add("  fastest and slowest", lambda arm: _range(arm["ms_min"], arm["ms_max"]))
    stock = arms.get("stock", {})
    if stock.get("status") == "ok":
        add("  faster than stock", lambda arm: f"{stock['ms'] / arm['ms']:.2f}x")
    add("tokens per second", lambda arm: f"{arm['tokens_per_second']:,.0f}")
    add("floor, ms", lambda arm: milliseconds(arm["floor_ms"]["total"]))
    add("  step over floor", lambda arm: f"{arm['ms'] / arm['floor_ms']['total']:.2f}x")
    if on_device:
        add("device busy, ms", lambda arm: milliseconds(arm["busy_ms"]))
        add("device idle, waiting for the host", lambda arm: share(arm["idle_ms"], arm["ms"]))
        add("launches", lambda arm: f"{arm['launches']:.0f}")
        add("waits of the host", _waits)
        add("  in CUDA's calls, ms", _waiting_ms)
        add("time on tensor cores", lambda arm: share(arm["tensor_core_ms"], arm["busy_ms"]))
        add("SM occupancy", _occupancy)
        add("DRAM traffic", lambda arm: quantity(arm["hardware"].get("dram_bytes"), "B"))
        bandwidth = results["ceilings"]["copy_bytes"]
        add(
            "  of a copy's bandwidth, while busy",
            lambda arm: share(arm["hardware"].get("dram_bytes_per_second"), bandwidth),
        )
    else:
        add("under the profiler, ms", lambda arm: milliseconds(arm["divided_ms"]))
        add("  in operations", lambda arm: share(arm["busy_ms"], arm["divided_ms"]))
        add("operations", lambda arm: f"{arm['launches']:.0f}")
    add("peak memory, GiB", _peak)
    add("mean L0", lambda arm: f"{arm['l0']:.1f}")
    add("implementation", lambda arm: arm["implementation"])
    return rows


def phase_table(results: Record) -> Rows:
    """Milliseconds of each arm by phase, and of the backward phase by what the gradient is of."""
    arms = measured(results)
    rows = [["phase, ms", *(label_of(name) for name in arms)]]
    for phase in PHASES:
        times = [arm["phases_ms"][phase] for arm in arms.values()]
        if any(times):
            rows.append([phase, *map(_if_any, times)])
        if phase != "backward":
            continue
        for part in PARTS:
            times = [arm["backward_ms"][part] for arm in arms.values()]
            if any(times):
                rows.append([f"  {part}", *map(_if_any, times)])
    on_device = results["settings"]["device"] == "cuda"
    rest = "device idle" if on_device else "outside of operations"
    rows.append([rest, *(milliseconds(arm["idle_ms"]) for arm in arms.values())])
    whole = "whole step" if on_device else "whole step, under the profiler"
    rows.append([whole, *(milliseconds(arm["divided_ms"]) for arm in arms.values())])
    return rows


def memory_table(results: Record) -> Rows:
    """GiB of each arm by what holds them when its step holds most."""
    arms = {name: arm for name, arm in measured(results).items() if arm["memory"]["parts_bytes"]}
    if not arms:
        return []
    holders: dict[str, float] = {}
    for arm in arms.values():
        for holder, held in arm["memory"]["parts_bytes"].items():
            holders[holder] = max(holders.get(holder, 0.0), held)
    most = max(holders.values())
    rows = [["at the peak, GiB", *(label_of(name) for name in arms)]]
    small = [holder for holder, held in holders.items() if held < 0.002 * most]
    for holder in [holder for holder in holders if holder not in small]:
        held = [arm["memory"]["parts_bytes"].get(holder, 0.0) for arm in arms.values()]
        rows.append([holder, *(gibibytes(part) if part else UNKNOWN for part in held)])
    if small:
        held = [
            sum(arm["memory"]["parts_bytes"].get(holder, 0.0) for holder in small)
            for arm in arms.values()
        ]
        rows.append(["everything else", *map(gibibytes, held)])
    rows.append(["all", *(gibibytes(arm["memory"]["traced_peak_bytes"]) for arm in arms.values())])
    rows.append(["reached in", *(arm["memory"]["peak_phase"] or "" for arm in arms.values())])
    return rows


def kernel_table(results: Record, arm: Record, limit: int, *, brief: bool = False) -> Rows:
    """
    The kernels of an arm that take longest; on a CPU its operations.

    Args:
        results: of the profile.
        arm: one of its records.
        limit: number of rows, before one for all others.
        brief: whether to leave out what follows from other columns.
    """
    ceilings = results["ceilings"]
    copy_bytes, gemm_flops = ceilings["copy_bytes"], max(ceilings["gemm_flops"].values())
    on_device = results["settings"]["device"] == "cuda"
    kernels = arm["kernels"]

    def rate(row: Record, what: str) -> float | None:
        known = row.get(what) is not None and row["ms"] > 0
        return 1e3 * row[what] / row["ms"] if known else None

    def asked(row: Record, text: str) -> str:
        return f">{text}" if row["at_least"] and text != UNKNOWN else text

    def products(row: Record) -> float | None:
        return rate(row, "flops") if _is_product(row) else None

    columns: dict[str, Callable[[Record], str]] = {
        "kernel" if on_device else "operation": lambda row: shorten(row["name"]),
        "phase": lambda row: row["phases"][0] + (" ..." if len(row["phases"]) > 1 else ""),
        "x" if on_device else "calls": lambda row: f"{row['launches']:.0f}",
        "ms": lambda row: milliseconds(row["ms"]),
        "bytes asked": lambda row: asked(row, quantity(row["bytes"], "B")),
        "per second": lambda row: asked(row, quantity(rate(row, "bytes"), "B/s")),
        "of copy": lambda row: asked(row, share(rate(row, "bytes"), copy_bytes)),
        "FLOP/s": lambda row: quantity(products(row), ""),
        "of GEMM": lambda row: share(products(row), gemm_flops),
    }
    if on_device:
        columns["tensor cores"] = _tensor_cores
        columns["occupancy"] = lambda row: share(
            row.get("occupancy") or row["estimated_occupancy"], 100
        )
    if any(row.get("dram_bytes") is not None for row in kernels):
        columns["DRAM bytes"] = lambda row: quantity(row.get("dram_bytes"), "B")
        columns["DRAM of copy"] = lambda row: share(rate(row, "dram_bytes"), copy_bytes)
    if brief:
        columns = {name: cell for name, cell in columns.items() if name not in _FOLLOWING}
    rows = [[*columns], *([cell(row) for cell in columns.values()] for row in kernels[:limit])]
    left = kernels[limit:]
    if left:
        launches, ms = (sum(row[name] for row in left) for name in ("launches", "ms"))
        rest = [f"{len(left)} more", "", f"{launches:.0f}", milliseconds(ms)]
        rows.append(rest + [""] * (len(columns) - len(rest)))
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


def sources(results: Record) -> list[str]:
    """Where the numbers are from, and what could not be measured."""
    arms, floor = measured(results), results["floor_ms"]
    on_device = results["settings"]["device"] == "cuda"
    steps = " or ".join(str(count) for count in sorted({arm["steps"] for arm in arms.values()}))
    said = [f"Step: the median of {steps} steps without a profiler."]
    said.append(_ABOUT_PHASES["cuda" if on_device else "cpu"])
    said.append(
        f"Floor: {milliseconds(floor['encoder product'])} ms for one dense product with the "
        f"encoder at the fastest GEMM's rate, and {milliseconds(floor['update'])} ms for reading "
        "and writing parameters and two moments once at a copy's."
    )
    said.append(_ABOUT_BYTES)
    if not on_device:
        return [*said, _NOT_ON_A_CPU]
    reasons: dict[str, list[str]] = {}
    for name, arm in arms.items():
        counters = arm["counters"]
        if counters["share_of_time"]:
            said.append(
                f"{label_of(name)}: occupancy, DRAM traffic and use of tensor cores are hardware "
                "counters of another step under Nsight Compute, matched to "
                f"{counters['share_of_time']:.0%} of the kernels' time; the rest is estimated."
            )
        else:
            reason = counters["reason"] or "no kernel could be matched"
            reasons.setdefault(reason, []).append(label_of(name))
    for reason, names in reasons.items():
        said.append(f"{'; '.join(names)}: no hardware counters ({reason}). {_ESTIMATED}")
    return [*said, _ABOUT_WAITS]


def _range(least: float, most: float) -> str:
    return f"{milliseconds(least)} to {milliseconds(most)}"


def _if_any(ms: float) -> str:
    return milliseconds(ms) if ms else UNKNOWN


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
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            scaled = value / factor
            return (
                f"{scaled:.0f} {prefix}{unit}" if scaled >= 100 else f"{scaled:.3g} {prefix}{unit}"
            )
    return f"{value:.0f} {unit}".rstrip()


def shorten(name: str, length: int = 40) -> str:
    """A kernel's name without what makes it longer than a column."""
    return name if len(name) <= length else f"{name[: length - 3]}..."


def _tensor_cores(row: Record) -> str:
    """How busy they were, where that was counted; else whether the kernel uses them."""
    counted = row.get("tensor_pipe_share")
    if counted is None:
        return "yes" if row["tensor_cores"] else ""
    return share(counted, 100)


def _is_product(row: Record) -> bool:
    """Whether it multiplies matrices, which ceilings of products are for."""
    return row["flops"] is not None and (
        row["tensor_cores"] or row["name"].split(":")[0] in ("mm", "addmm", "bmm")
    )


def _waits(arm: Record) -> str:
    return UNKNOWN if arm["waits"] is None else str(sum(arm["waits"].values()))


def _waiting_ms(arm: Record) -> str:
    calls = arm["waiting_calls"] or {}
    return milliseconds(sum(call["ms"] for call in calls.values()))


def _occupancy(arm: Record) -> str:
    counted = arm["hardware"].get("occupancy")
    estimated = arm["hardware"].get("estimated_occupancy")
    return share(counted, 100) if counted is not None else f"{share(estimated, 100)} (estimate)"


def _peak(arm: Record) -> str:
    memory = arm["memory"]
    return gibibytes(memory["peak_bytes"] or memory["traced_peak_bytes"])


def waits_table(results: Record) -> Rows:
    """Which lines make the host wait, and which of CUDA's calls; empty where none do."""
    rows: list[Sequence[str]] = [["arm", "where", "times", "ms"]]
    for name, arm in measured(results).items():
        for line, count in (arm["waits"] or {}).items():
            rows.append([label_of(name), line, str(count), UNKNOWN])
        for call, cost in (arm["waiting_calls"] or {}).items():
            rows.append([label_of(name), call, f"{cost['count']:.1f}", milliseconds(cost["ms"])])
    return rows if len(rows) > 1 else []
