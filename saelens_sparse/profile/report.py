"""What a profile leaves: `results.json`, pictures, `report.html`, and tables on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from saelens_sparse.profile import pictures
from saelens_sparse.profile.contender import Record
from saelens_sparse.profile.tables import measured, tables_of
from saelens_sparse.reports.presentation import Section, label_of, plain_table, write_page
from saelens_sparse.whole_files import write_whole

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
_FLOOR = (
    "Step: the median of the timed steps, without a profiler. Floor: {:.3g} ms for one dense "
    "product with the encoder at the fastest GEMM's rate, and {:.3g} ms for reading and writing "
    "parameters and two moments once at a copy's."
)
_BYTES = (
    "Bytes asked: inputs and outputs of PyTorch's operations from recorded shapes, and what this "
    "package's kernels declare. Caches serve part of them: the rate can exceed a copy's."
)


def write_results(results: Record, folder: Path) -> None:
    """Write `results.json`, which appears only once it is whole."""
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")


def write_report(results: Record, folder: Path) -> None:
    """Draw the pictures and write `report.html`, which holds all of them."""
    images = pictures.draw(results, folder) if measured(results) else {}
    sections = _sections(results, images, kernels=60)
    write_page(folder / REPORT_FILE, "One training step, taken apart", sections)


def terminal_text(results: Record) -> str:
    """All tables, for a terminal."""
    sections = _sections(results, {}, kernels=14)
    parts = [[s.heading, *s.text, *map(plain_table, s.tables)] for s in sections]
    return "\n\n".join(part for of_section in parts for part in of_section if part)


def _sections(results: Record, images: dict[str, dict[str, Path]], kernels: int) -> list[Section]:
    arms, s, environment = measured(results), results["settings"], results["environment"]
    # Older results have the number under its name.
    active = s.get("sparsity") or (f"L0 {s['l0']:g}" if s["k"] is None else f"k {s['k']}")
    dead = f", {s['dead_fraction']:.0%} dead" if s["dead_fraction"] else ""
    sizes = f"{s['d_in']} -> {s['d_sae']:,}, {active}, batch {s['batch']}{dead}, {s['precision']}"
    heading = [f"{s['architecture']}, {sizes}, on {environment['device']}"]
    for name, record in results["arms"].items():
        if record["status"] != "ok":
            heading.append(f"{label_of(name)}: {record['status']}: {record['message']}")
    if not arms:
        return [Section("", heading)]
    names = ("torch", "triton", "sae_lens", "python", "commit", "date")
    sources = [
        _FLOOR.format(results["floor_ms"]["encoder product"], results["floor_ms"]["update"]),
        _SOURCES[s["device"]],
        _BYTES,
        f"Traces for https://ui.perfetto.dev: {', '.join(r['trace'] for r in arms.values())}.",
        ", ".join(f"{name} {environment.get(name)}" for name in names) + ".",
    ]
    return [
        *(
            Section(title, () if title else heading, images.get(title, {}), [table])
            for title, table in tables_of(results, kernels).items()
            if len(table) > 1
        ),
        Section("Where the numbers are from", sources),
    ]
