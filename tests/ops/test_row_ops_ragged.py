"""Row operations on rows with their own numbers of latents each."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.pairs import LatentOrder, Rows
from saelens_sparse.ops.rows.operations import (
    gather_dot,
    gather_sum,
    segment_sum,
    segment_totals,
)
from tests.support.ops import assert_within_budget, order_of, random_latents, within


@dataclass(frozen=True)
class Pairs:
    """Latents, coefficients and keys of ragged rows, with spare room that nothing may read."""

    rows: Rows
    latents: torch.Tensor
    coefficients: torch.Tensor
    keys: torch.Tensor
    d_sae: int

    @property
    def n_pairs(self) -> int:
        return self.rows.count()

    def order(self) -> LatentOrder:
        return LatentOrder.of_keys(self.keys, self.rows, self.d_sae)

    def code(self, *, active_only: bool) -> torch.Tensor:
        """Coefficients `[n_rows, d_sae]` in float64, zero where a row has no such pair."""
        code = torch.zeros(self.rows.n_rows, self.d_sae, dtype=torch.float64)
        starts = self.rows.starts(self.latents.device).tolist()
        for row, (first, end) in enumerate(pairwise(starts)):
            for p in range(first, end):
                if self.keys[p] < self.d_sae or not active_only:
                    code[row, self.latents[p]] += float(self.coefficients[p])
        return code


LENGTHS = {
    "uneven": [3, 0, 20, 1, 0, 33, 7, 0],
    "one long row": [33],
    "all empty": [0, 0, 0],
    "no rows": [],
    "a latent on 300 rows": [2] * 300,
}


def ragged_pairs(
    lengths: str, n_spare: int, device: torch.device, dtype: torch.dtype, d_sae: int = 33
) -> Pairs:
    counts = torch.tensor(LENGTHS[lengths], dtype=torch.int64)
    rows = Rows.of_lengths(counts)
    assert rows.offsets is not None and rows.of_pairs is not None
    frequency = 1 / torch.arange(1.0, d_sae + 1)
    if lengths == "a latent on 300 rows":
        frequency[5] = 1e9
    drawn = [torch.multinomial(frequency, n).sort().values for n in counts.tolist() if n > 0]
    latents = torch.cat([torch.zeros(0, dtype=torch.int64), *drawn, torch.zeros(n_spare).long()])
    active = torch.rand(latents.numel()) > 0.1
    active[latents.numel() - n_spare :] = False
    coefficients = torch.randn(latents.numel()) / (torch.rand(latents.numel()) + 1e-2)
    coefficients[~active] = torch.nan if n_spare > 0 else 1.0
    in_rows = torch.arange(latents.numel()) < latents.numel() - n_spare
    coefficients[in_rows & ~active] = 2.0  # a pair of a row without a key
    of_pairs = torch.cat([rows.of_pairs, torch.zeros(n_spare, dtype=torch.int32)])
    return Pairs(
        Rows.ragged(rows.offsets.to(device), of_pairs.to(device)),
        latents.to(device),
        coefficients.to(device, dtype),
        latents.int().masked_fill(~active, d_sae).to(device),
        d_sae,
    )


# A search without rows leaves no room to spare.
RAGGED = pytest.mark.parametrize(
    ("lengths", "n_spare"),
    [(name, n) for name in LENGTHS for n in (0, 9) if name != "no rows" or not n],
)


@pytest.fixture(params=["as it is", "without embedding_bag"])
def torch_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the path of devices for which PyTorch has no `embedding_bag`, in chunks of pairs."""
    if request.param == "as it is":
        return
    monkeypatch.setattr("saelens_sparse.ops.rows.operations._has_embedding_bag", lambda _: False)
    monkeypatch.setattr("saelens_sparse.ops.rows.operations._CHUNK_BYTES", 7 * 19 * 4)


@pytest.mark.parametrize("lengths", [[], [0], [4], [0, 3, 0, 0, 2, 1, 0]], ids=str)
def test_ragged_rows_of_lengths_and_of_ascending(lengths: list[int], device: torch.device) -> None:
    of_lengths = Rows.of_lengths(torch.tensor(lengths, dtype=torch.int64, device=device))
    expected = [row for row, n in enumerate(lengths) for _ in range(n)]
    ascending = torch.tensor(expected, dtype=torch.int64, device=device)
    for rows in (of_lengths, Rows.of_ascending(ascending, len(lengths))):
        assert rows.n_rows == len(lengths)
        assert rows.offsets is not None and rows.of_pairs is not None
        assert rows.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        assert rows.of_pairs.tolist() == expected
        assert (rows.offsets.dtype, rows.of_pairs.dtype) == (torch.int64, torch.int32)
        assert rows.count() == sum(lengths)
        assert torch.equal(rows.of(torch.arange(sum(lengths), device=device)), ascending)


def test_rows_of_k_are_as_ragged_rows_of_that_length(device: torch.device) -> None:
    for n_rows, k in ((4, 3), (1, 1), (0, 5)):
        regular, pairs = Rows.regular(n_rows, k), torch.arange(n_rows * k, device=device)
        ragged = Rows.of_lengths(torch.full((n_rows,), k, device=device))
        assert regular.count() == ragged.count() == n_rows * k
        assert torch.equal(regular.starts(device), ragged.starts(device))
        assert torch.equal(regular.of(pairs), ragged.of(pairs))


@RAGGED
@pytest.mark.parametrize("d", [19, 523])
@pytest.mark.usefixtures("torch_path")
def test_gather_sum_of_ragged_rows_matches_float64(
    d: int, n_spare: int, lengths: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs(lengths, n_spare, device, dtype)
    weight = torch.randn(33, d).to(device, dtype)
    out = gather_sum(pairs.coefficients, pairs.latents, pairs.rows, weight, backend)
    assert out.dtype == dtype
    code, exact_weight = pairs.code(active_only=False), weight.cpu().double()
    exact = code @ exact_weight
    plain = (code.to(weight) @ weight).cpu()
    assert_within_budget(out.cpu(), plain, exact, code.abs() @ exact_weight.abs())


@RAGGED
@pytest.mark.parametrize("d", [19, 523])
@pytest.mark.usefixtures("torch_path")
def test_gather_dot_of_ragged_rows_matches_float64(
    d: int, n_spare: int, lengths: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs(lengths, n_spare, device, dtype)
    weight = torch.randn(33, d).to(device, dtype)
    batch = torch.randn(len(LENGTHS[lengths]), d).to(device, dtype)
    out = gather_dot(batch, pairs.latents, pairs.rows, weight, backend)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert out.shape == pairs.latents.shape
    assert not out[pairs.n_pairs :].any()
    rows = pairs.rows.of(torch.arange(pairs.n_pairs, device=device)).cpu()
    latents = pairs.latents[: pairs.n_pairs].cpu()
    terms = batch.cpu().double()[rows] * weight.cpu().double()[latents]
    error = (out[: pairs.n_pairs].cpu().double() - terms.sum(1)).abs()
    # Sums of so many terms are at worst this far off.
    assert (error <= d * torch.finfo(out.dtype).eps * terms.abs().sum(1)).all()


@RAGGED
@pytest.mark.usefixtures("torch_path")
def test_segment_sum_of_ragged_rows_matches_float64(
    n_spare: int, lengths: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Also of a latent with more pairs than one program sums."""
    pairs = ragged_pairs(lengths, n_spare, device, dtype)
    batch = torch.randn(len(LENGTHS[lengths]), 19).to(device, dtype)
    sums, totals = segment_sum(pairs.order(), pairs.coefficients, batch, dtype, backend)
    assert sums.dtype == totals.dtype == dtype
    code, exact_batch = pairs.code(active_only=True), batch.cpu().double()
    plain = (code.to(batch).T @ batch).cpu()
    assert_within_budget(sums.cpu(), plain, code.T @ exact_batch, code.abs().T @ exact_batch.abs())
    assert_totals(totals, code)
    never = (code != 0).sum(0) == 0
    assert never.any()
    assert not sums.cpu()[never].any()


def assert_totals(totals: torch.Tensor, code: torch.Tensor) -> None:
    assert totals.shape == code.shape[1:]
    sum_eps = torch.finfo(torch.promote_types(totals.dtype, torch.float32)).eps
    rounding = code.shape[0] * sum_eps * code.abs().sum(0)
    rounding += torch.finfo(totals.dtype).eps * code.sum(0).abs()
    assert within(totals, code.sum(0), rounding)


@RAGGED
@pytest.mark.usefixtures("torch_path")
def test_segment_totals_of_ragged_rows_match_float64(
    n_spare: int, lengths: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs(lengths, n_spare, device, dtype)
    totals = segment_totals(pairs.order(), pairs.coefficients, backend)
    assert totals.dtype == torch.promote_types(dtype, torch.float32)
    assert_totals(totals, pairs.code(active_only=True))


@pytest.mark.parametrize("law", ["uniform", "zipf"])
@pytest.mark.parametrize(("n_rows", "k"), [(7, 5), (1, 3), (150, 2), (0, 3)])
@pytest.mark.usefixtures("torch_path")
def test_segment_totals_of_rows_of_k_match_float64(
    n_rows: int, k: int, law: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    d_sae = 11
    latents = random_latents(n_rows, d_sae, k, law)
    active = torch.rand(n_rows, k) > 0.3
    values = (torch.randn(n_rows, k) / (torch.rand(n_rows, k) + 1e-2)).to(device, dtype)
    order = order_of(latents.to(device), active.to(device), d_sae)
    strided = torch.stack([values, values + 1], dim=-1)[..., 0].flatten()
    totals = segment_totals(order, strided, backend)
    assert totals.dtype == torch.promote_types(dtype, torch.float32)
    code = torch.zeros(n_rows, d_sae, dtype=torch.float64)
    code.scatter_(1, latents, values.cpu().double().masked_fill(~active, 0))
    assert_totals(totals, code)
    values[~active.to(device)] = torch.nan
    assert torch.equal(segment_totals(order, values.flatten(), backend), totals)


def test_a_bias_is_added_as_if_apart(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs("a latent on 300 rows", 9, device, dtype)
    weight = torch.randn(33, 19).to(device, dtype)
    for bias in (torch.randn(19).to(device, dtype), torch.randn(19, device=device).double()):
        sums = gather_sum(pairs.coefficients, pairs.latents, pairs.rows, weight, backend)
        given = gather_sum(pairs.coefficients, pairs.latents, pairs.rows, weight, backend, bias)
        assert given.dtype == (sums + bias).dtype
        assert torch.equal(given, sums + bias)


@pytest.mark.default_algorithms
def test_ragged_row_ops_repeat_bit_for_bit(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs("a latent on 300 rows", 9, device, dtype)
    weight, batch = torch.randn(33, 19).to(device, dtype), torch.randn(300, 19).to(device, dtype)
    results = [
        (
            gather_sum(pairs.coefficients, pairs.latents, pairs.rows, weight, backend),
            gather_dot(batch, pairs.latents, pairs.rows, weight, backend),
            *segment_sum(pairs.order(), pairs.coefficients, batch, dtype, backend),
            segment_totals(pairs.order(), pairs.coefficients, backend),
        )
        for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_ragged_row_ops_name_the_argument_with_a_wrong_shape(
    backend: Backend, device: torch.device
) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device)

    pairs = ragged_pairs("one long row", 2, device, torch.float32)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[35\]; got \[34\]"):
        gather_sum(zeros(34), pairs.latents, pairs.rows, zeros(33, 5), backend)
    with pytest.raises(ValueError, match=r"batch must have shape \[1, 5\]; got \[35, 5\]"):
        gather_dot(zeros(35, 5), pairs.latents, pairs.rows, zeros(33, 5), backend)
    with pytest.raises(ValueError, match=r"latents must have one dimension.*\[1, 35\]"):
        gather_dot(zeros(1, 5), pairs.latents[None], pairs.rows, zeros(33, 5), backend)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[35\]; got \[1, 35\]"):
        segment_sum(pairs.order(), zeros(1, 35), zeros(1, 5), torch.float32, backend)
    with pytest.raises(ValueError, match=r"values must have shape \[35\]; got \[33\]"):
        segment_totals(pairs.order(), zeros(33), backend)
