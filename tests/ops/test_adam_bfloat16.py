"""Adam with moments in bfloat16: its kernels, and PyTorch block by block, against float64."""

from collections.abc import Callable

import pytest
import torch

from saelens_sparse.architectures.parameters import SALTS
from saelens_sparse.ops.pairs import LatentOrder, Rows
from saelens_sparse.ops.update.adam import adam_update_by_blocks
from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_update
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.row_gradient_kernels import RowGradientLaunch, RowGradientSums
from tests.conftest import Target

LR, EPS, STEP, DIVISOR = 0.02, 1e-8, 3, 1.7
BETAS = [(0.9, 0.999), (0.0, 0.99)]
Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def case(target: Target, n_rows: int, n_columns: int) -> tuple[torch.Tensor, Moments]:
    """A gradient, and a weight with moments of many magnitudes."""
    shape = (n_rows, n_columns)
    gradient, weight, first = (torch.randn(shape, device=target.device) for _ in range(3))
    scale = torch.logspace(-8, 2, n_columns, device=target.device)
    first = (first * scale).bfloat16()
    second = (scale * torch.rand(shape, device=target.device)).square().bfloat16()
    return gradient * scale, (weight, first, second)


def in_float64(gradient: torch.Tensor, before: Moments, betas: tuple[float, float]) -> Moments:
    weight, first, second = (part.double() for part in before)
    gradient = gradient.double() / DIVISOR
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient**2
    root = (second / (1 - betas[1] ** STEP)).sqrt() + EPS
    return weight - LR * first / (1 - betas[0] ** STEP) / root, first, second


def update(
    target: Target, gradient: torch.Tensor, before: Moments, betas: tuple[float, float],
    salt: int | None = SALTS["W_enc"], *, by_blocks: bool = False,
) -> Moments:  # fmt: skip
    weight, first, second = after = (before[0].clone(), before[1].clone(), before[2].clone())
    step, divisor, lr = (torch.tensor(x, device=target.device) for x in (float(STEP), DIVISOR, LR))
    if by_blocks or target.backend == "torch":
        assert salt is not None
        adam_update_by_blocks(
            weight, gradient, first, second, step, divisor, lr=LR, betas=betas, eps=EPS, salt=salt
        )
    else:
        settings = AdamSettings(lr, *betas, EPS, salt)
        adam_update(weight, gradient, first, second, step, divisor, settings)
    return after


def next_to(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Whether elements are one of the two neighbours in bfloat16 of a float64 value."""
    # Float32 arithmetic may be on the other side of a value that bfloat16 holds.
    unit = torch.exp2(value.abs().clamp(min=2**-120).log2().floor() - 7)
    return lambda stored: (stored.double() - value).abs() <= unit * (1 + 1e-3)


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 1500), (700, 3), (23, 47), (2, 1024), (0, 5)], ids=str
)
def test_one_update_against_float64(
    target: Target, betas: tuple[float, float], shape: tuple[int, int]
) -> None:
    gradient, before = case(target, *shape)
    expected = in_float64(gradient, before, betas)
    weight, first, second = update(target, gradient, before, betas)
    assert first.dtype == second.dtype == torch.bfloat16
    # The weight's update takes moments as they are before they are rounded.
    torch.testing.assert_close(weight.double(), expected[0], rtol=1e-6, atol=1e-7)
    for stored, value in ((first, expected[1]), (second, expected[2])):
        assert next_to(value)(stored).all()


def test_moments_are_right_in_expectation(target: Target) -> None:
    if target.interpreted:
        pytest.skip("many elements; what it computes is compared with PyTorch's below")
    n_columns = 2**16
    gradient, before = case(target, 1, 4)
    gradient, *before = (part.T.expand(4, n_columns).contiguous() for part in (gradient, *before))
    weight, first, second = before
    _, *moments = update(target, gradient, (weight, first, second), BETAS[0])
    _, *expected = in_float64(gradient, (weight, first, second), BETAS[0])
    for stored, value in zip(moments, expected, strict=True):
        error = (stored.double().mean(1) - value.mean(1)).abs()
        # A rounding's standard deviation is at most half a unit.
        assert (error <= 4.5 * value.abs().mean(1) * 2**-8 / n_columns**0.5).all()
        nearest = value.bfloat16().double().mean(1) - value.mean(1)
        assert (nearest.abs() > 10 * error.max()).any(), "rounding to nearest would pass"


def test_without_a_salt_moments_are_rounded_to_nearest(target: Target) -> None:
    if target.backend != "triton" or target.interpreted:
        pytest.skip("a kernel, and the interpreter's conversion truncates")
    gradient, before = case(target, 23, 47)
    _, first, _ = update(target, gradient, before, BETAS[0], None)
    exact = in_float64(gradient, before, BETAS[0])[1]
    torch.testing.assert_close(first, exact.float().bfloat16(), rtol=2**-15, atol=0)


def assert_nearly_same(actual: Moments, expected: Moments) -> None:
    """Up to float32 arithmetic, which hardly ever moves a stochastic rounding."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-7)
    for mine, theirs in zip(actual[1:], expected[1:], strict=True):
        assert (mine != theirs).float().mean() <= 2e-3
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-133)


@pytest.mark.parametrize("shape", [(700, 3), (23, 47), (3, 1024), (2, 1500)], ids=str)
def test_kernel_rounds_as_pytorch(target: Target, shape: tuple[int, int]) -> None:
    if target.backend != "triton":
        pytest.skip("a kernel")
    gradient, before = case(target, *shape)
    kernel, by_blocks = (
        update(target, gradient, before, BETAS[0], by_blocks=value) for value in (False, True)
    )
    assert_nearly_same(kernel, by_blocks)
    other = update(target, gradient, before, BETAS[0], SALTS["W_dec"])
    assert (other[1] != kernel[1]).float().mean() > 0.2


@pytest.mark.parametrize("columns", [16, 1024], ids=["tiles", "one tile"])
def test_update_of_sums_rounds_as_pytorch(
    target: Target, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if target.backend != "triton":
        pytest.skip("a kernel")
    launch = RowGradientLaunch(COLS=columns)
    monkeypatch.setattr("saelens_sparse.ops.update.row_gradient_kernels.LAUNCH", launch)
    n_rows, d_sae, d = 40, 21, 37
    latents = torch.rand(n_rows, d_sae).argsort(1)[:, :2].flatten().int().to(target.device)
    order = LatentOrder.of_keys(latents, Rows.regular(n_rows, 2), d_sae)
    coefficients = torch.randn(2 * n_rows, device=target.device)
    batch = torch.randn(n_rows, d, device=target.device)
    gradient = RowGradient(order, coefficients, batch, None, None, False)
    dense, _ = gradient.dense(torch.float32, "triton")
    _, before = case(target, d_sae, d)
    expected = update(target, dense, before, BETAS[0], by_blocks=True)
    actual = (before[0].clone(), before[1].clone(), before[2].clone())
    step, divisor, lr = (torch.tensor(x, device=target.device) for x in (float(STEP), DIVISOR, LR))
    settings = AdamSettings(lr, *BETAS[0], EPS, SALTS["W_enc"])
    RowGradientSums(gradient).update(*actual, step, divisor, settings, None)
    assert_nearly_same(actual, expected)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target("torch", "cpu", (torch.float32,))
    gradient, before = case(target, 23, 47)
    whole = update(target, gradient, before, BETAS[0])
    for size in (1, 48, 100):
        monkeypatch.setattr("saelens_sparse.ops.update.adam._BLOCK", size)
        for mine, theirs in zip(update(target, gradient, before, BETAS[0]), whole, strict=True):
            assert torch.equal(mine, theirs), size


def test_not_a_number_and_infinity_go_where_they_do_in_adam(target: Target) -> None:
    for bad in (torch.nan, torch.inf):
        gradient, before = case(target, 5, 7)
        gradient[3, 4] = bad
        weight, first, second = update(target, gradient, before, BETAS[0])
        expected = in_float64(gradient, before, BETAS[0])
        assert torch.equal(weight.isnan(), expected[0].isnan())
        assert weight.isnan().sum() == 1
        for stored, value in ((first, expected[1]), (second, expected[2])):
            assert torch.equal(stored.isnan(), value.isnan())
            assert torch.equal(stored.isinf(), value.isinf())
