"""The constants of the screens' bounds; `BOUND.md` derives each, under the name it has here."""

from __future__ import annotations

# Rows up to this width are held in one program's registers; the bounds are proven up to it.
MAX_D_IN = 32768

# Unit roundoff: half the distance from 1 to the next number.
FLOAT32 = 2.0**-24
FLOAT16 = 2.0**-11
BFLOAT16 = 2.0**-8

# The GPU's screen. All are relative, but for UNDERFLOW.
NORM_SLACK = 1.001
PRODUCT_SLACK = 1.005
ROUNDED_NORMS = 1.002
ROUNDING = 4.887e-4
UNDERFLOW = 2.0**-126
BIAS_ROUNDING = 4.0e-7
SUMMED_PRODUCT = 3 * 2.0**-25
SUMMED_PRODUCT_HOPPER = 1.25 * 2.0**-25
OTHER_ROUNDINGS = 64

# Top-K's groups of latents.
GROUP_BIAS_ROUNDING = 6.0e-7
GROUP_SCORE_ROUNDING = 3.0e-7

# The mark kernel of a JumpReLU.
MARK_SLACK = 1.001
MARK_BIAS_ROUNDING = 5.0e-7
MARK_EDGE_ROUNDING = ROUNDING + 1.0e-6

# The CPU's screen, of rows up to CPU_MAX_D_IN.
CPU_MAX_D_IN = 16384
CPU_SLACK = 1.01
CPU_BIAS_ROUNDING = 4.0e-7
CPU_TINY_NORM = 1e-14


def summed_product(capability: tuple[int, int] | None) -> float:
    """Error of a sum of float16 products on a tensor core, each product's share of |x'| |w'|.

    Args:
        capability: CUDA's compute capability; None for what is no card of NVIDIA's.
    """
    is_hopper = capability is not None and capability[0] == 9
    return SUMMED_PRODUCT_HOPPER if is_hopper else SUMMED_PRODUCT


def recomputed_sum(d_in: int, tile: int) -> float:
    """Error of a float32 sum of d_in products, relative to |x| |w|.

    Args:
        d_in: number of products.
        tile: number of lanes. Each adds every tile-th product; then the lanes are added, in any
            order.
    """
    tiles = -(-d_in // tile)
    roundings = (tiles + min(tile, d_in)) * FLOAT32
    return roundings / (1 - roundings)


def accumulation(d_in: int, tile: int, capability: tuple[int, int] | None) -> float:
    """Errors of the screen's sums and of those that it is compared with, relative to |x| |w|.

    Args:
        d_in: width of the rows, at most MAX_D_IN.
        tile: columns that the recomputation in float32 adds at a time.
        capability: as for `summed_product`.
    """
    assert 0 <= d_in <= MAX_D_IN, f"no bound is proven for rows of {d_in} columns"
    assert tile >= 1, f"a tile of {tile} columns"
    error = d_in * summed_product(capability)
    error += recomputed_sum(d_in, tile) + OTHER_ROUNDINGS * FLOAT32
    return ROUNDED_NORMS * error / (1 - error)


def cpu_accumulation(d_in: int) -> float:
    """As `accumulation` for the CPU's screen: two float32 sums of d_in products in any order."""
    return 2 * d_in * FLOAT32
