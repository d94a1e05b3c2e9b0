"""`saelens-sparse compare`: what it makes of two trainings, and whole comparisons."""

import importlib.metadata
import json
import math
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import saelens_sparse
from saelens_sparse.compare import command, dictionaries, figures, report, side, tables
from saelens_sparse.compare.steps import Step, deviation, load_steps, summarize, table_of
from saelens_sparse.compare.whole_runs import load_runs
from saelens_sparse.reports import presentation
from saelens_sparse.whole_run.record import SAELENS_RUNNER, SPARSE_RUNNER
from tests.support.compare import make_config
from tests.support.whole_runs import record

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results"
MSE, AUX_LOSS = "mse_loss", "auxiliary_reconstruction_loss"


def steps_of_a_side(seconds: float, loss: float = 8.0, n_steps: int = 40) -> list[Step]:
    """A side whose loss falls, whose first step is slow, and whose second half trains with AuxK."""
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


def changed(step: Step, **changes: Any) -> Step:
    return step.model_copy(update=changes)


def steps_whose_l0_falls(seconds: float, n_steps: int = 40) -> list[Step]:
    """A side that gets faster in its second half, when few latents are active."""
    return [
        changed(
            step,
            seconds=seconds * (2 if step.step <= 20 else 1),
            losses={MSE: step.losses[MSE]},
            l0=4000 / step.step,
            implementation="fused" if step.step <= 20 else "torch",
        )
        for step in steps_of_a_side(seconds, n_steps=n_steps)
    ]


def test_summary_leaves_out_the_warm_up_and_keeps_aux_loss_apart() -> None:
    summary = summarize("topk", table_of(steps_of_a_side(seconds=0.1)), batch_size=1000)
    assert summary["ms_per_step"] == pytest.approx(100)
    assert summary["ms_per_step_with_aux_loss"] == pytest.approx(300)
    assert summary["step_seconds"] == pytest.approx(5 + 1.9 + 6)
    assert summary["tokens_per_second_of_step"] == pytest.approx(40_000 / 12.9)
    assert summary["tokens_per_second_end_to_end"] == pytest.approx(40_000 / 14.9)
    assert summary["first_loss"] == 8
    assert summary["final_mse"] == pytest.approx(sum(8 / n for n in (37, 38, 39, 40)) / 4)
    assert summary["final_losses"][AUX_LOSS] == pytest.approx(0.5)
    assert summary["dead_latents"] == 100
    assert (summary["added_memory_mib"], summary["peak_memory_mib"]) == (300, 700)


def test_steps_with_ghost_gradients_are_kept_apart_too() -> None:
    steps = [
        changed(step, losses={"ghost_grad_loss" if n == AUX_LOSS else n: value
                              for n, value in step.losses.items()})
        for step in steps_of_a_side(seconds=0.1)
    ]  # fmt: skip
    summary = summarize("topk_sparse", table_of(steps), batch_size=1000)
    assert summary["ms_per_step"] == pytest.approx(100)
    assert summary["ms_per_step_with_aux_loss"] == pytest.approx(300)


def test_summary_of_a_single_step() -> None:
    summary = summarize("topk", table_of(steps_of_a_side(0.1)[:1]), batch_size=1000)
    assert summary["final_mse"] == summary["first_loss"] == 8
    assert summary["ms_per_step"] == pytest.approx(5000)
    assert summary["ms_per_step_with_aux_loss"] is None


def test_deviation_is_relative_and_signed() -> None:
    stock = steps_of_a_side(0.1)
    sparse = [
        changed(step, losses={MSE: step.losses[MSE] * (1.1 if step.step == 7 else 0.99)})
        for step in stock
    ]
    apart = deviation(table_of(stock), table_of(sparse))
    assert apart["largest"] == pytest.approx(0.1)
    assert apart["largest_at"] == 7
    assert apart["median"] == pytest.approx(0.01)
    assert apart["final"] == pytest.approx(-0.01)
    assert apart["same_batches"]
    other = [*sparse[:-1], changed(sparse[-1], batch_crc32=99)]
    assert not deviation(table_of(stock), table_of(other))["same_batches"]
    lost = [*sparse[:-1], changed(sparse[-1], losses={MSE: float("nan")})]
    assert deviation(table_of(stock), table_of(lost))["largest"] == float("inf")


def results_of(stock: list[Step], sparse: list[Step], n_steps: int = 40, **more: Any) -> Any:
    """The results of a comparison with these steps, on cached activations."""
    sides = {"topk": table_of(stock), "topk_sparse": table_of(sparse)}
    config = {"use_cached_activations": True, "train_batch_size_tokens": 1000}
    config["training_tokens"] = 1000 * n_steps
    return {
        "settings": {"arms": dict.fromkeys(sides, config)},
        "arms": [summarize(name, steps, 1000) for name, steps in sides.items()],
        "mse_deviation": deviation(*sides.values()),
        "evaluations": [None, None],
        **more,
    }


def table_cells(results: Any) -> dict[str, list[str]]:
    """The cells of the terminal's table by their label."""
    lines = presentation.plain_table(tables.main_table(results)).splitlines()
    cells = [re.split(r"  +", line.strip()) for line in lines[2:]]
    return {label: values for label, *values in cells}


def test_table_and_headline_say_what_was_measured() -> None:
    stock, sparse = steps_of_a_side(0.4), steps_of_a_side(0.1, loss=8.08)
    sparse = [changed(step, added_memory_bytes=2**20 * 75) for step in sparse]
    sparse[6] = changed(sparse[6], losses={MSE: 1.02 * stock[6].losses[MSE]})
    rows = table_cells(results_of(stock, sparse))
    assert rows["loss of the first step"] == ["8.0000", "8.0800", "+1.00%"]
    assert rows["MSE of a step, median apart"] == ["1.00%"]
    assert rows["at most (step 7)"] == ["2.00%"]
    assert rows["ms per SAE step (median)"] == ["400.0", "100.0", "4.00x as fast"]
    assert rows["with dead latents trained"] == ["1200.0", "300.0", "4.00x as fast"]
    assert rows["memory that training adds, MiB"] == ["300", "75", "25% of it"]
    assert "tokens/s with language model" not in rows

    evaluations = [{"skipped": None, "llm_tokens_per_second": 1000.0}] * 2
    results = results_of(stock, sparse, evaluations=evaluations)
    assert table_cells(results)["tokens/s with language model"][2] == "1.73x as fast"
    assert tables.headline(results) == (
        "topk_sparse trains 4.00x as fast as topk in its SAE steps, 1.73x with the language model; "
        "final MSE +1.00%, at most 2.00% apart on any step"
    )
    assert tables.headline(results_of(stock, sparse, 80)).startswith("After 40 of 80 steps: ")
    runs = [
        record(model=40, step=150, architecture="topk", runner=SAELENS_RUNNER),
        record(architecture="topk", model=30, step=100),
        record(model=40, step=50, runner=SAELENS_RUNNER),
        record(model=20, step=20),
    ]
    results["whole_runs"] = [run.model_dump() for run in runs]
    assert tables.headline(results) == (
        "A whole run of topk_sparse with SparseTrainingRunner is 4.00x as fast as one of topk "
        "(81,920 instead of 20,480 tokens/s), 2.00x with SAELens's runner, its SAE step 7.50x; "
        "final MSE +1.00%, at most 2.00% apart on any step"
    )
    results["mse_deviation"]["same_batches"] = False
    assert "different batches" in tables.headline(results)


def test_table_has_no_row_for_what_could_not_be_measured() -> None:
    steps = [
        changed(
            step, added_memory_bytes=None, peak_memory_bytes=None, losses={MSE: step.losses[MSE]}
        )
        for step in steps_of_a_side(0.1)
    ]
    rows = table_cells(results_of(steps, steps))
    assert not [label for label in rows if "memory" in label or "AuxK" in label or "CE" in label]


def test_where_l0_falls_the_table_tells_the_last_steps_apart() -> None:
    rows = table_cells(results_of(steps_whose_l0_falls(0.4), steps_whose_l0_falls(0.1)))
    assert rows["at the final L0"] == ["400.0", "100.0", "4.00x as fast"]


def test_every_term_of_either_loss_is_in_the_table() -> None:
    results = results_of(steps_of_a_side(0.1), steps_whose_l0_falls(0.1))
    rows = {row[0]: row[1:] for row in tables.loss_table(results)[1:]}
    assert set(rows) == {"loss", MSE, AUX_LOSS}
    assert rows[AUX_LOSS] == ("0.5", "-", "")


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("compare_*/*.json")), ids=lambda p: p.stem)
def test_published_results_are_reported_again(path: Path) -> None:
    """What the tables need is in `results.json`, also of earlier versions."""
    results = json.loads(path.read_text())
    assert tables.headline(results) == results["headline"]
    rows = table_cells(results)
    assert rows["MSE of a step, median apart"]
    assert rows["tokens/s, SAE steps alone"][-1].endswith("x as fast")
    assert len(tables.loss_table(results)) > 2
    evaluated = all(evaluation["skipped"] is None for evaluation in results["evaluations"])
    assert len(tables.evaluation_table(results)) == (10 if evaluated else 1)
    assert len(tables.dictionary_table(results)) == 7


@pytest.mark.parametrize(
    ("make_steps", "n_steps"),
    [(steps_of_a_side, 40), (steps_whose_l0_falls, 40), (steps_of_a_side, 1)],
)
def test_pictures_are_pngs(
    tmp_path: Path, make_steps: Callable[[float], list[Step]], n_steps: int
) -> None:
    stock, sparse = (make_steps(seconds)[:n_steps] for seconds in (0.4, 0.1))
    shared = {"histogram": [0, 3, 5]}
    results = results_of(stock, sparse, shared_latents=shared, headline="a title")
    sides = {"topk": table_of(stock), "topk_sparse": table_of(sparse)}
    paths = figures.draw_all(sides, results, tmp_path)
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
    shared = dictionaries.share([a, b], [everything, everything], [a, b])
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
    shared = dictionaries.share([a, -3 * -a[order]], [everything, everything], [a, a])
    counts = shared["thresholds"]["0.99"]
    assert (counts["a_in_b"], counts["b_in_a"], counts["one_to_one"]) == (30, 30, 30)
    assert counts["same_index"] == 0
    assert counts["near_start"] == [30, 0]


def test_latents_that_are_not_alive_do_not_count() -> None:
    a = torch.randn(30, 8)
    alive = torch.arange(30) < 20
    shared = dictionaries.share([a, a], [alive, torch.arange(30) >= 5], [a, a])
    assert shared["alive"] == [20, 25]
    assert shared["alive_in_both"] == 15
    assert sum(shared["histogram"]) == 20  # rounding takes some cosines above 1
    assert shared["thresholds"]["0.99"]["a_in_b"] == 15
    assert shared["thresholds"]["0.99"]["same_index"] == 15
    assert dictionaries.share([a, a], [alive, ~alive & alive], [a, a])["thresholds"] == {}


def test_dictionaries_of_two_sizes_share_no_index() -> None:
    a = torch.randn(30, 8)
    every = [torch.ones(n, dtype=torch.bool) for n in (30, 20)]
    shared = dictionaries.share([a, a[:20]], every, [a, a[:20]])
    assert shared["alive_in_both"] == 0
    assert shared["thresholds"]["0.99"]["one_to_one"] == 20
    assert shared["thresholds"]["0.99"]["same_index"] == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_since_it_was_forgotten() -> None:
    device = torch.device("cpu")
    torch.ones(2**26)  # 256 MiB that do not count
    side.reset_peak(device)
    held_before = side.peak_bytes(device)
    torch.ones(2**24)  # 64 MiB, freed at once
    assert 60 < (side.peak_bytes(device) - held_before) / 2**20 < 100


def lines_of(steps: list[Step]) -> str:
    return "".join(step.model_dump_json() + "\n" for step in steps)


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    steps = steps_of_a_side(0.1)[:3]
    (tmp_path / "steps.jsonl").write_text(lines_of(steps)[:-9])
    assert load_steps(tmp_path / "steps.jsonl") == steps[:2]


def test_steps_keep_what_is_no_number(tmp_path: Path) -> None:
    steps = [changed(s, loss=float("inf"), losses={MSE: float("nan")}) for s in steps_of_a_side(1)]
    (tmp_path / "steps.jsonl").write_text(lines_of(steps))
    loaded = load_steps(tmp_path / "steps.jsonl")
    assert len(loaded) == 40
    assert loaded[0].loss == float("inf")
    assert math.isnan(loaded[0].losses[MSE])


def test_steps_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (step,) = steps_of_a_side(0.1)[:1]
    line = json.dumps({**json.loads(step.model_dump_json()), "threads": 2})
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
    take_turn = command.SideProcess.take_turn
    turns: list[str] = []

    def interrupt(process: command.SideProcess) -> str:
        if len(turns) == 2 * INTERRUPTED_AT + 1:  # the first side is a step ahead
            raise KeyboardInterrupt
        turns.append(take_turn(process))
        return turns[-1]

    found: dict[str, Any] = {"output": output}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        for name in ("interrupted", "resumed", "reported"):
            with pytest.MonkeyPatch.context() as interruption:
                if name == "interrupted":
                    interruption.setattr(command.SideProcess, "take_turn", interrupt)
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
    assert (state["trained"], state["resumed_at"]) == (False, [])
    assert results["shared_latents"] is None


def test_a_rerun_goes_on_from_the_checkpoints(outcomes: dict[str, Any]) -> None:
    status, results, state = outcomes["resumed"]
    assert (status, results["status"]) == (0, "complete")
    assert results["resumed_at"] == [state["checkpoint_step"]]
    assert 0 < state["checkpoint_step"] < INTERRUPTED_AT
    assert state["run"] == outcomes["interrupted"][2]["run"]
    for folder in (outcomes["output"] / name for name in ("topk", "topk_sparse")):
        steps = load_steps(folder / "steps.jsonl")
        assert [step.step for step in steps] == list(range(1, N_STEPS + 1))
        # A checkpoint that was passed is not saved again.
        assert len(list((folder / "checkpoints").iterdir())) == 3


def test_both_sides_train_the_same(outcomes: dict[str, Any]) -> None:
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


def test_whole_runs_are_timed_with_the_language_model(outcomes: dict[str, Any]) -> None:
    assert outcomes["interrupted"][1]["whole_runs"] == []
    results = outcomes["resumed"][1]
    stock, sparse = results["whole_runs"]
    assert (stock["runner"], sparse["runner"]) == (SAELENS_RUNNER, SPARSE_RUNNER)
    assert (stock["model_path"], sparse["model_path"]) == (None, "fast")
    for run in (stock, sparse):
        assert run["steps"] >= 8 and run["whole_fillings"]
        assert run["l0"] == 4
        assert min(run["parts_ms"][part] for part in ("language model", "store", "SAE step")) > 0
        assert run["ms"] == pytest.approx(run["ms_min"])  # one window
    assert results["headline"].startswith("A whole run of topk_sparse with SparseTrainingRunner")
    page = outcomes["resumed page"]
    first = page.index("A whole run, taken apart")
    table = page.index("ms per 4,096 tokens")
    assert page.index("<h1>") < first < table < page.index("final MSE</td")


def test_runs_on_other_batches_are_left_out(outcomes: dict[str, Any], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("topk", "topk_sparse")]
    for folder in folders:
        shutil.copytree(outcomes["output"] / folder.name, folder)
    records, problem = load_runs(folders)
    assert len(records) == 2 and problem is None
    path = folders[1] / "runs.safetensors"
    (name, rows), *_ = load_file(path).items()
    path.write_bytes(save({name: rows.roll(1, 0)}))
    assert load_runs(folders) == (
        [],
        "The timed runs were given different batches: they are left out.",
    )
    (folders[1] / "runs.json").write_text("[]")
    assert load_runs(folders)[1] == "The whole run of topk_sparse was not timed; its log says why."


def test_each_side_was_trained_by_its_runner(outcomes: dict[str, Any]) -> None:
    notes = outcomes["resumed"][1]["notes"]
    assert "topk_sparse is trained by SparseTrainingRunner, the other by SAELens's runner." in notes


def test_the_saved_sides_are_stock_saes(outcomes: dict[str, Any]) -> None:
    assert outcomes["resumed"][1]["opened_in_stock_saelens"].startswith("TopKSAE (topk), 16 -> 64")
    for name in ("topk", "topk_sparse"):
        folder = outcomes["output"] / name
        assert json.loads((folder / "sae" / "cfg.json").read_text())["architecture"] == "topk"
        assert load_file(folder / "final.safetensors")["activations"].shape == (128, 16)


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


def report_on_steps(config: Path, output: Path, steps: list[Step]) -> dict[str, Any]:
    """Report on a comparison whose steps are not taken but made up; returns its results."""
    comparison = command.parse_comparison([str(config), f"--steps={N_STEPS}", f"--output={output}"])
    state, _ = command.open_output(comparison)
    for folder in comparison.folders:
        (folder / "steps.jsonl").write_text(lines_of(steps))
    report.report(comparison, state, "complete")
    return json.loads((output / "results.json").read_text())


def test_prefetching_that_was_turned_off_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    for prefetch in (False, True):
        config = make_config(tmp_path, prefetch_llm_batches=prefetch)
        output = tmp_path / f"prefetch-{prefetch}"
        notes = report_on_steps(config, output, steps_of_a_side(0.1))["notes"]
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
    results = report_on_steps(config, tmp_path / "out", steps_of_a_side(0.1))
    assert results["environment"]["saelens_sparse"] == saelens_sparse.__version__


def test_without_matplotlib_there_are_no_pictures_but_everything_else(
    outcomes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    results = report_on_steps(
        make_config(outcomes["output"].parent), tmp_path, steps_of_a_side(0.1)
    )
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.rglob("*.png"))
    assert results["status"] == "complete"


def test_a_training_that_diverged_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    steps = steps_of_a_side(0.1)
    steps[30:] = [changed(s, loss=math.nan, losses={MSE: math.nan}) for s in steps[30:]]
    results = report_on_steps(make_config(tmp_path), tmp_path / "out", steps)
    assert [arm["final_mse"] for arm in results["arms"]] == [None, None]
    assert results["mse_deviation"]["largest"] is None  # JSON has no infinity
    assert "inf%" in results["headline"]
