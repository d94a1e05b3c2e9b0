from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import STEP, Benchmark, Session
from benchmarks.rows import ResultsFile, Row, load_rows
from saelens_sparse.reports.results import environment


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a problem runs faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.fixture
def run(out: Path) -> Callable[..., list[Row]]:
    """Runs a command on a tiny case; gives the rows in the file after it."""

    def run_command(command: str, case: str, *more: str) -> list[Row]:
        options = {"cases": case, "device": "cpu", "contenders": "sparse", "steps": "2"}
        options |= {"warmup-train": "5", "commit": "abc", "out": str(out)}
        args = [f"--{name}={value}" for name, value in options.items()]
        assert main([command, *args, *more]) == 0
        return load_rows([out])

    return run_command


@pytest.fixture
def session(out: Path) -> Callable[..., Session]:
    """Makes a session of a benchmark, whose rows are from an environment with these changes."""

    def make(benchmark: Benchmark = STEP, **changes: Any) -> Session:
        results = ResultsFile(out, {**environment("cpu", "abc"), **changes})
        return Session(benchmark, results, device="cpu", steps=1, warmup_train=2)

    return make
