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
from benchmarks.rows import DisagreementError, Row, load_rows
from benchmarks.run import CHECKED_REFILLS, RunSession, Turn, estimate, summary
from benchmarks.run_agreement import require_close_batches
from benchmarks.run_cases import (
    BFLOAT16_MODEL,
    CASES,
    CONTENDERS,
    DEFAULT_CASES,
    DEFAULT_CONTENDERS,
    FLOAT32,
    RunCase,
    RunPrecision,
)
from benchmarks.run_marks import Marks
from benchmarks.wall_clock import covered
from saelens_sparse import FastActivationsStore

TINY = CASES["cpu"].tiny
PERIOD = TINY.period("cpu")
FLOOR = ("model_ms", "store_ms", "step_ms")


def run_tiny(out: Path, *options: str) -> tuple[int, list[Row]]:
    common = ["--tiny", "--device=cpu", "--windows=2", f"--out={out}"]
    return main(["run", *common, "--commit=abc", *options]), load_rows([out])


def session(folder: Path, case: RunCase = TINY, library: str = "TL") -> RunSession:
    model = case.model(library, FLOAT32, "cpu")
    return RunSession(case, FLOAT32, library, "cpu", "cpu", model, folder, windows=1)


def test_runs_take_turns_and_leave_rows(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    evaluated: list[tuple[bool, int]] = []
    evaluate = LLMSaeEvaluator.__call__

    def counted(self: Any, sae: Any, *args: Any) -> Any:
        evaluated.append((type(sae).__name__.startswith("Sparse"), self.n_eval_batches))
        return evaluate(self, sae, *args)

    monkeypatch.setattr(LLMSaeEvaluator, "__call__", counted)
    options = ["--cases=cpu", "--libraries=TL", "--contenders=sparse_runner", "--rounds=2"]
    status, rows = run_tiny(out, *options)
    assert status == 0
    assert [row["contender"] for row in rows] == ["stock", "sparse_runner"]
    # A batch for a warm-up and an eval of ten, in each of two rounds of both.
    assert evaluated == [(False, 1), (False, 10), (True, 1), (True, 10)] * 2
    for row in rows:
        assert (row["operation"], row["precision"], row["commit"]) == ("run", "float32", "abc")
        assert (row["case"], row["library"]) == ("tiny_cpu", "TL")
        assert (row["steps"], row["rounds"]) == (2 * 2 * PERIOD, 2)
        assert row["checked_batches"] == CHECKED_REFILLS * TINY.refill_steps
        spread = row["eval_ms"] / 1000 * 4096 / TINY.batch
        assert row["ms"] == pytest.approx(row["ms_without_evals"] + spread)
        assert row["tokens_per_second"] == pytest.approx(4096e3 / row["ms_without_evals"])
        assert 0 < row["first_step_s"] < 60
    assert [row["implementation"] for row in rows] == [None, "torch"]
    stock, own = rows
    assert stock.get("floor_ms") is None
    assert own["floor_ms"] == pytest.approx(sum(own[part] for part in FLOOR))
    assert min(own[part] for part in FLOOR) > 0
    assert own["first_model_call_s"] < own["first_step_s"]
    said = capsys.readouterr().out
    assert f"{rows[0]['ms'] / rows[1]['ms']:.2f}x" in said
    assert f"{own['ms_without_evals'] / own['floor_ms']:.0%}" in said
    assert main(["report", str(out)]) == 0
    assert f"{rows[1]['ms']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_at_a_tiny_size(name: str, out: Path):
    precision = CASES[name].precisions[-1]
    options = [f"--cases={name}", "--contenders=sparse_runner", "--windows=1"]
    status, rows = run_tiny(out, *options, f"--precision={precision.name}")
    assert status == 0, [row.get("message") for row in rows]
    assert [(row["library"], row["contender"]) for row in rows] == [
        (library, contender)
        for library in CASES[name].libraries
        for contender in ("stock", "sparse_runner")
    ]
    for row in rows:
        assert row["eval_failure"] is None
        is_own = row["contender"] == "sparse_runner"
        assert (row["difference"] > 0) <= is_own
        assert ("floor_ms" in row) == is_own


def test_a_run_on_other_batches_is_not_timed(out: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("sparse", "sparse_runner"):
        contender = replace(CONTENDERS[name], config={"activations_mixing_fraction": 0.25})
        monkeypatch.setitem(run_cases.CONTENDERS, name, contender)
    options = ["--cases=cpu", "--libraries=TL", "--contenders=sparse,sparse_runner"]
    status, (stock, *others) = run_tiny(out, *options)
    assert (status, stock["status"]) == (1, "ok")
    for row in others:
        assert (row["status"], row.get("ms")) == ("disagrees", None)
        assert "rows are not SAELens's" in row["message"]


def test_one_that_fails_leaves_the_others_their_rows(out: Path, monkeypatch: pytest.MonkeyPatch):
    timed = RunSession._run

    def run_but_for_stock(self: RunSession, runner: Any, *, profiles: bool) -> Any:
        if not type(runner.sae).__name__.startswith("Sparse"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return timed(self, runner, profiles=profiles)

    monkeypatch.setattr(RunSession, "_run", run_but_for_stock)
    options = ["--cases=cpu", "--libraries=TL", "--contenders=sparse_runner"]
    status, (stock, own) = run_tiny(out, *options)
    assert status == 1
    assert (stock["status"], own["status"]) == ("out of memory", "ok")
    assert own["checked_batches"] == CHECKED_REFILLS * TINY.refill_steps


def test_an_eval_without_enough_memory_leaves_the_times(out: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(LLMSaeEvaluator, "__call__", fail)
    options = ["--cases=cpu", "--libraries=TL", "--contenders=stock"]
    status, (row,) = run_tiny(out, *options)
    assert (status, row["status"], row["eval_ms"]) == (0, "ok", None)
    assert "out of memory" in row["eval_failure"]
    assert row["ms"] == row["ms_without_evals"]


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_are_what_their_names_say(name: str, tmp_path: Path):
    runner = session(tmp_path).build(CONTENDERS[name])
    store = runner.activations_store
    if name in {"stock", "sparse", "sparse_runner_stock_store"}:
        assert type(store) is ActivationsStore
    else:
        assert type(store) is FastActivationsStore
        expected = "auto" if name in {"sparse_runner", "sparse_runner_prefetch"} else "saelens"
        assert store.language_model == expected
    assert runner.evaluator.activations_store is store
    assert runner.cfg.prefetch_llm_batches == (name == "sparse_runner_prefetch")
    assert (type(runner.sae).__module__.split(".")[0] == "sae_lens") == (name == "stock")
    assert runner.cfg.logger.log_to_wandb
    assert set(DEFAULT_CONTENDERS) <= set(CONTENDERS)


def test_all_start_from_the_same_model_and_tokens(tmp_path: Path):
    of_case = session(tmp_path)
    stock, sparse = (of_case.build(CONTENDERS[name]) for name in ("stock", "sparse"))
    assert stock.model is sparse.model
    expected = stock.sae.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in sparse.sae.state_dict().items()
    )


def test_windows_are_what_lies_between_calls():
    first = Marks(spans=[(10.0, 11.0), (13.0, 13.0), (14.0, 18.0)], step_peaks=[1.0, 2.0, 2.5])
    first.eval_peaks = [4.0, 2.0, 5.0]
    first.eval_seconds, first.busy_ms = 4.0, 700.0
    assert first.windows == [2.0, 1.0]
    second = Marks(spans=[(0.0, 3.0), (3.5, 3.5), (4.0, 6.0)], eval_seconds=2.0, busy_ms=500.0)
    turns = [
        Turn(first, 15, 0.0, 9.0, None, {"floor_ms": 1.0}),
        Turn(second, 15, 0.1, 3.0, "torch"),
    ]
    row = summary(replace(TINY, batch=2048), 10, turns)
    # Windows of 0.5, 0.5, 1 and 2 s of 10 steps; evals of 4 and of 2 s.
    assert row["ms_without_evals"] == pytest.approx(2 * 1e3 * 0.75 / 10)
    assert row["eval_ms"] == pytest.approx(3000)
    assert row["ms"] == pytest.approx(row["ms_without_evals"] + 2 * 3)
    assert (row["ms_min"], row["ms_max"]) == pytest.approx((100 + 6, 400 + 6))
    assert (row["busy_ms"], row["idle"]) == pytest.approx((120, 1 - 120 / 150))
    assert (row["peak_gib"], row["peak_gib_without_evals"]) == (5.0, 2.5)
    assert (row["steps"], row["implementation"], row["difference"]) == (40, "torch", 0.1)
    assert (row["first_step_s"], row["floor_ms"]) == (9.0, 1.0)  # of compilers without a cache


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_window_is_whole_refills_and_logs(case: RunCase):
    for device in DEFAULT_CASES:
        period = case.period(device)
        assert period % case.refill_steps == 0
        assert period % LoggingConfig().wandb_log_frequency == 0
        stock = CONTENDERS["stock"]
        cfg = case.runner_config(stock, case.precisions[0], case.libraries[0], device, device)
        every = cfg.logger.wandb_log_frequency * cfg.logger.eval_every_n_wandb_logs
        assert (every, cfg.train_batch_size_tokens) == (period, case.batch)


@pytest.mark.parametrize("library", ["TL", "HF"])
def test_a_model_has_the_dtype_of_the_precision(library: str):
    case = CASES["gemma2"].tiny
    model = case.model(library, BFLOAT16_MODEL, "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    cfg = case.runner_config(CONTENDERS["stock"], BFLOAT16_MODEL, library, "cpu", "cpu")
    assert (cfg.autocast, cfg.autocast_lm, cfg.dtype) == (True, False, "float32")


def test_rounding_is_allowed_but_no_other_order():
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(6, 32, generator=generator) for _ in range(2)]
    rounded = [batch.bfloat16().float() for batch in expected]
    difference = require_close_batches(expected, rounded, "autocast")
    assert 1e-4 < difference < 0.01
    with pytest.raises(DisagreementError, match="differs from SAELens's by"):
        require_close_batches(expected, rounded, "float32")
    swapped = [rounded[0], rounded[1][[0, 2, 1, 3, 4, 5]]]
    with pytest.raises(DisagreementError, match="batch 2: 2 rows are not SAELens's"):
        require_close_batches(expected, swapped, "autocast")
    with pytest.raises(DisagreementError, match="batch 1 is"):
        require_close_batches(expected, [batch.bfloat16() for batch in expected], "autocast")
    with pytest.raises(DisagreementError, match="1 rows"):
        require_close_batches(
            [torch.full((2, 4), 1.0)], [torch.tensor([[1.0] * 4, [torch.nan] * 4])], "float32"
        )


def test_spans_that_overlap_count_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2), (3, 4)]) == 5


def test_the_estimate_counts_compiling_and_every_contender():
    case = CASES["llama_8b"]
    args: Any = SimpleNamespace(device="cuda", windows=2, rounds=1)
    entered = [CONTENDERS[name] for name in DEFAULT_CONTENDERS]
    whole = estimate(case, BFLOAT16_MODEL, "TL", entered, args)
    single = [estimate(case, BFLOAT16_MODEL, "TL", [one], args) for one in entered]
    assert whole == pytest.approx(sum(seconds or 0 for seconds in single))
    assert whole is not None
    assert 60 < whole < 600  # seconds that a device call may take
    unknown = RunPrecision("unknown", torch.float32)
    assert estimate(case, unknown, "TL", entered, args) is None
