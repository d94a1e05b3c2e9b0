from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.implementation import Backend
from saelens_sparse.ops import (
    GatePattern,
    LatentOrder,
    RaggedRows,
    gather_dot,
    gather_sum,
    segment_sum,
    segment_totals,
    start_find_pattern,
)
from saelens_sparse.ops.dense_gate import dense_gate, dense_gate_gradients
from saelens_sparse.ops.gate import PendingPattern
from tests.conftest import Target
from tests.ops_helpers import assert_within_budget, random_latents, require_gpu_memory

BUFFER_BYTES = 64 * 2**20

# NumPy, on which Triton's interpreter runs, warns about arithmetic with NaN and infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:(triton|numpy)")


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@dataclass(frozen=True)
class Problem:
    """Arguments of `start_find_pattern`, float32 on the CPU unless moved."""

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
    ) -> PendingPattern:
        """The pending pattern; there is room for all pairs unless told otherwise."""
        capacity = self.n_rows * self.d_sae if capacity is None else capacity
        return start_find_pattern(
            self.x, self.weight, self.bias, self.threshold, self.bandwidth, capacity, backend,
            buffer_bytes,
        )  # fmt: skip


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
    pattern: GatePattern,
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
    offsets = pattern.ragged.offsets
    assert (offsets.dtype, offsets.shape) == (torch.int64, (n_rows + 1,))
    assert offsets[0] == 0
    lengths = offsets.diff()
    assert (lengths >= 0).all()
    n_pairs = int(offsets[-1])
    for values, dtype in (
        (pattern.latents, torch.int64),
        (pattern.keys, torch.int32),
        (pattern.ragged.rows, torch.int32),
        (pattern.pre_acts, expected.pre_acts_dtype),
    ):
        assert values.dtype == dtype
        assert values.shape == pattern.latents.shape
        assert values.numel() >= n_pairs
        assert not values.requires_grad
    # Beyond the last row there is nothing.
    assert (pattern.keys[n_pairs:] == d_sae).all()
    assert not pattern.ragged.rows[n_pairs:].any()
    assert not pattern.pre_acts[n_pairs:].any()

    latents, keys, pre_acts = (
        values[:n_pairs] for values in (pattern.latents, pattern.keys, pattern.pre_acts)
    )
    rows = torch.arange(n_rows, device=offsets.device).repeat_interleave(lengths)
    assert torch.equal(pattern.ragged.rows[:n_pairs].long(), rows)
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


def tensors_of(pattern: GatePattern) -> list[torch.Tensor]:
    """All that belongs to the rows of a pattern."""
    n_pairs = int(pattern.ragged.offsets[-1])
    pairs = (pattern.latents, pattern.keys, pattern.pre_acts, pattern.ragged.rows)
    return [
        *(values[:n_pairs] for values in pairs),
        pattern.ragged.offsets,
        pattern.row_counts,
        torch.tensor(pattern.totals),
    ]


def assert_same_bits(a: GatePattern, b: GatePattern) -> None:
    for x, y in zip(tensors_of(a), tensors_of(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.fixture
def searches(target: Target, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Capacity of each search by Triton's kernels."""
    capacities: list[int] = []
    if target.backend == "triton":
        gate_triton = import_module("saelens_sparse.ops.gate_triton")
        original = gate_triton.find_pattern

        def spy(*args: Any) -> Any:
            capacities.append(args[5])
            return original(*args)

        monkeypatch.setattr(gate_triton, "find_pattern", spy)
    return capacities


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda f: f.__name__)
def test_pattern_matches_float64(
    distribution: Callable[[int, int, int], Problem],
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    searches: list[int],
) -> None:
    problem = distribution(6, 25, 75)
    problem = problem.to(device, dtype)
    pattern = problem.start(backend).result()
    # In bfloat16 a window beside a large threshold is narrower than a rounding.
    assert_pattern(problem, pattern, clear=0.0 if dtype == torch.bfloat16 else 0.9)
    assert pattern.totals[0] > 0
    assert searches == ([6 * 75] if backend == "triton" else [])


def test_pattern_has_rows_of_nothing_and_of_everything(
    backend: Backend, device: torch.device
) -> None:
    problem = nothing_to_everything(6, 25, 75).to(device)
    counts = problem.start(backend).result().row_counts.tolist()
    assert counts[0] == counts[3] == 75
    assert counts[1] == counts[4] == 1
    assert 1 < counts[2] < 75
    problem.bias[75 // 3] = -5e3
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern)
    assert pattern.ragged.offsets.diff()[[1, 4]].tolist() == [0, 0]
    nowhere = replace(problem, threshold=torch.full_like(problem.threshold, 1e5))
    assert nowhere.start(backend).result().totals == (0, 0)


@pytest.mark.parametrize("distribution", [nothing_to_everything], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae"),
    [
        pytest.param(1, 33, 77, id="one row"),
        pytest.param(5, 1, 31, id="d_in=1, less than a word"),
        pytest.param(3, 8, 32, id="one word"),
        pytest.param(3, 7, 65, id="just over two words"),
        pytest.param(9, 12, 1, id="one latent"),
        pytest.param(17, 9, 33, id="more rows than a tile"),
        pytest.param(2, 8, 301, id="more latents than a tile"),
        pytest.param(2, 1101, 40, id="wide"),
        pytest.param(0, 12, 40, id="no rows"),
    ],
)
def test_pattern_takes_any_size(
    n_rows: int,
    d_in: int,
    d_sae: int,
    distribution: Callable[[int, int, int], Problem],
    backend: Backend,
    device: torch.device,
) -> None:
    problem = distribution(n_rows, d_in, d_sae).to(device)
    assert_pattern(problem, problem.start(backend).result())


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_pattern_takes_a_non_contiguous_input(
    layout: str, backend: Backend, device: torch.device
) -> None:
    problem = plain(5, 21, 40).to(device)
    x = {
        "transposed": problem.x.T.contiguous().T,
        "strided": torch.stack([problem.x, problem.x + 1], dim=-1)[..., 0],
        "expanded": problem.x[:1].expand(5, 21),
    }[layout]
    assert not x.is_contiguous()
    problem = replace(problem, x=x)
    assert_pattern(problem, problem.start(backend).result())


@pytest.mark.default_algorithms
def test_pattern_repeats_bit_for_bit_and_leaves_its_inputs_alone(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    problem = heavy_tails(5, 24, 70).to(device, dtype)
    before = problem.to("cpu")
    first, second = problem.start(backend).result(), problem.start(backend).result()
    assert_same_bits(first, second)
    for name in ("x", "weight", "bias", "threshold"):
        assert torch.equal(getattr(problem, name).cpu(), getattr(before, name))


def test_pattern_lists_few_pairs_that_are_not_of_it(
    backend: Backend, device: torch.device, target: Target
) -> None:
    problem = plain(target.few_rows(64), 96, 1000).to(device)
    pattern = problem.start(backend).result()
    n_spare = int((pattern.keys[: pattern.totals[0]] == 1000).sum())
    assert n_spare <= (0.02 * pattern.totals[0] if backend == "triton" else 0)


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7])
def test_pattern_by_chunks_of_rows_gives_the_same_bits(
    rows_per_chunk: int, backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = whole_numbers(7, 15, 45).to(device)
    whole = problem.start(backend).result()
    chunks: list[int] = []
    owner, name = (torch, "mm") if backend == "triton" else (torch.Tensor, "nonzero")
    original = getattr(owner, name)

    def spy(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        chunks.append(tensor.shape[0])
        return original(tensor, *args, **kwargs)

    monkeypatch.setattr(owner, name, spy)
    # The screen holds two bytes a product, the full computation four.
    product_bytes = 2 if backend == "triton" else 4
    pending = problem.start(backend, buffer_bytes=rows_per_chunk * 45 * product_bytes)
    monkeypatch.undo()
    assert chunks == {1: [1] * 7, 3: [3, 3, 1], 7: [7]}[rows_per_chunk]
    chunked = pending.result()
    assert_same_bits(whole, chunked)
    # The sums are exact, hence the float64 ones.
    exact = problem.to(device, torch.float64)
    pre_acts = exact.x @ exact.weight.T + exact.bias
    inside = pre_acts > exact.threshold - exact.bandwidth / 2
    has_key = chunked.keys < 45
    assert torch.equal(chunked.keys[has_key].long(), inside.nonzero()[:, 1])
    assert torch.equal(chunked.pre_acts[has_key].double(), pre_acts[inside])
    assert torch.equal(chunked.row_counts.long(), (pre_acts > exact.threshold).sum(1))


@pytest.mark.parametrize("buffer_bytes", [1, 500])
def test_pattern_by_chunks_of_rows_matches_float64(
    buffer_bytes: int, backend: Backend, device: torch.device
) -> None:
    """Also with a buffer smaller than a single row, which then holds one row at a time."""
    problem = heavy_tails(7, 24, 90).to(device)
    for capacity in (20, 7 * 90):
        pattern = problem.start(backend, capacity, buffer_bytes).result()
        assert_pattern(problem, pattern)


@pytest.mark.parametrize("distribution", [heavy_tails, nothing_to_everything])
@pytest.mark.parametrize("room", ["none", "one", "half", "one short", "exact", "one more", "ample"])
def test_pattern_is_the_same_with_any_capacity(
    room: str,
    distribution: Callable[[int, int, int], Problem],
    backend: Backend,
    device: torch.device,
    searches: list[int],
) -> None:
    """What does not fit is found a second time, with room for just that."""
    problem = distribution(4, 9, 40).to(device)
    whole = problem.start(backend).result()
    assert_pattern(problem, whole)
    searches.clear()

    n_pairs = whole.totals[0]
    capacity = {
        "none": 0, "one": 1, "half": n_pairs // 2, "one short": n_pairs - 1, "exact": n_pairs,
        "one more": n_pairs + 1, "ample": 1000,
    }[room]  # fmt: skip
    pending = problem.start(backend, capacity)
    if backend == "triton":
        first = pending.pattern
        kept = min(capacity, n_pairs)
        assert first.latents.numel() == capacity
        # What fits is right at once, and the rows end where the room does.
        assert torch.equal(first.ragged.offsets, whole.ragged.offsets.clamp(max=capacity))
        assert torch.equal(first.keys[:kept], whole.keys[:kept])
        assert torch.equal(first.pre_acts[:kept], whole.pre_acts[:kept])
    result = pending.result()
    assert_same_bits(result, whole)
    assert_pattern(problem, result)
    fits = capacity >= n_pairs
    assert (result.latents is pending.pattern.latents) == (fits or backend == "torch")
    if backend == "triton":
        assert searches == ([capacity] if fits else [capacity, n_pairs])
        assert result.latents.numel() == max(capacity, n_pairs)


@pytest.mark.parametrize("capacity", [1, 6 * 70])
def test_pattern_attaches_no_graph(capacity: int, backend: Backend, device: torch.device) -> None:
    """Neither at once nor when it is found a second time."""
    problem = plain(6, 24, 70).to(device)
    without = problem.start(backend).result()
    for tensor in (problem.x, problem.weight, problem.bias, problem.threshold):
        tensor.requires_grad_()
    with torch.enable_grad():
        pending = problem.start(backend, capacity)
        assert not pending.pattern.pre_acts.requires_grad
        result = pending.result()
        assert not result.pre_acts.requires_grad
        assert torch.is_grad_enabled()
    assert_same_bits(result, without)


def test_pattern_with_the_capacity_of_an_earlier_batch_under_autocast(
    backend: Backend, device: torch.device, searches: list[int]
) -> None:
    """The size is asked for within the context that the search began in."""
    problem = plain(6, 24, 70).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        whole = problem.start(backend).result()
        again = problem.start(backend, 5).result()
    assert_same_bits(whole, again)
    assert len(searches) == (3 if backend == "triton" else 0)


def test_pattern_under_autocast_is_the_dense_encoder_under_autocast(
    backend: Backend, device: torch.device
) -> None:
    """A bfloat16 product, to which the float32 bias is added in float32."""
    problem = heavy_tails(6, 48, 75).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        dense = problem.x @ problem.weight.T + problem.bias
        pattern = problem.start(backend).result()
    assert pattern.pre_acts.dtype == dense.dtype == torch.float32
    assert_pattern(problem, pattern, torch.bfloat16)
    n_pairs = pattern.totals[0]
    place = pattern.ragged.rows[:n_pairs].long(), pattern.latents[:n_pairs]
    if backend == "torch":
        assert torch.equal(pattern.pre_acts, dense[place])
    exact = Expected.of(problem)
    error = (pattern.pre_acts[:n_pairs].double() - exact.pre_acts[place]).abs()
    assert (error > exact.rounding[place]).any()  # or it would not be bfloat16


def test_pattern_keeps_nan_and_inf_under_autocast(backend: Backend, device: torch.device) -> None:
    problem = plain(6, 24, 70).to(device)
    problem.x[3, 2] = torch.nan
    problem.x[4, 5] = torch.inf
    problem.weight[[17, 69]] = torch.nan
    problem.bias[40], problem.bias[41] = torch.inf, -torch.inf
    with torch.autocast(device.type, torch.bfloat16):
        pattern = problem.start(backend).result()
    assert_pattern(problem, pattern, torch.bfloat16)


def scaled_whole_numbers(distance: float) -> Problem:
    """On row 0 every gate is within `distance`, up or down, of a pre-activation of up to 2^22.

    Products are of whole numbers that float16 rounds and whose sums float32 does not.
    """
    problem = Problem(
        x=torch.randint(-4000, 4001, (4, 16)).float(),
        weight=torch.randint(-60, 61, (90, 16)).float(),
        bias=torch.randint(-9, 10, (90,)).float(),
        threshold=torch.zeros(90),
        bandwidth=0.5,
    )
    problem.x[3] = problem.x[0]
    signs = 2 * torch.randint(0, 2, (90,)) - 1
    pre_acts = problem.x[0].double() @ problem.weight.double().T + problem.bias
    problem.threshold.copy_(pre_acts - signs * distance)
    # The input of the test: low precision is wrong about a good part.
    low = problem.x[:1].half().float() @ problem.weight.half().float().T + problem.bias
    above = (low > problem.threshold)[0]
    assert ((above != (signs > 0)).double().mean() > 0.1) and (low.abs() < 2**23).all()
    return problem


def test_gates_closer_than_the_screen_can_tell_are_decided_as_in_float32(
    backend: Backend, device: torch.device
) -> None:
    problem = scaled_whole_numbers(distance=0.5).to(device)
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern, clear=0.5)
    exact = problem.to(device, torch.float64)
    pre_acts = exact.x @ exact.weight.T + exact.bias
    assert torch.equal(pattern.row_counts.long(), (pre_acts > exact.threshold).sum(1))


def test_windows_closer_than_the_screen_can_tell_are_decided_as_in_float32(
    backend: Backend, device: torch.device
) -> None:
    problem = scaled_whole_numbers(distance=8.0).to(device)
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern, clear=0.5)
    exact = problem.to(device, torch.float64)
    pre_acts = exact.x @ exact.weight.T + exact.bias
    expected = (pre_acts > exact.threshold).nonzero()
    has_key = pattern.keys < 90
    assert torch.equal(pattern.keys[has_key].long(), expected[:, 1])
    assert torch.equal(pattern.ragged.rows[has_key].long(), expected[:, 0])
    if backend == "triton":
        assert not has_key[: pattern.totals[0]].all()


def test_a_pre_activation_at_its_threshold_is_not_active(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Though it is in the pattern, as are all that are anywhere inside the window."""
    levels = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 1.0])
    problem = Problem(
        x=levels.unsqueeze(1),
        weight=torch.ones(5, 1),
        bias=torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]),
        threshold=torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0]),
        bandwidth=1.0,
    ).to(device, dtype)
    pattern = problem.start(backend).result()
    assert pattern.row_counts.tolist() == [0, 0, 0, 0, 5, 5]
    in_pattern = torch.zeros(6, 6, dtype=torch.bool, device=device)
    in_pattern[pattern.ragged.rows.long(), pattern.keys.long()] = True
    assert in_pattern[2:, :5].all()
    assert not in_pattern[0, :5].any()


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("argument", ["x", "weight", "bias"])
def test_pattern_keeps_nan_and_inf_where_they_belong(
    argument: str, value: float, backend: Backend, device: torch.device
) -> None:
    problem = plain(5, 20, 70)
    clean = Expected.of(problem).inside
    tensor: torch.Tensor = getattr(problem, argument)
    tensor[2] = value  # a bias, or all of a row
    if argument != "bias":
        tensor[4, 7] = value
    problem = problem.to(device)
    pattern = problem.start(backend).result()
    assert_pattern(problem, pattern)
    in_pattern = torch.zeros(5, 71, dtype=torch.bool)
    in_pattern[pattern.ragged.rows.cpu().long(), pattern.keys.cpu().long()] = True
    in_pattern = in_pattern[:, :70]
    bad = torch.zeros(5, 70, dtype=torch.bool)
    for place in (2,) if argument == "bias" else (2, 4):
        (bad if argument == "x" else bad.T)[place] = True
    if value != value:
        assert in_pattern[bad].all()
    assert not (clean[0] & ~bad & ~in_pattern).any()
    assert not (in_pattern & ~bad & ~clean[1]).any()


def test_rows_too_wide_for_a_program_are_computed_in_full(
    backend: Backend, device: torch.device, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        monkeypatch.setattr("saelens_sparse.ops.gate_triton.MAX_D_IN", 20)
    for d_in in (20, 21):
        problem = plain(3, d_in, 40).to(device)
        assert_pattern(problem, problem.start(backend, 1).result())
    assert [capacity == 1 for capacity in searches] == [True, False] * (backend == "triton")


@pytest.mark.parametrize("shape", [(3, 19), (20,), (1, 3, 20)])
def test_start_find_pattern_names_an_input_of_a_wrong_shape(
    shape: tuple[int, ...], backend: Backend, device: torch.device
) -> None:
    problem = replace(plain(3, 20, 40).to(device), x=torch.zeros(shape, device=device))
    with pytest.raises(ValueError, match=r"x must have shape \[n_rows, 20\]; got \["):
        problem.start(backend, 100)


@dataclass(frozen=True)
class DenseProblem:
    """Arguments of `dense_gate` and of its gradients."""

    products: torch.Tensor  # [n_rows, d_sae]
    bias: torch.Tensor  # [d_sae]
    threshold: torch.Tensor  # [d_sae]
    bandwidth: float
    grad_acts: torch.Tensor  # [n_rows, d_sae]
    grad_l0: torch.Tensor  # [n_rows]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "DenseProblem":
        products, bias, threshold, grad_acts, grad_l0 = (
            tensor.to(device, dtype)
            for tensor in (
                self.products, self.bias, self.threshold, self.grad_acts, self.grad_l0
            )
        )  # fmt: skip
        return DenseProblem(products, bias, threshold, self.bandwidth, grad_acts, grad_l0)

    def forward(
        self, backend: Backend, acts_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, ...]:
        acts_dtype = acts_dtype or self.products.dtype
        return dense_gate(
            self.products, self.bias, self.threshold, self.bandwidth, acts_dtype, backend
        )

    def gradients(
        self, has_acts: bool, has_l0: bool, ste_to_input: bool, backend: Backend
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return dense_gate_gradients(
            self.products, self.bias, self.threshold, self.bandwidth, ste_to_input,
            self.grad_acts if has_acts else None, self.grad_l0 if has_l0 else None, backend,
        )  # fmt: skip

    def exact_gradients(
        self, has_acts: bool, has_l0: bool, ste_to_input: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Terms `[n_rows, d_sae]` of the gradients of acts, of the window, and both together."""
        exact = self.to("cpu", torch.float64)
        above = exact.products + exact.bias - exact.threshold
        half = exact.bandwidth / 2
        inside = (above > -half) & (above < half)
        through, direct = torch.zeros_like(above), torch.zeros_like(above)
        if has_acts:
            through += exact.grad_acts * exact.threshold
            direct += torch.where(above > 0, exact.grad_acts, 0.0)
        if has_l0:
            through += exact.grad_l0.unsqueeze(1)
        through = torch.where(inside, through / exact.bandwidth, 0.0)
        return direct, through, direct + through * ste_to_input


def eighths(n_rows: int, d_sae: int) -> DenseProblem:
    """Small multiples of 1/8: exact in each dtype, and often on a gate or an edge of a window."""

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape) / 8

    problem = DenseProblem(
        draw(-16, 33, n_rows, d_sae), draw(-2, 3, d_sae), draw(0, 25, d_sae), 0.5,
        draw(-8, 9, n_rows, d_sae), draw(-8, 9, n_rows),
    )  # fmt: skip
    above = problem.products + problem.bias - problem.threshold
    if above.numel() > 100:
        for value in (-0.25, 0.0, 0.25):
            assert (above == value).any()
    return problem


def heavy_tailed(n_rows: int, d_sae: int) -> DenseProblem:
    """Scales of all sizes; no pre-activation within rounding of a gate or of an edge."""
    threshold = torch.randn(d_sae).exp()
    bias = torch.randn(d_sae)
    products = threshold - bias + torch.randn(n_rows, d_sae) / (torch.rand(n_rows, d_sae) + 1e-2)
    problem = DenseProblem(
        products, bias, threshold, 0.7,
        torch.randn(n_rows, d_sae) / (torch.rand(n_rows, d_sae) + 1e-2),
        torch.randn(n_rows) / (torch.rand(n_rows) + 1e-2),
    )  # fmt: skip
    above = (products.double() + bias - threshold).abs()
    unclear = (above < 1e-4) | ((above - 0.35).abs() < 1e-4)
    products[unclear] = -100
    return problem


DENSE_SIZES = [
    pytest.param(7, 33, id="odd"),
    pytest.param(1, 12, id="one row"),
    pytest.param(9, 1, id="one latent"),
    pytest.param(65, 257, id="just beyond a tile"),
    pytest.param(0, 12, id="no rows"),
]
DENSE_SIZE = pytest.mark.parametrize(("n_rows", "d_sae"), DENSE_SIZES)


@DENSE_SIZE
def test_dense_gate_is_exact_where_sums_are(
    n_rows: int, d_sae: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Strictly above the threshold; pairs strictly above the window's lower edge."""
    problem = eighths(n_rows, d_sae)
    acts, row_counts, latent_counts, totals = problem.to(device, dtype).forward(backend)
    pre_acts = (problem.products + problem.bias).double()
    active = pre_acts > problem.threshold
    expected = torch.where(active, pre_acts, 0.0)
    assert acts.dtype == dtype
    assert row_counts.dtype == latent_counts.dtype == torch.int32
    assert totals.dtype == torch.int64
    assert torch.equal(acts.cpu().double(), expected)
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    n_pairs = int((pre_acts > problem.threshold.double() - problem.bandwidth / 2).sum())
    assert totals.tolist() == [n_pairs, int(active.sum())]


@DENSE_SIZE
def test_dense_gate_matches_float64(
    n_rows: int, d_sae: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Activations are one rounding off, or of the dtype that the caller asks for."""
    if dtype == torch.bfloat16:
        pytest.skip("rounding to bfloat16 moves pre-activations across gates")
    problem = heavy_tailed(n_rows, d_sae)
    acts_dtype = torch.bfloat16 if device.type == "cuda" else dtype
    acts, row_counts, latent_counts, totals = problem.to(device, dtype).forward(backend, acts_dtype)
    pre_acts = problem.products.double() + problem.bias
    active = pre_acts > problem.threshold
    size = problem.products.double().abs() + problem.bias.abs()
    rounding = torch.finfo(dtype).eps * size + torch.finfo(acts_dtype).eps * pre_acts.abs()
    assert acts.dtype == acts_dtype
    error = (acts.cpu().double() - torch.where(active, pre_acts, 0.0)).abs()
    assert (error <= torch.where(active, rounding, 0.0)).all()
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    n_pairs = int((pre_acts > problem.threshold.double() - problem.bandwidth / 2).sum())
    assert totals.tolist() == [n_pairs, int(active.sum())]


@pytest.mark.parametrize("ste_to_input", [False, True])
@pytest.mark.parametrize("has_l0", [False, True])
@pytest.mark.parametrize("has_acts", [False, True])
@DENSE_SIZE
def test_dense_gate_gradients_match_float64(
    n_rows: int,
    d_sae: int,
    has_acts: bool,
    has_l0: bool,
    ste_to_input: bool,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """With strict inequalities at both edges of the window."""
    arguments = (has_acts, has_l0, ste_to_input)
    for problem in (eighths(n_rows, d_sae), heavy_tailed(n_rows, d_sae)):
        is_exact = problem.bandwidth == 0.5
        if dtype == torch.bfloat16 and not is_exact:
            continue
        direct, through, both = problem.exact_gradients(*arguments)
        moved = problem.to(device, dtype)
        grad_products, grad_bias, grad_threshold = moved.gradients(*arguments, backend)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        assert grad_products.dtype == dtype
        assert grad_bias.dtype == grad_threshold.dtype == sum_dtype
        assert grad_bias.shape == grad_threshold.shape == (d_sae,)
        # Two factors and a sum are rounded, and at last the result; of the eighths nothing is
        # but products of bfloat16, and the result.
        eps = torch.finfo(dtype).eps
        term_error = 4 * eps * (direct.abs() + through.abs() + l0_size(problem, *arguments))
        if is_exact and dtype != torch.bfloat16:
            term_error = torch.zeros_like(term_error)
        assert within(grad_products, both, term_error)
        sum_eps = torch.finfo(sum_dtype).eps * n_rows
        assert within(grad_bias, both.sum(0), term_error.sum(0) + sum_eps * both.abs().sum(0))
        assert within(
            grad_threshold, -through.sum(0), term_error.sum(0) + sum_eps * through.abs().sum(0)
        )


def l0_size(
    problem: DenseProblem, has_acts: bool, has_l0: bool, ste_to_input: bool
) -> torch.Tensor:
    """Absolute values of the terms that a straight-through gradient adds, where they cancel."""
    del ste_to_input
    _, acts_part, _ = problem.exact_gradients(has_acts, False, True)
    _, l0_part, _ = problem.exact_gradients(False, has_l0, True)
    return acts_part.abs() + l0_part.abs()


def within(actual: torch.Tensor, expected: torch.Tensor, error: torch.Tensor) -> bool:
    """Written so that a NaN fails."""
    assert actual.shape == expected.shape
    return bool(((actual.cpu().double() - expected).abs() <= error).all())


def test_dense_gate_gradients_take_expanded_gradients(
    backend: Backend, device: torch.device
) -> None:
    """As a sum's or a mean's backward gives them."""
    problem = eighths(6, 20)
    problem.grad_acts.copy_(problem.grad_acts[:1, :1].clone().expand(6, 20))
    problem.grad_l0.fill_(0.25)
    moved = problem.to(device, torch.float32)
    expanded = replace(
        moved,
        grad_acts=moved.grad_acts[:1, :1].expand(6, 20),
        grad_l0=moved.grad_l0[:1].expand(6),
    )
    _, through, both = problem.exact_gradients(True, True, True)
    grad_products, grad_bias, grad_threshold = expanded.gradients(True, True, True, backend)
    assert torch.equal(grad_products.cpu().double(), both)
    assert torch.equal(grad_bias.cpu().double(), both.sum(0))
    assert torch.equal(grad_threshold.cpu().double(), -through.sum(0))


def test_dense_gate_keeps_a_nan_and_counts_it_nowhere(
    backend: Backend, device: torch.device
) -> None:
    problem = eighths(6, 20)
    problem.products[3, 7] = torch.nan
    problem.products[4, 8] = torch.inf
    moved = problem.to(device, torch.float32)
    acts, row_counts, latent_counts, totals = moved.forward(backend)
    pre_acts = problem.products + problem.bias
    active = pre_acts > problem.threshold
    assert acts.isnan().nonzero().tolist() == [[3, 7]]
    assert acts[4, 8] == torch.inf
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    assert totals.tolist()[1] == int(active.sum())
    grad_products, grad_bias, grad_threshold = moved.gradients(True, True, True, backend)
    _, through, both = problem.exact_gradients(True, True, True)
    assert both[3, 7] == 0
    assert torch.equal(grad_products.cpu().double(), both)
    assert torch.equal(grad_bias.cpu().double(), both.sum(0))
    assert torch.equal(grad_threshold.cpu().double(), -through.sum(0))


@pytest.mark.default_algorithms
@pytest.mark.parametrize(("n_rows", "d_sae"), [(7, 33), (130, 40)])
def test_dense_gate_repeats_bit_for_bit_and_leaves_its_inputs_alone(
    n_rows: int, d_sae: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    problem = heavy_tailed(n_rows, d_sae).to(device, dtype)
    before = problem.to("cpu", dtype)
    results = [
        (*problem.forward(backend), *problem.gradients(True, True, True, backend)) for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    for name in ("products", "bias", "threshold", "grad_acts", "grad_l0"):
        assert torch.equal(getattr(problem, name).cpu(), getattr(before, name))


@dataclass(frozen=True)
class Pairs:
    """Latents, coefficients and keys of ragged rows, with spare room that nothing may read."""

    ragged: RaggedRows
    latents: torch.Tensor
    coefficients: torch.Tensor
    keys: torch.Tensor
    d_sae: int

    @property
    def n_pairs(self) -> int:
        return int(self.ragged.offsets[-1])

    def order(self) -> LatentOrder:
        return LatentOrder.of_keys(self.keys, self.d_sae, self.ragged)

    def code(self, *, active_only: bool) -> torch.Tensor:
        """Coefficients `[n_rows, d_sae]` in float64, zero where a row has no such pair."""
        code = torch.zeros(self.ragged.n_rows, self.d_sae, dtype=torch.float64)
        for row in range(self.ragged.n_rows):
            for p in range(int(self.ragged.offsets[row]), int(self.ragged.offsets[row + 1])):
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
    ragged = RaggedRows.of_lengths(counts)
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
    rows = torch.cat([ragged.rows, torch.zeros(n_spare, dtype=torch.int32)])
    return Pairs(
        RaggedRows(ragged.offsets.to(device), rows.to(device)),
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
    monkeypatch.setattr("saelens_sparse.ops.row_ops._has_embedding_bag", lambda _: False)
    monkeypatch.setattr("saelens_sparse.ops.row_ops._CHUNK_BYTES", 7 * 19 * 4)


@pytest.mark.parametrize("lengths", [[], [0], [4], [0, 3, 0, 0, 2, 1, 0]], ids=str)
def test_ragged_rows_of_lengths(lengths: list[int], device: torch.device) -> None:
    ragged = RaggedRows.of_lengths(torch.tensor(lengths, dtype=torch.int64, device=device))
    assert ragged.n_rows == len(lengths)
    assert ragged.offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert ragged.rows.tolist() == [row for row, n in enumerate(lengths) for _ in range(n)]
    assert (ragged.offsets.dtype, ragged.rows.dtype) == (torch.int64, torch.int32)


@RAGGED
@pytest.mark.parametrize("d", [19, 523])
@pytest.mark.usefixtures("torch_path")
def test_gather_sum_of_ragged_rows_matches_float64(
    d: int, n_spare: int, lengths: str, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs(lengths, n_spare, device, dtype)
    weight = torch.randn(33, d).to(device, dtype)
    out = gather_sum(pairs.coefficients, pairs.latents, weight, backend, pairs.ragged)
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
    out = gather_dot(batch, pairs.latents, weight, backend, pairs.ragged)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    assert out.shape == pairs.latents.shape
    assert not out[pairs.n_pairs :].any()
    rows, latents = (
        values[: pairs.n_pairs].cpu().long() for values in (pairs.ragged.rows, pairs.latents)
    )
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
    order = LatentOrder.of(latents.to(device), active.to(device), d_sae)
    totals = segment_totals(order, values.T.contiguous().T, backend)
    assert totals.dtype == torch.promote_types(dtype, torch.float32)
    code = torch.zeros(n_rows, d_sae, dtype=torch.float64)
    code.scatter_(1, latents, values.cpu().double().masked_fill(~active, 0))
    assert_totals(totals, code)
    values[~active.to(device)] = torch.nan
    assert torch.equal(segment_totals(order, values, backend), totals)


def test_a_bias_is_added_as_if_apart(
    backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    pairs = ragged_pairs("a latent on 300 rows", 9, device, dtype)
    weight = torch.randn(33, 19).to(device, dtype)
    for bias in (torch.randn(19).to(device, dtype), torch.randn(19, device=device).double()):
        sums = gather_sum(pairs.coefficients, pairs.latents, weight, backend, pairs.ragged)
        given = gather_sum(pairs.coefficients, pairs.latents, weight, backend, pairs.ragged, bias)
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
            gather_sum(pairs.coefficients, pairs.latents, weight, backend, pairs.ragged),
            gather_dot(batch, pairs.latents, weight, backend, pairs.ragged),
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
        gather_sum(zeros(34), pairs.latents, zeros(33, 5), backend, pairs.ragged)
    with pytest.raises(ValueError, match=r"batch must have shape \[1, 5\]; got \[35, 5\]"):
        gather_dot(zeros(35, 5), pairs.latents, zeros(33, 5), backend, pairs.ragged)
    with pytest.raises(ValueError, match=r"latents one if rows are ragged\); got.*\[1, 35\]"):
        gather_dot(zeros(1, 5), pairs.latents[None], zeros(33, 5), backend, pairs.ragged)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[35\]; got \[1, 35\]"):
        segment_sum(pairs.order(), zeros(1, 35), zeros(1, 5), torch.float32, backend)
    with pytest.raises(ValueError, match=r"values must have 35 elements; got shape \[33\]"):
        segment_totals(pairs.order(), zeros(33), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "distribution",
    [plain, heavy_tails, outlier_inputs, large_thresholds, nothing_to_everything],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("autocast", [False, True])
def test_pattern_matches_float64_at_a_training_shape(
    autocast: bool,
    distribution: Callable[[int, int, int], Problem],
    gpu_backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # By default cuBLAS may round partial sums to bfloat16, which no bound here allows for.
    reduction = "allow_bf16_reduced_precision_reduction"
    monkeypatch.setattr(torch.backends.cuda.matmul, reduction, False)
    problem = distribution(300, 768, 12_289).to("cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        patterns = [
            problem.start(gpu_backend, capacity, buffer_bytes).result()
            for capacity in (1000, 300 * 12_289)
            for buffer_bytes in (BUFFER_BYTES, 2**20)
        ]
    for pattern in patterns:
        assert_pattern(problem, pattern, torch.bfloat16 if autocast else None, clear=0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_pattern_addresses_products_beyond_32_bits(autocast: bool) -> None:
    """The last rows, in a single chunk of more than 2^31 products, are as by themselves."""
    require_gpu_memory(20)
    n_rows, d_sae, tail = 4200, 2**19 + 8, 20
    assert (n_rows - tail) * d_sae > 2**31
    problem = Problem(
        x=torch.randn(n_rows, 64, device="cuda"),
        weight=torch.randn(d_sae, 64, device="cuda"),
        bias=torch.zeros(d_sae, device="cuda"),
        threshold=torch.full((d_sae,), 36.0, device="cuda"),
    )
    problem.weight[-5] *= 10  # so that one of the last latents is active
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        pattern = problem.start("triton", 2**20, 24 * 2**30).result()
    last_problem = replace(problem, x=problem.x[-tail:])
    first = int(pattern.ragged.offsets[-tail - 1])
    row_counts = pattern.row_counts[-tail:]
    last = GatePattern(
        pattern.latents[first:],
        pattern.keys[first:],
        pattern.pre_acts[first:],
        RaggedRows(
            pattern.ragged.offsets[-tail - 1 :] - first,
            (pattern.ragged.rows[first:] - (n_rows - tail)).clamp(min=0),
        ),
        row_counts,
        (pattern.totals[0] - first, int(row_counts.sum())),
    )
    assert (last.keys == d_sae - 5).any()
    assert_pattern(last_problem, last, torch.bfloat16 if autocast else None)


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
def test_dense_gate_matches_float64_at_a_training_shape(gpu_backend: Backend) -> None:
    problem = eighths(1000, 12_289)
    moved = problem.to("cuda", torch.float32)
    acts, row_counts, latent_counts, totals = moved.forward(gpu_backend)
    pre_acts = problem.products + problem.bias
    active = pre_acts > problem.threshold
    assert torch.equal(acts.cpu(), pre_acts * active)
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    n_pairs = int((pre_acts > problem.threshold - problem.bandwidth / 2).sum())
    assert totals.tolist() == [n_pairs, int(active.sum())]
    grad_products, grad_bias, grad_threshold = moved.gradients(True, True, True, gpu_backend)
    _, through, both = problem.exact_gradients(True, True, True)
    # Multiples of 1/64, whose sums over rows stay far below 2^24 of them.
    assert torch.equal(grad_products.cpu().double(), both)
    assert torch.equal(grad_bias.cpu().double(), both.sum(0))
    assert torch.equal(grad_threshold.cpu().double(), -through.sum(0))


@pytest.mark.gpu
def test_dense_gate_addresses_products_beyond_32_bits() -> None:
    """The last rows of a huge batch give what the same rows give by themselves."""
    require_gpu_memory(40)
    n_rows, d_sae, tail = 2**15 + 128, 2**16 + 5, 64
    assert (n_rows - tail) * d_sae > 2**31
    near = eighths(tail, d_sae).to("cuda", torch.bfloat16)
    far = replace(
        near,
        products=torch.full((n_rows, d_sae), -1e3, device="cuda", dtype=torch.bfloat16),
        grad_acts=torch.zeros(n_rows, d_sae, device="cuda", dtype=torch.bfloat16),
        grad_l0=torch.zeros(n_rows, device="cuda", dtype=torch.bfloat16),
    )
    far.products[-tail:] = near.products
    far.grad_acts[-tail:] = near.grad_acts
    far.grad_l0[-tail:] = near.grad_l0
    acts, row_counts, latent_counts, totals = far.forward("triton")
    near_acts, near_row_counts, near_latent_counts, near_totals = near.forward("triton")
    assert torch.equal(acts[-tail:], near_acts)
    assert not acts[:-tail].any()
    assert torch.equal(row_counts[-tail:], near_row_counts)
    assert torch.equal(latent_counts, near_latent_counts)
    assert torch.equal(totals, near_totals)
    del acts
    grads = far.gradients(True, True, True, "triton")
    near_grads = near.gradients(True, True, True, "triton")
    assert torch.equal(grads[0][-tail:], near_grads[0])
    assert not grads[0][:-tail].any()
    assert torch.equal(grads[1], near_grads[1])
    assert torch.equal(grads[2], near_grads[2])
