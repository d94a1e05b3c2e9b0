import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from benchmarks import forward, report, train_step
from benchmarks.cases import FLOAT32, SPARSE, STEP_CASES, STOCK, Arm
from benchmarks.measure import PHASES
from benchmarks.results import ResultsFile, Row, environment

KEYS = {"case", "precision", "operation", "arm", "d_in", "d_sae", "k", "batch", "dead_fraction"}
ENVIRONMENT = {"device", "commit", "torch", "triton", "sae_lens", "python", "date"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a problem runs faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_tiny(main: Callable[[list[str]], object], out: Path) -> list[Row]:
    options = {"cases": "tiny", "device": "cpu", "arms": "sparse", "steps": "2"}
    options |= {"warmup-train": "5", "commit": "abc", "out": str(out)}
    main([f"--{name}={value}" for name, value in options.items()])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_train_step_appends_complete_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "rows.jsonl"
    stock, sparse = run_tiny(train_step.main, out)
    assert (stock["arm"], sparse["arm"]) == ("stock", "sparse")
    assert (stock["implementation"], sparse["implementation"]) == (None, "torch")
    for row in (stock, sparse):
        assert row.keys() >= KEYS | ENVIRONMENT
        assert (row["status"], row["commit"]) == ("ok", "abc")
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["phases_ms"].keys() == set(PHASES)
        assert sum(row["phases_ms"].values()) > 0
        assert row["firing"]["l0"] == pytest.approx(row["k"], rel=0.2)
        assert max(row["differences"].values()) < 1e-2
        assert {f"gradient of {name}" for name in ("W_enc", "W_dec", "b_enc", "b_dec")} <= set(
            row["differences"]
        )
    assert "auxiliary_reconstruction_loss" in sparse["differences"]
    assert sparse["checked"]

    last_line = [line for line in capsys.readouterr().out.splitlines() if "|" in line][-1]
    assert f"{stock['ms'] / sparse['ms']:.2f}x" in last_line

    report.main([str(out)])
    assert last_line in capsys.readouterr().out


def test_forward_appends_complete_rows(tmp_path: Path):
    rows = run_tiny(forward.main, tmp_path / "rows.jsonl")
    assert [(row["arm"], row["operation"]) for row in rows] == [
        (arm, operation)
        for arm in ("stock", "sparse")
        for operation in ("decode", "forward", "forward_backward")
    ]
    assert all(row.keys() >= KEYS | ENVIRONMENT and row["status"] == "ok" for row in rows)


def scale_encoder_gradient(sae: TrainingSAE[Any]) -> None:
    sae.W_enc.register_hook(lambda gradient: 1.1 * gradient)


def drop_auxk(sae: TrainingSAE[Any]) -> None:
    sae.cfg.aux_loss_coefficient = 0.0


def scale_mse(sae: TrainingSAE[Any]) -> None:
    sae.mse_loss_fn = lambda preds, target: 1.01 * (preds - target).square()


def freeze_b_dec(sae: TrainingSAE[Any]) -> None:
    sae.b_dec.register_hook(torch.zeros_like)


def forget_the_first_row(sae: TrainingSAE[Any]) -> None:
    forward_pass = sae.training_forward_pass

    def forgetful(step_input: TrainStepInput) -> TrainStepOutput:
        output = forward_pass(step_input=step_input)
        return replace(output, feature_acts=output.feature_acts.detach().to_dense()[1:])

    sae.training_forward_pass = forgetful  # pyright: ignore[reportAttributeAccessIssue]


def poison(sae: TrainingSAE[Any]) -> None:
    torch.nn.init.constant_(sae.b_dec, torch.nan)


@pytest.mark.parametrize(
    ("perturb", "named"),
    [
        (scale_encoder_gradient, "gradient of W_enc"),
        (drop_auxk, "auxiliary_reconstruction_loss"),
        (scale_mse, "mse_loss"),
        (freeze_b_dec, "change of b_dec"),
        (forget_the_first_row, "firing counts"),
        (poison, "reconstruction"),
    ],
)
def test_an_arm_that_trains_another_model_is_not_timed(
    tmp_path: Path, perturb: Callable[[TrainingSAE[Any]], None], named: str
):
    results = ResultsFile(tmp_path / "rows.jsonl", environment("cpu", "abc"))
    contest = train_step.StepContest(results, device="cpu", steps=1, warmup_train=5)
    perturbed = Arm("perturbed", "topk_sparse", prepare=perturb)
    contest.run(STEP_CASES["tiny"], FLOAT32, [STOCK, perturbed])
    stock, other = results.rows
    assert stock["status"] == "ok"
    assert (other["arm"], other["status"]) == ("perturbed", "disagrees")
    assert f"{named} is off by" in other["message"]
    assert "ms" not in other


def test_failing_arms_are_recorded_and_the_rest_go_on(tmp_path: Path):
    def run_out_of_memory(_: TrainingSAE[Any]) -> None:
        raise torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 1 GiB"
        )

    def fail(_: TrainingSAE[Any]) -> None:
        raise RuntimeError("no such kernel\nwith details")

    results = ResultsFile(tmp_path / "rows.jsonl", environment("cpu", "abc"))
    contest = train_step.StepContest(results, device="cpu", steps=1, warmup_train=0)
    large = Arm("stock", "topk", prepare=run_out_of_memory)
    broken = Arm("broken", "topk_sparse", prepare=fail)
    contest.run(STEP_CASES["tiny"], FLOAT32, [large, broken, SPARSE])
    assert [row["status"] for row in results.rows] == ["out of memory", "failed", "ok"]
    assert results.rows[0]["message"] == "CUDA out of memory. Tried to allocate 16.00 GiB."
    assert results.rows[1]["message"] == "RuntimeError: no such kernel"
    # Without stock's differences there is no bound to check against, and the table says so.
    assert not results.rows[2]["checked"]
