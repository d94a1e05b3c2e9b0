"""Ghost gradients in every architecture: the formula's loss and gradients, and whose they are.

The oracle is stock in float64 whose dead latents are trained by the formula, with autograd.
"""

from typing import Any

import pytest
import torch

from saelens_sparse.codes.on_demand import OnDemandTensor
from tests.support.architectures import EVERYWHERE, NOT_INTERPRETED, ON_CPU, Subject, subjects
from tests.support.ghost import GHOST_LOSS, compare_ghost_steps, require_formula, with_ghosts
from tests.support.saes import (
    AUTOCAST,
    FLOAT32,
    FLOAT64,
    N_DEAD,
    PRECISIONS,
    Precision,
    dead_mask,
    error,
    forward_pass,
    gradients,
    input_or_not,
    on_cpu,
    record_materializations,
    step_values,
    stock_like,
    superposed_rows,
)
from tests.support.trainers import (
    make_trainer,
    own_trainer,
    stock_trainer,
    structured_batches,
    train,
    trajectory,
)

AUXK = "auxiliary_reconstruction_loss"


def ghostly(subject: Subject, stock: Any, implementation: str | None = None, **changes: Any) -> Any:
    return subject.sparse(stock, implementation, dead_latent_loss="ghost", **changes)


def precisest(subject: Subject) -> Precision:
    """float64, where what runs takes that."""
    return FLOAT64 if FLOAT64.dtype in subject.target.dtypes else FLOAT32


@pytest.mark.pairwise
@pytest.mark.parametrize("dead", N_DEAD)
@input_or_not
@subjects(precisions=PRECISIONS, options="all")
def test_step(
    subject: Subject,
    precision: Precision,
    options: dict[str, Any],
    dead: str,
    input_gradient: bool,
) -> None:
    stock = subject.stock(precision, **subject.traits.screened, **options)
    mask = dead_mask(stock, min(N_DEAD[dead], stock.cfg.d_sae))
    x = subject.inputs(stock, subject.target.few_rows(40), precision, mask)
    sparse = ghostly(subject, stock)
    assert sparse.implementation.name == subject.target.backend
    compare_ghost_steps(stock, sparse, x, mask, precision, input_gradient=input_gradient)


@subjects(EVERYWHERE, options="few")
def test_step_on_every_path(subject: Subject, options: dict[str, Any]) -> None:
    stock = subject.stock(**options)
    mask = dead_mask(stock, 7)
    x = subject.inputs(stock, subject.target.few_rows(20), FLOAT32, mask)
    compare_ghost_steps(stock, ghostly(subject, stock), x, mask, FLOAT32)


@subjects(EVERYWHERE)
def test_where_no_other_loss_asks_for_dead_latents(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = subject.stock(**subject.traits.reconstruction_alone)
    mask = dead_mask(stock, 7)
    x = subject.inputs(stock, subject.target.few_rows(20), FLOAT32, mask)
    sparse = ghostly(subject, stock)
    made = record_materializations(monkeypatch)
    assert forward_pass(sparse, x, mask).losses[GHOST_LOSS] > 0
    assert made == []
    compare_ghost_steps(stock, sparse, x, mask, FLOAT32)


@pytest.mark.parametrize("n_dead", [1, 70, 130, 200])
@subjects(NOT_INTERPRETED)
def test_numbers_about_the_block_s_alignment(subject: Subject, n_dead: int) -> None:
    stock = subject.stock(d_sae=200)
    mask = dead_mask(stock, n_dead)
    x = subject.inputs(stock, 12, FLOAT32, mask)
    compare_ghost_steps(stock, ghostly(subject, stock), x, mask, FLOAT32)


@pytest.mark.parametrize("n_dead", [1, 20])
@subjects(ON_CPU, options="all")
def test_dense_implementation(subject: Subject, options: dict[str, Any], n_dead: int) -> None:
    stock, x = subject.case(FLOAT64, **options)
    dense = ghostly(subject, stock, "dense")
    assert dense.implementation.name == "dense"
    require_formula(stock, dense, x, dead_mask(stock, n_dead))


@subjects(ON_CPU)
def test_dense_has_second_derivatives(subject: Subject) -> None:
    stock, x = subject.case(FLOAT64, n_rows=6)
    dense = ghostly(subject, stock, "dense")
    loss = forward_pass(dense, x, dead_mask(stock, 9)).losses[GHOST_LOSS]
    (gradient,) = torch.autograd.grad(loss, dense.W_dec, create_graph=True)
    gradient.pow(2).sum().backward()
    assert dense.W_dec.grad.norm() > 0


@pytest.mark.parametrize("implementation", [None, "dense"])
@subjects(options="few")
def test_dead_latents_alone_get_gradients(
    subject: Subject, options: dict[str, Any], implementation: str | None
) -> None:
    stock, x = subject.case(n_rows=9, **options)
    sparse, dead = ghostly(subject, stock, implementation), dead_mask(stock, 9)
    forward_pass(sparse, x, dead).losses[GHOST_LOSS].backward()
    found = {name.removeprefix("gradient of "): value for name, value in gradients(sparse).items()}
    by_latent = {
        "W_enc": found["W_enc"].T,
        "W_dec": found["W_dec"],
        "b_enc": found["b_enc"][:, None],
    }
    for name, value in by_latent.items():
        assert value[~dead].count_nonzero() == 0, name
        assert (value[dead].norm(dim=1) > 0).all(), name
    # Through the encoder alone, whose biases see what is subtracted from the input.
    expected = 0.0
    if sparse.cfg.apply_b_dec_to_input:
        expected = -(sparse.W_enc.detach() @ found["b_enc"])
        assert found["b_dec"].norm() > 0
    torch.testing.assert_close(found["b_dec"], expected + 0 * found["b_dec"], rtol=1e-4, atol=1e-6)
    if "threshold" in found:
        assert found["threshold"].count_nonzero() == 0


@subjects(options="few")
def test_without_dead_latents_it_is_zero(subject: Subject, options: dict[str, Any]) -> None:
    stock, x = subject.case(n_rows=6, **options)
    for implementation in (None, "dense"):
        for mask in (None, dead_mask(stock, 0)):
            sparse = ghostly(subject, stock, implementation)
            output = forward_pass(sparse, x, mask)
            assert output.losses[GHOST_LOSS].item() == 0
            assert AUXK not in output.losses
            output.loss.backward()
            expected = step_values(stock, x, mask)
            for name, value in on_cpu(gradients(sparse)).items():
                assert error(value, expected[name]) <= 1e-5 * expected[name].norm(), name


@subjects(ON_CPU)
def test_other_losses_are_stock_s(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    mask = dead_mask(stock, 9)
    expected = {**forward_pass(stock, x, mask).losses}
    expected.pop(AUXK, None)
    for implementation in (None, "dense"):
        output = forward_pass(ghostly(subject, stock, implementation), x, mask)
        ghost = output.losses.pop(GHOST_LOSS)
        assert output.losses.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(output.losses[name], value)
        torch.testing.assert_close(output.loss, sum(expected.values()) + ghost)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@subjects(NOT_INTERPRETED)
def test_coefficient(subject: Subject, coefficient: float) -> None:
    stock, x = subject.case(n_rows=6)
    mask = dead_mask(stock, 9)
    for implementation in (None, "dense"):
        losses = [
            forward_pass(
                ghostly(subject, stock, implementation, aux_loss_coefficient=value), x, mask
            ).losses[GHOST_LOSS]
            for value in (coefficient, 1.0)
        ]
        torch.testing.assert_close(losses[0], coefficient * losses[1])
        assert losses[1] > 0


@subjects(ON_CPU)
def test_pre_activations_whose_exponentials_overflow(subject: Subject) -> None:
    stock, x = subject.case(FLOAT64, n_rows=12)
    mask = dead_mask(stock, 9)
    with torch.no_grad():
        stock.b_enc[mask] -= 1000.0
        # Of three orders of magnitude, so that each row's largest counts.
        stock.W_enc[:, mask] *= torch.logspace(0, 2.5, 9).to(x)
    for implementation in (None, "dense"):
        require_formula(stock, ghostly(subject, stock, implementation), x, mask)


@subjects(NOT_INTERPRETED)
def test_a_decoder_row_of_zero(subject: Subject) -> None:
    """Of a dead latent; where activations are rescaled by norms, stock itself gives NaN."""
    fields = {}
    if hasattr(subject.stock().cfg, "rescale_acts_by_decoder_norm"):
        fields["rescale_acts_by_decoder_norm"] = False
    stock, x = subject.case(n_rows=12, **fields)
    mask = dead_mask(stock, 9)
    with torch.no_grad():
        stock.W_dec[mask.nonzero()[3]] = 0
        stock.b_enc[mask] -= 50.0  # none of them is active
    for implementation in (None, "dense"):
        compare_ghost_steps(stock, ghostly(subject, stock, implementation), x, mask, FLOAT32)


@subjects(NOT_INTERPRETED)
def test_a_perfect_reconstruction_of_a_row(subject: Subject) -> None:
    stock, x = subject.case(precisest(subject), n_rows=12)
    mask = dead_mask(stock, 9)
    for implementation in (None, "dense"):
        sparse = ghostly(subject, stock, implementation)
        x[4] = 0
        with torch.no_grad():
            sparse.b_dec.zero_()
            sparse.b_enc.fill_(-1.0)
        output = forward_pass(sparse, x, mask)
        assert (output.sae_out[4] == 0).all()
        output.losses[GHOST_LOSS].backward()
        assert all(value.isfinite().all() for value in gradients(sparse).values())
        assert sparse.W_dec.grad.norm() > 0


@subjects(NOT_INTERPRETED, options="few")
def test_nothing_dense_is_made(
    subject: Subject, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, x = subject.case(n_rows=9, **options)
    made = record_materializations(monkeypatch)
    output = forward_pass(ghostly(subject, stock), x, dead_mask(stock, 9))
    output.loss.backward()
    assert made == []
    assert isinstance(output.hidden_pre, OnDemandTensor)


@subjects(NOT_INTERPRETED)
def test_of_other_dead_latents_than_the_step_s(subject: Subject) -> None:
    """What overrides the loss may ask for any mask."""
    stock, x = subject.case(precisest(subject), n_rows=9)
    masks = [dead_mask(stock, 9), dead_mask(stock, 5)]
    for name in ("loss", GHOST_LOSS):
        values = []
        for sae in (with_ghosts(stock_like(stock)), ghostly(subject, stock)):
            original = sae.calculate_aux_loss

            def of_another_mask(
                step_input: Any, *args: Any, original: Any = original, **kw: Any
            ) -> Any:
                step_input.dead_neuron_mask = masks[1]
                return original(step_input, *args, **kw)

            sae.calculate_aux_loss = of_another_mask
            values.append(
                step_values(
                    sae,
                    x,
                    masks[0],
                    objective=lambda o, n=name: o.loss if n == "loss" else o.losses[n],
                )
            )
        for key, value in values[0].items():
            assert error(values[1][key], value) <= 1e-5 * value.norm() + 1e-12, key


@subjects(NOT_INTERPRETED, any_input=True)
def test_heads_are_rows(subject: Subject) -> None:
    """As for the reported MSE, a mean over rows and heads."""
    stock, flat = subject.case(precisest(subject), n_rows=20, d_in=12, reshape_activations="hook_z")
    mask = dead_mask(stock, 9)
    rtol = 1e-6 if stock.W_enc.dtype == torch.float64 else 1e-5
    values = []
    for implementation in (None, "dense"):
        sae = ghostly(subject, stock, implementation)
        sae.turn_on_forward_pass_hook_z_reshaping()
        x = flat.view(-1, 4, 3)
        values.append(step_values(sae, x, mask))
        r = (x - values[-1]["sae_out"].to(x)).detach()
        assert r.shape == (20, 4, 3)
        h = flat - stock.b_dec if stock.cfg.apply_b_dec_to_input else flat
        h = (h @ stock.W_enc + stock.b_enc)[:, mask]
        g = ((h - h.amax(1, keepdim=True)).exp() @ stock.W_dec[mask]).view_as(r)
        s = r.norm(dim=-1) / (2 * g.norm(dim=-1) + 1e-6)
        apart = (s[..., None] * g - r).pow(2).sum(-1)
        expected = (r.pow(2).sum(-1) / (apart + 1e-6) * apart).mean().double().cpu()
        torch.testing.assert_close(values[-1][GHOST_LOSS], expected, rtol=rtol, atol=0)
    for name, value in values[1].items():
        assert error(values[0][name], value) <= rtol * value.norm() + 1e-12, name


@subjects(NOT_INTERPRETED, any_input=True)
def test_leading_dimensions(subject: Subject) -> None:
    stock, x = subject.case(precisest(subject), n_rows=8)
    mask, rtol = dead_mask(stock, 9), 100 * precisest(subject).eps
    for implementation in (None, "dense"):
        flat, shaped = (
            step_values(ghostly(subject, stock, implementation), rows, mask)
            for rows in (x, x.view(2, 4, -1))
        )
        for name in (GHOST_LOSS, "gradient of W_enc", "gradient of W_dec"):
            assert error(flat[name], shaped[name]) <= rtol * flat[name].norm(), name


class TestTraining:
    @pytest.mark.parametrize("autocast", [False, True])
    @subjects(NOT_INTERPRETED)
    def test_as_the_formula_trains(self, subject: Subject, autocast: bool) -> None:
        """SAELens's trainer and this package's, whose update sums gradients itself."""
        if autocast and not subject.target.device.startswith("cuda"):
            pytest.skip("on a CPU autocast takes other latents")
        stock = subject.stock()
        with torch.no_grad():
            stock.b_enc[dead_mask(stock, 5)] -= 3.0
        batches = structured_batches(12, 32, stock.cfg.d_in)
        batches = [batch.to(subject.target.device) for batch in batches]
        settings = {"dead_feature_window": 3, "lr": 1e-4, "autocast": autocast}
        with_dead = ghostly(subject, stock)
        trainers = [
            stock_trainer(with_ghosts(stock_like(stock, torch.float32)), **settings),
            stock_trainer(ghostly(subject, stock), **settings),
            own_trainer(with_dead, **settings),
            own_trainer(ghostly(subject, stock, gradient_buffers=True), **settings),
        ]
        losses = [train(trainer, batches) for trainer in trainers]
        assert trainers[0].dead_neurons.any()
        for trainer, found in zip(trainers[1:], losses[1:], strict=True):
            assert torch.equal(trainer.dead_neurons, trainers[0].dead_neurons)
            torch.testing.assert_close(found, losses[0], rtol=1e-2 if autocast else 1e-4, atol=0)
            for name, value in trainers[0].sae.named_parameters():
                moved = (value - stock.get_parameter(name)).norm().item()
                apart = error(getattr(trainer.sae, name), value)
                assert apart <= (0.3 if autocast else 0.01) * moved, name

    @subjects(ON_CPU)
    def test_dead_latents_move(self, subject: Subject) -> None:
        stock = subject.stock()
        with torch.no_grad():
            stock.b_enc[:9] = -100.0
        fields: dict[str, Any] = {"aux_loss_coefficient": 0.0}
        if hasattr(stock.cfg, "pre_act_loss_coefficient"):
            fields = {"pre_act_loss_coefficient": None}
        ghost: dict[str, Any] = {"dead_latent_loss": "ghost", "aux_loss_coefficient": 1.0}
        for changes, moves in (({**fields, **ghost}, True), (fields, False)):
            sparse = subject.sparse(stock, **changes)
            trainer = make_trainer(sparse, dead_feature_window=100)
            trainer.n_forward_passes_since_fired[:9] = 10**6
            for _ in range(3):
                trainer.step(superposed_rows(sparse, 32))
            assert trainer.dead_neurons.nonzero().flatten().tolist() == list(range(9))
            for name in ("W_enc", "W_dec", "b_enc"):
                before, after = (
                    getattr(sae, name).T[:9] if name == "W_enc" else getattr(sae, name)[:9]
                    for sae in (stock, sparse)
                )
                assert (before != after).any() == moves, name

    @subjects(ON_CPU)
    def test_compiled(self, subject: Subject) -> None:
        torch.compiler.reset()
        stock, x = subject.case(n_rows=6)
        mask = dead_mask(stock, 9)
        for implementation in (None, "dense"):
            sparse = ghostly(subject, stock, implementation)
            expected = step_values(ghostly(subject, stock, implementation), x, mask)
            sparse.training_forward_pass = torch.compile(
                sparse.training_forward_pass, backend="eager"
            )
            for name, value in step_values(sparse, x, mask).items():
                assert error(value, expected[name]) <= 1e-5 * expected[name].norm() + 1e-9, name


@subjects(NOT_INTERPRETED, precisions=(FLOAT32, AUTOCAST))
def test_trajectory_is_stock_s_as_long_as_none_is_dead(
    subject: Subject, precision: Precision
) -> None:
    """Nothing but the name of a loss changes."""
    stock = subject.stock(precision)
    batches = [superposed_rows(stock, 32) for _ in range(4)]
    options = {"dead_feature_window": 100, "autocast": precision.autocast}
    found = [
        trajectory(sparse, batches, **options)
        for sparse in (ghostly(subject, stock), subject.sparse(stock))
    ]
    ghost = found[0].pop(GHOST_LOSS)
    assert ghost.count_nonzero() == 0
    found[1].pop(AUXK, None)
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        assert torch.equal(found[0][name], value), name
