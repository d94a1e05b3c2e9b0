"""`saelens-sparse profile CONFIG`: a whole run, timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_sparse.cli import main as cli_main
from saelens_sparse.profile import command
from saelens_sparse.whole_run import profiled
from saelens_sparse.whole_run.profiled import profile_run
from saelens_sparse.whole_run.suggestions import Trial
from saelens_sparse.whole_run.windows import EVALS, LOGGING, MODEL, PARTS, STEP, STORE
from tests.support.compare import make_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


def profile(config: Path, output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    arguments = [str(config), "--device=cpu", f"--output={output}", *options]
    return cli_main(["profile", *arguments]), json.loads((output / "results.json").read_text())


def test_a_run_is_taken_apart_and_leaves_no_sae(
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = {"log_to_wandb": True, "wandb_log_frequency": 2, "eval_every_n_wandb_logs": 3}
    sae = {"d_in": 16, "d_sae": 64, "k": 4, "normalize_activations": "expected_average_only_in"}
    sae["architecture"] = "topk"
    outputs = {"output_path": str(tmp_path / "sae"), "checkpoint_path": str(tmp_path / "saved")}
    config = make_config(inputs, logger=logger, sae=sae, n_checkpoints=5, **outputs)
    status, results = profile(config, tmp_path / "out", "--only=run", "--windows=2")
    assert (status, results["arms"]) == (0, {})
    run = results["run"]
    record = run["record"]
    assert set(record["parts_ms"]) == set(PARTS)
    for part in (MODEL, STORE, STEP, EVALS, LOGGING):
        assert record["parts_ms"][part] > 0, part
    assert record["ms"] == pytest.approx(sum(record["parts_ms"].values()))
    assert record["ms_min"] < record["ms"] < record["ms_max"]
    assert (record["busy_share"], record["model_path"], record["l0"]) == (None, "fast", 4)
    assert record["steps"] >= 16 and record["whole_fillings"]
    # An eval every six steps of 128 tokens.
    scale = 4096 / 128
    assert record["parts_ms"][EVALS] == pytest.approx(scale * 1e3 * record["eval_seconds"] / 6)
    assert any("eval_every_n_wandb_logs" in text for text in run["suggestions"])
    assert not (tmp_path / "sae").exists() and not (tmp_path / "saved").exists()
    assert not Path("wandb").exists()
    printed = capsys.readouterr().out
    sentence = next(line for line in printed.splitlines() if "The run trains" in line)
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"<h1>{sentence}</h1>" in page
    assert page.count("data:image/png;base64,") == 1


def test_a_stock_architecture_is_held_against_the_sparse_one(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = {"architecture": "topk", "d_in": 16, "d_sae": 64, "k": 4}
    config = make_config(inputs, sae=sae)

    def measured(name: str, *_: Any) -> dict[str, Any]:
        return {"status": "ok", "ms": {"stock": 40.0, "sparse_runner": 10.0}[name]}

    monkeypatch.setattr(command, "measure_contender", measured)
    monkeypatch.setattr(command, "measure_ceilings", lambda *_: {})
    monkeypatch.setattr(command.report, "write_report", lambda *_: None)
    monkeypatch.setattr(command.report, "terminal_text", lambda *_: "")
    monkeypatch.setattr(profiled, "_trials", lambda _: [])
    options = ("--arms=stock,sparse_runner", "--warmup-train=0")
    status, results = profile(config, tmp_path / "out", *options)
    assert status == 0
    (trial,) = results["run"]["trials"]
    assert Trial(**trial) == Trial("sae.architecture=topk_sparse", STEP, 1280.0, 320.0)
    assert results["run"]["record"]["architecture"] == "topk"


def test_a_run_that_cannot_begin_is_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(inputs, hook_name="model.layers.7")
    status, results = profile(config, tmp_path / "out", "--only=run")
    assert status == 1
    assert results["run"]["status"] == "failed"
    assert "model.layers.7" in results["run"]["message"]
    assert "model.layers.7" in capsys.readouterr().out


def test_a_run_needs_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_main(["profile", "--shape=32,256,4,64", "--only=run"]) == 2
    assert "--only: 'run' needs a config file" in capsys.readouterr().err


def test_more_prompts_at_once_are_tried_alone(inputs: Path) -> None:
    cfg = command.load_config(make_config(inputs, logger={"log_to_wandb": False}))
    torch.manual_seed(0)
    (trial,) = profile_run(cfg, 1).trials
    assert (trial.change, trial.part) == ("store_batch_size_prompts=32", MODEL)
    assert trial.before_ms > 0 and trial.after_ms > 0
