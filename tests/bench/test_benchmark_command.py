"""The benchmark's command line, what it passes over, single operations and figures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from benchmarks import command, figures, kernels, report, selection, train_step
from benchmarks.figures_sweep import break_even
from saelens_sparse import cli
from saelens_sparse.profile.cases import (
    FLOAT32,
    SPARSE,
    SPARSE_RUNNER,
    STEP_CASES,
    STEP_GROUPS,
    STOCK,
)
from saelens_sparse.reports import results as results_module
from saelens_sparse.reports.presentation import can_draw
from saelens_sparse.reports.results import Row, load_rows
from tests.bench.test_benchmark import arguments, one_thread, run_tiny, step_contest

__all__ = ["one_thread"]

TINY = STEP_CASES["tiny"]
ALIVE = replace(TINY, name="alive", dead_fraction=0.0)


# What is measured already.


def test_a_rerun_measures_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "rows.jsonl"
    first = run_tiny(train_step.main, "tiny", out)
    assert run_tiny(train_step.main, "tiny", out) == first
    said = capsys.readouterr().out
    assert "tiny float32: stock, sparse measured already" in said
    assert "--again" in said

    # Killed after stock, in the middle of writing the next row: stock is not measured again, and
    # what was found of it bounds the sparse arm.
    lines = [json.dumps(row) for row in first]
    out.write_text(f"{lines[0]}\n{lines[1][: len(lines[1]) // 2]}")
    assert train_step.main(arguments("tiny", out)) == 0
    stock, sparse = load_rows([out])
    assert stock == first[0]
    assert (sparse["arm"], sparse["status"], sparse["checked"]) == ("sparse", "ok", True)
    assert selection.pairs([stock, sparse]) == [(stock, sparse)]

    assert train_step.main(arguments("tiny", out, "--again")) == 0
    assert len(load_rows([out])) == 4


@pytest.mark.parametrize("name", results_module.SOURCE)
def test_rows_of_another_device_commit_or_version_do_not_count(tmp_path: Path, name: str):
    steps = step_contest(tmp_path / "rows.jsonl", **{name: "another"})
    for arm in (STOCK, SPARSE):
        steps.results.append({"case": "tiny", "precision": "float32", "operation": "step",
                              "arm": arm.name, "status": "ok"})  # fmt: skip
    assert steps.pending(TINY, FLOAT32, [STOCK, SPARSE]) == []
    here = step_contest(tmp_path / "rows.jsonl")
    assert here.pending(TINY, FLOAT32, [STOCK, SPARSE]) == [STOCK, SPARSE]


def test_stock_is_measured_beside_what_another_machine_has_not(tmp_path: Path):
    out = tmp_path / "rows.jsonl"
    elsewhere = step_contest(out, machine="elsewhere")
    done = {"case": "tiny", "precision": "float32", "operation": "step", "status": "ok"}
    elsewhere.results.append({**done, "arm": "stock"})
    assert elsewhere.pending(TINY, FLOAT32, [STOCK, SPARSE]) == [SPARSE]
    assert step_contest(out).pending(TINY, FLOAT32, [STOCK, SPARSE]) == [STOCK, SPARSE]
    elsewhere.results.append({**done, "arm": "sparse"})
    assert step_contest(out).pending(TINY, FLOAT32, [STOCK, SPARSE]) == []


def test_failed_rows_are_measured_again(tmp_path: Path):
    steps = step_contest(tmp_path / "rows.jsonl")
    key = {"case": "tiny", "precision": "float32", "operation": "step", "arm": "sparse"}
    steps.results.append({**key, "status": "failed"})
    assert steps.pending(TINY, FLOAT32, [SPARSE]) == [SPARSE]
    steps.results.append({**key, "status": "ok"})
    assert steps.pending(TINY, FLOAT32, [SPARSE]) == []


def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    measure_arm = train_step.StepContest._measure_arm
    out = tmp_path / "rows.jsonl"

    def only_stock(self: Any, arm: Any, *rest: Any) -> list[Row]:
        return measure_arm(self, arm, *rest) if arm == STOCK else cast(Any, interrupt())

    monkeypatch.setattr(train_step.StepContest, "_measure_arm", only_stock)
    assert command.main(["step", *arguments("tiny", out)]) == 130
    assert "same command goes on" in capsys.readouterr().out
    assert [row["arm"] for row in load_rows([out])] == ["stock"]


# Names and defaults.


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["step", "--cases", "gemma2b,gemma3"], "gemma3"),
        (["step", "--arms", "sparze"], "sparze"),
        (["step", "--precision", "float8"], "float8"),
        (["step", "--steps", "0"], "--steps"),
        (["step", "--warmup-train", "-1"], "--warmup-train"),
        (["forward", "--cases", "gemma2b"], "gemma2b"),
        (["kernels", "--shape", "1,2,3"], "D_IN,D_SAE,K,BATCH"),
        (["kernels", "--shape", "8,16,32,4"], "K at most D_SAE"),
        (["--cases", "tiny"], "--cases"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(
    args: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "rows.jsonl"
    assert cli.main(["bench", *args, "--out", str(out)]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "step", "--device", "cuda"]) == 2
    assert "--device: 'cuda' cannot be used here" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "report", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert cli.main(["bench", "step", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("sweep", [name for name in STEP_GROUPS if "sweep_" in name])
def test_a_sweep_varies_one_size_upwards(sweep: str):
    cases = [STEP_CASES[name] for name in STEP_GROUPS[sweep]]
    size = sweep.split("sweep_")[1]
    values = [getattr(case, size) for case in cases]
    assert values == sorted(set(values))
    assert len(values) > 4
    fixed = {
        replace(case, name="", options={}, check_rows=None, **{size: 0}).__repr__()
        for case in cases
    }
    assert len(fixed) == 1
    assert {case.sweep for case in cases} == {sweep}
    assert all(case.name not in STEP_GROUPS["cuda"] + STEP_GROUPS["cpu"] for case in cases)


# Ratios.


def row_of(arm: str, ms: float, date: str, **more: Any) -> Row:
    row = {"case": "gemma2b", "precision": "float32", "operation": "step", "status": "ok"}
    row |= {"architecture": "topk", "d_in": 2304, "d_sae": 65536, "k": 64, "batch": 4096}
    row |= {"device": "gpu", "commit": "abc", "checked": True, "arm": arm, "ms": ms, "date": date}
    return {**row, **more}


def test_ratios_are_of_the_latest_run_that_has_both():
    old = [row_of("stock", 10.0, "1"), row_of("sparse", 5.0, "1")]
    assert selection.pairs(old) == [(old[0], old[1])]
    # Later, on one machine but in two parts.
    stock = row_of("stock", 12.0, "2", machine="m")
    sparse = row_of("sparse", 3.0, "3", machine="m")
    assert selection.pairs([*old, stock, sparse]) == [(stock, sparse)]
    # What has no partner changes nothing: another machine, another commit.
    lone = row_of("sparse", 1.0, "4", machine="n")
    other = row_of("sparse", 1.0, "5", machine="m", commit="def")
    assert selection.pairs([*old, stock, sparse, lone, other]) == [(stock, sparse)]
    assert "4.00x" in report.tables([*old, stock, sparse, lone, other])


def test_break_even_lies_where_the_line_crosses_one():
    (falling,) = break_even([(64, 4.0), (256, 1.0 / 4.0)])
    assert falling.value == pytest.approx(128) and not falling.rises
    rising, falling = break_even([(1, 0.5), (2, 2.0), (4, 0.5)])
    assert rising.value == pytest.approx(math.sqrt(2)) and rising.rises
    assert falling.value == pytest.approx(2 * 2**0.5) and not falling.rises
    assert break_even([(64, 4.0), (256, 1.5)]) == []


# Single operations, figures, the whole command.


SHAPE = "32,256,4,64"


def run_kernels(out: Path) -> list[Row]:
    args = ["--device=cpu", f"--shape={SHAPE}", "--steps=1", "--commit=abc", f"--out={out}"]
    assert command.main(["kernels", *args]) == 0
    return load_rows([out])


def test_kernels_append_rows_with_their_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(kernels.COPIED_BYTES, "cpu", 2**20)
    monkeypatch.setitem(kernels.PRODUCT_SIZE, "cpu", 64)
    out = tmp_path / "rows.jsonl"
    rows = run_kernels(out)
    assert len(run_kernels(out)) == len(rows)  # measured already

    by_name = {(row["kernel"], row["side"]): row for row in rows}
    assert by_name["decode", "stock"]["flops"] == 2 * 64 * 32 * 256
    assert by_name["decode", "sparse"]["flops"] == 2 * 64 * 4 * 32
    assert by_name["Adam on a weight", "stock"]["bytes"] == 7 * 4 * 32 * 256
    assert all(row["ms"] > 0 and row["copy_tb_s"] > 0 and row["product_tflops"] > 0 for row in rows)
    weights, batch, pairs = 4 * 32 * 256, 4 * 32 * 64, 12 * 4 * 64
    assert batch + pairs < by_name["decode", "sparse"]["bytes"] < batch + pairs + weights
    assert "gradient of a weight" in report.tables(rows)
    if can_draw():
        assert [path.name for path in figures.draw(rows, tmp_path)] == ["roofline.png"]


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_figures_are_drawn_for_what_there_are_rows_of(tmp_path: Path):
    steps = step_contest(tmp_path / "rows.jsonl")
    for k in (2, 8):
        case = replace(TINY, name=f"sweep_{k}", k=k, sweep="sweep_k")
        steps.run(case, FLOAT32, [STOCK, SPARSE, SPARSE_RUNNER])
    drawn = figures.draw(steps.results.rows, tmp_path / "figures")
    assert [path.name for path in drawn] == ["sweep_k.png"]
    steps.run(replace(TINY, name="gemma2b"), FLOAT32, [STOCK, SPARSE])
    drawn = figures.draw(steps.results.rows, tmp_path / "figures")
    names = {"overview.png", "step_breakdown.png", "sweep_k.png"}
    assert {path.name for path in drawn} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert {path.parent.parent for path in drawn} == {tmp_path / "figures"}


def test_the_whole_command_measures_reports_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for contest_class in command.CONTESTS:
        monkeypatch.setattr(contest_class, "groups", {"quick": ("tiny",)})
    out = tmp_path / "rows.jsonl"
    args = ["--quick", "--device=cpu", "--steps=1", "--warmup-train=2", f"--out={out}"]
    assert cli.main(["bench", *args]) == 0
    said = capsys.readouterr().out
    assert f"rows go to {out}" in said
    rows = load_rows([out])
    assert {row["operation"] for row in rows} == {"step", "decode", "forward", "forward_backward"}
    assert {row["arm"] for row in rows} == {"stock", "sparse", "sparse_runner"}
    assert f"{rows[0]['ms']:.2f}" in said


def test_without_matplotlib_there_are_tables_and_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "rows.jsonl"
    out.write_text("\n".join(json.dumps(row_of(arm, 1.0, "1")) for arm in ("stock", "sparse")))
    monkeypatch.setattr(figures, "can_draw", lambda: False)
    assert cli.main(["bench", "figures", str(out)]) == 1
    assert cli.main(["bench", "report", str(out)]) == 0
    assert not (tmp_path / "figures").exists()


def test_rows_of_the_project_are_drawn_into_its_documentation(tmp_path: Path):
    mine = results_module.RESULTS / "nvidia_h200.jsonl"
    assert figures.folder_for(mine) == results_module.FIGURES
    assert figures.folder_for(tmp_path / "rows.jsonl") == tmp_path / "figures"


def test_core_modules_do_not_import_the_commands():
    folder = Path(results_module.__file__).parent
    for path in folder.glob("*.py"):
        source = path.read_text()
        for name in ("bench", "compare", "profile"):
            assert f"evaluation.{name}" not in source, f"{path.name} imports {name}"
