"""What a profile leaves: `results.json`, pictures, `report.html`, and tables on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.pictures import draw
from saelens_sparse.profile.settings import Settings
from saelens_sparse.profile.tables import (
    ALL_KERNELS,
    MANY_KERNELS,
    Record,
    ceilings_table,
    kernel_table,
    measured,
    memory_table,
    phase_table,
    sources,
    summary_table,
    waits_table,
)
from saelens_sparse.reports.presentation import (
    Section,
    html_image,
    html_page,
    html_table,
    html_text,
    label_of,
    plain_table,
)
from saelens_sparse.reports.whole_files import damage, write_whole

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"


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
    if (problem := damage(path, "settings", "environment", "ceilings", "arms")) is not None:
        raise UsageError(f"--output: {path} {problem}; name another folder")
    return json.loads(path.read_text(encoding="utf-8"))


def write_report(results: Record, folder: Path) -> None:
    """Draw the pictures and write `report.html`, which holds all of them."""
    pictures = draw(results, folder)
    sections = [Section("", html_text(_heading(results)) + html_table(summary_table(results)))]
    failed = _failures(results)
    if failed:
        sections.append(Section("Not measured", html_text(*failed)))
    arms = measured(results)
    if arms:
        breakdown = pictures.get("breakdown")
        picture = html_image(breakdown, "Milliseconds of each arm's step by phase.") if breakdown \
            else ""  # fmt: skip
        sections.append(Section("Where a step goes", picture + html_table(phase_table(results))))
        if memory := memory_table(results):
            sections.append(Section("What holds the memory", html_table(memory)))
        if waits := waits_table(results):
            sections.append(Section("Where the host waits", html_table(waits)))
        roofline = pictures.get("roofline")
        picture = html_image(roofline, "Rate of each kernel over its operations per byte.") \
            if roofline else ""  # fmt: skip
        sections.append(Section("Ceilings", picture + html_table(ceilings_table(results))))
        what = "Kernels" if results["settings"]["device"] == "cuda" else "Operations"
        sections += [
            Section(
                f"{what}: {label_of(name)}", html_table(kernel_table(results, arm, ALL_KERNELS))
            )
            for name, arm in arms.items()
        ]
        traces = ", ".join(arm["trace"] for arm in arms.values())
        sections.append(
            Section(
                "Where the numbers are from",
                html_text(
                    *sources(results),
                    f"Traces for https://ui.perfetto.dev, in the folder of this page: {traces}.",
                    _environment(results),
                ),
            )
        )
    page = html_page("One training step, taken apart", sections)
    write_whole(folder / REPORT_FILE, page)


def terminal_text(results: Record) -> str:
    """All tables, for a terminal."""
    parts = [_heading(results), plain_table(summary_table(results)), *_failures(results)]
    arms = measured(results)
    if arms:
        parts += [plain_table(phase_table(results))]
        parts += [plain_table(table) for table in (memory_table(results),) if table]
        for name, arm in arms.items():
            table = plain_table(kernel_table(results, arm, MANY_KERNELS, brief=True))
            parts.append(f"{label_of(name)}\n{table}")
        parts += [plain_table(ceilings_table(results)), "\n".join(sources(results))]
    return "\n\n".join(parts)


def _heading(results: Record) -> str:
    described = Settings.from_json(results["settings"]).describe()
    return f"{described}, on {results['environment']['device']}"


def _failures(results: Record) -> list[str]:
    return [
        f"{label_of(name)}: {arm['status']}: {arm['message']}"
        for name, arm in results["arms"].items()
        if arm["status"] != "ok"
    ]


def _environment(results: Record) -> str:
    environment = results["environment"]
    versions = ("torch", "triton", "sae_lens", "python", "commit", "date")
    return ", ".join(f"{name} {environment.get(name)}" for name in versions) + "."
