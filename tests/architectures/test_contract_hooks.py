"""Hooks on a sparse SAE: what they see and change is as in SAELens's own SAE."""

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import _disable_hooks

from saelens_sparse.codes.on_demand import OnDemandTensor
from tests.support.architectures import NOT_INTERPRETED, Subject, subjects
from tests.support.saes import FLOAT64, Precision, dead_mask, forward_pass

NAMES = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")

every_subject = subjects(NOT_INTERPRETED, precisions=(FLOAT64,))


@every_subject
def test_run_with_cache(subject: Subject, precision: Precision) -> None:
    stock, x = subject.case(precision, n_rows=6)
    sparse = subject.sparse(stock)
    x = x.view(2, 3, -1)
    (expected, expected_cache), (actual, cache) = (sae.run_with_cache(x) for sae in (stock, sparse))
    torch.testing.assert_close(actual, expected)
    assert cache.keys() == expected_cache.keys()
    assert set(NAMES) < set(cache.keys())
    for name, value in expected_cache.items():
        assert type(cache[name]) is torch.Tensor
        torch.testing.assert_close(cache[name], value)
    # Afterwards nothing is dense any more.
    assert sparse.implementation.name == subject.target.backend


@pytest.mark.parametrize("name", NAMES)
@every_subject
def test_a_hook_makes_the_call_dense(subject: Subject, precision: Precision, name: str) -> None:
    stock, x = subject.case(precision, n_rows=6)
    sparse = subject.sparse(stock)
    seen: list[list[torch.Tensor]] = []
    outputs = []
    for sae in (stock, sparse):
        calls: list[torch.Tensor] = []

        def halve(value: torch.Tensor, hook: Any, calls: Any = calls) -> torch.Tensor:  # noqa: ARG001
            calls.append(value)
            return value * 0.5

        with sae.hooks(fwd_hooks=[(name, halve)]):
            if sae is sparse:
                assert sae.implementation.name == "dense"
                assert name in sae.implementation.reason
            outputs.append(forward_pass(sae, x, dead_mask(sae, 0)))
            outputs[-1].loss.backward()
        seen.append(calls)
    assert len(seen[0]) == 1
    torch.testing.assert_close(seen[1], seen[0])
    assert type(seen[1][0]) is torch.Tensor
    torch.testing.assert_close(outputs[1].sae_out, outputs[0].sae_out)
    for parameter, expected in stock.named_parameters():
        torch.testing.assert_close(getattr(sparse, parameter).grad, expected.grad)
    assert sparse.implementation.name != "dense"
    assert isinstance(forward_pass(sparse, x).feature_acts, OnDemandTensor)


@pytest.mark.parametrize("name", NAMES)
@every_subject
def test_backward_hooks(subject: Subject, precision: Precision, name: str) -> None:
    stock, x = subject.case(precision, n_rows=6)
    seen = []
    for sae in (stock, subject.sparse(stock)):
        gradients: list[torch.Tensor] = []
        hook = getattr(sae, name)
        hook.add_hook(lambda grad, hook, g=gradients: g.append(grad), dir="bwd")  # noqa: ARG005
        forward_pass(sae, x).loss.backward()
        sae.reset_hooks(including_permanent=True)
        seen.append(gradients)
    assert len(seen[0]) == 1
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize("name", ["hook_sae_input", "hook_sae_output"])
@every_subject
def test_hooks_that_change_nothing_about_the_path(
    subject: Subject, precision: Precision, name: str
) -> None:
    stock, x = subject.case(precision, n_rows=6)
    results = []
    for sae in (stock, subject.sparse(stock)):
        with sae.hooks(fwd_hooks=[(name, lambda value, hook: 2 * value)]):  # noqa: ARG005
            if sae is not stock:
                assert sae.implementation.name == subject.target.backend
            results.append(sae(x))
    torch.testing.assert_close(results[1], results[0])


@every_subject
def test_error_term(subject: Subject, precision: Precision) -> None:
    """Values, what the hook sees, and the gradient, which does not go through the error."""
    stock, x = subject.case(precision, n_rows=6)
    values: list[list[torch.Tensor]] = []
    for sae in (stock, subject.sparse(stock)):
        with pytest.warns(DeprecationWarning, match="use_error_term"):
            sae.use_error_term = True
        x = x.detach().clone().requires_grad_()
        errors: list[torch.Tensor] = []
        with sae.hooks(
            fwd_hooks=[("hook_sae_error", lambda value, hook, e=errors: e.append(value))]  # noqa: ARG005
        ):
            out = sae(x)
        (gradient,) = torch.autograd.grad((out**2).sum(), x)
        with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda v, hook: v * 0)]):  # noqa: ARG005
            ablated = sae(x)
        torch.testing.assert_close(out, x)
        values.append([errors[0], gradient, ablated])
    for expected, actual in zip(*values, strict=True):
        torch.testing.assert_close(actual, expected)


@every_subject
def test_disabled_hooks(subject: Subject, precision: Precision) -> None:
    stock, x = subject.case(precision, n_rows=6)
    sparse = subject.sparse(stock)
    sparse.hook_sae_acts_post.add_hook(lambda tensor, *, hook: tensor * 0)  # noqa: ARG005
    assert sparse.implementation.name == "dense"
    with _disable_hooks(sparse):
        assert sparse.implementation.name == subject.target.backend
        acts = sparse.encode(x)
    assert acts.any()


@pytest.mark.parametrize("name", NAMES)
@every_arm
def test_a_hook_that_is_attached_within_a_step(arm: Arm, name: str) -> None:
    """As by an auxiliary loss that looks at pre-activations: `run_with_cache` attaches hooks."""
    stock, x = stock_and_inputs(arm)
    caches: list[dict[str, torch.Tensor]] = []
    for sae in (stock, arm.sparse(stock)):

        def cached(*args: Any, sae: Any = sae, **kwargs: Any) -> Any:
            _, cache = sae.run_with_cache(x, names_filter=[name])
            caches.append(dict(cache))
            return type(sae).calculate_aux_loss(sae, *args, **kwargs)

        sae.calculate_aux_loss = cached
        forward_pass(sae, x, dead_mask(sae, 0))
    expected, actual = caches
    assert expected.keys() == {name}
    torch.testing.assert_close(actual, expected)
