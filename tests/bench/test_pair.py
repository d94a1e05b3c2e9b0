"""Steps of two checkouts, each in a process of its own."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pair as module
from benchmarks.__main__ import main
from benchmarks.pair import require_same_losses
from benchmarks.rows import CHECKOUT, DisagreementError


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A checkout of the same commit."""
    checkout = tmp_path / "other"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "saelens_sparse", checkout / "saelens_sparse", ignore=ignored)
    return checkout


def pair(other: Path, out: Path) -> int:
    options = ["--cases=tiny", "--contenders=sparse_runner", "--device=cpu", "--rounds=2"]
    return main(["pair", str(other), *options, "--steps=2", "--warmup-train=2", f"--out={out}"])


def test_two_checkouts_are_timed_in_turn(
    other: Path, out: Path, capsys: pytest.CaptureFixture[str]
):
    assert pair(other, out) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["other_checkout"] == other.name
    assert (row["steps"], len(row["ratio_by_round"])) == (4, 2)
    assert row["ratio"] == pytest.approx(sum(row["ratio_by_round"]) / 2)
    assert min(row["ms"], row["ms_other"]) > 0
    assert row["same_losses"]
    assert f"{row['ratio']:.4f}" in capsys.readouterr().out


def test_a_checkout_that_trains_another_model_is_not_timed(
    other: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    asked: list[str] = []

    class Trained:
        """A worker that has taken its first steps."""

        def __init__(self, checkout: Path):
            self.losses = [1.0, 1.01 if checkout == other else 1.0, 1.0]

        def ask(self, request: str = "") -> Any:
            asked.append(request)
            return {"losses": self.losses}

    monkeypatch.setattr(module, "running", lambda checkout, *_: nullcontext(Trained(checkout)))
    assert pair(other, out) == 1
    assert "the loss of step 2 is 1.01 there, 1.0 here" in capsys.readouterr().out
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["status"], row.get("ms")) == ("disagrees", None)
    assert asked == ["", ""]


def test_losses_may_differ_by_rounding_only():
    require_same_losses([[1.0, 2.0], [1.0 + 1e-6, 2.0]])
    with pytest.raises(DisagreementError, match="step 2"):
        require_same_losses([[1.0, 2.0], [1.0, 2.01]])
    with pytest.raises(DisagreementError, match="step 1"):
        require_same_losses([[1.0], [float("nan")]])


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["pair", str(tmp_path), "--device=cpu", f"--out={tmp_path / 'rows.jsonl'}"]) == 2
    assert "OTHER_CHECKOUT" in capsys.readouterr().err
