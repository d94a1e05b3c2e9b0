"""A screen in float8: rows rounded for it, what a search with it finds, and how much that is."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.ops.common.precision import FLOAT8
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.search.batch_topk import search_batch_topk
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.search.recall import RowSample
from saelens_sparse.ops.search.threshold import search_above_threshold
from saelens_sparse.ops.search.topk import search_topk
from tests.conftest import Target, target_parameters
from tests.support.float8 import set_deviations

pytest.importorskip("triton")

from saelens_sparse.ops.screen.gpu import float8_deviations
from saelens_sparse.ops.screen.round_kernels import round_rows, settle_rows

kernels = pytest.mark.parametrize(
    "target", [p for p in target_parameters(interpreted=True) if p.values[0].backend == "triton"]
)
BUFFER_BYTES = 2**24


def rows_of_all_sizes(d: int) -> torch.Tensor:
    rows = torch.randn(12, d)
    rows *= torch.logspace(-30, 30, 12)[:, None]
    rows[3, 1:] = 0
    rows[4] = 0
    rows[5, 0] = 1e4 * rows[5, 0]
    return rows


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, FLOAT8], ids=["float16", "float8"])
@pytest.mark.parametrize("d", [1, 48, 96, 100, 2304])
def test_rounded_rows_and_their_errors(target: Target, dtype: torch.dtype, d: int) -> None:
    rows = rows_of_all_sizes(d).to(target.device)
    rounded, (inverse, norms, residuals) = round_rows(rows, dtype)
    assert torch.equal(torch.frexp(inverse).mantissa, torch.full_like(inverse, 0.5))
    exact = rows.double()
    torch.testing.assert_close(norms.double(), exact.norm(dim=1), rtol=1e-6, atol=0)
    scaled = rounded.double().norm(dim=1)[exact.norm(dim=1) > 0]
    assert bool(((scaled > 64 / 1.2) & (scaled < 128 * 1.2)).all())
    off = (exact - rounded.double() * inverse.double()[:, None]).norm(dim=1)
    torch.testing.assert_close(residuals.double(), off, rtol=1e-5, atol=0)
    expected = (exact / inverse.double()[:, None]).float().to(dtype)
    assert torch.equal(rounded.float(), expected.float())


@kernels
def test_rows_rounded_with_an_old_scale_become_what_they_are_anew(target: Target) -> None:
    """Those that still fit their scale keep it, the others are rounded again."""
    rows = torch.cat([rows_of_all_sizes(40), torch.randn(8, 40)]).to(target.device)
    rounded, errors = round_rows(rows, FLOAT8)
    changes = torch.tensor([1.0, 1.01, 2.0, 0.5, 1e3, 1e-6, 3.9, 1.3], device=target.device)
    rows[12:] *= changes[:, None]
    rows[12, 0] = torch.nan
    scaled = rows / errors[0][:, None]
    fits = (scaled.norm(dim=1) >= 64) & (scaled.norm(dim=1) < 128)
    assert fits.any() and (~fits).any()
    again, _ = round_rows(rows, FLOAT8)
    # What is settled as it is must not be rounded again: only then is this seen afterwards.
    rounded = torch.where(fits[:, None], scaled.to(FLOAT8).float(), -1.0).to(FLOAT8)
    kept = rounded.clone()
    halves = scaled.view(20, 2, 20)
    residuals = scaled - rounded.float()
    settle_rows(
        rows, rounded, errors, halves.square().sum(2), residuals.view(20, 2, 20).square().sum(2)
    )
    assert torch.equal(rounded[fits].float(), kept[fits].float())
    assert torch.equal(rounded[~fits].float().nan_to_num(), again[~fits].float().nan_to_num())
    inverse, norms, off = errors[:, 1:12].double()
    exact = rows[1:12].double()
    torch.testing.assert_close(norms, exact.norm(dim=1), rtol=1e-5, atol=0)
    apart = (exact - rounded[1:12].double() * inverse[:, None]).norm(dim=1)
    torch.testing.assert_close(off, apart, rtol=1e-4, atol=0)
    assert bool(errors[1, 12].isnan())


@kernels
def test_rows_of_several_programs_are_settled_as_those_of_one(target: Target) -> None:
    rows = torch.cat([rows_of_all_sizes(40), torch.randn(11, 40)])[:23].to(target.device)
    inverse = round_rows(rows, FLOAT8)[1][0]
    rows *= torch.where(torch.arange(23, device=target.device) % 5 == 0, 2.5, 1.0)[:, None]
    scaled = rows / inverse[:, None]
    rounded = scaled.clamp(-448, 448).to(FLOAT8)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for times in (1, 6):  # 138 rows, no multiple of what a program settles
        many, values = rows.repeat(times, 1), rounded.repeat(times, 1)
        errors = torch.full((3, 23 * times), -1.0, device=target.device)
        errors[0] = inverse.repeat(times)
        squares, residual_squares = (
            part.repeat(times, 1).view(-1, 2, 20).square().sum(2)
            for part in (scaled, scaled - rounded.float())
        )
        settle_rows(many, values, errors, squares, residual_squares)
        results.append((values.float(), errors))
    (values, errors), (many_values, many_errors) = results
    assert torch.equal(many_values, values.repeat(6, 1))
    assert torch.equal(many_errors, errors.repeat(1, 6))
    expected, expected_errors = round_rows(rows, FLOAT8)
    assert torch.equal(values, expected.float())
    torch.testing.assert_close(errors, expected_errors, rtol=1e-5, atol=0)


def topk_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, **of: Any
) -> FoundPairs:
    return search_topk(x, weight, bias, norms, 4, "triton", BUFFER_BYTES, **of)


def batch_topk_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, **of: Any
) -> FoundPairs:
    # In several chunks: the edge of a single one leaves more room than a margin does.
    buffer_bytes = 2 * weight.shape[0] * (x.shape[0] // 3 + 1)
    count = 4 * x.shape[0]
    return search_batch_topk(x, weight, bias, norms, count, "triton", buffer_bytes, **of)


def pattern_of(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, **of: Any
) -> FoundPairs:
    del norms
    threshold = torch.full_like(bias, 2.0)
    return search_above_threshold(
        x, weight, bias, threshold, 0.1, 5000, "triton", BUFFER_BYTES, **of
    )


searches = pytest.mark.parametrize("search", [topk_of, batch_topk_of, pattern_of])


def operands(target: Target, n_rows: int) -> tuple[torch.Tensor, ...]:
    """Of heavy-tailed latents: a few fire on most rows."""
    d_in, d_sae = 96, 512
    weight = torch.randn(d_sae, d_in) / d_in**0.5
    bias = 0.5 / (1 + torch.randperm(d_sae)) ** 0.3
    some = (torch.randn(n_rows, d_in), weight, bias, 0.5 + torch.rand(d_sae))
    return tuple(part.to(target.device) for part in some)


def taking_part(pairs: ActivePairs, d_sae: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and latent of the pairs that take part in sums, in order, and their pre-activations."""
    places = (pairs.keys < d_sae).nonzero().squeeze(1)
    where = pairs.rows.of(places) * d_sae + pairs.latents[places]
    order = where.argsort()
    return where[order], pairs.pre_acts[places][order]


@kernels
@searches
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_what_is_found_is_computed_in_float32(
    target: Target, search: Callable[..., FoundPairs], autocast: bool
) -> None:
    x, weight, bias, norms = operands(target, 10 if target.interpreted else 500)
    expected = search(x, weight, bias, norms).complete().pairs
    with torch.autocast(target.device, torch.bfloat16, enabled=autocast):
        found = search(x, weight, bias, norms, screen_dtype="float8").complete().pairs
    where, pre_acts = taking_part(expected, bias.numel())
    found_where, found_pre_acts = taking_part(found, bias.numel())
    is_right = torch.isin(found_where, where)
    assert is_right.float().mean() >= 0.998
    assert torch.isin(where, found_where).float().mean() >= 0.998
    same = torch.isin(where, found_where)
    torch.testing.assert_close(found_pre_acts[is_right], pre_acts[same], rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize(
    ("autocast", "deviations"), [(False, 1.5), (True, 1.25)], ids=["float32", "autocast"]
)
def test_the_margin_is_the_documented_one(
    target: Target, autocast: bool, deviations: float
) -> None:
    screen = import_module("saelens_sparse.ops.screen.gpu")
    x, weight, bias, norms = (part[:24] for part in operands(target, 5))
    with torch.autocast(target.device, torch.bfloat16, enabled=autocast):
        of = screen.Screen.of(x, weight, bias, tile=64, norms=norms, screen_dtype="float8")
    _, x_norms, x_residuals = round_rows(x, FLOAT8)[1][..., None]
    _, w_norms, w_residuals = round_rows(weight, FLOAT8)[1]
    root = x.shape[1] ** 0.5
    margin = deviations * (x_residuals * w_norms + x_norms * w_residuals) / root * norms
    used = of.x_errors[2, :, None] * of.terms[2] + of.x_errors[1, :, None] * of.terms[3]
    torch.testing.assert_close(used, margin, rtol=1e-5, atol=0)


@kernels
def test_a_search_above_thresholds_allows_for_two_margins(target: Target) -> None:
    """What it compares scores with is no score that a margin has lowered."""
    kernels_of = import_module("saelens_sparse.ops.search.threshold_kernels")
    x, weight, bias, _ = operands(target, 24 if target.interpreted else 500)
    edge = 2.0 - 0.1 / 2
    _, (n_marked, _) = kernels_of.find_pattern(
        x,
        weight,
        bias,
        torch.full_like(bias, 2.0),
        0.1,
        x.shape[0] * bias.numel(),
        BUFFER_BYTES,
        screen_dtype="float8",
    )
    low_x, (x_inverse, x_norms, x_residuals) = round_rows(x, FLOAT8)
    low_weight, (w_inverse, w_norms, w_residuals) = round_rows(weight, FLOAT8)
    products = low_x.double() @ low_weight.double().T
    scores = products * x_inverse[:, None] * w_inverse + bias
    margin = x_residuals[:, None] * w_norms + x_norms[:, None] * w_residuals
    margin *= float8_deviations(x.dtype) / x.shape[1] ** 0.5
    one, two = ((scores + n * margin >= edge).sum().item() for n in (1, 2))
    assert two > 1.02 * one
    assert abs(n_marked.item() - two) < (two - one) / 4


@kernels
@searches
def test_without_a_margin_latents_are_missed(
    target: Target, search: Callable[..., FoundPairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their share is what a sample of rows says."""
    x, weight, bias, norms = operands(target, 12 if target.interpreted else 500)
    expected = search(x, weight, bias, norms).complete().pairs
    recalls: list[float] = []
    for deviations in (0.0, 1.5):
        set_deviations(monkeypatch, deviations)
        found = search(x, weight, bias, norms, screen_dtype="float8").complete().pairs
        recall, whole_rows = RowSample.of(found, bias.numel(), x.shape[0]).recall(expected)
        where = taking_part(expected, bias.numel())[0]
        there = torch.isin(where, taking_part(found, bias.numel())[0])
        assert recall.item() == pytest.approx(there.float().mean().item())
        missed_rows = (where[~there] // bias.numel()).unique().numel()
        assert whole_rows.item() == pytest.approx(1 - missed_rows / x.shape[0])
        recalls.append(recall.item())
    assert recalls[0] < recalls[1]
    assert recalls[1] >= 0.998


def test_recall_of_a_sample_of_ragged_rows() -> None:
    """Rows 0, 2 and 4 of six; what takes part in no sum, and what is on no row, is not there."""
    d_sae = 5
    rows = torch.tensor([0, 0, 1, 2, 2, 2, 5, 0])
    latents = torch.tensor([0, 1, 0, 2, 3, 4, 1, 3])
    keys = latents.int()
    keys[4] = d_sae
    offsets = torch.tensor([0, 2, 3, 6, 6, 6, 7])
    found = ActivePairs(latents, keys, torch.ones(8), Rows.ragged(offsets, rows.int()))
    sample = RowSample.of(found, d_sae, 3)
    assert sample.rows.tolist() == [0, 2, 4]
    assert sample.found.int().tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0]]
    there = torch.tensor([1, 2, 3, 4, 0, 0])
    exact = ActivePairs(there, there.int(), torch.ones(6), Rows.regular(3, 2))
    recall, whole_rows = sample.recall(exact)
    # Of row 0 latent 2 is missed, of row 2 latent 3, of row 4 latent 0, which is counted once.
    assert recall.item() == pytest.approx(2 / 5)
    assert whole_rows.item() == 0
    nothing = ActivePairs(there, torch.full_like(there, d_sae).int(), torch.ones(6), exact.rows)
    assert [one.item() for one in sample.recall(nothing)] == [1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("d_in", [16, 768, 2304, 4096])
def test_a_product_is_that_of_its_operands(d_in: int) -> None:
    """Up to float16, and to what fast accumulation keeps of a sum."""
    product = import_module("saelens_sparse.ops.screen.float8_product")
    x, weight = torch.randn(300, d_in, device="cuda"), torch.randn(1024, d_in, device="cuda")
    (low_x, _), (low_weight, _) = round_rows(x, FLOAT8), round_rows(weight, FLOAT8)
    out = torch.empty(300, 1024, dtype=torch.float16, device="cuda")
    product.multiply_float8(low_x, low_weight, out)
    exact = low_x.double() @ low_weight.double().T
    sizes = low_x.double().norm(dim=1)[:, None] * low_weight.double().norm(dim=1)
    assert ((out.double() - exact).abs() <= 2**-11 * (exact.abs() + sizes)).all()


@pytest.mark.gpu
def test_recall_at_a_training_shape() -> None:
    d_in, d_sae, k = 2304, 65_536, 64
    weight = torch.randn(d_sae, d_in, device="cuda")
    weight *= (torch.rand(d_sae, 1, device="cuda") ** 2 + 0.2) / d_in**0.5
    x = torch.randn(1024, d_in, device="cuda") * torch.logspace(-1, 1, d_in, device="cuda")
    bias = torch.zeros(d_sae, device="cuda")
    with torch.no_grad():
        found = search_topk(x, weight, bias, None, k, "triton", 2**30, None, "float8").complete()
        exact = search_topk(x, weight, bias, None, k, "triton", 2**30).complete()
    recall, whole_rows = RowSample.of(found.pairs, d_sae, 1024).recall(exact.pairs)
    assert recall.item() >= 0.9995
    assert whole_rows.item() >= 0.97
    assert found.pairs.rows_recomputed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("n_chunks", [1, 2, 8])
def test_the_candidates_of_a_batch_have_room(n_chunks: int) -> None:
    """Of normal scores, of which a margin makes 1.4 to 1.5 times as many candidates."""
    search = import_module("saelens_sparse.ops.search.batch_topk_kernels")
    n_rows, d_in, d_sae, k = 512, 768, 65_536, 16
    weight = torch.randn(d_sae, d_in, device="cuda") / d_in**0.5
    x, bias = torch.randn(n_rows, d_in, device="cuda"), torch.zeros(d_sae, device="cuda")
    buffer_bytes = 2 * d_sae * n_rows // n_chunks
    _, found, capacity = search.find_largest(
        x, weight, bias, None, k * n_rows, buffer_bytes, None, "float8"
    )
    n_candidates, reaches_down = found.tolist()
    assert n_candidates <= capacity
    assert reaches_down


@pytest.mark.parametrize("n_chunks", [1, 2, 8, 64])
def test_a_list_has_room_for_what_a_margin_lets_in(n_chunks: int) -> None:
    search = import_module("saelens_sparse.ops.search.batch_topk_kernels")
    count, margin = 2**18, 2.0
    among_the_largest_so_far = sum(count / (1 + chunk) for chunk in range(n_chunks))
    room = search.list_capacity(count, n_chunks, "float8")
    assert margin * among_the_largest_so_far <= room
    assert search.list_capacity(count, n_chunks, "auto") < room
