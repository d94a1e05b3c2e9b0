"""The benchmark of runs of several SAEs."""

from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from benchmarks import several
from benchmarks.__main__ import main
from benchmarks.rows import load_rows
from saelens_sparse import SparseMultiSAETrainingRunner

TINY = ["several", "--cases=cpu", "--tiny", "--device=cpu", "--n-saes=2", "--windows=1"]


def test_both_runners_and_the_parts_leave_rows(out: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, f"--out={out}", "--commit=abc"]) == 0
    stock, own = load_rows([out])
    assert [row["contender"] for row in (stock, own)] == ["stock", "sparse_runner"]
    for row in (stock, own):
        assert (row["operation"], row["case"], row["n_saes"]) == ("several", "tiny_cpu", 2)
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["steps"] == 20
    assert stock["difference"] == 0
    assert "ratio" not in stock
    assert len(own["step_ms"]) == 2
    assert own["floor_ms"] == pytest.approx(own["model_ms"] + sum(own["step_ms"]))
    assert own["ratio"] == pytest.approx(own["ms"] / own["floor_ms"])
    assert f"{own['ratio']:.3f} of the language model" in capsys.readouterr().out


def test_a_run_that_fails_leaves_the_other_its_row(out: Path, monkeypatch: pytest.MonkeyPatch):
    class Failing(SparseMultiSAETrainingRunner):
        @override
        def run(self) -> Any:
            raise RuntimeError("no")

    monkeypatch.setitem(several.CONTENDERS, "stock", Failing)
    assert main([*TINY, f"--out={out}", "--commit=abc"]) == 1
    stock, own = load_rows([out])
    assert (stock["status"], own["status"]) == ("failed", "ok")
    assert "no" in stock["message"]
