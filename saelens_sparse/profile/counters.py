"""Hardware counters of each kernel of a step, by Nsight Compute's command line (`ncu`).

Counters cannot be read by the process that is measured, and each kernel is run several times for
them. So the step is taken again by another process, under `ncu`, and its numbers are matched to
the profiler's kernels by name and order.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from saelens_sparse.profile.cases import Arm
from saelens_sparse.profile.kernels import base_name
from saelens_sparse.profile.settings import Settings

TIME_LIMIT_S = 120
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
DRAM_BYTES = "dram__bytes.sum"
DRAM_SHARE = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
DURATION = "gpu__time_duration.sum"
TENSOR_SHARE = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
METRICS = (OCCUPANCY, DRAM_BYTES, DRAM_SHARE, DURATION, TENSOR_SHARE)
# Enough for what is reported, where a GPU or a version of ncu does not know the others.
ESSENTIAL = (OCCUPANCY, DRAM_BYTES, DRAM_SHARE, DURATION)

# ncu prints base units for those that it does not scale: see its option --print-units.
_UNIT_FACTORS = {
    "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class KernelCounters:
    """The counters of one launch: those of `METRICS` that there are, in bytes, ns and percent."""

    name: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Counted:
    """
    What became of reading counters.

    Attributes:
        kernels: of one step, in the order of their launches; empty if there are none.
        reason: why there are none.
    """

    kernels: Sequence[KernelCounters] = ()
    reason: str = ""


def why_not(device: str, wanted: bool) -> str | None:
    """Why counters cannot be read here, or None where that can be tried."""
    if device != "cuda":
        return "only NVIDIA GPUs have them"
    if not wanted:
        return "switched off by --ncu never"
    if shutil.which("ncu") is None:
        return "Nsight Compute (ncu) is not on the PATH"
    return None


def count_step(settings: Settings, arm: Arm, time_limit_s: float = TIME_LIMIT_S) -> Counted:
    """Take one step of the arm in another process and read its counters; never raises for them."""
    reason = why_not(settings.device, settings.counters)
    if reason is not None:
        return Counted(reason=reason)
    counted = _run(settings, arm, METRICS, time_limit_s)
    if not counted.kernels and "metric" in counted.reason:
        counted = _run(settings, arm, ESSENTIAL, time_limit_s)
    return counted


def parse_csv(lines: Iterable[str]) -> list[KernelCounters]:
    """
    The kernels in what `ncu --csv --metrics ...` prints: one line for each metric of each kernel.

    Lines before the header are ncu's and the program's own. A metric that a GPU does not have is
    printed as `n/a`, and numbers with a comma after every third digit.
    """
    rows = list(lines)
    start = next((i for i, line in enumerate(rows) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names: dict[str, str] = {}
    values: dict[str, dict[str, float]] = defaultdict(dict)
    body = [rows[start], *(row for row in rows[start + 1 :] if row.startswith('"'))]
    for row in csv.DictReader(body):
        launch = row["ID"]
        names[launch] = row["Kernel Name"]
        value = _number(row["Metric Value"], row["Metric Unit"])
        if value is not None:
            values[launch][row["Metric Name"]] = value
    return [KernelCounters(name, values[launch]) for launch, name in names.items()]


def match(
    profiled: Sequence[str], counted: Sequence[KernelCounters]
) -> list[KernelCounters | None]:
    """
    The counters of each kernel of a profiled step.

    The i-th kernel of a base name is the i-th of that name under ncu. Where the numbers of launches
    differ, as they may between steps that take different paths, kernels of that name have none.

    Args:
        profiled: full names in the order of their launches.
        counted: in the order of their launches.
    """
    found: dict[str, list[KernelCounters]] = defaultdict(list)
    for kernel in counted:
        found[base_name(kernel.name)].append(kernel)
    places: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(profiled):
        places[base_name(name)].append(index)
    matched: list[KernelCounters | None] = [None] * len(profiled)
    for name, indices in places.items():
        if len(found[name]) == len(indices):
            for index, kernel in zip(indices, found[name], strict=True):
                matched[index] = kernel
    return matched


def _run(settings: Settings, arm: Arm, metrics: Sequence[str], time_limit_s: float) -> Counted:
    with tempfile.TemporaryDirectory() as folder:
        request, log = Path(folder, "request.json"), Path(folder, "ncu.csv")
        request.write_text(json.dumps({"arm": arm.name, "settings": settings.to_json()}))
        try:
            output = _call(_command(request, log, metrics), time_limit_s)
        except subprocess.TimeoutExpired:
            return Counted(reason=f"ncu took longer than {time_limit_s:g} s")
        except OSError as error:
            return Counted(reason=f"ncu could not be started: {error}")
        printed = log.read_text(errors="replace").splitlines() if log.exists() else []
        kernels = parse_csv(printed)
        if any(kernel.values for kernel in kernels):
            return Counted(kernels)
        return Counted(reason=_reason([*printed, *output.splitlines()]))


def _command(request: Path, log: Path, metrics: Sequence[str]) -> list[str]:
    return [
        "ncu",
        "--csv",
        "--log-file", str(log),
        "--print-units", "base",
        "--print-kernel-base", "demangled",
        "--metrics", ",".join(metrics),
        # As in training: no fixed clock, and caches as the kernel before left them.
        "--clock-control", "none",
        "--cache-control", "none",
        "--profile-from-start", "off",
        "--target-processes", "application-only",
        sys.executable, "-m", "saelens_sparse.profile.counted_step", str(request),
    ]  # fmt: skip


def _call(command: Sequence[str], time_limit_s: float) -> str:
    """Run the command in a process group of its own; at the time limit end all of the group."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=time_limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
    return output


def _reason(lines: Sequence[str]) -> str:
    """The line that says best why there are no counters."""
    text = "\n".join(lines)
    if "ERR_NVGPUCTRPERM" in text:
        return "the driver reserves them for administrators (ERR_NVGPUCTRPERM)"
    errors = [line for line in lines if line.startswith("==ERROR==")]
    errors += [line for line in lines if "Error" in line][-1:]
    said = [line for line in [*errors, *lines[-1:]] if line.strip()]
    return f"ncu gave none: {said[0].strip()}" if said else "ncu gave none and did not say why"


def _number(text: str, unit: str) -> float | None:
    try:
        return float(text.replace(",", "")) * _UNIT_FACTORS.get(unit, 1.0)
    except ValueError:
        return None
