"""The benchmarks' command line, what it passes over, single operations, tables and figures."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import figures, report
from benchmarks.__main__ import main
from benchmarks.cases import CASES, groups_of
from benchmarks.contenders import SPARSE, SPARSE_RUNNER, STOCK, Contender
from benchmarks.harness import Session
from benchmarks.rows import FIGURES, RESULTS, Row, frame_of, load_rows, ratios
from benchmarks.sweeps import break_even
from saelens_sparse import cli
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.profile import ceilings
from saelens_sparse.profile.cases import FLOAT32
from saelens_sparse.reports.presentation import can_draw
from saelens_sparse.reports.results import SOURCE

TINY = CASES["tiny"]
Run = Callable[..., list[Row]]


def test_a_rerun_measures_only_what_is_missing(
    run: Run, out: Path, capsys: pytest.CaptureFixture[str]
):
    first = run("step", "tiny")
    assert run("step", "tiny") == first
    said = capsys.readouterr().out
    assert "tiny float32: stock, sparse measured already" in said
    assert "--again" in said

    # Killed after stock, in the middle of writing the next row: stock is not measured again, and
    # what was found of it bounds the sparse contender.
    lines = [json.dumps(row) for row in first]
    out.write_text(f"{lines[0]}\n{lines[1][: len(lines[1]) // 2]}")
    stock, sparse = run("step", "tiny")
    assert stock == first[0]
    assert (sparse["arm"], sparse["status"], sparse["checked"]) == ("sparse", "ok", True)
    assert len(ratios(frame_of([stock, sparse]))) == 1
    assert len(run("step", "tiny", "--again")) == 4


def good_row(contender: Contender) -> Row:
    key = {"case": "tiny", "precision": "float32", "operation": "step"}
    return {**key, "arm": contender.name, "status": "ok"}


@pytest.mark.parametrize("name", SOURCE)
def test_rows_of_another_device_commit_or_version_do_not_count(
    session: Callable[..., Session], name: str
):
    there = session(**{name: "another"})
    for contender in (STOCK, SPARSE):
        there.results.append(good_row(contender))
    assert there.pending(TINY, FLOAT32, [STOCK, SPARSE]) == []
    assert session().pending(TINY, FLOAT32, [STOCK, SPARSE]) == [STOCK, SPARSE]


def test_stock_is_measured_beside_what_another_machine_has_not(session: Callable[..., Session]):
    elsewhere = session(machine="elsewhere")
    elsewhere.results.append(good_row(STOCK))
    assert elsewhere.pending(TINY, FLOAT32, [STOCK, SPARSE]) == [SPARSE]
    assert session().pending(TINY, FLOAT32, [STOCK, SPARSE]) == [STOCK, SPARSE]
    elsewhere.results.append(good_row(SPARSE))
    assert session().pending(TINY, FLOAT32, [STOCK, SPARSE]) == []


def test_what_failed_is_measured_again(session: Callable[..., Session]):
    steps = session()
    steps.results.append({**good_row(SPARSE), "status": "failed"})
    assert steps.pending(TINY, FLOAT32, [SPARSE]) == [SPARSE]
    steps.results.append(good_row(SPARSE))
    assert steps.pending(TINY, FLOAT32, [SPARSE]) == []


def test_an_interruption_keeps_what_was_measured(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    build = Contender.build

    def interrupted(contender: Contender, *args: Any) -> Any:
        if contender == SPARSE:
            raise KeyboardInterrupt
        return build(contender, *args)

    monkeypatch.setattr(Contender, "build", interrupted)
    args = ["--cases=tiny", "--device=cpu", "--steps=1", "--warmup-train=2", f"--out={out}"]
    assert main(["step", *args]) == 130
    assert "same command goes on" in capsys.readouterr().out
    assert [row["arm"] for row in load_rows([out])] == ["stock"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["step", "--cases", "gemma2b,gemma3"], "gemma3"),
        (["step", "--contenders", "sparze"], "sparze"),
        (["step", "--arms", "sparze"], "sparze"),
        (["step", "--precision", "float8"], "float8"),
        (["step", "--steps", "0"], "--steps"),
        (["step", "--warmup-train", "-1"], "--warmup-train"),
        (["forward", "--cases", "gemma2b"], "gemma2b"),
        (["kernels", "--shape", "1,2,3"], "D_IN,D_SAE,K,BATCH"),
        (["kernels", "--shape", "8,16,32,4"], "K at most D_SAE"),
        (["pair", "--cases", "tiny"], "OTHER_CHECKOUT"),
        (["pair", ".", "--contenders", "stock"], "stock"),
        (["--cases", "tiny"], "--cases"),
    ],
)
def test_bad_options_are_named_before_anything_is_measured(
    args: list[str], named: str, out: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*args, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("python -m benchmarks: ")
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["step", "--device", "cuda"]) == 2
    assert "--device: 'cuda' cannot be used here" in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert main(["step", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").touch()
    for command_name in ("report", "figures"):
        assert main([command_name, str(tmp_path / "empty.jsonl")]) == 2
        assert "no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"notes\n", b'{"text": "a data set"}\n' * 3, b"[1, 2]", b"\x89PNG\r\n\x1a\n\xff\xfe"],
)
def test_rows_are_not_appended_to_a_file_of_others(
    content: bytes, out: Path, capsys: pytest.CaptureFixture[str]
):
    out.write_bytes(content)
    assert main(["step", "--device=cpu", f"--out={out}"]) == 2
    assert f"--out: {out} " in capsys.readouterr().err
    assert out.read_bytes() == content


def test_a_file_of_rows_that_cannot_be_written_is_named_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "rows.jsonl"
    assert main(["step", "--device=cpu", f"--out={path}"]) == 2
    assert f"--out: {path} " in capsys.readouterr().err


def test_the_package_says_where_the_benchmarks_went(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "step"]) == 2
    error = capsys.readouterr().err
    assert "python -m benchmarks" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases_are_of_registered_architectures(case: Any):
    assert case.architecture in ARCHITECTURES
    assert case.precisions
    assert set(case.benchmarks) <= {"step", "forward"}


@pytest.mark.parametrize("sweep", [name for name in groups_of("step") if "sweep_" in name])
def test_a_sweep_varies_one_size_upwards(sweep: str):
    groups = groups_of("step")
    cases = [CASES[name] for name in groups[sweep]]
    size = {"k": "sparsity", "l0": "sparsity"}.get(name := sweep.split("sweep_")[1], name)
    values = [getattr(case, size) for case in cases]
    assert values == sorted(set(values))
    assert len(values) > 4
    assert len({repr(replace(case, name="", **{size: 0})) for case in cases}) == 1
    assert {case.sweep for case in cases} == {sweep}
    assert all(case.name not in groups["cuda"] + groups["cpu"] for case in cases)


def row_of(contender: str, ms: float, date: str, **more: Any) -> Row:
    row = {"case": "gemma2b", "precision": "float32", "operation": "step", "status": "ok"}
    row |= {"d_in": 2304, "d_sae": 65536, "k": 64, "batch": 4096, "device": "gpu", "commit": "abc"}
    return {**row, "checked": True, "arm": contender, "ms": ms, "date": date, **more}


def pairs_of(rows: list[Row]) -> list[tuple[float, float]]:
    found = ratios(frame_of(rows))
    return list(zip(found["ms_other"], found["ms"], strict=True))


def test_ratios_are_of_the_latest_run_that_has_both():
    old = [row_of("stock", 10.0, "1"), row_of("sparse", 5.0, "1")]
    assert pairs_of(old) == [(10.0, 5.0)]
    # Later, on one machine but in two parts.
    stock = row_of("stock", 12.0, "2", machine="m")
    sparse = row_of("sparse", 3.0, "3", machine="m")
    assert pairs_of([*old, stock, sparse]) == [(12.0, 3.0)]
    # What has no partner changes nothing: another machine, another commit.
    lone = row_of("sparse", 1.0, "4", machine="n")
    other = row_of("sparse", 1.0, "5", machine="m", commit="def")
    assert pairs_of([*old, stock, sparse, lone, other]) == [(12.0, 3.0)]
    assert "4.00x" in report.tables(frame_of([*old, stock, sparse, lone, other]))


def test_rows_older_than_the_second_architecture_are_of_topk(
    out: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [row_of(contender, 1.0, "2026") for contender in ("stock", "sparse")]
    out.write_text("\n".join(map(json.dumps, rows)))
    assert {row["architecture"] for row in load_rows([out])} == {"topk"}
    assert main(["report", str(out)]) == 0
    assert "2304 -> 65,536, k 64, 4096" in capsys.readouterr().out


def test_break_even_lies_where_the_line_crosses_one():
    (falling,) = break_even([(64, 4.0), (256, 1.0 / 4.0)])
    assert falling.value == pytest.approx(128) and not falling.rises
    rising, falling = break_even([(1, 0.5), (2, 2.0), (4, 0.5)])
    assert rising.value == pytest.approx(math.sqrt(2)) and rising.rises
    assert falling.value == pytest.approx(2 * 2**0.5) and not falling.rises
    assert break_even([(64, 4.0), (256, 1.5)]) == []


def run_kernels(out: Path) -> list[Row]:
    options = ["--device=cpu", "--shape=32,256,4,64", "--steps=1", "--commit=abc", f"--out={out}"]
    assert main(["kernels", *options]) == 0
    return load_rows([out])


def test_kernels_append_rows_with_their_work(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(ceilings.SQUARE, "cpu", 64)
    rows = run_kernels(out)
    assert len(run_kernels(out)) == len(rows)  # measured already

    by_name = {(row["kernel"], row["side"]): row for row in rows}
    assert by_name["decode", "stock"]["flops"] == 2 * 64 * 32 * 256
    assert by_name["decode", "sparse"]["flops"] == 2 * 64 * 4 * 32
    assert by_name["Adam on a weight", "stock"]["bytes"] == 7 * 4 * 32 * 256
    assert all(row["ms"] > 0 and row["copy_tb_s"] > 0 and row["product_tflops"] > 0 for row in rows)
    weights, batch, pairs = 4 * 32 * 256, 4 * 32 * 64, 12 * 4 * 64
    assert batch + pairs < by_name["decode", "sparse"]["bytes"] < batch + pairs + weights
    assert "gradient of a weight" in report.tables(frame_of(rows))
    if can_draw():
        assert [path.name for path in figures.draw(frame_of(rows), tmp_path)] == ["roofline.png"]


@pytest.mark.skipif(not can_draw(), reason="needs matplotlib")
def test_figures_are_drawn_for_what_there_are_rows_of(
    session: Callable[..., Session], tmp_path: Path
):
    steps = session()
    for k in (2, 8):
        case = replace(TINY, name=f"sweep_{k}", sparsity=k, sweep="sweep_k")
        steps.run(case, FLOAT32, [STOCK, SPARSE, SPARSE_RUNNER])
    drawn = figures.draw(frame_of(steps.results.rows), tmp_path / "figures")
    assert [path.name for path in drawn] == ["sweep_k.png"]
    steps.run(replace(TINY, name="gemma2b"), FLOAT32, [STOCK, SPARSE])
    drawn = figures.draw(frame_of(steps.results.rows), tmp_path / "figures")
    names = {"overview.png", "step_breakdown.png", "sweep_k.png"}
    assert {path.name for path in drawn} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert {path.parent.parent for path in drawn} == {tmp_path / "figures"}


def test_the_whole_command_measures_reports_and_draws(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(command, "groups_of", lambda _: {"quick": ("tiny",)})
    args = ["--quick", "--device=cpu", "--steps=1", "--warmup-train=2", f"--out={out}"]
    assert main(args) == 0
    said = capsys.readouterr().out
    assert f"rows go to {out}" in said
    rows = load_rows([out])
    assert {row["operation"] for row in rows} == {"step", "decode", "forward", "forward_backward"}
    assert {row["arm"] for row in rows} == {"stock", "sparse", "sparse_runner"}
    assert f"{rows[0]['ms']:.2f}" in said


def test_without_matplotlib_there_are_tables_and_no_figures(
    out: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = [row_of(contender, 1.0, "1") for contender in ("stock", "sparse")]
    out.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(command, "can_draw", lambda: False)
    assert main(["figures", str(out)]) == 1
    assert main(["report", str(out)]) == 0
    assert not out.with_name("figures").exists()


def test_rows_of_the_project_are_drawn_into_its_documentation(tmp_path: Path):
    assert figures.folder_for(RESULTS / "nvidia_h200.jsonl") == FIGURES
    assert figures.folder_for(tmp_path / "rows.jsonl") == tmp_path / "figures"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_published_rows_are_readable(file: Path):
    frame = frame_of(load_rows([file]))
    text = report.tables(frame)
    assert all(f"### {device}" in text for device in frame["device"].unique())
    assert ratios(frame)["faster"].notna().any()
