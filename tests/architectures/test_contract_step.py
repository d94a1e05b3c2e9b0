"""A training step of every architecture against SAELens's own, for each use of its outputs.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is.
"""

from typing import Any

import pytest
import torch

from tests.support.architectures import (
    EVERYWHERE,
    NOT_INTERPRETED,
    ON_CPU,
    Subject,
    subjects,
)
from tests.support.saes import (
    BFLOAT16,
    FLOAT32,
    N_DEAD,
    PRECISIONS,
    Precision,
    compare_steps,
    dead_mask,
    error,
    forward_pass,
    gradients,
    input_or_not,
    on_cpu,
    random_objective,
    step_values,
    superposed_rows,
)
from tests.support.trainers import make_trainer, trajectory


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
    sparse = subject.sparse(stock)
    assert sparse.implementation.name == subject.target.backend
    compare_steps(stock, sparse, x, mask, precision, input_gradient=input_gradient)


@pytest.mark.pairwise
@input_or_not
@pytest.mark.parametrize(
    "names",
    [("feature_acts", "sae_out"), ("hidden_pre",), ("loss", "hidden_pre")],
    ids="+".join,
)
@subjects(precisions=PRECISIONS, options="all")
def test_random_upstream_gradients(
    subject: Subject,
    precision: Precision,
    options: dict[str, Any],
    names: tuple[str, ...],
    input_gradient: bool,
) -> None:
    stock, x = subject.case(precision, **subject.traits.screened, **options)
    compare_steps(
        stock,
        subject.sparse(stock),
        x,
        None,
        precision,
        input_gradient=input_gradient,
        objective=random_objective(*names),
    )


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("shape", "n_rows"),
    [
        ({"d_in": 1}, 20),
        ({"d_in": 7, "d_sae": 37}, 20),
        ({"d_in": 12, "d_sae": 100}, 20),
        ({}, 1),
        ({}, 129),
    ],
    ids=["d_in=1", "odd-widths", "d_sae=100", "one-row", "129-rows"],
)
@subjects(NOT_INTERPRETED, options="few")
def test_shapes(
    subject: Subject, shape: dict[str, Any], n_rows: int, options: dict[str, Any]
) -> None:
    stock, x = subject.case(n_rows=n_rows, **options, **shape)
    # SAELens's k_aux = d_in // 2 is 0 for one input, and its scale a division by zero.
    dead = dead_mask(stock, 20 if stock.cfg.d_in > 1 else 0)
    compare_steps(stock, subject.sparse(stock), x, dead, FLOAT32, input_gradient=True)


@subjects(NOT_INTERPRETED, options="few", any_input=True)
def test_non_contiguous_input_with_leading_dimensions(
    subject: Subject, options: dict[str, Any]
) -> None:
    stock, x = subject.case(n_rows=8, **options)
    x = x.T.contiguous().T.view(2, 4, -1)
    assert not x.is_contiguous()
    compare_steps(
        stock, subject.sparse(stock), x, dead_mask(stock, 3), FLOAT32, input_gradient=True
    )


@pytest.mark.pairwise
@pytest.mark.parametrize("normalize", ["constant_norm_rescale", "layer_norm"])
@input_or_not
@subjects(precisions=PRECISIONS, any_input=True)
def test_run_time_normalization(
    subject: Subject, precision: Precision, normalize: str, input_gradient: bool
) -> None:
    stock, x = subject.case(precision, n_rows=20, normalize_activations=normalize)
    compare_steps(stock, subject.sparse(stock), x, None, precision, input_gradient=input_gradient)


@subjects(options="few")
def test_each_loss_term_alone(subject: Subject, options: dict[str, Any]) -> None:
    """Gradients of the terms apart, in one graph, add up to the gradient of the loss."""
    stock, x = subject.case(n_rows=6, **options)
    dead = dead_mask(stock, 20)
    terms = list(forward_pass(stock, x, dead).losses)
    assert len(terms) > 1
    for term in terms:
        compare_steps(
            stock, subject.sparse(stock), x, dead, FLOAT32,
            objective=lambda output, term=term: output.losses[term],
        )  # fmt: skip
    whole = step_values(subject.sparse(stock), x, dead)
    for order in (terms, terms[::-1]):
        sparse = subject.sparse(stock)
        output = forward_pass(sparse, x, dead)
        for term in order:
            output.losses[term].backward(retain_graph=True)
        for name, value in on_cpu(gradients(sparse)).items():
            assert error(value, whole[name]) <= 1e-6 * whole[name].norm(), name


@subjects(options="few")
def test_gradients_of_single_parameters(subject: Subject, options: dict[str, Any]) -> None:
    stock, x = subject.case(n_rows=6, **options)
    dead = dead_mask(stock, 20)
    whole = step_values(subject.sparse(stock), x, dead)
    for name, _ in stock.named_parameters():
        sparse = subject.sparse(stock)
        loss = forward_pass(sparse, x, dead).loss
        (gradient,) = torch.autograd.grad(loss, [getattr(sparse, name)])
        torch.testing.assert_close(
            gradient.double().cpu(), whole[f"gradient of {name}"], rtol=0, atol=0, msg=name
        )


@subjects(options="few")
def test_frozen_parameters_get_no_gradient(subject: Subject, options: dict[str, Any]) -> None:
    for frozen in dict(subject.stock().named_parameters()):
        stock, x = subject.case(n_rows=6, **options)
        sparse = subject.sparse(stock)
        for sae in (stock, sparse):
            getattr(sae, frozen).requires_grad_(False)
        compare_steps(stock, sparse, x, dead_mask(stock, 20), FLOAT32)
        assert getattr(sparse, frozen).grad is None


@subjects()
def test_gradients_accumulate(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    dead, batches = dead_mask(stock, 20), [x, x.flip(1)]
    single = [step_values(subject.sparse(stock), x, dead) for x in batches]
    sparse = subject.sparse(stock)
    for x in batches:
        forward_pass(sparse, x, dead).loss.backward()
    for name, value in on_cpu(gradients(sparse)).items():
        expected = single[0][name] + single[1][name]
        assert error(value, expected) <= 1e-6 * expected.norm(), name


@subjects()
def test_gradients_lie_in_memory_as_their_parameters(subject: Subject) -> None:
    """Autograd would copy them otherwise."""
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    forward_pass(sparse, x, dead_mask(sparse, 20)).loss.backward()
    assert sparse.W_enc.T.is_contiguous()
    for name, parameter in sparse.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.default_algorithms
@subjects(precisions=(FLOAT32, BFLOAT16), options="few")
def test_the_same_step_gives_the_same_bits(
    subject: Subject, precision: Precision, options: dict[str, Any]
) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        traits = subject.traits
        sizes = traits.screened if subject.target.interpreted else traits.large
        stock = subject.stock(precision, **sizes, **options)
        x, dead = superposed_rows(stock, subject.target.few_rows(96)), dead_mask(stock, 30)
        repeats = [
            step_values(
                subject.sparse(stock), x, dead, autocast=precision.autocast, input_gradient=True
            )
            for _ in range(2)
        ]
    finally:
        torch.set_num_threads(n_threads)
    for name, value in repeats[0].items():
        assert torch.equal(value, repeats[1][name]), name


@pytest.mark.pairwise
@pytest.mark.parametrize("dead", N_DEAD)
@subjects(ON_CPU, options="all")
def test_dense_implementation_is_stock_bit_for_bit(
    subject: Subject, options: dict[str, Any], dead: str
) -> None:
    stock, x = subject.case(**options)
    dense = subject.sparse(stock, "dense")
    assert dense.implementation.name == "dense"
    mask = dead_mask(stock, min(N_DEAD[dead], stock.cfg.d_sae))
    # On another SAE: each pass moves a BatchTopK's threshold.
    output = forward_pass(subject.sparse(stock, "dense"), x, mask)
    assert type(output.feature_acts) is torch.Tensor
    expected, actual = (step_values(sae, x, mask, input_gradient=True) for sae in (stock, dense))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    batches = [superposed_rows(stock, 32) for _ in range(5)]
    expected, actual = trajectory(stock, batches), trajectory(dense, batches)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@subjects()
def test_bad_activations_surface_as_in_stock(subject: Subject, bad: float) -> None:
    stock, x = subject.case(n_rows=12)
    sparse = subject.sparse(stock)
    x[3, 2] = bad
    bad_rows: list[list[int]] = []
    for sae in (stock, sparse):
        trainer = make_trainer(sae)
        trainer.n_forward_passes_since_fired[:20] = 10**6
        output = trainer.step(x)
        assert not torch.isfinite(output.loss)
        assert all(not torch.isfinite(p).all() for p in sae.parameters())
        bad_rows.append((~torch.isfinite(output.sae_out).all(-1)).nonzero().flatten().tolist())
    assert bad_rows == [[3], [3]]


@subjects(EVERYWHERE)
def test_a_row_of_nan_weights_surfaces(subject: Subject) -> None:
    stock, x = subject.case(n_rows=20)
    sparse = subject.sparse(stock)
    with torch.no_grad():
        sparse.W_enc[:, 5] = float("nan")
    assert torch.isnan(forward_pass(sparse, x).loss)
