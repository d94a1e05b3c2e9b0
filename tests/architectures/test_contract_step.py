"""Gradients against those of SAELens's own SAEs, for each use of a step's outputs."""

from typing import Any

import pytest
import torch

from tests.support.architectures import (
    FEW_OPTIONS,
    TOPK_OPTIONS,
    Arm,
    arms,
    every_arm,
    every_arm_and_option,
)
from tests.support.saes import (
    FLOAT32,
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

# Where the Triton path screens: from 32 latents per selected one on.
SCREENED: dict[str, dict[str, Any]] = {"topk": {"d_in": 13, "d_sae": 64, "k": 2}, "jumprelu": {}}
LARGER: dict[str, dict[str, Any]] = {
    "topk": {"d_in": 32, "d_sae": 512, "k": 16},
    "jumprelu": {"d_in": 32, "d_sae": 512, "pre_act_loss_coefficient": 0.3},
}
LOSS_TERMS = {
    "topk": ("mse_loss", "auxiliary_reconstruction_loss"),
    "jumprelu": ("mse_loss", "l0_loss", "pre_act_loss"),
}


@input_or_not
@pytest.mark.parametrize(
    "names",
    [("feature_acts", "sae_out"), ("hidden_pre",), ("loss", "hidden_pre")],
    ids="+".join,
)
@arms(precisions=PRECISIONS, options={**FEW_OPTIONS, "topk": TOPK_OPTIONS})
def test_random_upstream_gradients(
    arm: Arm,
    precision: Precision,
    options: dict[str, Any],
    names: tuple[str, ...],
    input_gradient: bool,
) -> None:
    stock, x = arm.case(precision, **SCREENED[arm.architecture], **options)
    compare_steps(
        stock,
        arm.sparse(stock),
        x,
        None,
        precision,
        input_gradient=input_gradient,
        objective=random_objective(*names),
    )


@every_arm_and_option
def test_each_loss_term_alone(arm: Arm, options: dict[str, Any]) -> None:
    """Gradients of the terms apart, in one graph, add up to the gradient of the loss."""
    stock, x = arm.case(**options)
    dead, terms = dead_mask(stock, 20), LOSS_TERMS[arm.architecture]
    for term in terms:
        compare_steps(
            stock, arm.sparse(stock), x, dead, FLOAT32,
            objective=lambda output, term=term: output.losses[term],
        )  # fmt: skip
    whole = step_values(arm.sparse(stock), x, dead)
    for order in (terms, terms[::-1]):
        sparse = arm.sparse(stock)
        output = forward_pass(sparse, x, dead)
        for term in order:
            output.losses[term].backward(retain_graph=True)
        for name, value in on_cpu(gradients(sparse)).items():
            assert error(value, whole[name]) <= 1e-6 * whole[name].norm(), name


@every_arm_and_option
def test_gradients_of_single_parameters(arm: Arm, options: dict[str, Any]) -> None:
    stock, x = arm.case(**options)
    dead = dead_mask(stock, 20)
    whole = step_values(arm.sparse(stock), x, dead)
    for name, _ in stock.named_parameters():
        sparse = arm.sparse(stock)
        loss = forward_pass(sparse, x, dead).loss
        (gradient,) = torch.autograd.grad(loss, [getattr(sparse, name)])
        torch.testing.assert_close(
            gradient.double().cpu(), whole[f"gradient of {name}"], rtol=0, atol=0, msg=name
        )


@every_arm_and_option
def test_frozen_parameters_get_no_gradient(arm: Arm, options: dict[str, Any]) -> None:
    for frozen in dict(arm.stock().named_parameters()):
        stock, x = arm.case(n_rows=8, **options)
        sparse = arm.sparse(stock)
        for sae in (stock, sparse):
            getattr(sae, frozen).requires_grad_(False)
        compare_steps(stock, sparse, x, dead_mask(stock, 20), FLOAT32)
        assert getattr(sparse, frozen).grad is None


@every_arm
def test_gradients_accumulate(arm: Arm) -> None:
    stock, x = arm.case()
    dead, batches = dead_mask(stock, 20), [x, x.flip(1)]
    single = [step_values(arm.sparse(stock), x, dead) for x in batches]
    sparse = arm.sparse(stock)
    for x in batches:
        forward_pass(sparse, x, dead).loss.backward()
    for name, value in on_cpu(gradients(sparse)).items():
        expected = single[0][name] + single[1][name]
        assert error(value, expected) <= 1e-6 * expected.norm(), name


@every_arm
def test_gradients_lie_in_memory_as_their_parameters(arm: Arm) -> None:
    """Autograd would copy them otherwise."""
    stock, x = arm.case()
    sparse = arm.sparse(stock)
    forward_pass(sparse, x, dead_mask(sparse, 20)).loss.backward()
    assert sparse.W_enc.T.is_contiguous()
    for name, parameter in sparse.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


@pytest.mark.default_algorithms
@arms(precisions=PRECISIONS, options=FEW_OPTIONS)
def test_the_same_step_gives_the_same_bits(
    arm: Arm, precision: Precision, options: dict[str, Any]
) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sizes = (SCREENED if arm.target.interpreted else LARGER)[arm.architecture]
        stock = arm.stock(precision, **sizes, **options)
        x, dead = superposed_rows(stock, arm.target.few_rows(512)), dead_mask(stock, 30)
        repeats = [
            step_values(
                arm.sparse(stock), x, dead, autocast=precision.autocast, input_gradient=True
            )
            for _ in range(2)
        ]
    finally:
        torch.set_num_threads(n_threads)
    for name, value in repeats[0].items():
        assert torch.equal(value, repeats[1][name]), name
