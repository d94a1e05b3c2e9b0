"""`saelens-sparse compare`: what it makes of two trainings, and whole comparisons."""

import importlib.metadata
import json
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from saelens_sparse.compare.metrics import deviation, summarize, with_language_model
from saelens_sparse.compare.records import AUX_LOSS, MSE, ArmFolder, Step, load_steps
from safetensors.torch import load_file

import saelens_sparse
from saelens_sparse.compare import command, dictionaries, driver, figures, report, tables
from saelens_sparse.compare.process_memory import ProcessMemory
from saelens_sparse.reports import presentation
from tests.support.compare import make_config


def steps_of_an_arm(seconds: float, loss: float = 8.0, n_steps: int = 40) -> list[Step]:
    """An arm whose loss falls, whose first step is slow, and whose second half trains with AuxK."""
    return [
        Step(
            step=index + 1,
            seconds=seconds * (50 if index == 0 else 1 if index < n_steps // 2 else 3),
            data_seconds=2.0 if index == 0 else 0.0,
            loss=loss / (index + 1),
            losses={MSE: loss / (index + 1), AUX_LOSS: 0.0 if index < n_steps // 2 else 0.5},
            explained_variance=1 - 1 / (index + 1),
            l0=32.0,
            dead_latents=0 if index < n_steps // 2 else 100,
            implementation=None,
            added_memory_bytes=2**20 * 300,
            peak_memory_bytes=2**20 * 700,
            batch_crc32=index,
        )
        for index in range(n_steps)
    ]


def steps_whose_l0_falls(seconds: float, n_steps: int = 40) -> list[Step]:
    """An arm that gets faster in its second half, when few latents are active."""
    return [
        replace(
            step,
            seconds=seconds * (2 if step.step <= 20 else 1),
            losses={MSE: step.mse},
            l0=4000 / step.step,
            implementation="fused" if step.step <= 20 else "torch",
        )
        for step in steps_of_an_arm(seconds, n_steps=n_steps)
    ]


def test_summary_leaves_out_the_warm_up_and_keeps_aux_loss_apart() -> None:
    summary = summarize("topk", steps_of_an_arm(seconds=0.1), batch_size=1000)
    assert summary.ms_per_step == pytest.approx(100)
    assert summary.ms_per_step_with_aux_loss == pytest.approx(300)
    assert summary.step_seconds == pytest.approx(5 + 1.9 + 6)
    assert summary.tokens_per_second_of_step == pytest.approx(40_000 / 12.9)
    assert summary.tokens_per_second_end_to_end == pytest.approx(40_000 / 14.9)
    assert summary.first_loss == 8
    assert summary.final_mse == pytest.approx(sum(8 / n for n in (37, 38, 39, 40)) / 4)
    assert summary.final_losses[AUX_LOSS] == pytest.approx(0.5)
    assert summary.dead_latents == 100
    assert (summary.added_memory_mib, summary.peak_memory_mib) == (300, 700)


def test_summary_of_a_single_step() -> None:
    summary = summarize("topk", steps_of_an_arm(0.1)[:1], batch_size=1000)
    assert summary.final_mse == summary.first_loss == 8
    assert summary.ms_per_step == pytest.approx(5000)
    assert summary.ms_per_step_with_aux_loss is None


def test_language_model_and_step_share_the_time() -> None:
    assert with_language_model(1000, 1000) == pytest.approx(500)
    assert with_language_model(1e12, 700) == pytest.approx(700)


def test_deviation_is_relative_and_signed() -> None:
    stock = steps_of_an_arm(0.1)
    sparse = [
        replace(step, losses={MSE: step.mse * (1.1 if step.step == 7 else 0.99)}) for step in stock
    ]
    apart = deviation(stock, sparse)
    assert apart.largest == pytest.approx(0.1)
    assert apart.largest_at == 7
    assert apart.median == pytest.approx(0.01)
    assert apart.final == pytest.approx(-0.01)
    assert apart.same_batches
    other = [*sparse[:-1], replace(sparse[-1], batch_crc32=99)]
    assert not deviation(stock, other).same_batches
    lost = [*sparse[:-1], replace(sparse[-1], losses={MSE: float("nan")})]
    assert deviation(stock, lost).largest == float("inf")


def table_of(stock: list[Step], sparse: list[Step]) -> dict[str, list[str]]:
    """The cells of the terminal's table by their label."""
    a = summarize("topk", stock, batch_size=1000)
    b = summarize("topk_sparse", sparse, batch_size=1000)
    rows = tables.main_table(a, b, deviation(stock, sparse), (None, None), cached=True)
    lines = presentation.plain_table(rows).splitlines()
    cells = [re.split(r"  +", line.strip()) for line in lines[2:]]
    return {label: values for label, *values in cells}


def test_table_and_headline_say_what_was_measured() -> None:
    stock, sparse = steps_of_an_arm(0.4), steps_of_an_arm(0.1, loss=8.08)
    sparse = [replace(step, added_memory_bytes=2**20 * 75) for step in sparse]
    sparse[6] = replace(sparse[6], losses={MSE: 1.02 * stock[6].mse})
    rows = table_of(stock, sparse)
    assert rows["loss of the first step"] == ["8.0000", "8.0800", "+1.00%"]
    assert rows["MSE of a step, median apart"] == ["1.00%"]
    assert rows["at most (step 7)"] == ["2.00%"]
    assert rows["ms per SAE step (median)"] == ["400.0", "100.0", "4.00x as fast"]
    assert rows["with dead latents (AuxK)"] == ["1200.0", "300.0", "4.00x as fast"]
    assert rows["memory that training adds, MiB"] == ["300", "75", "25% of it"]
    assert "tokens/s with language model" not in rows

    a = summarize("topk", stock, batch_size=1000)
    b = summarize("topk_sparse", sparse, batch_size=1000)
    apart = deviation(stock, sparse)
    evaluations = [{"skipped": None, "llm_tokens_per_second": 1000.0}] * 2
    assert tables.headline(a, b, apart, evaluations, True, 40) == (
        "topk_sparse trains 4.00x as fast as topk in its SAE steps, 1.73x with the language model; "
        "final MSE +1.00%, at most 2.00% apart on any step"
    )
    assert tables.headline(a, b, apart, [None, None], True, 80).startswith("After 40 of 80 steps: ")
    assert "different batches" in tables.headline(
        a, b, replace(apart, same_batches=False), [None, None], True, 40
    )


def test_table_has_no_row_for_what_could_not_be_measured() -> None:
    steps = [
        replace(step, added_memory_bytes=None, peak_memory_bytes=None, losses={MSE: step.mse})
        for step in steps_of_an_arm(0.1)
    ]
    rows = table_of(steps, steps)
    assert not [label for label in rows if "memory" in label or "AuxK" in label or "CE" in label]


def test_where_l0_falls_the_table_tells_the_last_steps_apart() -> None:
    rows = table_of(steps_whose_l0_falls(0.4), steps_whose_l0_falls(0.1))
    assert rows["at the final L0"] == ["400.0", "100.0", "4.00x as fast"]


def test_every_term_of_either_loss_is_in_the_table() -> None:
    a = summarize("topk", steps_of_an_arm(0.1), batch_size=1000)
    b = summarize("jumprelu", steps_whose_l0_falls(0.1), batch_size=1000)
    rows = {row[0]: row[1:] for row in tables.loss_table(a, b)[1:]}
    assert set(rows) == {"loss", MSE, AUX_LOSS}
    assert rows[AUX_LOSS] == ("0.5", "-", "")


@pytest.mark.parametrize(
    ("make_steps", "n_steps"),
    [(steps_of_an_arm, 40), (steps_whose_l0_falls, 40), (steps_of_an_arm, 1)],
)
def test_pictures_are_pngs(
    tmp_path: Path, make_steps: Callable[[float], list[Step]], n_steps: int
) -> None:
    arms = {"stock": make_steps(0.4)[:n_steps], "sparse": make_steps(0.1)[:n_steps]}
    shared = {"histogram": [0, 3, 5]}
    paths = figures.draw_all(arms, deviation(*arms.values()), shared, "a title", tmp_path)
    assert {"mse_over_steps", "mse_over_seconds", "mse_deviation", "shared_latents"} <= set(paths)
    for path in [*paths.values(), tmp_path / "curves.png"]:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5_000


def naive_shares(a: torch.Tensor, b: torch.Tensor, threshold: float) -> tuple[int, int, int]:
    """Latents of `a` with a match, latents of `b` with one, and mutual nearest neighbours."""
    unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    cosines = unit_a @ unit_b.T
    mutual = sum(
        int(cosines[:, cosines[i].argmax()].argmax() == i and cosines[i].max() >= threshold)
        for i in range(len(a))
    )
    of_a, of_b = (cosines.max(dim).values >= threshold for dim in (1, 0))
    return int(of_a.sum()), int(of_b.sum()), mutual


@pytest.mark.parametrize("at_once", [7, 50, 2**26])
def test_shared_latents_are_those_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(dictionaries, "SIMILARITIES_AT_ONCE", at_once)
    a = torch.randn(40, 6)
    b = a[torch.randperm(40)] + 0.4 * torch.randn(40, 6)
    everything = torch.ones(40, dtype=torch.bool)
    told: list[int] = []
    shared = dictionaries.share([a, b], [everything, everything], on_rows=told.append)
    assert sum(told) == 40
    for threshold in dictionaries.THRESHOLDS:
        counts = shared["thresholds"][str(threshold)]
        expected = naive_shares(a, b, threshold)
        assert (counts["a_in_b"], counts["b_in_a"], counts["one_to_one"]) == expected
    assert 0 < shared["thresholds"]["0.9"]["one_to_one"] < 40
    assert sum(shared["histogram"]) == 40


def test_a_permuted_dictionary_is_shared_but_not_at_its_indices() -> None:
    a = torch.randn(30, 8)
    order = torch.arange(30).roll(1)
    everything = torch.ones(30, dtype=torch.bool)
    shared = dictionaries.share([a, -3 * -a[order]], [everything, everything], [a, None])
    counts = shared["thresholds"]["0.99"]
    assert (counts["a_in_b"], counts["b_in_a"], counts["one_to_one"]) == (30, 30, 30)
    assert counts["same_index"] == 0
    assert counts["near_start"] == [30, None]


def test_latents_that_are_not_alive_do_not_count() -> None:
    a = torch.randn(30, 8)
    alive = torch.arange(30) < 20
    shared = dictionaries.share([a, a], [alive, torch.arange(30) >= 5])
    assert shared["alive"] == [20, 25]
    assert shared["alive_in_both"] == 15
    assert shared["thresholds"]["0.99"]["a_in_b"] == 15
    assert shared["thresholds"]["0.99"]["same_index"] == 15
    assert dictionaries.share([a, a], [alive, ~alive & alive])["thresholds"] == {}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_the_steps_alone() -> None:
    memory = ProcessMemory(torch.device("cpu"))
    memory.begin_step()
    torch.ones(2**24)  # 64 MiB, freed at once
    memory.end_step()
    torch.ones(2**26)  # 256 MiB between two steps do not count
    memory.begin_step()
    memory.end_step()
    assert memory.added_bytes is not None and memory.peak_bytes is not None
    assert 60 < memory.added_bytes / 2**20 < 100
    assert memory.peak_bytes > memory.added_bytes


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    steps = steps_of_an_arm(0.1)[:3]
    text = "\n".join(step.to_json() for step in steps)
    (tmp_path / "steps.jsonl").write_text(text[:-9])
    assert load_steps(tmp_path / "steps.jsonl") == steps[:2]


def test_steps_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (step,) = steps_of_an_arm(0.1)[:1]
    line = json.dumps({**json.loads(step.to_json()), "threads": 2})
    (tmp_path / "steps.jsonl").write_text(line + "\n")
    assert load_steps(tmp_path / "steps.jsonl") == [step]


N_STEPS, INTERRUPTED_AT = 24, 15


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A comparison that is interrupted, resumed and reported again: what each call left."""
    folder = tmp_path_factory.mktemp("compare")
    output = folder / "output"
    options = [f"--steps={N_STEPS}", "--checkpoints=3", "--runner=own", f"--output={output}"]
    args = [str(make_config(folder)), *options]
    handler = signal.getsignal(signal.SIGTERM)
    take_step = driver.ArmProcess.take_step

    def interrupt(arm: driver.ArmProcess) -> Step:
        if arm.architecture == "topk_sparse" and arm.taken == INTERRUPTED_AT:
            raise KeyboardInterrupt
        return take_step(arm)

    found: dict[str, Any] = {"output": output}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name in ("interrupted", "resumed", "reported"):
            with pytest.MonkeyPatch.context() as interruption:
                if name == "interrupted":
                    interruption.setattr(driver.ArmProcess, "take_step", interrupt)
                if name != "resumed":  # pictures once will do
                    interruption.setattr(report, "can_draw", lambda: False)
                status = command.main(args)
            state = json.loads((output / "state.json").read_text())
            found[name] = (status, json.loads((output / "results.json").read_text()), state)
            found[f"{name} page"] = (output / "report.html").read_text()
            (output / "results.json").unlink()
    signal.signal(signal.SIGTERM, handler)
    return found


def test_an_interruption_keeps_and_reports_the_steps(outcomes: dict[str, Any]) -> None:
    status, results, state = outcomes["interrupted"]
    assert status == 130
    assert results["status"] == "interrupted"
    assert results["headline"].startswith(f"After {INTERRUPTED_AT} of {N_STEPS} steps: ")
    assert [arm["steps"] for arm in results["arms"]] == [INTERRUPTED_AT, INTERRUPTED_AT]
    assert 0 < state["checkpoint_step"] < INTERRUPTED_AT
    assert results["shared_latents"] is None


def test_a_rerun_goes_on_from_the_checkpoints(outcomes: dict[str, Any]) -> None:
    status, results, state = outcomes["resumed"]
    assert (status, results["status"]) == (0, "complete")
    assert results["resumed_at"] == [outcomes["interrupted"][2]["checkpoint_step"]]
    assert state["run"] == outcomes["interrupted"][2]["run"]
    for folder in map(ArmFolder, (outcomes["output"] / n for n in ("topk", "topk_sparse"))):
        assert [step.step for step in load_steps(folder.steps)] == list(range(1, N_STEPS + 1))
        # A checkpoint that was passed is not saved again.
        assert len(list(folder.checkpoints.iterdir())) == 3


def test_both_arms_train_the_same(outcomes: dict[str, Any]) -> None:
    _, results, _ = outcomes["resumed"]
    assert results["mse_deviation"]["same_batches"]
    assert results["mse_deviation"]["largest"] < 1e-3
    stock, sparse = results["arms"]
    assert sparse["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-5)
    assert stock["final_mse"] < 0.7 * stock["first_loss"]
    shared = results["shared_latents"]["thresholds"]["0.99"]
    assert shared["one_to_one"] == shared["same_index"] > 0
    # They have learned: what they share is not what they began with.
    assert max(shared["near_start"]) < shared["one_to_one"]
    for evaluation in results["evaluations"]:
        assert evaluation["skipped"] is None
        assert evaluation["explained_variance"] > 0.3
    a, b = (evaluation["ce_loss_with_sae"] for evaluation in results["evaluations"])
    assert a == pytest.approx(b, rel=1e-3)


def test_each_arm_was_trained_by_its_runner(outcomes: dict[str, Any]) -> None:
    notes = outcomes["resumed"][1]["notes"]
    assert "topk_sparse is trained by SparseTrainingRunner, the other by SAELens's runner." in notes


def test_the_saved_arms_are_stock_saes(outcomes: dict[str, Any]) -> None:
    assert outcomes["resumed"][1]["opened_in_stock_saelens"].startswith("TopKSAE (topk), 16 -> 64")
    for name in ("topk", "topk_sparse"):
        folder = ArmFolder(outcomes["output"] / name)
        assert json.loads((folder.sae / "cfg.json").read_text())["architecture"] == "topk"
        assert load_file(folder.latents)["activations"].shape == (128, 16)


def test_a_finished_comparison_is_reported_again_without_training(outcomes: dict[str, Any]) -> None:
    status, results, _ = outcomes["reported"]
    assert status == 0
    before = outcomes["resumed"][1]
    for part in ("arms", "mse_deviation", "evaluations", "shared_latents", "headline"):
        assert results[part] == before[part]


def test_the_page_needs_no_other_file(outcomes: dict[str, Any]) -> None:
    page = outcomes["resumed page"]
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) >= 12
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "Latents that both dictionaries share" in page
    assert "Latents that both dictionaries share" not in outcomes["interrupted page"]


def report_on_steps(config: Path, output: Path) -> None:
    """Report on a comparison whose steps are not taken but made up."""
    comparison = command.parse_comparison([str(config), f"--steps={N_STEPS}", f"--output={output}"])
    state, _ = command.open_output(comparison)
    for folder in comparison.folders:
        lines = (step.to_json() + "\n" for step in steps_of_an_arm(0.1))
        folder.steps.write_text("".join(lines))
    findings = command.collect(comparison, state, "complete", None, None)
    assert findings is not None
    command.write_report(comparison, state, findings)


def test_prefetching_that_was_turned_off_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    for prefetch in (False, True):
        config = make_config(tmp_path, prefetch_llm_batches=prefetch)
        output = tmp_path / f"prefetch-{prefetch}"
        report_on_steps(config, output)
        notes = json.loads((output / "results.json").read_text())["notes"]
        assert any("prefetch_llm_batches is off" in note for note in notes) == prefetch


def test_a_report_needs_no_installed_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The plugin may be run from its source folder alone."""

    def not_installed(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(report, "can_draw", lambda: False)
    config = make_config(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    report_on_steps(config, tmp_path / "out")
    environment = json.loads((tmp_path / "out" / "results.json").read_text())["environment"]
    assert environment["saelens_sparse"] == saelens_sparse.__version__


def test_without_matplotlib_there_are_no_pictures_but_everything_else(
    outcomes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    report_on_steps(make_config(outcomes["output"].parent), tmp_path)
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.rglob("*.png"))
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "complete"


def test_a_failed_arm_is_reported_with_its_reason(
    outcomes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_config(outcomes["output"].parent, hook_name="model.layers.9"))
    handler = signal.getsignal(signal.SIGTERM)
    assert command.main([config, f"--output={tmp_path}"]) == 1
    signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err
    assert re.search(r"compare: training topk failed: \w+Error: .*model\.layers\.9", error)
    assert str(tmp_path / "topk" / "log.txt") in error
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "failed"
