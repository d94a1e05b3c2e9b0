"""What SAEs that are trained in turn have in common."""

import weakref

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening

from saelens_sparse.training.shared import SharedBatch, logs_at_once

CPU = torch.device("cpu")


def test_a_batch_is_scaled_once_for_each_factor() -> None:
    shared, batch = SharedBatch(5), torch.randn(4, 3)
    factors = [None, 2.0, 2.0, 3.0, None]
    taken = [shared.take(batch, CPU, ActivationScaler(factor)) for factor in factors]
    assert taken[0] is taken[4] is batch
    assert taken[1] is taken[2]
    for factor, one in zip(factors, taken, strict=True):
        assert torch.equal(one, batch * (factor or 1.0))


def test_whitening_is_each_users_own() -> None:
    shared, batch = SharedBatch(2), torch.randn(4, 3)
    for scale in (1.0, 2.0):
        matrix = scale * torch.eye(3)
        scaler = ActivationScaler(whitening=ActivationWhitening(torch.zeros(3), matrix, matrix))
        assert torch.equal(shared.take(batch, CPU, scaler), scale * batch)


def test_another_batch_is_another_even_if_some_have_not_taken_it() -> None:
    shared, scaler = SharedBatch(3), ActivationScaler(2.0)
    first, second = torch.randn(2, 4, 3)
    assert torch.equal(shared.take(first, CPU, scaler), 2 * first)
    for _ in range(3):
        assert torch.equal(shared.take(second, CPU, scaler), 2 * second)


def test_no_batch_is_kept_after_its_last_user() -> None:
    shared, batch = SharedBatch(2), torch.randn(4, 3)
    alive = weakref.ref(batch)
    for _ in range(2):
        shared.take(batch, CPU, ActivationScaler(2.0))
    del batch
    assert alive() is None


def test_logs_are_what_item_gives() -> None:
    value = torch.randn(3, requires_grad=True)

    def make() -> dict[str, object]:
        return {
            "float": value.sum().item(),
            "double": value.double().sum().item(),
            "int": (value > 0).sum().item(),
            "bool": (value > 0).all().item(),
            "of one element": value[:1].item(),
            "half": 0.5 * value.sum().item(),
            "text": "as it is",
        }

    expected = {f"{key}/{name}": one for key in "ab" for name, one in make().items()}
    found = logs_at_once({"a": make, "b": make})
    half = {f"{key}/half" for key in "ab"}
    assert {n: v for n, v in found.items() if n not in half} == {
        n: v for n, v in expected.items() if n not in half
    }
    assert found["a/half"] == pytest.approx(expected["a/half"])
    assert {name: type(one) for name, one in found.items()} == {
        name: type(one) for name, one in expected.items()
    }
