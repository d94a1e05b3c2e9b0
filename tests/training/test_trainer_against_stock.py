"""Several steps in SAELens's own trainer, and whole trainings, beside SAELens's own SAEs."""

from copy import deepcopy
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

from tests.conftest import Target
from tests.support.architectures import (
    ALL_OR_NO_OPTIONS,
    NOT_INTERPRETED,
    Subject,
    subjects,
)
from tests.support.jumprelu import MODES, every_fast_path, make_case, make_jumprelu, sparse_jumprelu
from tests.support.saes import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    Precision,
    make_stock,
    not_interpreted,
    require_within_budget,
    shrunk_to_float64,
    sparse_like,
    stock_like,
    superposed_rows,
    zipf_inputs,
)
from tests.support.trainers import make_trainer, structured_batches, training_curve, trajectory

COUNTS = ("l0", "n_dead", "n_forward_passes_since_fired", "act_freq_scores")


@pytest.mark.parametrize("options", ALL_OR_NO_OPTIONS.values(), ids=ALL_OR_NO_OPTIONS)
def test_topk_steps_stay_together(target: Target, options: dict[str, Any]) -> None:
    dtype = torch.float64 if torch.float64 in target.dtypes else torch.float32
    n_steps = 25 if dtype == torch.float64 else 6
    stock = make_stock(device=target.device, dtype=dtype, **options)
    n_rows = target.few_rows(32)
    batches = [zipf_inputs(stock, n_rows) for _ in range(n_steps - 1)]
    batches.append(zipf_inputs(stock, n_rows // 2 + 1))
    sparse = trajectory(sparse_like(stock, target.backend), batches)
    oracle = trajectory(stock_like(stock), batches)
    yardstick = trajectory(stock_like(stock, torch.float32), batches)

    assert oracle["n_dead"].max() > 0, "no latent died, so AuxK was not tested"
    assert oracle["auxiliary_reconstruction_loss"].max() > 0
    for name in COUNTS:
        assert torch.equal(sparse[name], oracle[name]), name
    factor = 2.0
    if dtype == torch.float64:
        yardstick = shrunk_to_float64(yardstick, oracle)
        factor = 3.0
    require_within_budget(sparse, yardstick, oracle, torch.finfo(dtype).eps, factor)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({**MODES["step"], "l0_coefficient": 0.1}, id="step"),
        pytest.param({**MODES["tanh"], "jumprelu_ste_to_input": True}, id="tanh-ste"),
        pytest.param({**MODES["quadratic"], "l0_coefficient": 0.1}, id="quadratic"),
        pytest.param({"l0_warm_up_steps": 7, "l0_coefficient": 3.0}, id="warm-up"),
        pytest.param({"apply_b_dec_to_input": False}, id="uncentred"),
    ],
)
@every_fast_path
def test_jumprelu_steps_stay_together(target: Target, options: dict[str, Any]) -> None:
    dtype = torch.float64 if torch.float64 in target.dtypes else torch.float32
    n_steps = 20 if dtype == torch.float64 else 6
    stock = make_jumprelu(
        device=target.device,
        dtype=dtype,
        jumprelu_bandwidth=0.2,
        pre_act_loss_coefficient=0.03,
        **options,
    )
    with torch.no_grad():
        # Some latents cross zero, where thresholds are clamped; some are dead.
        stock.threshold[::3] = 1e-3
        stock.b_enc[::5] = -30.0
    batches = [superposed_rows(stock, 32) for _ in range(n_steps - 1)]
    batches.append(superposed_rows(stock, 17))
    sparse = trajectory(sparse_jumprelu(stock, target.backend), batches)
    oracle = trajectory(stock_like(stock), batches)
    yardstick = trajectory(stock_like(stock, torch.float32), batches)

    assert oracle["n_dead"].max() > 0, "no latent died"
    assert oracle["pre_act_loss"].max() > 0
    assert (oracle["lowest threshold"] < 0).any(), "no threshold had to be clamped"
    for values in (sparse, oracle, yardstick):
        # One value of a vector whose rounding is judged as a whole.
        del values["lowest threshold"]
    if "l0_warm_up_steps" in options:
        assert oracle["l0_loss"][0] == 0 < oracle["l0_loss"][5]
    for name in COUNTS:
        assert torch.equal(sparse[name], oracle[name]), name
    if dtype == torch.float64:
        # Thresholds are float32 in stock, whatever the dtype of the rest: no two runs are
        # nearer than that.
        yardstick = shrunk_to_float64(yardstick, oracle)
    require_within_budget(sparse, yardstick, oracle, FLOAT32.eps)


@pytest.mark.pairwise
@subjects(NOT_INTERPRETED, precisions=(BFLOAT16, AUTOCAST), options="few")
def test_steps_in_low_precision(
    subject: Subject, precision: Precision, options: dict[str, Any]
) -> None:
    """Ten steps drift from float64 at most twice as far as stock's, for the mean of the losses."""
    stock = subject.stock(precision, d_in=32, d_sae=256, **options)
    with torch.no_grad():
        stock.b_enc[::8] = -30.0  # dead, for the loss that revives them
    batches = [superposed_rows(stock, 256) for _ in range(10)]
    oracle = trajectory(stock_like(stock), batches)
    # Before stock is trained in place.
    sparse = subject.sparse(stock)
    expected, actual = (
        trajectory(sae, batches, autocast=precision.autocast) for sae in (stock, sparse)
    )
    losses = [value for name, value in oracle.items() if name.endswith("_loss")]
    assert all(value.max() > 0 for value in losses), "a term of the loss was not tested"
    left_out = ("n_dead", "n_forward_passes_since_fired", "lowest threshold")
    actual, expected, oracle = (
        {name: value for name, value in values.items() if name not in left_out}
        for values in (actual, expected, oracle)
    )
    require_within_budget(actual, expected, oracle, precision.eps)


@every_fast_path
def test_thresholds_below_zero_are_clamped_at_the_next_step_as_in_stock(target: Target) -> None:
    stock, x = make_case(target)
    sparse = sparse_jumprelu(stock, target.backend)
    for sae in (stock, sparse):
        trainer = make_trainer(sae, lr=1.0)
        trainer.step(x)
        below = sae.threshold < 0
        assert below.any()
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        trainer.step(x)
        assert (sae.threshold[below] == 0).all()
        assert (sae.threshold >= 0).all()
    torch.testing.assert_close(sparse.threshold, stock.threshold, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("second", ["stock", "sparse"])
@pytest.mark.parametrize("first", ["stock", "sparse"])
@subjects(NOT_INTERPRETED)
def test_checkpoint_continues_bit_for_bit_or_to_rounding(
    subject: Subject, first: str, second: str, tmp_path: Path
) -> None:
    """Four steps, a checkpoint, four more; against eight steps in one go."""
    # Rounding to float32 moves gates within eight steps. Thresholds and their moments stay in it.
    if torch.float64 not in subject.target.dtypes:
        pytest.skip("rounding to float32 moves gates within eight steps")
    precision, tolerance, of_moments = FLOAT64, 1e-6, 1e-5
    stock = subject.stock(precision)
    batches = [superposed_rows(stock, 32) for _ in range(8)]
    settings = {
        "dead_feature_window": 2, "total_training_samples": 256, "lr_decay_steps": 6,
        "train_batch_size_samples": 32,
    }  # fmt: skip

    def make(name: str) -> Any:
        return stock_like(stock, precision.dtype) if name == "stock" else subject.sparse(stock)

    def train(trainer: Any, batches: list[torch.Tensor]) -> None:
        for x in batches:
            trainer.step(x)
            trainer.n_training_steps += 1

    whole = make_trainer(make(first), **settings)
    train(whole, batches)
    half = make_trainer(make(first), **settings)
    train(half, batches[:4])
    half.save_checkpoint("half", base_path=tmp_path)

    sae = make(second)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
    resumed = make_trainer(sae, **settings)
    resumed.load_trainer_state(tmp_path / "half")
    sae.load_weights_from_checkpoint(tmp_path / "half")
    for name, value in half.sae.named_parameters():
        assert torch.equal(getattr(sae, name), value), name
    assert resumed.n_training_steps == 4
    assert resumed.get_coefficients() == half.get_coefficients()
    assert torch.equal(resumed.act_freq_scores, half.act_freq_scores)
    train(resumed, batches[4:])

    # Nothing is rounded otherwise, unless what ran before decides what runs next.
    if first == second and subject.target.backend != "fused":
        tolerance, of_moments = 0, 0
    for name, expected in whole.sae.named_parameters():
        parameter = getattr(sae, name)
        assert (parameter - expected).norm() <= tolerance * expected.norm(), name
        state, expected_state = resumed.optimizer.state[parameter], whole.optimizer.state[expected]
        assert state["step"] == expected_state["step"] == 8
        for moment in ("exp_avg", "exp_avg_sq"):
            distance = (state[moment] - expected_state[moment]).norm()
            assert distance <= of_moments * expected_state[moment].norm(), (name, moment)
            if second == "sparse":
                assert state[moment].stride() == parameter.stride(), (name, moment)
    if second == "sparse":
        assert sae.W_enc.T.is_contiguous()
    assert torch.equal(resumed.act_freq_scores, whole.act_freq_scores)
    assert resumed.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()


def last_quarter(logs: list[dict[str, Any]]) -> dict[str, float]:
    """First loss, and the mean of each metric over the last quarter of the steps."""
    names = {
        "mse": "losses/mse_loss",
        "aux": "losses/auxiliary_reconstruction_loss",
        "l0": "metrics/l0",
        "explained variance": "metrics/explained_variance",
        "dead latents": "sparsity/dead_features",
    }
    last = logs[-(len(logs) // 4) :]
    means = {short: fmean(log[name] for log in last) for short, name in names.items()}
    return {"first mse": logs[0]["losses/mse_loss"], **means}


def with_latents_reordered(stock: TopKTrainingSAE) -> TopKTrainingSAE:
    """The same function; only the order of sums differs."""
    sae = deepcopy(stock)
    order = torch.randperm(sae.cfg.d_sae, device=sae.W_dec.device)
    with torch.no_grad():
        sae.W_enc.copy_(stock.W_enc[:, order])
        sae.W_dec.copy_(stock.W_dec[order])
        sae.b_enc.copy_(stock.b_enc[order])
    return sae


# Under autocast two runs of the same stock SAE, with its latents in another order, end half a
# percent apart, so that only means over seeds tell anything.
@pytest.mark.parametrize(
    ("autocast", "n_seeds", "n_steps"),
    [(False, 2, 200), (True, 12, 100)],
    ids=["float32", "autocast"],
)
@not_interpreted
def test_training_curves_of_topk_coincide(
    target: Target, autocast: bool, n_seeds: int, n_steps: int
) -> None:
    d_in, d_sae = 64, 128
    curves: dict[str, list[dict[str, float]]] = {"stock": [], "reordered": [], "sparse": []}
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        batches = structured_batches(n_steps=n_steps, n_rows=128, d_in=d_in)
        # SAELens's own initialisation.
        stock = TopKTrainingSAE(
            TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=8, device=target.device)
        )
        arms = {
            "sparse": sparse_like(stock, target.backend),
            "reordered": with_latents_reordered(stock),
            "stock": stock,
        }
        for name, sae in arms.items():
            logs = training_curve(sae, batches, autocast=autocast)
            curves[name].append(last_quarter(logs))
    mean = {
        arm: {name: fmean(curve[name] for curve in of_arm) for name in of_arm[0]}
        for arm, of_arm in curves.items()
    }
    for arm, values in mean.items():
        print(arm, values)
    sparse, stock_mean = mean["sparse"], mean["stock"]
    assert stock_mean["mse"] < 0.5 * stock_mean["first mse"], "training did not get anywhere"
    assert stock_mean["aux"] > 0 and stock_mean["dead latents"] > 5, "AuxK was not tested"
    tolerance = 1e-4 * stock_mean["mse"]
    if autocast:
        strays = [
            reordered["mse"] - plain["mse"]
            for reordered, plain in zip(curves["reordered"], curves["stock"], strict=True)
        ]
        # Three standard errors of the mean difference between runs that differ by rounding.
        tolerance = 3 * sqrt(fmean(stray**2 for stray in strays) / n_seeds)
        assert tolerance < 0.015 * stock_mean["mse"], "the comparison would not tell anything"
    assert sparse["mse"] == pytest.approx(stock_mean["mse"], abs=tolerance)
    assert sparse["l0"] == pytest.approx(stock_mean["l0"], rel=0.001)
    assert sparse["explained variance"] == pytest.approx(
        stock_mean["explained variance"], abs=0.005
    )
    assert sparse["dead latents"] == pytest.approx(stock_mean["dead latents"], abs=5)
