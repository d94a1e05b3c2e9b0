"""Each Triton kernel compiles, as it is launched, for GPUs that need not be there, and fits."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.kernel_compilation import (
    CARDS,
    EVERY_KERNEL_FOR,
    LARGE_SHAPES,
    SHAPES,
    Usage,
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

Rows = list[dict[str, Any]]
MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)


def run(*arguments: str) -> Rows:
    """What the program prints, in a process in which Triton compiles."""
    repository = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.kernel_compilation", *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-5000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


@pytest.fixture(scope="module")
def recorded() -> Rows:
    """Names of all kernels, and every launch at the shapes of this test and at large ones."""
    return run("launches")


def test_every_kernel_is_launched_here(recorded: Rows) -> None:
    assert set(recorded[0]["kernels"]) == {launch["kernel"] for launch in recorded[1:]}


def test_every_launch_says_that_multiplications_and_additions_are_fused(recorded: Rows) -> None:
    silent = {
        launch["kernel"]
        for launch in recorded[1:]
        if launch["options"].get("enable_fp_fusion") != "True"
    }
    assert silent == set()


def test_every_launch_has_no_more_programs_than_a_grid_may_have(recorded: Rows) -> None:
    assert max(shape.n_rows for shape in LARGE_SHAPES) > 8 * 2**16
    too_large = [
        launch
        for launch in recorded[1:]
        if any(n > most for n, most in zip(launch["grid"], MAX_GRID, strict=False))
    ]
    assert too_large == []
    assert max(launch["grid"][1] for launch in recorded[1:] if len(launch["grid"]) > 1) > 2**15


USAGE = Usage("gfx942", "_kernel", "", warps=16, shared=64 * 1024, registers=128, spilled=0)


@pytest.mark.parametrize(
    ("usage", "problems"),
    [
        (USAGE, []),
        (replace(USAGE, warps=32), ["2048 threads, of 1024", "1024 registers, of 512"]),
        (replace(USAGE, shared=64 * 1024 + 1), ["65537 bytes of shared memory, of 65536"]),
        (replace(USAGE, registers=129), ["544 registers, of 512"]),
        (replace(USAGE, card="sm_90", warps=32, registers=64, shared=227 * 1024), []),
        (replace(USAGE, card="sm_90", warps=32, registers=65), ["576 registers, of 512"]),
        (replace(USAGE, card="sm_75", shared=99_999), ["99999 bytes of shared memory, of 65536"]),
        (replace(USAGE, card="gfx1100", warps=32, registers=192), []),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_known(usage: Usage, problems: list[str]) -> None:
    assert list(usage.problems()) == problems


def assert_all_fit(usages: Rows, complete: Callable[[Rows], bool], cards: Iterable[str]) -> None:
    assert {usage["card"] for usage in usages} == set(CARDS)
    for card in cards:
        assert complete([usage for usage in usages if usage["card"] == card]), card
    assert [usage for usage in usages if usage["problems"]] == []


def each_of(kernels: list[str]) -> Callable[[Rows], bool]:
    return lambda usages: sorted({usage["kernel"] for usage in usages}) == kernels


@pytest.mark.timeout(1800)
def test_every_kernel_compiles_for_cards_of_each_kind_and_fits(recorded: Rows) -> None:
    """In the setting in which it does most at once."""
    kernels, usages = recorded[0]["kernels"], run("some")
    assert_all_fit(usages, each_of(kernels), EVERY_KERNEL_FOR)
    rest = [usage["kernel"] for usage in usages if usage["card"] not in EVERY_KERNEL_FOR]
    assert sorted(rest) == kernels


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_every_kernel_compiles_for_every_card_and_fits(recorded: Rows) -> None:
    assert_all_fit(run("kernels"), each_of(recorded[0]["kernels"]), CARDS)


@pytest.mark.exhaustive
@pytest.mark.timeout(0)
def test_every_setting_of_every_kernel_compiles_for_every_card_and_fits() -> None:
    assert_all_fit(run("settings"), lambda usages: len(usages) > 10 * len(SHAPES), CARDS)
