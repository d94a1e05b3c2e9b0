from itertools import pairwise

import pytest
import torch

from saelens_sparse.ops.pairs import ActivePairs, LatentOrder, Rows
from tests.support.ops import order_of, random_latents


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
    order = order_of(latents, active, 6)
    assert segments(order) == [[1, 2], [], [], [0, 4, 7], [5], []]
    assert order.offsets.tolist() == [0, 2, 2, 2, 5, 6, 6]
    assert order.keys.tolist() == [0, 0, 3, 3, 3, 4, 6, 6]
    assert order.counts.tolist() == [2, 0, 0, 3, 1, 0]
    assert order.rows.k == 2
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
    order = order_of(latents, active, d_sae)

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
    order = order_of(latents, torch.zeros_like(latents, dtype=torch.bool), 6)
    assert not order.offsets.any()
    assert not order.counts.any()
    assert order.pairs.numel() == n_rows * 3
    assert (order.rows.k, order.d_sae) == (3, 6)


def random_keys(device: torch.device) -> torch.Tensor:
    """Of 20 rows of 4 pairs each; 15 where a pair is not active."""
    latents = random_latents(20, 15, 4, device=device)
    active = (torch.rand(20, 4) > 0.4).to(device)
    return latents.int().masked_fill(~active, 15).flatten()


def assert_same_order(order: LatentOrder, expected: LatentOrder) -> None:
    assert torch.equal(order.pairs, expected.pairs)
    assert torch.equal(order.keys, expected.keys)
    assert torch.equal(order.offsets, expected.offsets)
    assert order.rows is expected.rows


def test_latent_order_takes_non_contiguous_keys(device: torch.device) -> None:
    keys, rows = random_keys(device), Rows.regular(20, 4)
    strided = torch.stack([keys, keys + 1], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert_same_order(LatentOrder.of_keys(strided, rows, 15), LatentOrder.of_keys(keys, rows, 15))


def test_latent_order_from_keys_is_the_order_from_pairs(device: torch.device) -> None:
    keys, rows = random_keys(device), Rows.regular(20, 4)
    latents = keys.long().masked_fill(keys == 15, 3)
    pairs = ActivePairs(latents, keys, torch.randn(80, device=device), rows)
    assert_same_order(LatentOrder.of(pairs, 15), LatentOrder.of_keys(keys, rows, 15))


def test_latent_order_leaves_its_keys_alone(device: torch.device) -> None:
    keys = random_keys(device)
    before = keys.clone()
    LatentOrder.of_keys(keys, Rows.regular(20, 4), 15)
    assert torch.equal(keys, before)
