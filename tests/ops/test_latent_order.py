from itertools import pairwise

import pytest
import torch

from saelens_sparse.ops import LatentOrder
from tests.support.ops import random_latents


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """An order does not depend on the backend that uses it."""
    return torch.device(request.param)


def segments(order: LatentOrder) -> list[list[int]]:
    """The pairs of each latent."""
    ends = order.offsets.tolist()
    return [order.pairs[a:b].tolist() for a, b in pairwise(ends)]


def test_latent_order_groups_active_pairs_by_latent_in_row_order(device: torch.device) -> None:
    latents = torch.tensor([[3, 0], [0, 1], [3, 4], [4, 3]], device=device)
    active = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1]], device=device).bool()
    order = LatentOrder.of(latents, active, 6)
    assert segments(order) == [[1, 2], [], [], [0, 4, 7], [5], []]
    assert order.offsets.tolist() == [0, 2, 2, 2, 5, 6, 6]
    assert order.keys.tolist() == [0, 0, 3, 3, 3, 4, 6, 6]
    assert order.counts.tolist() == [2, 0, 0, 3, 1, 0]
    assert order.k == 2
    assert order.d_sae == 6
    assert order.pairs.dtype == order.offsets.dtype == torch.int64


@pytest.mark.parametrize("law", ["uniform", "zipf"])
@pytest.mark.parametrize(
    ("n_rows", "d_sae", "k"), [(1, 7, 7), (300, 5, 2), (64, 1, 1), (40, 1000, 9), (33, 200, 64)]
)
def test_latent_order_of_random_selections(
    n_rows: int, d_sae: int, k: int, law: str, device: torch.device
) -> None:
    latents = random_latents(n_rows, d_sae, k, law, device)
    active = (torch.rand(n_rows, k) > 0.4).to(device)
    order = LatentOrder.of(latents, active, d_sae)

    assert torch.equal(order.counts, torch.bincount(latents[active], minlength=d_sae))
    assert order.offsets[0] == 0
    assert order.offsets[-1] == active.sum()
    # Every pair is somewhere, the inactive ones at the end.
    assert torch.equal(order.pairs.sort().values, torch.arange(n_rows * k, device=device))
    assert not active.flatten()[order.pairs[order.offsets[-1] :]].any()
    for latent, pairs in enumerate(segments(order)):
        assert pairs == sorted(pairs)
        assert (latents.flatten()[pairs] == latent).all()
        assert active.flatten()[pairs].all()


@pytest.mark.parametrize("n_rows", [0, 4])
def test_latent_order_without_active_pairs(n_rows: int, device: torch.device) -> None:
    latents = random_latents(n_rows, 6, 3, device=device)
    order = LatentOrder.of(latents, torch.zeros_like(latents, dtype=torch.bool), 6)
    assert not order.offsets.any()
    assert not order.counts.any()
    assert order.pairs.numel() == n_rows * 3
    assert (order.k, order.d_sae) == (3, 6)


def test_latent_order_takes_int32_and_non_contiguous_latents(device: torch.device) -> None:
    latents = random_latents(20, 15, 4, device=device)
    active = (torch.rand(20, 4) > 0.4).to(device)
    expected = LatentOrder.of(latents, active, 15)
    for other in (latents.int(), latents.T.contiguous().T):
        order = LatentOrder.of(other, active.T.contiguous().T, 15)
        assert torch.equal(order.pairs, expected.pairs)
        assert torch.equal(order.offsets, expected.offsets)


def test_latent_order_from_keys_is_the_order_from_latents(device: torch.device) -> None:
    latents = random_latents(20, 15, 4, device=device)
    active = (torch.rand(20, 4) > 0.4).to(device)
    expected = LatentOrder.of(latents, active, 15)
    order = LatentOrder.of_keys(latents.int().masked_fill(~active, 15), 15)
    assert torch.equal(order.pairs, expected.pairs)
    assert torch.equal(order.keys, expected.keys)
    assert torch.equal(order.offsets, expected.offsets)
    assert order.k == expected.k


def test_latent_order_leaves_its_inputs_alone(device: torch.device) -> None:
    latents, active = random_latents(6, 9, 2, device=device), torch.eye(6, 2).bool().to(device)
    before = latents.clone(), active.clone()
    LatentOrder.of(latents, active, 9)
    assert torch.equal(latents, before[0])
    assert torch.equal(active, before[1])
