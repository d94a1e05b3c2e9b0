"""Inputs of the search for pairs, and what a dense float64 computation expects of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.search.threshold import search_above_threshold

BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Pattern:
    """What a search for pairs found, and their numbers as it told them.

    Attributes:
        latents: `[n_pairs]`, as all but the following.
        offsets: `[n_rows + 1]`.
        row_counts: `[n_rows]`.
        totals: number of pairs, and of active ones.
    """

    latents: torch.Tensor
    keys: torch.Tensor
    pre_acts: torch.Tensor
    offsets: torch.Tensor
    rows: torch.Tensor
    row_counts: torch.Tensor
    totals: tuple[int, int]

    @classmethod
    def of(cls, pairs: ActivePairs, totals: tuple[int, int]) -> "Pattern":
        rows = pairs.rows
        assert rows.k is None and rows.offsets is not None and rows.of_pairs is not None
        assert pairs.row_counts is not None
        assert pairs.rows_recomputed == 0
        return cls(
            pairs.latents, pairs.keys, pairs.pre_acts, rows.offsets, rows.of_pairs,
            pairs.row_counts, totals,
        )  # fmt: skip


@dataclass(frozen=True)
class Search:
    """A search that is queued on the device."""

    found: FoundPairs

    @property
    def pattern(self) -> Pattern:
        """As many of the pairs as there was room for."""
        return Pattern.of(self.found.pairs, _totals(self.found))

    def result(self) -> Pattern:
        """All pairs."""
        found = self.found.complete()
        return Pattern.of(found.pairs, _totals(found))


def _totals(found: FoundPairs) -> tuple[int, int]:
    assert found.totals is not None
    n_pairs, n_active = found.totals.values().tolist()
    return n_pairs, n_active


@dataclass(frozen=True)
class Problem:
    """Arguments of `search_above_threshold`, float32 on the CPU unless moved."""

    x: torch.Tensor  # [n_rows, d_in]
    weight: torch.Tensor  # [d_sae, d_in]
    bias: torch.Tensor  # [d_sae]
    threshold: torch.Tensor  # [d_sae]
    bandwidth: float = 0.25

    @property
    def n_rows(self) -> int:
        return self.x.shape[0]

    @property
    def d_sae(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Problem":
        return replace(
            self,
            x=self.x.to(device, dtype),
            weight=self.weight.to(device, dtype),
            bias=self.bias.to(device, dtype),
            threshold=self.threshold.to(device, dtype),
        )

    def start(
        self, backend: Backend, capacity: int | None = None, buffer_bytes: int = BUFFER_BYTES
    ) -> Search:
        """The search; there is room for all pairs unless told otherwise."""
        capacity = self.n_rows * self.d_sae if capacity is None else capacity
        found = search_above_threshold(
            self.x, self.weight, self.bias, self.threshold, self.bandwidth, capacity, backend,
            buffer_bytes,
        )  # fmt: skip
        return Search(found)


def plain(n_rows: int, d_in: int, d_sae: int) -> Problem:
    return Problem(
        x=torch.randn(n_rows, d_in),
        weight=torch.randn(d_sae, d_in) / d_in**0.5,
        bias=0.1 * torch.randn(d_sae),
        threshold=torch.randn(d_sae).div(2).exp(),
    )


def heavy_tails(n_rows: int, d_in: int, d_sae: int) -> Problem:
    problem = plain(n_rows, d_in, d_sae)
    problem.x.div_(torch.rand(n_rows, d_in) + 1e-3)
    problem.weight.mul_((2 * torch.randn(d_sae, 1)).exp())
    problem.threshold.mul_((2 * torch.randn(d_sae)).exp())
    return problem


def outlier_inputs(n_rows: int, d_in: int, d_sae: int) -> Problem:
    """A few input dimensions far larger than the others, and a large mean."""
    problem = plain(n_rows, d_in, d_sae)
    problem.x.add_(3)
    problem.x[:, 1] += 80
    problem.x[:, d_in // 2] *= 100
    return problem


def large_biases(n_rows: int, d_in: int, d_sae: int) -> Problem:
    """Pre-activations near thresholds that are large themselves."""
    problem = plain(n_rows, d_in, d_sae)
    problem.bias.add_(300)
    problem.threshold.copy_(300 + torch.randn(d_sae))
    return problem


def wide_row_scales(n_rows: int, d_in: int, d_sae: int) -> Problem:
    """Rows whose squares would leave float32's range, beside ordinary ones."""
    problem = plain(n_rows, d_in, d_sae)
    problem.x.mul_(torch.logspace(-30, 30, n_rows).unsqueeze(1))
    problem.threshold[::2] = 0
    return replace(problem, bias=torch.zeros(d_sae), bandwidth=1e-12)


def tiny_weights(n_rows: int, d_in: int, d_sae: int) -> Problem:
    problem = plain(n_rows, d_in, d_sae)
    for tensor in (problem.weight, problem.bias, problem.threshold):
        tensor.mul_(1e-25)
    return replace(problem, bandwidth=1e-26)


def zero_thresholds(n_rows: int, d_in: int, d_sae: int) -> Problem:
    return replace(plain(n_rows, d_in, d_sae), threshold=torch.zeros(d_sae))


def large_thresholds(n_rows: int, d_in: int, d_sae: int) -> Problem:
    """Nothing fires, but for one latent that its bias lifts above on every row."""
    problem = replace(plain(n_rows, d_in, d_sae), threshold=torch.full((d_sae,), 1e4))
    problem.bias[d_sae // 2] = 2e4
    return problem


def wide_window(n_rows: int, d_in: int, d_sae: int) -> Problem:
    return replace(plain(n_rows, d_in, d_sae), bandwidth=5.0)


def nothing_to_everything(n_rows: int, d_in: int, d_sae: int) -> Problem:
    """Rows on which nothing, some, or everything is active; one latent fires on every row."""
    problem = plain(n_rows, d_in, d_sae)
    problem.weight[:, 0] = 1
    problem.x[:, 0] = torch.tensor([1e3, -1e3, 0.0]).repeat(n_rows)[:n_rows]
    problem.bias[d_sae // 3] = 5e3
    return problem


DISTRIBUTIONS: list[Callable[[int, int, int], Problem]] = [
    plain,
    heavy_tails,
    outlier_inputs,
    large_biases,
    wide_row_scales,
    tiny_weights,
    zero_thresholds,
    large_thresholds,
    wide_window,
    nothing_to_everything,
]


def whole_numbers(n_rows: int, d_in: int, d_sae: int) -> Problem:
    """Sums that are exact in any order, none of which meets a gate or an edge of its window."""
    return Problem(
        x=torch.randint(-8, 9, (n_rows, d_in)).float(),
        weight=torch.randint(-8, 9, (d_sae, d_in)).float(),
        bias=torch.randint(-8, 8, (d_sae,)) + 0.125,
        threshold=torch.randint(0, 60, (d_sae,)).float(),
        bandwidth=3.5,
    )


@dataclass(frozen=True)
class Expected:
    """A dense float64 computation, and what the rounding of its operations leaves open.

    Attributes:
        pre_acts: `[n_rows, d_sae]`.
        rounding: bound on the error of a pre-activation, likewise.
        pre_acts_dtype: dtype that a dense encoder gives.
        inside: pairs that must be in the pattern, and those that may be.
        active: pairs that must be counted as active, and those that may be.
    """

    pre_acts: torch.Tensor
    rounding: torch.Tensor
    pre_acts_dtype: torch.dtype
    inside: tuple[torch.Tensor, torch.Tensor]
    active: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, problem: Problem, compute_dtype: torch.dtype | None = None) -> "Expected":
        compute_dtype = compute_dtype or problem.x.dtype
        dtype = torch.promote_types(compute_dtype, problem.bias.dtype)
        x, weight = (t.to(compute_dtype).double() for t in (problem.x, problem.weight))
        bias, gate = problem.bias.double(), problem.threshold.to(dtype).double()
        products = x @ weight.T
        pre_acts = products + bias
        size = x.abs() @ weight.abs().T + bias.abs()
        sum_eps = torch.finfo(torch.promote_types(compute_dtype, torch.float32)).eps
        rounding = (x.shape[1] + 2) * sum_eps * size
        rounding += torch.finfo(compute_dtype).eps * products.abs()
        rounding += torch.finfo(dtype).eps * pre_acts.abs()
        edge = gate - problem.bandwidth / 2
        slack = 4 * torch.finfo(dtype).eps * (gate.abs() + problem.bandwidth)

        def where(finite: torch.Tensor, not_finite: torch.Tensor) -> torch.Tensor:
            return torch.where(pre_acts.isfinite(), finite, not_finite)

        not_below = pre_acts.ne(-torch.inf)  # a NaN is inside, but not active
        infinite = pre_acts.eq(torch.inf)
        return cls(
            pre_acts,
            rounding,
            dtype,
            (
                where(pre_acts > edge + rounding, not_below),
                where(pre_acts > edge - slack - rounding, not_below),
            ),
            (
                where(pre_acts > gate + rounding, infinite),
                where(pre_acts > gate - rounding, infinite),
            ),
        )


def assert_pattern(
    problem: Problem,
    pattern: Pattern,
    compute_dtype: torch.dtype | None = None,
    clear: float = 0.9,
) -> None:
    """The pairs, values and counts of a float64 computation.

    Args:
        problem: the arguments.
        pattern: what was found.
        compute_dtype: dtype of the product, if not that of the arguments.
        clear: share of pairs, at least, of which rounding leaves nothing open.
    """
    n_rows, d_sae = problem.n_rows, problem.d_sae
    expected = Expected.of(problem, compute_dtype)
    offsets = pattern.offsets
    assert (offsets.dtype, offsets.shape) == (torch.int64, (n_rows + 1,))
    assert offsets[0] == 0
    lengths = offsets.diff()
    assert (lengths >= 0).all()
    n_pairs = int(offsets[-1])
    for values, dtype in (
        (pattern.latents, torch.int64),
        (pattern.keys, torch.int32),
        (pattern.rows, torch.int32),
        (pattern.pre_acts, expected.pre_acts_dtype),
    ):
        assert values.dtype == dtype
        assert values.shape == pattern.latents.shape
        assert values.numel() >= n_pairs
        assert not values.requires_grad
    # Beyond the last row there is nothing.
    assert (pattern.keys[n_pairs:] == d_sae).all()
    assert not pattern.rows[n_pairs:].any()
    assert not pattern.pre_acts[n_pairs:].any()

    latents, keys, pre_acts = (
        values[:n_pairs] for values in (pattern.latents, pattern.keys, pattern.pre_acts)
    )
    rows = torch.arange(n_rows, device=offsets.device).repeat_interleave(lengths)
    assert torch.equal(pattern.rows[:n_pairs].long(), rows)
    assert (latents >= 0).all() and (latents < d_sae).all()
    place = rows * d_sae + latents
    assert (place.diff() > 0).all()  # rows in order, and ascending within a row
    has_key = keys != d_sae
    assert torch.equal(keys[has_key].long(), latents[has_key])

    in_pattern = torch.zeros_like(expected.pre_acts, dtype=torch.bool)
    in_pattern.view(-1)[place[has_key]] = True
    must, may = expected.inside
    assert not (must & ~in_pattern).any()
    assert not (in_pattern & ~may).any()
    if must.numel() > 0:
        assert (must == may).double().mean() >= clear

    exact, rounding = (values.flatten()[place] for values in (expected.pre_acts, expected.rounding))
    finite = exact.isfinite()
    assert ((pre_acts.double() - exact).abs() <= rounding)[finite].all()
    torch.testing.assert_close(
        pre_acts[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True
    )

    assert (pattern.row_counts.dtype, pattern.row_counts.shape) == (torch.int32, (n_rows,))
    must, may = expected.active
    assert (must.sum(1) <= pattern.row_counts).all()
    assert (pattern.row_counts <= may.sum(1)).all()
    # Of its own values exactly.
    above = pre_acts > problem.threshold.to(pre_acts.dtype)[latents]
    assert torch.equal(torch.bincount(rows[above], minlength=n_rows), pattern.row_counts.long())
    assert pattern.totals == (n_pairs, int(pattern.row_counts.sum()))


def tensors_of(pattern: Pattern) -> list[torch.Tensor]:
    """All that belongs to the rows of a pattern."""
    n_pairs = int(pattern.offsets[-1])
    pairs = (pattern.latents, pattern.keys, pattern.pre_acts, pattern.rows)
    return [
        *(values[:n_pairs] for values in pairs),
        pattern.offsets,
        pattern.row_counts,
        torch.tensor(pattern.totals),
    ]


def assert_same_bits(a: Pattern, b: Pattern) -> None:
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
