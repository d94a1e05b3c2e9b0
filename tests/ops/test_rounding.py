"""Random bits that depend on place and time alone, and rounding by them: PyTorch and Triton."""

import itertools

import pytest
import torch
import triton
import triton.language as tl

from saelens_sparse.architectures.parameters import SALTS
from saelens_sparse.ops.common.launch import kernel
from saelens_sparse.ops.update import rounding, rounding_kernels
from saelens_sparse.ops.update.adam import adam_update_by_blocks
from tests.conftest import Target, target_parameters

kernels = pytest.mark.parametrize(
    "target", [p for p in target_parameters(interpreted=True) if p.values[0].backend == "triton"]
)


def lowbias32(x: int) -> int:
    """In integers of any size."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def bits_of(
    salt: int = SALTS["W_enc"],
    step: int = 1,
    *,
    n_rows: int = 512,
    n_columns: int = 512,
    start: int = 0,
) -> torch.Tensor:
    rows = torch.arange(start, start + n_rows)
    return rounding.random_bits(salt, torch.tensor(float(step)), rows, torch.arange(n_columns))


@kernel
def _bits_kernel(out_ptr, salt, step_ptr, row_ptr, column_ptr, BLOCK: tl.constexpr):
    """out[i] = random_bits(salt, step, row[i], column[i])"""
    i = tl.arange(0, BLOCK)
    row, column = tl.load(row_ptr + i), tl.load(column_ptr + i)
    bits = rounding_kernels.random_bits(salt, tl.load(step_ptr).to(tl.int32), row, column)
    tl.store(out_ptr + i, bits.to(tl.int64))


@kernel
def _round_kernel(out_ptr, value_ptr, noise_ptr, BLOCK: tl.constexpr):
    """out[i] = round_stochastically(value[i], noise[i])"""
    i = tl.arange(0, BLOCK)
    noise = tl.load(noise_ptr + i).to(tl.uint32)
    rounded = rounding_kernels.round_stochastically(tl.load(value_ptr + i), noise)
    tl.store(out_ptr + i, rounded.to(out_ptr.dtype.element_ty))


def test_mix_is_lowbias32() -> None:
    values = [*torch.randint(0, 2**32, (1000,)).tolist(), 0, 1, 2**31, 2**32 - 1]
    assert rounding.mix(torch.tensor(values)).tolist() == [lowbias32(x) for x in values]


def bits_by_definition(salt: int, step: int, row: int, column: int) -> int:
    key = salt
    for index in (step, row, column):
        key = lowbias32(key ^ index * 0x9E3779B9 % 2**32)
    return key


@kernels
@pytest.mark.parametrize("step", [1, 2, 12_345, 2**24])
def test_bits_of_triton_are_those_of_pytorch(target: Target, step: int) -> None:
    rows, columns = (0, 1, 70_000, 2**20 + 1, 2**31 - 1), (0, 1, 2303, 2**31 - 1)
    places = torch.tensor([*itertools.product(rows, columns)])
    n = triton.next_power_of_2(len(places))
    row, column = torch.nn.functional.pad(places.T, (0, n - len(places))).to(target.device)
    of_step = torch.tensor(float(step), device=target.device)
    for salt in (*SALTS.values(), 2, 2**31 - 1):
        expected = [bits_by_definition(salt, step, *place) for place in places.tolist()]
        in_pytorch = rounding.random_bits(
            salt, of_step.cpu(), torch.tensor(rows), torch.tensor(columns)
        )
        assert in_pytorch.flatten().tolist() == expected
        out = torch.zeros(n, dtype=torch.int64, device=target.device)
        # As the kernels of the update count: rows in 64 bits, columns in 32.
        _bits_kernel[(1,)](
            out, salt=salt, step_ptr=of_step, row_ptr=row.contiguous(), column_ptr=column.int(),
            BLOCK=n,
        )  # fmt: skip
        assert out[: len(expected)].tolist() == expected


def values_of_every_kind() -> torch.Tensor:
    exponents = torch.exp2(torch.linspace(-148, 127, 1000))
    special = torch.tensor([0.0, 1.0, 1.5, 2**-149, 2**-126, 3.3e38, torch.inf])
    values = torch.cat([exponents, special, torch.tensor([1 + 2**-8, 1 + 2**-23, 2 - 2**-23])])
    return torch.cat([values, -values])


@kernels
def test_rounding_of_triton_is_that_of_pytorch(target: Target) -> None:
    nans = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32)
    values = torch.cat([values_of_every_kind(), nans.view(torch.float32)])
    values = torch.nn.functional.pad(values, (0, 4096 - len(values)))
    for noise in (torch.randint(0, 2**16, (4096,)), torch.full((4096,), 0xFFFF)):
        expected = rounding.round_stochastically(values, noise)
        out = torch.zeros(4096, dtype=torch.bfloat16, device=target.device)
        _round_kernel[(1,)](out, values.to(target.device), noise.to(target.device), BLOCK=4096)
        assert expected.isnan().sum() == 4
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_the_mean_over_all_noise_is_the_value() -> None:
    """Not up to an error: rounding is unbiased if the noise is uniform."""
    values = torch.cat([values_of_every_kind(), torch.randn(100)])
    values = values[values.abs() < 3e38]
    noise = torch.arange(2**16)
    for value in values:
        rounded = rounding.round_stochastically(value.expand(2**16), noise).double()
        assert rounded.mean() == value.double()
        assert len(rounded.unique()) == (1 if value.bfloat16() == value else 2)


def test_what_bfloat16_holds_stays() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.bfloat16)
    rounded = rounding.round_stochastically(values.float(), torch.full((2**16,), 0xFFFF))
    torch.testing.assert_close(rounded, values, rtol=0, atol=0, equal_nan=True)


def halves(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return bits & 0xFFFF, bits >> 16


def assert_independent(first: torch.Tensor, second: torch.Tensor) -> None:
    """No correlation, and each pair of high and of low bits as often as any other."""
    n = first.numel()
    assert n == second.numel() > 10_000
    x, y = (part.flatten().double() for part in (first, second))
    correlation = torch.corrcoef(torch.stack([x, y]))[0, 1]
    assert abs(correlation) < 4.5 / n**0.5
    for shift in (0, 12):
        pairs = ((first >> shift) & 15) * 16 + ((second >> shift) & 15)
        assert_uniform(pairs.flatten(), 256)


def assert_uniform(values: torch.Tensor, n_values: int) -> None:
    """Chi-squared within 4.5 of its standard deviations."""
    counts = torch.bincount(values, minlength=n_values).double()
    expected = values.numel() / n_values
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - (n_values - 1)) < 4.5 * (2 * (n_values - 1)) ** 0.5


def test_bits_are_uniform_and_halves_independent() -> None:
    bits = bits_of()
    for half in halves(bits):
        for shift in (0, 8):
            assert_uniform(((half >> shift) & 0xFF).flatten(), 256)
    assert_independent(*halves(bits))


@pytest.mark.parametrize(
    "other",
    [
        bits_of(step=2),
        bits_of(step=1025),
        bits_of(SALTS["W_dec"]),
        bits_of(start=1),
        bits_of(start=2**20),
        bits_of().roll(1, 1),
        bits_of().T,
    ],
    ids=["step", "far step", "weight", "row", "far row", "column", "row and column"],
)
def test_bits_are_independent_between(other: torch.Tensor) -> None:
    bits = bits_of()
    for mine, theirs in itertools.product(halves(bits), halves(other.contiguous())):
        off = ~torch.eye(512, dtype=torch.bool)  # a transposed matrix shares its diagonal
        assert_independent(mine[off], theirs[off])


def test_no_two_rows_share_a_stretch_of_bits() -> None:
    """As they would if a column were only added to the key of its row."""
    bits = bits_of(n_rows=4096)
    neighbours = bits[:, :-1] * 2**32 + bits[:, 1:]
    assert neighbours.unique().numel() == neighbours.numel()


def decayed(n_steps: int, *, stochastic: bool) -> torch.Tensor:
    """Second moments, from 1e-6 on, after updates without a gradient: those of rare latents."""
    first, second = torch.zeros(8, 512).bfloat16(), torch.full((8, 512), 1e-6).bfloat16()
    weight, gradient = torch.zeros(8, 512), torch.zeros(8, 512)
    for step in torch.arange(1.0, n_steps + 1):
        if stochastic:
            adam_update_by_blocks(
                weight, gradient, first, second, step, torch.tensor(1.0),
                lr=1e-3, betas=(0.9, 0.999), eps=1e-8, salt=SALTS["W_enc"],
            )  # fmt: skip
        else:
            second = second.float().lerp_(gradient, 1 - 0.999).bfloat16()
    return second.double()


def test_a_second_moment_decays_in_expectation_and_not_by_rounding_to_nearest() -> None:
    n_steps = 2000
    start = decayed(0, stochastic=True)
    assert torch.equal(decayed(n_steps, stochastic=False), start)
    actual, expected = decayed(n_steps, stochastic=True), start * 0.999**n_steps
    # Each step's rounding adds at most a variance of a quarter of a unit squared, 2**-8 of a value.
    deviation = (n_steps * 2**-18) ** 0.5
    assert (actual.mean() / expected.mean()).item() == pytest.approx(
        1, abs=4.5 * deviation / actual.numel() ** 0.5
    )
    assert (actual / expected - 1).abs().max() < 6 * deviation
