"""Operands that try to break the bounds of screens, and the sums that the bounds are proven for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Rows = Callable[[int, int, torch.Generator], torch.Tensor]
MIDPOINT = 2.0**-11  # between float16's 1 and the next number


def _normal(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    return torch.randn(n, d, generator=chance, device=chance.device)


def _uniform(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    return torch.rand(n, d, generator=chance, device=chance.device)


def outliers(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """A column a thousand times the others."""
    rows = _normal(n, d, chance)
    rows[:, d // 2] *= 1000
    return rows


def heavy_tails(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """Elements over many orders of magnitude, so that many round to float16's subnormals."""
    return _normal(n, d, chance) * (4 * _normal(n, d, chance)).exp()


def rounded_up(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """Every element grows by nearly half of float16's distance."""
    return 1 + (1 + 2 * (3 * _uniform(n, d, chance)).floor()) * MIDPOINT * 1.01


def rounded_down(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """Every element shrinks by as much."""
    return 1 + (1 + 2 * (3 * _uniform(n, d, chance)).floor()) * MIDPOINT * 0.99


def cancelling(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """Halves that differ in their signs, and little else."""
    rows = rounded_down(n, d, chance)
    rows[:, d // 2 :] *= -1
    return rows


def cancelling_randomly(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    rows = _normal(n, d, chance)
    half = d // 2
    rows[:, half : 2 * half] = -rows[:, :half] * (1 + 1e-4 * rows[:, half : 2 * half])
    return rows


def one_sum(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """One large element, before many that a sum with it cuts off."""
    rows = 2.0**-6 * (1.998 - 0.5 * _uniform(n, d, chance))
    rows[:, 0] = 64
    return rows


def on_the_grid(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """Few elements other than zero, all of which float16 holds: only products are rounded."""
    rows = 1 + (1024 * _uniform(n, d, chance)).floor() / 1024
    rows *= _uniform(n, d, chance) < 2 / d
    rows[:, 0] += 1
    return rows


def below_a_power_of_two(n: int, d: int, chance: torch.Generator) -> torch.Tensor:
    """Norms just under 128: of products at the upper edge of what float16 holds here."""
    rows = _normal(n, d, chance)
    return rows * (127.9999 / rows.norm(dim=1, keepdim=True).clamp(min=1e-30))


KINDS: dict[str, Rows] = {
    "normal": _normal,
    **{
        kind.__name__: kind
        for kind in (
            outliers,
            heavy_tails,
            rounded_up,
            rounded_down,
            cancelling,
            cancelling_randomly,
            one_sum,
            on_the_grid,
            below_a_power_of_two,
        )
    },
}
BIASES = ("zero", "small", "huge", "cancelling")
NORMS = ("none", "usual", "wide")


@dataclass(frozen=True)
class Operands:
    """Arguments of a screen, float32."""

    x: torch.Tensor  # [n_rows, d_in]
    weight: torch.Tensor  # [d_sae, d_in]
    bias: torch.Tensor  # [d_sae]
    norms: torch.Tensor | None  # [d_sae]

    def scores(self) -> torch.Tensor:
        """`[n_rows, d_sae]` float64."""
        pre_acts = self.x.double() @ self.weight.double().T + self.bias.double()
        return pre_acts if self.norms is None else pre_acts * self.norms.double()


def adversarial(
    shape: tuple[int, int, int],
    kinds: tuple[str, str],
    exponents: tuple[int, int],
    bias: str,
    norms: str,
    chance: torch.Generator,
) -> Operands:
    """Operands of a kind.

    Args:
        shape: n_rows, d_in and d_sae.
        kinds: of the rows of x and of the weight, from `KINDS`.
        exponents: of two, by which they are scaled; rows differ by up to 2^8 more.
        bias: one of `BIASES`.
        norms: one of `NORMS`.
        chance: what draws.
    """
    n_rows, d_in, d_sae = shape
    x, weight = (
        torch.ldexp(
            KINDS[kind](n, d_in, chance),
            exponent + (8 * _uniform(n, 1, chance)).floor().to(torch.int32),
        )
        for kind, n, exponent in zip(kinds, (n_rows, d_sae), exponents, strict=True)
    )
    products = x[:1].double() @ weight.double().T
    size = products.abs().mean().float()
    offset = {
        "zero": torch.zeros(d_sae, device=x.device),
        "small": 0.1 * size * _normal(1, d_sae, chance)[0],
        "huge": 1e4 * size * _normal(1, d_sae, chance)[0].sign(),
        "cancelling": -products[0].float(),
    }[bias]
    factor = None
    if norms != "none":
        spread = 1.0 if norms == "usual" else 20.0
        factor = (spread * (_uniform(1, d_sae, chance)[0] - 0.5)).exp()
    return Operands(x.contiguous(), weight.contiguous(), offset, factor)


def cut_sums(d_in: int, guard: int, used: int, device: str) -> Operands:
    """One product of one, then such as a tensor core with so many guard bits cuts by half.

    Of 16 columns `used` are not zero. Sums differ by row, in steps far below float16's distance.
    All numbers are float16's. There are so many rows and latents that a GEMM need not split sums.
    """
    n_rows, d_sae = 2048, 2048
    small = torch.arange(d_in, device=device) % 16 < used
    x, weight = (torch.zeros(n, d_in, device=device) for n in (n_rows, d_sae))
    x[:, small], weight[:, small] = 2.0**-11 - 2.0**-21, 2.0 ** -(11 + guard)
    x[:, 0] = weight[:, 0] = 1.0
    weight[:, 15] = 2.0**-5
    x[:, 15] = 2.0**-11 * (torch.arange(n_rows, device=device) % 64)
    return Operands(x, weight, torch.zeros(d_sae, device=device), None)


def tensor_core_sum(products: list[float], block: int, guard: int) -> float:
    """A sum as a tensor core makes it (Fasi et al. 2021, doi:10.7717/peerj-cs.330).

    `block` products and the sum so far are aligned to the largest of them, cut `guard` bits below
    the last of a float32 of its size, and added; the sum is cut to a float32.
    """
    total = 0.0
    for start in range(0, len(products), block):
        terms = [total, *products[start : start + block]]
        largest = max(map(abs, terms))
        if largest > 0:
            total = _cut(sum(_cut(term, largest, guard) for term in terms), None, 0)
    return total


def _cut(value: float, size: float | None, guard: int) -> float:
    """Toward zero to a multiple of 2^-guard of a float32's distance at `size`, or at itself."""
    if value == 0:
        return 0.0
    exponent = torch.frexp(torch.tensor(abs(value if size is None else size)).double())[1].item()
    unit = 2.0 ** (exponent - 24 - guard)
    return float(int(value / unit)) * unit


def lane_sum(products: torch.Tensor, tile: int) -> float:
    """A float32 sum of `[n]` by `tile` lanes that are then added one after the other."""
    padded = torch.nn.functional.pad(products, (0, -products.numel() % tile)).view(-1, tile)
    lanes = torch.zeros(tile)
    for row in padded:
        lanes += row
    total = torch.tensor(0.0)
    for lane in lanes:
        total += lane
    return float(total)
