"""Counters of Nsight Compute, in tables written by hand.

What `ncu --csv --metrics ...` prints, after the Nsight Compute CLI's documentation: its own lines
begin with `==`, then one line for each metric of each kernel, thousands separated by commas, `n/a`
for a metric that the GPU does not have.
"""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from saelens_sparse.profile import counters
from saelens_sparse.profile.cases import FLOAT32, SPARSE
from saelens_sparse.profile.counters import Counted, KernelCounters, count_step, match
from saelens_sparse.profile.phases import Attribution
from saelens_sparse.profile.settings import Settings, case_of_shape
from saelens_sparse.profile.tables import kernel_table
from saelens_sparse.profile.usage import add_counters, kernel_rows, usage_of
from tests.support.profile import PROBLEM, SIZES, Recorder

NCU_CSV = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "_gather_sum_kernel": 0%....50%....100% - 3 passes
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size",\
"Grid Size","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
{rows}
==PROF== Disconnected from process 4711
"""


def ncu_csv(*kernels: tuple[str, dict[str, tuple[str, str]]]) -> str:
    rows = [
        f'"{launch}","4711","python3.12","127.0.0.1","{name}","1","7","(64, 1, 1)",'
        f'"(4096, 5, 1)","0","9.0","Command line profiler metrics","{metric}","{unit}","{value}"'
        for launch, (name, metrics) in enumerate(kernels)
        for metric, (unit, value) in metrics.items()
    ]
    return NCU_CSV.format(rows="\n".join(rows))


GATHER_COUNTERS = {
    counters.DRAM_BYTES: ("byte", "1,234,567"),
    counters.DRAM_SHARE: ("%", "41.50"),
    counters.DURATION: ("ns", "2,048"),
    counters.TENSOR_SHARE: ("", "n/a"),
    counters.OCCUPANCY: ("%", "73.25"),
}


def test_ncu_csv_is_read_past_its_other_lines():
    text = ncu_csv(
        ("_gather_sum_kernel", GATHER_COUNTERS),
        (
            "void at::native::add<(int)4>(int, T2)",
            {counters.DRAM_BYTES: ("Mbyte", "2.5"), counters.DURATION: ("us", "1,001.5")},
        ),
    )
    gather, add = counters.parse_csv(text.splitlines())
    assert gather.name == "_gather_sum_kernel"
    assert gather.values == {
        counters.DRAM_BYTES: 1234567,
        counters.DRAM_SHARE: 41.5,
        counters.DURATION: 2048,
        counters.OCCUPANCY: 73.25,
    }
    assert add.values == {counters.DRAM_BYTES: 2.5e6, counters.DURATION: 1001.5e3}
    assert counters.parse_csv(["==ERROR== No kernels were profiled"]) == []


def test_counters_are_matched_by_base_name_and_order():
    counted = [
        KernelCounters("void f<(int)4>(int)", {"m": 1.0}),
        KernelCounters("g", {"m": 2.0}),
        KernelCounters("void f<(int)8>(int)", {"m": 3.0}),
    ]
    first, second, third, fourth = match(["void f<4>(int)", "void f<8>(int)", "g", "h"], counted)
    assert first is not None and second is not None and third is not None
    assert [k.values["m"] for k in (first, second, third)] == [1.0, 3.0, 2.0]
    assert fourth is None
    # Another number of launches: which is which is not known.
    assert match(["void f<4>(int)"], counted) == [None]


def test_counters_replace_estimates():
    record = Recorder()
    for _ in range(2):
        with record.range("saelens_sparse::step"), record.range("saelens_sparse::decode"):
            record.kernel("_gather_sum_kernel", duration=2.0)
            record.kernel("other", duration=2.0)
    trace = record.trace()
    usage = usage_of(trace, Attribution(trace, SIZES, False), on_device=True, allows_tf32=False)
    text = ncu_csv(("_gather_sum_kernel", GATHER_COUNTERS))
    assert add_counters(usage, counters.parse_csv(text.splitlines())) == pytest.approx(0.5)
    rows = {row["name"]: row for row in kernel_rows(usage, PROBLEM)}
    assert rows["_gather_sum_kernel"]["occupancy"] == 73.25
    assert rows["_gather_sum_kernel"]["dram_bytes"] == 1234567
    assert rows["other"].get("occupancy") is None


def test_tensor_cores_are_in_use_where_counters_say_so():
    """Elementwise kernels keep a little of that pipe busy."""
    shares = {"mul_kernel": "1.84", "my_product": "92.5", "nvjet_sm90_hsh_320x128": "n/a"}
    record = Recorder()
    with record.range("saelens_sparse::step"), record.range("saelens_sparse::decode"):
        for name in shares:
            record.kernel(name, duration=2.0)
    trace = record.trace()
    usage = usage_of(trace, Attribution(trace, SIZES, False), on_device=True, allows_tf32=False)
    text = ncu_csv(
        *((name, {counters.TENSOR_SHARE: ("%", share)}) for name, share in shares.items())
    )
    add_counters(usage, counters.parse_csv(text.splitlines()))
    rows = kernel_rows(usage, PROBLEM)
    expected = {"mul_kernel": False, "my_product": True, "nvjet_sm90_hsh_320x128": True}
    assert {row["name"]: row["tensor_cores"] for row in rows} == expected
    results = {
        "settings": {"device": "cuda"},
        "ceilings": {"copy_bytes": 3e12, "gemm_flops": {"bfloat16": 8e14}},
    }
    header, *cells = kernel_table(results, {"kernels": rows}, 3)
    shown = {row[0]: row[header.index("tensor cores")] for row in cells}
    assert shown == {"mul_kernel": "2%", "my_product": "92%", "nvjet_sm90_hsh_320x128": "yes"}


@pytest.fixture
def fake_ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts an `ncu` on the PATH that runs a shell script; "$log" is where its CSV belongs."""

    def install(script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        ncu = folder / "ncu"
        find_log = 'for a; do [ "$before" = --log-file ] && log="$a"; before="$a"; done'
        note = f'echo "$@" >> {tmp_path}/called'
        ncu.write_text(f"#!/bin/sh\n{find_log}\n{note}\n{script}\n")
        ncu.chmod(ncu.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return tmp_path / "called"

    return install


def gpu_settings() -> Settings:
    case = case_of_shape([32, 256, 4, 64], "topk_sparse", None, 0.0)
    return Settings(case, FLOAT32, "cuda", 2, 2, counters=True)


def test_a_step_is_counted_by_another_process(fake_ncu: Callable[[str], Path], tmp_path: Path):
    csv_file = tmp_path / "csv"
    csv_file.write_text(ncu_csv(("_gather_sum_kernel", GATHER_COUNTERS)))
    called = fake_ncu(f'cp {csv_file} "$log"')
    counted = count_step(gpu_settings(), SPARSE)
    assert [kernel.name for kernel in counted.kernels] == ["_gather_sum_kernel"]
    arguments = called.read_text()
    assert "--profile-from-start off" in arguments and "--clock-control none" in arguments
    assert counters.OCCUPANCY in arguments
    assert "-m saelens_sparse.profile.counted_step" in arguments


@pytest.mark.parametrize(
    ("script", "reason", "calls"),
    [
        (
            "echo '==ERROR== ERR_NVGPUCTRPERM - no permission' > \"$log\"; exit 1",
            "administrators",
            1,
        ),
        ("echo '==ERROR== Failed to find metric xyz' > \"$log\"; exit 1", "find metric xyz", 2),
        ("exit 9", "did not say why", 1),
    ],
)
def test_counters_that_cannot_be_read_have_a_reason(
    script: str, reason: str, calls: int, fake_ncu: Callable[[str], Path]
):
    called = fake_ncu(script)
    counted = count_step(gpu_settings(), SPARSE)
    assert not counted.kernels and reason in counted.reason
    assert len(called.read_text().splitlines()) == calls


def test_counting_ends_at_its_time_limit(fake_ncu: Callable[[str], Path]):
    fake_ncu("sleep 60 & sleep 60")
    begun = time.monotonic()
    counted = count_step(gpu_settings(), SPARSE, time_limit_s=0.5)
    assert time.monotonic() - begun < 20
    assert counted == Counted(reason="ncu took longer than 0.5 s")


def test_where_counters_are_not_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "PATH" in (counters.why_not("cuda", wanted=True) or "")
    assert "--ncu never" in (counters.why_not("cuda", wanted=False) or "")
    assert "NVIDIA" in (counters.why_not("cpu", wanted=True) or "")
