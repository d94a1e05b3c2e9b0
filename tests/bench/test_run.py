"""The benchmark of whole runs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.config import LoggingConfig
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.training.activations_store import ActivationsStore

from benchmarks import run_cases
from benchmarks.__main__ import main
from benchmarks.rows import Row, load_rows
from benchmarks.run import PERIOD, Marks, RunSession, summary
from benchmarks.run_cases import CASES, CONTENDERS, DEFAULT_CONTENDERS
from saelens_sparse import FastActivationsStore
from saelens_sparse.profile.cases import FLOAT32

TINY = CASES["tiny"]


def run_tiny(out: Path, *options: str) -> tuple[int, list[Row]]:
    common = ["--cases=tiny", "--device=cpu", "--rounds=2", "--windows=2", f"--out={out}"]
    return main(["run", *common, "--commit=abc", *options]), load_rows([out])


def test_runs_take_turns_and_leave_rows(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    evaluated: list[Any] = []
    evaluate = LLMSaeEvaluator.__call__

    def counted(self: Any, sae: Any, *args: Any) -> Any:
        evaluated.append(sae)
        return evaluate(self, sae, *args)

    monkeypatch.setattr(LLMSaeEvaluator, "__call__", counted)
    status, rows = run_tiny(out, "--contenders=sparse_runner")
    assert status == 0
    assert [row["contender"] for row in rows] == ["stock", "sparse_runner"]
    # At both ends of each of two rounds of both.
    assert [type(sae).__name__.startswith("Sparse") for sae in evaluated] == [
        False, False, True, True, False, False, True, True
    ]  # fmt: skip
    assert len({id(sae) for sae in evaluated}) == 4
    for row in rows:
        assert (row["operation"], row["precision"], row["commit"]) == ("run", "float32", "abc")
        assert (row["steps"], row["rounds"]) == (2 * 2 * PERIOD["cpu"], 2)
        assert row["checked_batches"] == 2.5 * TINY.refill_steps
        spread = row["eval_ms"] / 1000 * 4096 / TINY.batch
        assert row["ms"] == pytest.approx(row["ms_without_evals"] + spread)
    assert [row["implementation"] for row in rows] == [None, "torch"]
    said = capsys.readouterr().out
    assert f"{rows[0]['ms'] / rows[1]['ms']:.2f}x" in said
    assert main(["report", str(out)]) == 0
    assert f"{rows[1]['ms']:.3f}" in capsys.readouterr().out


def test_a_run_on_other_batches_is_not_timed(out: Path, monkeypatch: pytest.MonkeyPatch):
    contender = replace(CONTENDERS["sparse"], config={"activations_mixing_fraction": 0.25})
    monkeypatch.setitem(run_cases.CONTENDERS, "sparse", contender)
    status, (row,) = run_tiny(out, "--contenders=sparse")
    assert (status, row["status"], row.get("ms")) == (1, "disagrees", None)
    assert "rows are not SAELens's" in row["message"]


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_are_what_their_names_say(name: str, tmp_path: Path):
    session = RunSession(TINY, FLOAT32, "cpu", TINY.model("cpu"), tmp_path, windows=1)
    runner = session.build(CONTENDERS[name], calls=1)
    is_fast = type(runner.activations_store) is FastActivationsStore
    assert is_fast == (name in {"sparse_fast_store", "sparse_runner", "sparse_runner_prefetch"})
    assert is_fast or type(runner.activations_store) is ActivationsStore
    assert runner.evaluator.activations_store is runner.activations_store
    assert runner.cfg.prefetch_llm_batches == (name == "sparse_runner_prefetch")
    assert (type(runner.sae).__module__.split(".")[0] == "sae_lens") == (name == "stock")
    assert runner.cfg.logger.log_to_wandb
    assert set(DEFAULT_CONTENDERS) <= set(CONTENDERS)


def test_all_start_from_the_same_model_and_tokens(tmp_path: Path):
    session = RunSession(TINY, FLOAT32, "cpu", TINY.model("cpu"), tmp_path, windows=1)
    stock, sparse = (session.build(CONTENDERS[name], calls=1) for name in ("stock", "sparse"))
    assert stock.model is sparse.model
    expected = stock.sae.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in sparse.sae.state_dict().items()
    )


def test_windows_are_what_lies_between_calls():
    first = Marks(spans=[(10.0, 11.0), (13.0, 13.0), (14.0, 18.0)], step_peaks=[1.0, 2.0, 2.5])
    first.eval_peaks = [4.0, 2.0, 5.0]
    assert first.windows == [2.0, 1.0]
    second = Marks(spans=[(0.0, 3.0), (3.5, 3.5), (4.0, 6.0)], implementation="torch")
    session: Any = SimpleNamespace(case=replace(TINY, batch=2048), period=10)
    row = summary(session, [first, second])
    # Windows of 0.5, 0.5, 1 and 2 s of 10 steps; evals of 4 and of 2 s.
    assert row["ms_without_evals"] == pytest.approx(2 * 1e3 * 0.75 / 10)
    assert row["eval_ms"] == pytest.approx(3000)
    assert row["ms"] == pytest.approx(row["ms_without_evals"] + 2 * 3)
    assert (row["ms_min"], row["ms_max"]) == pytest.approx((100 + 6, 400 + 6))
    assert (row["peak_gib"], row["peak_gib_without_evals"]) == (5.0, 2.5)
    assert (row["steps"], row["implementation"]) == (40, "torch")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_window_is_whole_refills_and_logs(case: run_cases.RunCase):
    for device, period in PERIOD.items():
        assert period % case.refill_steps == 0
        assert period % LoggingConfig().wandb_log_frequency == 0
        cfg = case.runner_config(CONTENDERS["stock"], FLOAT32, device, 3 * period, period)
        every = cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs
        assert (every, cfg.training_tokens) == (period, 3 * period * case.batch)
