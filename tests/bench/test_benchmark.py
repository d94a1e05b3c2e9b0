import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput

from benchmarks import forward, report, train_step
from saelens_sparse.profile.cases import FLOAT32, SPARSE, STEP_CASES, STOCK, Arm, Case
from saelens_sparse.profile.data import COMMON_FEATURES, ActivationStream
from saelens_sparse.profile.measure import PHASES
from saelens_sparse.profile.trainers import build_sae, implementation_of
from saelens_sparse.profile.weights import calibrate, plant_features
from saelens_sparse.reports.results import ResultsFile, Row, environment
from tests.support.saes import make_stock, sparse_like

SIZES = {"architecture", "d_in", "d_sae", "k", "l0", "batch", "dead_fraction"}
KEYS = {"case", "precision", "operation", "arm"} | SIZES
ENVIRONMENT = {"device", "commit", "torch", "triton", "sae_lens", "python", "date", "machine"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a problem runs faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(case: str, out: Path, *more: str) -> list[str]:
    options = {"cases": case, "device": "cpu", "arms": "sparse", "steps": "2"}
    options |= {"warmup-train": "5", "commit": "abc", "out": str(out)}
    return [*(f"--{name}={value}" for name, value in options.items()), *more]


def run_tiny(main: Callable[[list[str]], int], case: str, out: Path, *more: str) -> list[Row]:
    assert main(arguments(case, out, *more)) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def step_contest(out: Path, **changes: Any) -> train_step.StepContest:
    results = ResultsFile(out, {**environment("cpu", "abc"), **changes})
    return train_step.StepContest(results, device="cpu", steps=1, warmup_train=2)


@pytest.mark.parametrize(
    ("case", "architecture", "active", "losses", "parameters"),
    [
        ("tiny", "topk", "k 4", {"auxiliary_reconstruction_loss"}, set[str]()),
        ("tiny_jumprelu", "jumprelu", "L0 4", {"l0_loss", "pre_act_loss"}, {"threshold"}),
    ],
)
def test_train_step_appends_complete_rows(
    case: str,
    architecture: str,
    active: str,
    losses: set[str],
    parameters: set[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "rows.jsonl"
    stock, sparse = run_tiny(train_step.main, case, out)
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

    assert report.main([str(out)]) == 0
    assert last_line in capsys.readouterr().out
    assert report.main([str(out), "--markdown"]) == 0
    assert f"| 32 -> 256, {active}, 64 | float32 | step |" in capsys.readouterr().out


def test_rows_older_than_the_second_architecture_are_of_topk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    old = {"case": "gemma2b", "precision": "float32", "operation": "step", "status": "ok"}
    old |= {"d_in": 2304, "d_sae": 65536, "k": 64, "batch": 4096, "checked": True}
    old |= {"device": "gpu", "date": "2026"}
    out = tmp_path / "rows.jsonl"
    out.write_text(
        "\n".join(json.dumps({**old, "arm": arm, "ms": 1.0}) for arm in ("stock", "sparse"))
    )
    report.main([str(out)])
    assert "2304 -> 65,536, k 64, 4096" in capsys.readouterr().out


@pytest.mark.parametrize("case", STEP_CASES.values(), ids=STEP_CASES)
def test_arms_train_the_architecture_of_the_case(case: Case):
    jumprelu = "jumprelu" in case.name or "sweep_l0" in case.name
    assert case.architecture == STOCK.architecture(case) == ("jumprelu" if jumprelu else "topk")
    assert SPARSE.architecture(case) == f"{case.architecture}_sparse"
    assert (case.k is None) == jumprelu == (case.l0 is not None)


def test_features_are_present_as_often_as_they_should_be():
    n, rows = 4 * COMMON_FEATURES, 4096
    stream = ActivationStream(8, n, features_per_row=60.0, device="cpu")
    # With one dimension for each feature and nothing else, a batch shows the code.
    stream.directions, stream.spread = torch.eye(n), torch.ones(n)
    stream.mean, stream.scale = torch.zeros(n), 1.0
    present = (stream.batch(rows, 0) > 0.05).float()
    rank = torch.arange(1, n + 1)
    expected = (60.0 / rank / (1 / rank).sum()).clamp(max=1.0)
    frequencies = present.mean(0)
    torch.testing.assert_close(frequencies[:50], expected[:50], rtol=0.15, atol=0.02)
    for first in range(0, n, COMMON_FEATURES // 2):
        part = slice(first, first + COMMON_FEATURES // 2)
        assert frequencies[part].sum() == pytest.approx(expected[part].sum().item(), rel=0.05)
    # No row gets the others' share.
    assert present[:, COMMON_FEATURES:].sum(1).std() < 1.3 * expected[COMMON_FEATURES:].sum().sqrt()
    assert torch.equal(stream.batch(64, 3), stream.batch(64, 3))


def test_features_are_planted_all_over_the_latents():
    case = STEP_CASES["tiny"]
    stream = ActivationStream(case.d_in, case.d_sae // 4, 4, "cpu")
    sae = build_sae(STOCK, case, FLOAT32, "cpu")
    untouched = sae.W_dec.detach().clone()
    plant_features(sae, stream)
    planted = (sae.W_dec != untouched).any(1).nonzero().squeeze(1)
    assert planted.numel() == case.d_sae // 4
    halves = (planted < case.d_sae // 2).float().mean().item()
    assert 0.3 < halves < 0.7
    # Every feature has its own latent, in the encoder as in the decoder.
    directions = torch.nn.functional.normalize(stream.spread * stream.directions, dim=-1)
    for weight in (sae.W_dec, sae.W_enc.T):
        latents = torch.nn.functional.normalize(weight[planted], dim=-1)
        assert (latents @ directions.T).argmax(1).unique().numel() == case.d_sae // 4


@pytest.mark.parametrize("l0", [2.0, 20.0])
def test_thresholds_are_calibrated_to_the_l0(l0: float):
    case = STEP_CASES["tiny_jumprelu"]
    stream = ActivationStream(case.d_in, case.d_sae, case.features_per_row, "cpu")
    batches = [stream.batch(case.batch, index) for index in range(2)]
    sae = cast(JumpReLUTrainingSAE, build_sae(STOCK, case, FLOAT32, "cpu"))
    plant_features(sae, stream)
    calibrate(sae, batches, l0)
    x = torch.cat(batches)
    active = sae.encode(x) > 0
    assert active.sum(-1).float().mean().item() == pytest.approx(l0, rel=0.01)
    assert sae.threshold.min() >= 0
    # The scale is the best one: the error is orthogonal to the reconstruction.
    recons = sae(x) - sae.b_dec
    assert (recons * (x - sae(x))).sum().abs() < 1e-2 * recons.square().sum()


@pytest.mark.parametrize("case", ["tiny", "tiny_jumprelu"])
def test_forward_appends_complete_rows(case: str, tmp_path: Path):
    rows = run_tiny(forward.main, case, tmp_path / "rows.jsonl")
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
def test_an_arm_that_trains_another_model_is_not_timed(
    tmp_path: Path, case: str, perturb: Callable[[TrainingSAE[Any]], None], named: str
):
    steps = step_contest(tmp_path / "rows.jsonl")
    perturbed = Arm("perturbed", sparse=True, prepare=perturb)
    steps.run(STEP_CASES[case], FLOAT32, [STOCK, perturbed])
    stock, other = steps.results.rows
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

    steps = step_contest(tmp_path / "rows.jsonl")
    large = Arm("stock", prepare=run_out_of_memory)
    broken = Arm("broken", sparse=True, prepare=fail)
    steps.run(STEP_CASES["tiny"], FLOAT32, [large, broken, SPARSE])
    rows = steps.results.rows
    assert [row["status"] for row in rows] == ["out of memory", "failed", "ok"]
    assert rows[0]["message"] == "CUDA out of memory. Tried to allocate 16.00 GiB."
    assert rows[1]["message"] == "RuntimeError: no such kernel"
    # Without stock's differences there is no bound to check against, and the table says so.
    assert not rows[2]["checked"]


def test_rows_name_what_runs_under_their_autocast() -> None:
    sae = sparse_like(make_stock(d_sae=200, k=6), "auto")
    assert implementation_of(sae, nullcontext()) == "torch"
    assert implementation_of(sae, torch.autocast("cpu", torch.bfloat16)) == "dense"
