"""What benchmarks record, and that only a contender that trains as stock does is timed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from benchmarks.__main__ import main
from benchmarks.cases import CASES
from benchmarks.contenders import SPARSE, STOCK, Contender
from benchmarks.harness import Session
from benchmarks.rows import Row
from saelens_sparse.profile.cases import FLOAT32
from saelens_sparse.profile.trace import PHASES

SIZES = {"architecture", "d_in", "d_sae", "k", "l0", "batch", "dead_fraction"}
KEYS = {"case", "precision", "operation", "arm"} | SIZES
ENVIRONMENT = {"device", "commit", "torch", "triton", "sae_lens", "python", "date", "machine"}


@pytest.mark.parametrize(
    ("case", "architecture", "active", "losses", "parameters"),
    [
        ("tiny", "topk", "k 4", {"auxiliary_reconstruction_loss"}, set[str]()),
        ("tiny_batchtopk", "batchtopk", "k 4", {"auxiliary_reconstruction_loss"}, set[str]()),
        (
            "tiny_matryoshka",
            "matryoshka_batchtopk",
            "k 4",
            {"auxiliary_reconstruction_loss", *(f"inner_mse_loss_{w}" for w in (8, 32, 128))},
            set[str](),
        ),
        ("tiny_jumprelu", "jumprelu", "L0 4", {"l0_loss", "pre_act_loss"}, {"threshold"}),
    ],
)
def test_train_step_appends_complete_rows(
    case: str,
    architecture: str,
    active: str,
    losses: set[str],
    parameters: set[str],
    run: Callable[..., list[Row]],
    out: Path,
    capsys: pytest.CaptureFixture[str],
):
    stock, sparse = run("step", case)
    assert (stock["arm"], sparse["arm"]) == ("stock", "sparse")
    assert (stock["implementation"], sparse["implementation"]) == (None, "torch")
    for row in (stock, sparse):
        assert row.keys() >= KEYS | ENVIRONMENT
        assert (row["status"], row["commit"]) == ("ok", "abc")
        assert row["architecture"] == architecture
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms"])
        assert row["phases_ms"].keys() == set(PHASES)
        assert sum(row["phases_ms"].values()) > 0
        assert row["firing"]["l0"] == pytest.approx(row["k"] or row["l0"], rel=0.15)
        assert max(row["differences"].values()) < 1e-2
        trained = {"W_enc", "W_dec", "b_enc", "b_dec"} | parameters
        assert row["differences"].keys() >= {f"gradient of {name}" for name in trained} | losses
    assert sparse["checked"]

    last_line = [line for line in capsys.readouterr().out.splitlines() if " -> " in line][-1]
    assert f"{stock['ms'] / sparse['ms']:.2f}x" in last_line
    assert f"32 -> 256, {active}, 64" in last_line

    assert main(["report", str(out)]) == 0
    assert last_line in capsys.readouterr().out
    assert main(["report", str(out), "--markdown"]) == 0
    assert f"| 32 -> 256, {active}, 64 | float32 | step |" in capsys.readouterr().out


@pytest.mark.parametrize("case", ["tiny", "tiny_batchtopk", "tiny_jumprelu"])
def test_forward_appends_complete_rows(case: str, run: Callable[..., list[Row]]):
    rows = run("forward", case)
    assert [(row["arm"], row["operation"]) for row in rows] == [
        (arm, operation)
        for arm in ("stock", "sparse")
        for operation in ("decode", "forward", "forward_backward")
    ]
    assert all(row.keys() >= KEYS | ENVIRONMENT and row["status"] == "ok" for row in rows)


def scale_encoder_gradient(sae: TrainingSAE[Any]) -> None:
    sae.W_enc.register_hook(lambda gradient: 1.1 * gradient)


def scale_threshold_gradient(sae: TrainingSAE[Any]) -> None:
    cast(JumpReLUTrainingSAE, sae).threshold.register_hook(lambda gradient: 1.1 * gradient)


def drop_l0_loss(sae: TrainingSAE[Any]) -> None:
    forward_pass = sae.training_forward_pass

    def without_sparsity(step_input: TrainStepInput) -> TrainStepOutput:
        return forward_pass(step_input=replace(step_input, coefficients={"l0": 0.0}))

    sae.training_forward_pass = without_sparsity  # pyright: ignore[reportAttributeAccessIssue]


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
    ("case", "perturb", "named"),
    [
        ("tiny", scale_encoder_gradient, "gradient of W_enc"),
        ("tiny", drop_auxk, "auxiliary_reconstruction_loss"),
        ("tiny", scale_mse, "mse_loss"),
        ("tiny", freeze_b_dec, "change of b_dec"),
        ("tiny", forget_the_first_row, "firing counts"),
        ("tiny", poison, "reconstruction"),
        ("tiny_jumprelu", scale_encoder_gradient, "gradient of W_enc"),
        ("tiny_jumprelu", scale_threshold_gradient, "gradient of threshold"),
        ("tiny_jumprelu", drop_l0_loss, "l0_loss"),
    ],
)
def test_a_contender_that_trains_another_model_is_not_timed(
    session: Callable[..., Session],
    case: str,
    perturb: Callable[[TrainingSAE[Any]], None],
    named: str,
):
    steps = session()
    perturbed = Contender("perturbed", sparse=True, prepare=perturb)
    steps.run(CASES[case], FLOAT32, [STOCK, perturbed])
    stock, other = steps.results.rows
    assert stock["status"] == "ok"
    assert (other["arm"], other["status"]) == ("perturbed", "disagrees")
    assert f"{named} is off by" in other["message"]
    assert "ms" not in other


def test_failing_contenders_are_recorded_and_the_rest_go_on(session: Callable[..., Session]):
    def run_out_of_memory(_: TrainingSAE[Any]) -> None:
        raise torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 16.00 GiB. GPU 0 has a total capacity of 1 GiB"
        )

    def fail(_: TrainingSAE[Any]) -> None:
        raise RuntimeError("no such kernel\nwith details")

    steps = session()
    large = Contender("stock", prepare=run_out_of_memory)
    broken = Contender("broken", sparse=True, prepare=fail)
    steps.run(CASES["tiny"], FLOAT32, [large, broken, SPARSE])
    rows = steps.results.rows
    assert [row["status"] for row in rows] == ["out of memory", "failed", "ok"]
    assert rows[0]["message"] == "CUDA out of memory. Tried to allocate 16.00 GiB."
    assert rows[1]["message"] == "RuntimeError: no such kernel"
    # Without stock's differences there is no bound to check against, and the table says so.
    assert not rows[2]["checked"]
