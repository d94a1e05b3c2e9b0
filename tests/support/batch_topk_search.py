"""What a search for the largest scores of a batch must find, by a dense computation in float64."""

import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.search.batch_topk import search_batch_topk
from saelens_sparse.ops.search.found import FoundPairs
from tests.support.topk_search import BUFFER_BYTES, Problem


def search(
    problem: Problem, count: int, backend: Backend, buffer_bytes: int = BUFFER_BYTES
) -> FoundPairs:
    """Of the problem's rows together, whatever its k."""
    return search_batch_topk(
        problem.x, problem.weight, problem.bias, problem.norms, count, backend, buffer_bytes
    )


def find(
    problem: Problem, count: int, backend: Backend, buffer_bytes: int = BUFFER_BYTES
) -> ActivePairs:
    return search(problem, count, backend, buffer_bytes).complete().pairs


def kept(pairs: ActivePairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, latent and pre-activation of the pairs that are on a row."""
    assert pairs.rows.of_pairs is not None
    n = pairs.rows.count()
    return pairs.rows.of_pairs[:n].long(), pairs.latents[:n], pairs.pre_acts[:n]


def assert_well_formed(pairs: ActivePairs, n_rows: int, d_sae: int) -> None:
    """Rows in order, latents that ascend on each, and nothing beyond the last row."""
    offsets, of_pairs = pairs.rows.offsets, pairs.rows.of_pairs
    assert offsets is not None and of_pairs is not None
    assert (offsets.dtype, offsets.shape) == (torch.int64, (n_rows + 1,))
    assert offsets[0] == 0
    assert pairs.rows.k is None
    assert pairs.row_counts is None  # pairs on a row are active
    assert (pairs.latents.dtype, pairs.keys.dtype) == (torch.int64, torch.int32)
    assert of_pairs.dtype == torch.int32
    assert pairs.latents.shape == pairs.keys.shape == pairs.pre_acts.shape == of_pairs.shape
    assert not pairs.pre_acts.requires_grad
    n = pairs.rows.count()
    rows, latents, _ = kept(pairs)
    expected = torch.arange(n_rows, device=offsets.device).repeat_interleave(offsets.diff())
    assert torch.equal(rows, expected)
    assert (latents >= 0).all() and (latents < d_sae).all()
    assert ((rows * d_sae + latents).diff() > 0).all()
    assert torch.equal(pairs.keys[:n].long(), latents)
    assert (pairs.keys[n:] == d_sae).all()
    assert not (pairs.latents[n:].any() or pairs.pre_acts[n:].any() or of_pairs[n:].any())


def rounding_of(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """What the rounding of its operations may change of pre-activations and of scores,
    `[n_rows, d_sae]`.
    """
    eps = torch.finfo(torch.promote_types(problem.x.dtype, torch.float32)).eps
    x, weight, bias = (t.double() for t in (problem.x, problem.weight, problem.bias))
    size = x.abs() @ weight.abs().T + bias.abs()
    pre_acts = (x.shape[1] + 4) * eps * size
    if problem.x.dtype == torch.bfloat16:
        pre_acts = pre_acts + 2 * torch.finfo(torch.bfloat16).eps * size
    pre_acts = pre_acts + torch.finfo(problem.x.dtype).tiny
    return pre_acts, pre_acts if problem.norms is None else pre_acts * problem.norms.double()


def assert_keeps_largest(
    problem: Problem, count: int, pairs: ActivePairs, clear: float = 0.98
) -> None:
    """The values and, as far as rounding leaves nothing open, the very set of a float64
    computation; exactly `count` of them, unless fewer scores are positive.

    Args:
        problem: the arguments.
        count: how many were asked for.
        pairs: what was found.
        clear: share of pairs, at least, of which rounding leaves nothing open.
    """
    n_rows, d_sae = problem.x.shape[0], problem.weight.shape[0]
    assert_well_formed(pairs, n_rows, d_sae)
    exact_pre_acts, exact = problem.to(problem.x.device, torch.float64).dense()
    rounding, score_rounding = rounding_of(problem)
    rows, latents, pre_acts = kept(pairs)
    assert ((pre_acts.double() - exact_pre_acts[rows, latents]).abs() <= rounding[rows, latents])\
        .all()  # fmt: skip

    n_sure, n_possible = ((exact > part).sum() for part in (score_rounding, -score_rounding))
    n_kept = pairs.rows.count()
    assert min(count, int(n_sure)) <= n_kept <= min(count, int(n_possible))
    in_kept = torch.zeros_like(exact, dtype=torch.bool)
    in_kept[rows, latents] = True
    # That many scores are at most this, wherever rounding moves them, and that many at least that.
    limits = torch.zeros(2, dtype=torch.float64, device=exact.device)
    if count > 0:
        for i, scores in enumerate((exact + score_rounding, exact - score_rounding)):
            limits[i] = scores.flatten().topk(count).values[-1].clamp(min=0.0)
        must = exact - score_rounding > limits[0]
        may = exact + score_rounding >= limits[1]
        assert not (must & ~in_kept).any()
        assert not (in_kept & ~may).any()
        assert (must == may).double().mean() >= clear
