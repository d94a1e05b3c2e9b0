"""One forward pass of stock and of a sparse SAE, and what it computed."""

import pytest
import torch

from tests.support.pair import N_ROWS, Pair
from tests.support.saes import (
    forward_pass,
    make_stock,
    record_materializations,
    sparse_like,
    zipf_inputs,
)


@pytest.fixture
def pair() -> Pair:
    # float64, so that the two differ by no more than the last digits.
    stock = make_stock(dtype=torch.float64)
    sparse = sparse_like(stock)
    x = zipf_inputs(stock, N_ROWS)
    return Pair(x, stock, sparse, forward_pass(stock, x), forward_pass(sparse, x))


@pytest.fixture
def materializations(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Collects the class of every on-demand tensor that is computed."""
    return record_materializations(monkeypatch)
