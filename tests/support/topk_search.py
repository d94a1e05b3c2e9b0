"""Inputs of the search for the top k, and what a dense computation expects of it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.search.topk import search_topk
from tests.support.ops import assert_within_budget

BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Selection:
    """What a search for the top k found, by row, with the scores; each `[n_rows, k]`."""

    latents: torch.Tensor
    pre_acts: torch.Tensor
    scores: torch.Tensor
    keys: torch.Tensor
    rows_recomputed: int = 0

    @classmethod
    def of(cls, pairs: ActivePairs, norms: torch.Tensor | None) -> "Selection":
        assert pairs.rows.k is not None
        assert pairs.row_counts is None  # those that take part in sums are active
        latents, pre_acts, keys = (
            part.view(pairs.rows.n_rows, pairs.rows.k)
            for part in (pairs.latents, pairs.pre_acts, pairs.keys)
        )
        scores = pre_acts if norms is None else pre_acts * norms[latents]
        return cls(latents, pre_acts, scores, keys, pairs.rows_recomputed)


@dataclass
class Problem:
    """Arguments of `search_topk`, float32 unless moved."""

    x: torch.Tensor  # [n_rows, d_in]
    weight: torch.Tensor  # [d_sae, d_in]
    bias: torch.Tensor  # [d_sae]
    norms: torch.Tensor | None  # [d_sae]
    k: int

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Problem":
        norms = None if self.norms is None else self.norms.to(device, dtype)
        return Problem(
            self.x.to(device, dtype),
            self.weight.to(device, dtype),
            self.bias.to(device, dtype),
            norms,
            self.k,
        )

    def search(self, backend: Backend, buffer_bytes: int = BUFFER_BYTES) -> FoundPairs:
        return search_topk(
            self.x, self.weight, self.bias, self.norms, self.k, backend, buffer_bytes
        )

    def select(self, backend: Backend, buffer_bytes: int = BUFFER_BYTES) -> Selection:
        return Selection.of(self.search(backend, buffer_bytes).complete().pairs, self.norms)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pre-activations and scores `[n_rows, d_sae]` of the dense encoder."""
        pre_acts = self.x @ self.weight.T + self.bias
        return pre_acts, pre_acts if self.norms is None else pre_acts * self.norms


def random_problem(
    n_rows: int, d_in: int, d_sae: int, k: int, *, with_norms: bool = True
) -> Problem:
    return Problem(
        x=torch.randn(n_rows, d_in),
        weight=torch.randn(d_sae, d_in) / d_in**0.5,
        bias=0.1 * torch.randn(d_sae),
        norms=torch.rand(d_sae) + 0.5 if with_norms else None,
        k=k,
    )


def plain(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    return random_problem(n_rows, d_in, d_sae, k)


def no_norms(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    return random_problem(n_rows, d_in, d_sae, k, with_norms=False)


def zipf_encoder_norms(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.weight /= (torch.randperm(d_sae) + 1).unsqueeze(1)
    problem.bias.zero_()
    return problem


def outlier_inputs(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    """A few input dimensions far larger than the others, and a large mean."""
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.x += 3
    problem.x[:, 1] += 80
    problem.x[:, d_in // 2] *= 100
    return problem


def large_biases(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.bias *= 1000
    return problem


def equal_large_biases(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    """Scores are close to each other in comparison with their size."""
    problem = random_problem(n_rows, d_in, d_sae, k, with_norms=False)
    problem.bias.fill_(300.0)
    return problem


def all_negative(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.bias -= 20
    return problem


def wide_norms(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.norms = 10 ** (6 * torch.rand(d_sae) - 3)
    return problem


def wide_row_scales(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    """Rows whose squares would leave float32's range, beside ordinary ones."""
    problem = random_problem(n_rows, d_in, d_sae, k)
    problem.x *= torch.logspace(-30, 30, n_rows).unsqueeze(1)
    problem.bias.zero_()
    return problem


def tiny_weights(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = random_problem(n_rows, d_in, d_sae, k, with_norms=False)
    problem.weight *= 1e-25
    problem.bias.zero_()
    return problem


def huge_weights(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    problem = random_problem(n_rows, d_in, d_sae, k, with_norms=False)
    problem.weight *= 1e25
    return problem


def neighbouring_latents(n_rows: int, d_in: int, d_sae: int, k: int) -> Problem:
    """Each row's largest scores lie beside each other."""
    problem = random_problem(n_rows, d_in, d_sae, k)
    start = d_sae // 3
    problem.bias[start : start + k + k // 2] += 8
    return problem


DISTRIBUTIONS: list[Callable[[int, int, int, int], Problem]] = [
    plain,
    no_norms,
    zipf_encoder_norms,
    outlier_inputs,
    large_biases,
    equal_large_biases,
    all_negative,
    wide_norms,
    wide_row_scales,
    tiny_weights,
    huge_weights,
    neighbouring_latents,
]


def assert_selects_topk(problem: Problem, selection: Selection, distinct: float = 0.6) -> None:
    """Values within the error budget; the very set of a float64 computation where it is clear.

    Args:
        problem: float32 arguments.
        selection: what was selected.
        distinct: share of rows, at least, for which rounding cannot change the set.
    """
    n_rows, k = problem.x.shape[0], problem.k
    assert selection.latents.shape == (n_rows, k)
    assert selection.latents.dtype == torch.int64
    assert_keys(selection, problem.weight.shape[0])
    assert_distinct_latents(selection, problem.weight.shape[0])

    pre_acts, scores = problem.dense()
    exact_pre_acts, exact_scores = problem.to(problem.x.device, torch.float64).dense()
    assert selection.pre_acts.dtype == pre_acts.dtype
    assert selection.scores.dtype == scores.dtype
    size = problem.x.double().abs() @ problem.weight.double().abs().T + problem.bias.abs()
    latents = selection.latents
    assert_within_budget(
        selection.pre_acts,
        pre_acts.gather(1, latents),
        exact_pre_acts.gather(1, latents),
        size.gather(1, latents),
    )
    score_size = size if problem.norms is None else size * problem.norms
    assert_within_budget(
        selection.scores,
        scores.gather(1, latents),
        exact_scores.gather(1, latents),
        score_size.gather(1, latents),
    )

    # The scores themselves, in order, are those of the true top k.
    exact_top = exact_scores.topk(min(k + 1, exact_scores.shape[1])).values
    assert_within_budget(
        selection.scores.sort(descending=True).values,
        scores.topk(k).values,
        exact_top[:, :k],
        score_size,
    )

    if k == exact_scores.shape[1]:
        return
    rounding = 4 * (scores.double() - exact_scores).abs().amax(1)
    is_clear = exact_top[:, k - 1] - exact_top[:, k] > rounding
    assert is_clear.double().mean() >= distinct
    expected = exact_scores.topk(k).indices.sort().values
    assert torch.equal(latents.sort().values[is_clear], expected[is_clear])


def assert_keys(selection: Selection, d_sae: int) -> None:
    """The latent where it is active, `d_sae` where the ReLU clips it; a NaN is active."""
    assert selection.keys.dtype == torch.int32
    expected = selection.latents.masked_fill(selection.scores <= 0, d_sae)
    assert torch.equal(selection.keys.long(), expected)


def assert_distinct_latents(selection: Selection, d_sae: int) -> None:
    latents = selection.latents.sort().values
    assert (latents >= 0).all()
    assert (latents < d_sae).all()
    assert (latents.diff() > 0).all()


def assert_same_scores(problem: Problem, selection: Selection) -> None:
    """Sorted scores of a float32 computation, NaN and infinities included; any set on ties."""
    assert_distinct_latents(selection, problem.weight.shape[0])
    assert_keys(selection, problem.weight.shape[0])
    pre_acts, scores = problem.dense()
    expected = scores.topk(problem.k).values
    actual = selection.scores.topk(problem.k).values
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(
        selection.pre_acts,
        pre_acts.gather(1, selection.latents),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )
    torch.testing.assert_close(
        selection.scores,
        scores.gather(1, selection.latents),
        rtol=1e-4,
        atol=1e-5,
        equal_nan=True,
    )
