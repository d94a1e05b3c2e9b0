"""Rows of measurements: one JSON object a line, appended as soon as it exists."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import uuid
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import saelens_sparse

CHECKOUT = Path(__file__).parents[2]
IN_CHECKOUT = (CHECKOUT / "benchmarks" / "results").is_dir()
"""Whether this is the project's repository, whose results and figures belong to it."""

RESULTS = CHECKOUT / "benchmarks" / "results" if IN_CHECKOUT else Path("benchmark_results")
FIGURES = CHECKOUT / "docs" / "figures" if IN_CHECKOUT else RESULTS / "figures"

SOURCE = ("device", "commit", "torch", "triton", "sae_lens", "python")
"""What tells measurements of the same thing apart, besides when they were made."""

Row = dict[str, Any]


class DisagreementError(Exception):
    """An arm does not train the same model as stock."""


def device_name(device: str) -> str:
    """The GPU's name; for a CPU its model and the number of threads PyTorch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def slug(text: str) -> str:
    """The text in lower case, with one underscore for everything that is no letter or digit."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def environment(device: str, commit: str | None) -> Row:
    """What a row is keyed by besides its case; made once, so it also tells runs apart."""
    return {
        "device": device_name(device),
        "commit": commit or _git_commit() or f"v{saelens_sparse.__version__}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sae_lens": _version("sae-lens"),
        "python": platform.python_version(),
        "machine": _machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def same_source(row: Row, other: Row) -> bool:
    """Whether two rows are from the same device, commit and versions."""
    return all(row.get(name) == other.get(name) for name in SOURCE)


class ResultsFile:
    """
    Appends rows to a file, by default the one of the device, and keeps this run's.

    Args:
        path: JSON Lines file, made where there is none; None for the device's in `RESULTS`.
        environment: What `environment` gave for this run.
    """

    def __init__(self, path: Path | None, environment: Row):
        self.path = path or RESULTS / f"{slug(environment['device'])}.jsonl"
        self.environment = environment
        self.rows: list[Row] = []
        earlier = load_rows([self.path]) if self.path.exists() else []
        self._earlier = [row for row in earlier if same_source(row, environment)]

    def append(self, row: Row) -> None:
        row = {**row, **self.environment}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A run that was killed while it wrote has left half a line.
            file.seek(0, 2)
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(row).encode() + b"\n")

    def measured(self, **key: Any) -> Row | None:
        """The last good row with these values from the same device, commit and versions."""
        found = [
            row
            for row in (*self._earlier, *self.rows)
            if row.get("status") == "ok" and all(row.get(name) == key[name] for name in key)
        ]
        return found[-1] if found else None


def load_rows(paths: Iterable[Path]) -> list[Row]:
    """
    The rows of the files; older ones do not name the only architecture there was. Half a line, left
    by a run that was killed while it wrote, is passed over.
    """
    return [
        {"architecture": "topk", **row}
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
        if (row := _parse(line)) is not None
    ]


def describe_failure(error: Exception) -> Row:
    """The status and message of a row whose measurement raised."""
    if "out of memory" in str(error):
        # What follows in PyTorch's message is about this process and this machine.
        return {"status": "out of memory", "message": str(error).split(" GPU ")[0]}
    if isinstance(error, DisagreementError):
        return {"status": "disagrees", "message": str(error)}
    first_line = str(error).strip().split("\n")[0]
    return {"status": "failed", "message": f"{type(error).__name__}: {first_line}"}


def _parse(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> str:
    """Tells machines of one kind apart, as long as they run: no name leaves them."""
    boot = _read("/proc/sys/kernel/random/boot_id").strip()
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{platform.node()} {boot}").hex[:8]


def _git_commit() -> str | None:
    """The commit of the package's repository, marked where its files differ from it."""
    if not IN_CHECKOUT:
        return None
    commit = _git("rev-parse", "--short", "HEAD")
    changed = commit and _git("status", "--porcelain", "--", "saelens_sparse")
    return f"{commit}+changes" if changed else commit


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=CHECKOUT, capture_output=True, check=True, text=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
