"""What measurements depend on besides their settings, and how one that failed is described."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import saelens_sparse

SOURCE = ("device", "commit", "torch", "triton", "sae_lens", "python")
"""What tells measurements of the same thing apart, besides when they were made."""

Row = dict[str, Any]


def environment(device: str, commit: str | None) -> Row:
    """
    Device, commit and versions; made once, so that its date also tells runs apart.

    Args:
        device: "cuda" or "cpu".
        commit: Instead of the checkout's, or of the version where there is no checkout.
    """
    checkout = Path(__file__).parents[2]
    return {
        "device": _device_name(device),
        "commit": commit or git_commit(checkout) or f"v{saelens_sparse.__version__}",
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


def describe_failure(error: Exception) -> Row:
    """The status and message of a measurement that raised; an error may bring its own `status`."""
    if "out of memory" in str(error):
        # What follows in PyTorch's message is about this process and this machine.
        return {"status": "out of memory", "message": str(error).split(" GPU ")[0]}
    if status := getattr(error, "status", None):
        return {"status": status, "message": str(error)}
    first_line = str(error).strip().split("\n")[0]
    return {"status": "failed", "message": f"{type(error).__name__}: {first_line}"}


def _device_name(device: str) -> str:
    """The GPU's name; for a CPU its model and the number of threads PyTorch uses."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*: (.+)", _read("/proc/cpuinfo"))
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


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


def git_commit(checkout: Path) -> str | None:
    """The commit of a checkout of this package, marked where the package's files differ from it."""
    if not (checkout / "benchmarks" / "results").is_dir():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "saelens_sparse")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
