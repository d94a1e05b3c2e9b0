"""Rows of measurements: one JSON object a line, appended as soon as it exists."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from saelens_sparse.evaluation.bench.agreement import DisagreementError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

Row = dict[str, Any]


def device_name(device: str) -> str:
    """The GPU's name; for a CPU its model and the number of threads PyTorch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def environment(device: str, commit: str | None) -> Row:
    """What a row is keyed by besides its case; made once, so it also tells runs apart."""
    return {
        "device": device_name(device),
        "commit": commit or _git_commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "sae_lens": _version("sae-lens"),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class ResultsFile:
    """Appends rows to a file, by default the one of the device, and keeps this run's."""

    def __init__(self, path: Path | None, environment: Row):
        slug = re.sub(r"[^a-z0-9]+", "_", environment["device"].lower()).strip("_")
        self.path = path or RESULTS / f"{slug}.jsonl"
        self.environment = environment
        self.rows: list[Row] = []

    def append(self, row: Row) -> None:
        row = {**row, **self.environment}
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def load_rows(paths: Iterable[Path]) -> list[Row]:
    """The rows of the files; older ones do not name the only architecture there was."""
    return [
        {"architecture": "topk", **json.loads(line)}
        for path in paths
        for line in path.read_text().splitlines()
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


def _git_commit() -> str | None:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
