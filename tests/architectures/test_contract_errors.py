"""Squared errors of a training step: whoever reads them, or the reconstruction, sees stock's."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss

from saelens_sparse.codes.on_demand import SquaredErrors, code_of
from saelens_sparse.codes.step import in_progress, step_in_progress
from tests.support.architectures import Subject, subjects
from tests.support.saes import (
    forward_pass,
    record_materializations,
    require_same_gradients,
)

# In stock, each level's MSE function gets another reconstruction.
LEVELED = "matryoshka_batchtopk_sparse"


def in_a_step(sae: Any, x: torch.Tensor, use: Callable[[Any, torch.Tensor], Any]) -> Any:
    """What a function makes of an SAE and a reconstruction that was decoded in a training step."""
    step_input = TrainStepInput(
        sae_in=x,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    if not hasattr(sae, "start_step"):
        return use(sae, sae.decode(sae.encode_with_hidden_pre(x)[0]))
    with in_progress(sae, sae.start_step(step_input)):
        return use(sae, sae.decode(sae.encode_with_hidden_pre(x)[0]))


def compares(subject: Subject) -> bool:
    """Whether a decoder of the architecture compares, on the path."""
    return subject.target.backend == "triton" and subject.name != LEVELED


@subjects()
def test_a_step_asks_for_sums_alone(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    made = record_materializations(monkeypatch)
    for sae in (stock, sparse):
        forward_pass(sae, x).loss.backward()
    require_same_gradients(sparse, stock)
    assert SquaredErrors not in made
    errors = in_a_step(sparse, x, lambda sae, out: sae.mse_loss_fn(out, x))
    assert isinstance(errors, SquaredErrors) == compares(subject)


@pytest.mark.parametrize(
    "use",
    [
        lambda e: e.sum(dim=-1).square().sum(),
        lambda e: e.sum(-1).mean(),
        lambda e: torch.sum(e, dim=1).max(),
        lambda e: e.sum(dim=0).square().sum(),
        lambda e: e.mean(),
        lambda e: (e * torch.linspace(0, 1, e.shape[-1], device=e.device)).sum(-1).mean(),
        lambda e: e.sum(dim=-1, keepdim=True).square().sum(),
        lambda e: e.sum(dim=-1, dtype=torch.float64).mean(),
    ],
)
@subjects()
def test_other_uses_of_errors(subject: Subject, use: Callable[[torch.Tensor], Any]) -> None:
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    values = []
    for sae in (stock, sparse):
        value = in_a_step(sae, x, lambda sae, out: use(sae.mse_loss_fn(out, x)))
        value.backward()
        values.append(value.item())
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    require_same_gradients(sparse, stock)


@subjects()
def test_the_reconstruction_s_own_gradient(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    found: list[torch.Tensor] = []
    for sae in (stock, subject.sparse(stock)):
        output = forward_pass(sae, x)
        (gradient,) = torch.autograd.grad(output.loss, output.sae_out)
        output = forward_pass(sae, x)
        output.sae_out.retain_grad()
        output.loss.backward()
        torch.testing.assert_close(output.sae_out.grad, gradient)
        found.append(gradient)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


@subjects()
def test_a_loss_that_reads_the_reconstruction_too(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)

    def loss(output: TrainStepOutput) -> torch.Tensor:
        return output.loss + output.sae_out.sin().sum()

    for sae in (stock, sparse):
        loss(forward_pass(sae, x)).backward()
    require_same_gradients(sparse, stock)


@subjects()
def test_a_reconstruction_that_was_changed(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)

    def changed(sae: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.mul_(0.5) if sae is sparse else out * 0.5
        return sae.mse_loss_fn(out, x).sum(dim=-1).mean()

    losses = [in_a_step(sae, x, changed) for sae in (stock, sparse)]
    torch.testing.assert_close(losses[1], losses[0])


@subjects()
def test_a_reconstruction_that_was_changed_after_its_errors(subject: Subject) -> None:
    """What they were cannot be computed any more; stock refuses their gradient."""
    stock, x = subject.case(n_rows=6)

    def changed_later(sae: Any, out: torch.Tensor) -> torch.Tensor:
        errors = sae.mse_loss_fn(out, x)
        out.mul_(0.5)
        return errors.sum(dim=-1).mean()

    for sae in (stock, subject.sparse(stock)):
        with pytest.raises(RuntimeError, match=r"in.?place"):
            in_a_step(sae, x, changed_later).backward()


@subjects()
def test_errors_that_were_made_without_a_graph(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)

    def without_graph(sae: Any, out: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            errors = sae.mse_loss_fn(out, x)
        return errors.sum(dim=-1).mean()

    for sae in (stock, subject.sparse(stock)):
        assert not in_a_step(sae, x, without_graph).requires_grad


@subjects(any_input=True)
def test_errors_of_heads(subject: Subject) -> None:
    """Rows of heads are compared by head."""
    stock, x = subject.case(n_rows=6, d_in=12, reshape_activations="hook_z")
    sparse, losses = subject.sparse(stock), list[torch.Tensor]()
    for sae in (stock, sparse):
        sae.turn_on_forward_pass_hook_z_reshaping()
        output = forward_pass(sae, x.view(-1, 4, 3))
        output.loss.backward()
        losses.append(output.loss)
    torch.testing.assert_close(losses[1], losses[0])
    require_same_gradients(sparse, stock)


@subjects()
def test_errors_are_of_one_step(subject: Subject) -> None:
    """Outside of it, and of a later one, they are made as in stock."""
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    out = in_a_step(sparse, x, lambda _, out: out)
    assert type(sparse.mse_loss_fn(out, x)) is torch.Tensor
    errors = in_a_step(sparse, x, lambda sae, _: sae.mse_loss_fn(out, x))
    assert type(errors) is torch.Tensor


@subjects()
def test_a_step_lets_go_of_what_it_compared(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    code = code_of(forward_pass(subject.sparse(stock), x).feature_acts)
    assert code is not None
    assert code.step.target is None and code.step.comparison is None


@subjects()
def test_an_sae_is_in_no_cycle(subject: Subject) -> None:
    """It and what its steps hold are given back when the last name for them goes."""
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    gc.collect()
    gc.disable()
    try:
        output = forward_pass(sparse, x)
        output.loss.backward()
        alive = [weakref.ref(sparse), weakref.ref(output.sae_out)]
        del sparse, output
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def compared(sae: Any, x: torch.Tensor) -> bool:
    """Whether the decoder compares in a training step."""
    return in_a_step(sae, x, lambda *_: step_in_progress().comparison is not None)  # pyright: ignore[reportOptionalMemberAccess]


@subjects()
def test_nothing_is_compared_in_vain(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    assert compared(sparse, x) == compares(subject)
    with torch.no_grad():
        assert not compared(sparse, x)
    other = in_a_step(sparse, x, lambda sae, _: sae.encode_with_hidden_pre(x)[0])

    def decode_other(sae: Any, _: torch.Tensor) -> bool:
        sae.decode(other)
        step = step_in_progress()
        assert step is not None
        return step.comparison is not None

    # The activations of another step leave what this one has compared.
    assert in_a_step(sparse, x, decode_other) == compares(subject)
    sparse.mse_loss_fn = mse_loss
    assert not compared(sparse, x)


@subjects(any_input=True)
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_nothing_is_compared_before_a_norm_is_undone(subject: Subject, normalization: str) -> None:
    stock, x = subject.case(n_rows=6, normalize_activations=normalization)
    assert not compared(subject.sparse(stock), x)


@subjects()
def test_an_input_that_is_not_contiguous(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    sparse, strided = subject.sparse(stock), x.T.contiguous().T
    for sae in (stock, sparse):
        forward_pass(sae, strided).loss.backward()
    require_same_gradients(sparse, stock)
