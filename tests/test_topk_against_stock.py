"""One training step, and several, against SAELens's own Top-K SAE.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is.
"""

import importlib
import itertools
from collections.abc import Callable
from copy import deepcopy
from math import sqrt
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepOutput

from saelens_sparse.lazy import SparseFeatureActs
from tests.conftest import Target, target_parameters
from tests.sae_helpers import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    PRECISIONS,
    Precision,
    Values,
    compare_steps,
    dead_mask,
    forward_pass,
    gradients,
    make_stock,
    make_trainer,
    on_cpu,
    require_within_budget,
    sparse_like,
    step_values,
    stock_like,
    target_precision_parameters,
    zipf_inputs,
)

OPTIONS = [
    pytest.param(
        {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": centre},
        id=f"{'rescaled' if rescale else 'raw'}-{'centred' if centre else 'uncentred'}",
    )
    for rescale, centre in itertools.product((True, False), repeat=2)
]
# The Triton path screens from 32 latents per selected one on.
D_IN, D_SAE, K = 13, 64, 2
N_DEAD = {"no-dead": 0, "few-dead": 3, "many-dead": 20, "all-dead": D_SAE}

every_target_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS)
)
not_interpreted = pytest.mark.parametrize("target", target_parameters(interpreted=False))
every_option = pytest.mark.parametrize("options", OPTIONS)
all_or_no_options = pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]])


@pytest.mark.parametrize("dead", N_DEAD)
@every_option
@every_target_precision
def test_step(target: Target, precision: Precision, options: dict[str, Any], dead: str) -> None:
    stock = make_stock(
        d_in=D_IN, d_sae=D_SAE, k=K, dtype=precision.dtype, device=target.device, **options
    )
    sparse = sparse_like(stock, target.backend)
    assert sparse.implementation.name == target.backend
    mask = dead_mask(stock, N_DEAD[dead])
    x = zipf_inputs(stock, target.few_rows(40), mask)
    if target.backend == "triton":
        assert select_triton().can_screen(x, stock.W_enc.T, K)
    compare_steps(stock, sparse, x, mask, precision)


@every_option
@every_target_precision
def test_step_with_input_gradient(
    target: Target, precision: Precision, options: dict[str, Any]
) -> None:
    stock = make_stock(
        d_in=D_IN, d_sae=D_SAE, k=K, dtype=precision.dtype, device=target.device, **options
    )
    dead = dead_mask(stock, N_DEAD["many-dead"])
    x = zipf_inputs(stock, target.few_rows(40), dead)
    sparse = sparse_like(stock, target.backend)
    compare_steps(stock, sparse, x, dead, precision, input_gradient=True)


def test_step_without_a_mask_of_dead_latents(backend: str, device: torch.device) -> None:
    stock = make_stock(device=str(device))
    compare_steps(stock, sparse_like(stock, backend), zipf_inputs(stock, 9), None, FLOAT32)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("input_gradient", [False, True], ids=["constant-input", "input-gradient"])
@every_target_precision
def test_step_with_run_time_normalization(
    target: Target, precision: Precision, normalize: str, input_gradient: bool
) -> None:
    stock = make_stock(dtype=precision.dtype, device=target.device, normalize_activations=normalize)
    x = zipf_inputs(stock, target.few_rows(20))
    sparse = sparse_like(stock, target.backend)
    compare_steps(stock, sparse, x, None, precision, input_gradient=input_gradient)


@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
def test_auxk_refuses_run_time_normalization_as_stock_does(normalize: str) -> None:
    stock = make_stock(normalize_activations=normalize)
    x, dead = zipf_inputs(stock, 20), dead_mask(stock, 3)
    messages = []
    for sae in (stock, sparse_like(stock)):
        with pytest.raises(ValueError, match="does not support activation normalization") as raised:
            forward_pass(sae, x, dead)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("shape", "n_rows"),
    [
        ({"k": 1}, 20),
        ({"k": 7}, 20),
        ({"k": 48}, 20),
        ({"d_in": 1, "k": 3}, 20),
        ({"d_in": 7, "d_sae": 37, "k": 3}, 20),
        ({"d_sae": 1, "k": 1}, 20),
        ({}, 1),
        ({}, 129),
    ],
    ids=["k=1", "k=7", "k=d_sae", "d_in=1", "odd-widths", "d_sae=1", "one-row", "129-rows"],
)
@all_or_no_options
def test_shapes(
    target: Target, shape: dict[str, Any], n_rows: int, options: dict[str, Any]
) -> None:
    stock = make_stock(**shape, **options, device=target.device)
    n_dead = min(20, stock.cfg.d_sae)
    if stock.cfg.d_in == 1:
        n_dead = 0  # SAELens's k_aux = d_in // 2 is 0 there, and its scale a division by zero.
    compare_steps(
        stock,
        sparse_like(stock, target.backend),
        zipf_inputs(stock, target.few_rows(n_rows)),
        dead_mask(stock, n_dead),
        FLOAT32,
        input_gradient=True,
    )


def everywhere_active(stock: TopKTrainingSAE) -> None:
    stock.b_enc[7] = 50.0


def mostly_clipped(stock: TopKTrainingSAE) -> None:
    stock.b_enc.sub_(2.5)


def entirely_clipped(stock: TopKTrainingSAE) -> None:
    stock.b_enc.sub_(1e4)


@pytest.mark.parametrize("change", [everywhere_active, mostly_clipped, entirely_clipped])
@all_or_no_options
@every_target_precision
def test_activation_patterns(
    target: Target,
    precision: Precision,
    options: dict[str, Any],
    change: Callable[[TopKTrainingSAE], None],
) -> None:
    stock = make_stock(k=20, dtype=precision.dtype, device=target.device, **options)
    dead = dead_mask(stock, 20)
    x = zipf_inputs(stock, target.few_rows(40), dead)
    with torch.no_grad():
        change(stock)
    l0 = stock.encode(x).bool().sum(-1)
    shows_pattern = {
        "everywhere_active": (stock.encode(x)[:, 7] > 0).all(),
        "mostly_clipped": 0 < l0.float().mean() < stock.cfg.k - 1,
        "entirely_clipped": (l0 == 0).all(),
    }
    assert shows_pattern[change.__name__]
    compare_steps(
        stock,
        sparse_like(stock, target.backend),
        x,
        dead,
        precision,
        input_gradient=True,
    )


@every_option
@every_target_precision
def test_ties(target: Target, precision: Precision, options: dict[str, Any]) -> None:
    """Latents in identical pairs tie exactly, and an odd k splits a pair in every row.

    Which one of a pair is kept is arbitrary; what both arms must share is all that does not
    depend on it: losses, values, the reconstruction, and gradients summed over each pair.
    """
    stock = make_stock(dtype=precision.dtype, device=target.device, **options)
    with torch.no_grad():
        for parameter in (stock.W_dec, stock.W_enc.T, stock.b_enc):
            parameter[1::2] = parameter[::2]
    dead = dead_mask(stock, 20)
    dead[1::2] = dead[::2]
    x = zipf_inputs(stock, target.few_rows(40), dead, n_selected=stock.cfg.k + 1)

    def values(sae: TopKTrainingSAE, autocast: bool = False) -> Values:
        result = step_values(sae, x, dead, autocast=autocast, input_gradient=True)
        for name in ("W_dec", "b_enc"):
            gradient = result[f"gradient of {name}"]
            result[f"gradient of {name}"] = gradient[::2] + gradient[1::2]
        gradient = result["gradient of W_enc"]
        result["gradient of W_enc"] = gradient[:, ::2] + gradient[:, 1::2]
        return result

    if precision == FLOAT64:
        precision = FLOAT32
        stock = stock_like(stock, torch.float32)
    require_within_budget(
        values(sparse_like(stock, target.backend), precision.autocast),
        values(stock, precision.autocast),
        values(stock_like(stock)),
        precision.eps,
    )


def select_triton() -> ModuleType:
    return importlib.import_module("saelens_sparse.ops.select_triton")


def random_objective(*names: str) -> Callable[[TrainStepOutput], torch.Tensor]:
    """A loss that reads tensors of the step's output with fixed random weights."""

    def objective(output: TrainStepOutput) -> torch.Tensor:
        total = torch.zeros((), dtype=output.sae_out.dtype, device=output.sae_out.device)
        for name in names:
            value = getattr(output, name)
            generator = torch.Generator().manual_seed(len(name))
            weights = torch.randn(value.shape, generator=generator).bfloat16()
            total = total + (value * weights.to(value)).sum()
        return total

    return objective


@pytest.mark.parametrize("input_gradient", [False, True], ids=["constant-input", "input-gradient"])
@pytest.mark.parametrize(
    "names",
    [("feature_acts", "sae_out"), ("hidden_pre",)],
    ids="+".join,
)
@every_option
@every_target_precision
def test_random_upstream_gradients(
    target: Target,
    precision: Precision,
    options: dict[str, Any],
    names: tuple[str, ...],
    input_gradient: bool,
) -> None:
    stock = make_stock(
        d_in=D_IN, d_sae=D_SAE, k=K, dtype=precision.dtype, device=target.device, **options
    )
    compare_steps(
        stock,
        sparse_like(stock, target.backend),
        zipf_inputs(stock, target.few_rows(40)),
        None,
        precision,
        input_gradient=input_gradient,
        objective=random_objective(*names),
    )


@all_or_no_options
def test_each_loss_term_alone(target: Target, options: dict[str, Any]) -> None:
    """Gradients of the terms apart, in one graph, add up to the gradient of the loss."""
    stock = make_stock(device=target.device, **options)
    sparse = sparse_like(stock, target.backend)
    x, dead = zipf_inputs(stock, target.few_rows(40)), dead_mask(stock, 20)
    terms = ("mse_loss", "auxiliary_reconstruction_loss")
    for term in terms:
        compare_steps(
            stock, sparse, x, dead, FLOAT32, objective=lambda output, term=term: output.losses[term]
        )

    whole = step_values(sparse, x, dead)
    for order in (terms, terms[::-1]):
        sparse.zero_grad()
        output = forward_pass(sparse, x, dead)
        for term in order:
            output.losses[term].backward(retain_graph=True)
        apart = on_cpu(gradients(sparse))
        for name, value in apart.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_of_single_parameters(target: Target) -> None:
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    x, dead = zipf_inputs(stock, target.few_rows(40)), dead_mask(stock, 20)
    whole = step_values(sparse, x, dead)
    for name, parameter in sparse.named_parameters():
        loss = forward_pass(sparse, x, dead).loss
        (gradient,) = torch.autograd.grad(loss, [parameter])
        torch.testing.assert_close(
            gradient.double().cpu(), whole[f"gradient of {name}"], rtol=0, atol=0, msg=name
        )


def test_frozen_parameters_get_no_gradient(target: Target) -> None:
    names = [name for name, _ in make_stock().named_parameters()]
    for frozen in names:
        stock = make_stock(device=target.device)
        sparse = sparse_like(stock, target.backend)
        for sae in (stock, sparse):
            getattr(sae, frozen).requires_grad_(False)
        x, dead = zipf_inputs(stock, 8), dead_mask(stock, 20)
        compare_steps(stock, sparse, x, dead, FLOAT32)
        assert getattr(sparse, frozen).grad is None


def test_gradients_accumulate(target: Target) -> None:
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    batches = [zipf_inputs(stock, target.few_rows(20)) for _ in range(2)]
    dead = dead_mask(stock, 20)
    single = [step_values(sparse, x, dead) for x in batches]
    sparse.zero_grad()
    for x in batches:
        forward_pass(sparse, x, dead).loss.backward()
    for name, value in on_cpu(gradients(sparse)).items():
        expected = single[0][name] + single[1][name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@all_or_no_options
def test_bad_activations_surface_as_in_stock(
    target: Target, options: dict[str, Any], bad: float
) -> None:
    stock = make_stock(device=target.device, **options)
    x = zipf_inputs(stock, target.few_rows(20))
    x[3, 2] = bad
    outputs, trainers = {}, {}
    for name, sae in {"stock": stock, "sparse": sparse_like(stock, target.backend)}.items():
        trainers[name] = trainer = make_trainer(sae)
        trainer.n_forward_passes_since_fired[:20] = 10**6
        outputs[name] = trainer.step(x)
        assert not torch.isfinite(outputs[name].loss)
        assert all(not torch.isfinite(p).all() for p in sae.parameters())
    bad_rows = {name: ~torch.isfinite(out.sae_out).all(-1) for name, out in outputs.items()}
    assert torch.equal(bad_rows["stock"], bad_rows["sparse"])
    assert bad_rows["sparse"].nonzero().flatten().tolist() == [3]
    counts = {name: trainer.act_freq_scores.sum() for name, trainer in trainers.items()}
    assert counts["stock"] == counts["sparse"]


def test_a_row_of_nan_weights_surfaces(target: Target) -> None:
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    with torch.no_grad():
        sparse.W_enc[:, 5] = float("nan")
    assert torch.isnan(forward_pass(sparse, zipf_inputs(stock, target.few_rows(20))).loss)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (0,)], ids=str)
@all_or_no_options
def test_any_leading_shape(target: Target, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    stock = make_stock(device=target.device, dtype=torch.float32, **options)
    sparse = sparse_like(stock, target.backend)
    rows = zipf_inputs(stock, max(1, torch.Size(shape).numel()))
    x = rows[: torch.Size(shape).numel()].reshape(*shape, stock.cfg.d_in)
    for method in (stock.encode, stock.forward, lambda x: stock.decode(stock.encode(x))):
        expected = method(x)
        actual = {
            "encode": sparse.encode,
            "forward": sparse.forward,
        }.get(getattr(method, "__name__", ""), lambda x: sparse.decode(sparse.encode(x)))(x)
        assert actual.shape == expected.shape
        assert type(actual) is torch.Tensor
        torch.testing.assert_close(actual, expected)
    feature_acts, hidden_pre = sparse.encode_with_hidden_pre(x)
    expected_acts, expected_pre = stock.encode_with_hidden_pre(x)
    assert feature_acts.shape == expected_acts.shape == hidden_pre.shape
    torch.testing.assert_close(feature_acts.clone(), expected_acts)
    torch.testing.assert_close(hidden_pre.clone(), expected_pre)
    torch.testing.assert_close(sparse.decode(feature_acts), stock.decode(expected_acts))


@not_interpreted
def test_small_screen_buffer_gives_the_same_step(target: Target) -> None:
    """One MiB holds at most 8 of the 19 rows, and the last chunk is partial."""
    stock = make_stock(device=target.device, d_in=5, d_sae=2**16, k=3)
    sparse = sparse_like(stock, target.backend, screen_buffer_mib=1)
    dead = dead_mask(stock, 20)
    compare_steps(stock, sparse, zipf_inputs(stock, 19), dead, FLOAT32)


def trajectory(sae: TopKTrainingSAE, batches: list[torch.Tensor], **trainer_options: Any) -> Values:
    trainer = make_trainer(sae, dead_feature_window=3, lr=3e-3, **trainer_options)
    losses: dict[str, list[torch.Tensor]] = {}
    n_dead = []
    for batch in batches:
        n_dead.append(trainer.dead_neurons.sum())
        output = trainer.step(batch.to(sae.dtype))
        trainer.n_training_steps += 1
        for name, loss in {"loss": output.loss, **output.losses}.items():
            losses.setdefault(name, []).append(loss.detach())
    return on_cpu(
        {
            **{name: torch.stack(values) for name, values in losses.items()},
            **{f"final {name}": parameter for name, parameter in sae.named_parameters()},
            "n_dead": torch.stack(n_dead),
            "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
            "act_freq_scores": trainer.act_freq_scores,
        }
    )


@all_or_no_options
def test_trainer_steps_stay_together(target: Target, options: dict[str, Any]) -> None:
    dtype = torch.float64 if torch.float64 in target.dtypes else torch.float32
    n_steps = 25 if dtype == torch.float64 else 6
    stock = make_stock(device=target.device, dtype=dtype, **options)
    batches = [zipf_inputs(stock, 32) for _ in range(n_steps - 1)] + [zipf_inputs(stock, 17)]
    sparse = trajectory(sparse_like(stock, target.backend), batches)
    oracle = trajectory(stock_like(stock), batches)
    yardstick = trajectory(stock_like(stock, torch.float32), batches)

    assert oracle["n_dead"].max() > 0, "no latent died, so AuxK was not tested"
    assert oracle["auxiliary_reconstruction_loss"].max() > 0
    for name in ("n_dead", "n_forward_passes_since_fired", "act_freq_scores"):
        assert torch.equal(sparse[name], oracle[name]), name
    factor = 2.0
    if dtype == torch.float64:
        shrink = FLOAT64.eps / FLOAT32.eps
        yardstick = {
            name: oracle[name] + shrink * (value - oracle[name])
            for name, value in yardstick.items()
        }
        factor = 3.0
    require_within_budget(sparse, yardstick, oracle, torch.finfo(dtype).eps, factor)


@all_or_no_options
@pytest.mark.parametrize(("target", "precision"), target_precision_parameters(BFLOAT16, AUTOCAST))
def test_trainer_steps_in_low_precision(
    target: Target, precision: Precision, options: dict[str, Any]
) -> None:
    """Ten steps drift from float64 at most twice as far as stock's, for the mean of the losses."""
    stock = make_stock(
        d_in=32, d_sae=256, k=8, dtype=precision.dtype, device=target.device, **options
    )
    batches = [zipf_inputs(stock, 256) for _ in range(10)]
    oracle = trajectory(stock_like(stock), batches)
    # Before stock is trained in place.
    sparse = sparse_like(stock, target.backend)
    expected, actual = (
        trajectory(sae, batches, autocast=precision.autocast) for sae in (stock, sparse)
    )
    assert oracle["auxiliary_reconstruction_loss"].max() > 0
    names = ["loss", "mse_loss", "auxiliary_reconstruction_loss", "act_freq_scores"]
    names += [name for name in oracle if name.startswith("final ")]
    actual, expected, oracle = (
        {name: values[name] for name in names} for values in (actual, expected, oracle)
    )
    require_within_budget(actual, expected, oracle, precision.eps)


def test_gradients_lie_in_memory_as_their_parameters(target: Target) -> None:
    """Autograd would copy them otherwise."""
    sparse = sparse_like(make_stock(device=target.device), target.backend)
    forward_pass(sparse, zipf_inputs(sparse, 9), dead_mask(sparse, 20)).loss.backward()
    assert sparse.W_enc.T.is_contiguous()
    for name, parameter in sparse.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.default_algorithms
@every_target_precision
def test_the_same_step_gives_the_same_bits(target: Target, precision: Precision) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        shape: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "k": K}
        if not target.interpreted:
            shape = {"d_in": 32, "d_sae": 512, "k": 16}
        stock = make_stock(**shape, dtype=precision.dtype, device=target.device)
        x, dead = zipf_inputs(stock, target.few_rows(512)), dead_mask(stock, 30)
        repeats = [
            step_values(
                sparse_like(stock, target.backend),
                x,
                dead,
                autocast=precision.autocast,
                input_gradient=True,
            )
            for _ in range(2)
        ]
    finally:
        torch.set_num_threads(n_threads)
    for name, value in repeats[0].items():
        assert torch.equal(value, repeats[1][name]), name


@pytest.mark.parametrize("dead", N_DEAD)
@every_option
def test_dense_implementation_is_stock_bit_for_bit(options: dict[str, Any], dead: str) -> None:
    stock = make_stock(**options)
    dense = sparse_like(stock, "dense")
    assert dense.implementation.name == "dense"
    x, mask = zipf_inputs(stock, 40), dead_mask(stock, min(N_DEAD[dead], stock.cfg.d_sae))
    assert type(forward_pass(dense, x, mask).feature_acts) is torch.Tensor
    expected, actual = (step_values(sae, x, mask, input_gradient=True) for sae in (stock, dense))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    batches = [zipf_inputs(stock, 32) for _ in range(5)]
    expected, actual = trajectory(stock, batches), trajectory(dense, batches)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


def test_auto_uses_dense_products_where_most_latents_are_active() -> None:
    stock = make_stock(d_sae=48, k=7)
    sparse = sparse_like(stock, "auto")
    assert sparse.implementation.name == "dense"
    assert "active" in sparse.implementation.reason
    stock = make_stock(d_sae=48, k=6)
    sparse = sparse_like(stock, "auto")
    assert sparse.implementation.name == "torch"
    assert isinstance(forward_pass(sparse, zipf_inputs(stock, 4)).feature_acts, SparseFeatureActs)


def structured_batches(n_steps: int, n_rows: int, d_in: int) -> list[torch.Tensor]:
    """Sparse sums of 64 random directions with Zipf-like frequencies, and a little noise."""
    directions = torch.nn.functional.normalize(torch.randn(64, d_in), dim=-1)
    presence = (torch.arange(1, 65) ** -0.7).clamp(max=0.9)
    batches = []
    for _ in range(n_steps):
        strengths = (torch.rand(n_rows, 64) < presence) * (0.5 * torch.randn(n_rows, 64)).exp()
        batches.append(strengths @ directions + 0.02 * torch.randn(n_rows, d_in))
    return batches


def training_curve(
    sae: TopKTrainingSAE, batches: list[torch.Tensor], autocast: bool
) -> dict[str, float]:
    """First loss, and the mean of each metric over the last quarter of the steps."""
    n_steps, n_rows = len(batches), len(batches[0])
    trainer = make_trainer(
        sae,
        total_training_samples=n_steps * n_rows,
        train_batch_size_samples=n_rows,
        dead_feature_window=30,
        autocast=autocast,
    )
    logs = []
    for x in batches:
        output = trainer.step(x)
        trainer.n_training_steps += 1
        logs.append(trainer.build_train_step_log_dict(output, trainer.n_training_samples))
    last = logs[-(n_steps // 4) :]
    return {
        "first mse": logs[0]["losses/mse_loss"],
        "mse": fmean(log["losses/mse_loss"] for log in last),
        "aux": fmean(log["losses/auxiliary_reconstruction_loss"] for log in last),
        "l0": fmean(log["metrics/l0"] for log in last),
        "explained variance": fmean(log["metrics/explained_variance"] for log in last),
        "dead latents": fmean(log["sparsity/dead_features"] for log in last),
    }


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
    ("autocast", "n_seeds"), [(False, 2), (True, 12)], ids=["float32", "autocast"]
)
@not_interpreted
def test_training_curves_coincide(target: Target, autocast: bool, n_seeds: int) -> None:
    d_in, d_sae = 64, 128
    curves: dict[str, list[dict[str, float]]] = {"stock": [], "reordered": [], "sparse": []}
    for seed in range(n_seeds):
        torch.manual_seed(seed)
        batches = structured_batches(n_steps=200, n_rows=128, d_in=d_in)
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
            curves[name].append(training_curve(sae, batches, autocast))
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
