"""What a profile leaves: `results.json`, pictures, `report.html`, and tables on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from saelens_sparse.config.files import UsageError
from saelens_sparse.profile import pictures, tables
from saelens_sparse.profile.contender import Record
from saelens_sparse.reports.files import damage, write_whole
from saelens_sparse.reports.presentation import Section, label_of, plain_table, write_page

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
_SOURCES = {
    "cuda": "Phases and kernels: PyTorch's profiler (CUPTI), mean of the traced steps; a kernel is "
    "of the phase that launched it. Idle is what they leave of the step. Steps are traced without "
    "CUDA graphs, which launch the same kernels. Occupancy is the profiler's estimate from "
    "launches; use of tensor cores follows from types.",
    "cpu": "Phases: operations under PyTorch's profiler, mean of the traced steps, without the "
    "Python between them, which is idle here. The profiler itself makes small operations slower. "
    "Not measurable on a CPU: SM occupancy, tensor cores, waits. Memory is what PyTorch's "
    "allocator holds at the peak of a traced step, weights and moments included, not the "
    "process's resident set.",
}
_BYTES = (
    "Bytes asked: inputs and outputs of PyTorch's operations from recorded shapes, and what this "
    "package's kernels declare. Caches serve part of them: the rate can exceed a copy's."
)
_FLOOR = (
    "Floor: {:.3g} ms for one dense product with the encoder at the fastest GEMM's rate, and "
    "{:.3g} ms for reading and writing parameters and two moments once at a copy's."
)


def write_results(results: Record, folder: Path) -> None:
    """Write `results.json`, which appears only once it is whole."""
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")


def read_results(folder: Path) -> Record | None:
    """
    What an earlier run left in the folder; None if there was none.

    Raises:
        UsageError: the folder's results are not those of a profile, or damaged.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return None
    # Results of a comparison have no ceilings.
    if problem := damage(path, "settings", "environment", "ceilings", "arms"):
        raise UsageError(f"--output: {problem}; name another folder")
    return json.loads(path.read_text(encoding="utf-8"))


def write_report(results: Record, folder: Path) -> None:
    """Draw the pictures and write `report.html`, which holds all of them."""
    arms, sections = tables.measured(results), [Section("", _heading(results))]
    if arms:
        breakdown, roofline = pictures.draw(results, folder)
        sections += [
            Section("Summary", tables=[tables.summary_table(results)]),
            Section("Where a step goes", images=breakdown, tables=[tables.phase_table(results)]),
            Section("What holds the memory", tables=[tables.memory_table(results)]),
            Section("Where the host waits", tables=[tables.waits_table(results)]),
            Section("Ceilings", images=roofline, tables=[tables.ceilings_table(results)]),
        ]
        for name, record in arms.items():
            kernels = tables.kernel_table(results, record, 60)
            sections.append(Section(f"Kernels: {label_of(name)}", tables=[kernels]))
        traces = ", ".join(record["trace"] for record in arms.values())
        text = [*_sources(results), f"Traces for https://ui.perfetto.dev: {traces}."]
        sections.append(Section("Where the numbers are from", text))
    shown = [part for part in sections if part.text or len(part.tables[0]) > 1]
    write_page(folder / REPORT_FILE, "One training step, taken apart", shown)


def terminal_text(results: Record) -> str:
    """All tables, for a terminal."""
    arms, parts = tables.measured(results), _heading(results)
    if arms:
        parts += [
            plain_table(table(results))
            for table in (tables.summary_table, tables.phase_table, tables.memory_table)
        ]
        for name, record in arms.items():
            kernels = tables.kernel_table(results, record, 14, brief=True)
            parts.append(f"{label_of(name)}\n{plain_table(kernels)}")
        parts += [plain_table(tables.ceilings_table(results)), "\n".join(_sources(results))]
    return "\n\n".join(parts)


def _heading(results: Record) -> list[str]:
    """What was measured, and what could not be."""
    s = results["settings"]
    # Older results have the number under its name.
    active = s.get("sparsity") or (f"L0 {s['l0']:g}" if s["k"] is None else f"k {s['k']}")
    dead = f", {s['dead_fraction']:.0%} dead" if s["dead_fraction"] else ""
    sizes = f"{s['d_in']} -> {s['d_sae']:,}, {active}, batch {s['batch']}{dead}, {s['precision']}"
    failed = [
        f"{label_of(name)}: {record['status']}: {record['message']}"
        for name, record in results["arms"].items()
        if record["status"] != "ok"
    ]
    return [f"{s['architecture']}, {sizes}, on {results['environment']['device']}", *failed]


def _sources(results: Record) -> list[str]:
    """Where the numbers are from, and what could not be measured."""
    names = ("torch", "triton", "sae_lens", "python", "commit", "date")
    floor = results["floor_ms"]
    return [
        "Step: the median of the timed steps, without a profiler.",
        _SOURCES[results["settings"]["device"]],
        _FLOOR.format(floor["encoder product"], floor["update"]),
        _BYTES,
        ", ".join(f"{name} {results['environment'].get(name)}" for name in names) + ".",
    ]
