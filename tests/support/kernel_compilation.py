"""Compiles the package's Triton kernels, as they are launched, for GPUs that need not be there.

The launchers run on tensors without data; what they would launch is recorded, and Triton compiles
it for each card. Run as a program, where Triton is not told to interpret:

    python -m tests.support.kernel_compilation launches      # what is recorded, without compiling
    python -m tests.support.kernel_compilation some          # as CI does: see `for_ci`
    python -m tests.support.kernel_compilation kernels       # a setting of each kernel, all cards
    python -m tests.support.kernel_compilation settings      # every setting
    python -m tests.support.kernel_compilation settings sm_90 gfx942

It prints a JSON object a line.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Card:
    """
    A kind of GPU: what Triton compiles for, and what one program may use.

    Attributes:
        backend: "cuda" or "hip".
        arch: compute capability times ten, or the name of AMD's architecture.
        shared: bytes of shared memory.
        registers: of 32 bits, for each of the four parts of a multiprocessor, over the threads of
            a warp.
        granule: registers of a thread are given in multiples of this.
        warp_size: threads of a warp.
    """

    backend: str
    arch: int | str
    shared: int
    registers: int = 512
    granule: int = 8
    warp_size: int = 32


KIB = 1024
CARDS = {
    "sm_75": Card("cuda", 75, 64 * KIB),
    "sm_80": Card("cuda", 80, 163 * KIB),
    "sm_86": Card("cuda", 86, 99 * KIB),
    "sm_89": Card("cuda", 89, 99 * KIB),
    "sm_90": Card("cuda", 90, 227 * KIB),
    "sm_100": Card("cuda", 100, 227 * KIB),
    "sm_120": Card("cuda", 120, 99 * KIB),
    "gfx942": Card("hip", "gfx942", 64 * KIB, warp_size=64),
    "gfx1100": Card("hip", "gfx1100", 64 * KIB, registers=1536, granule=24),
}

# The others cannot convert to float8 (e4m3) either.
MULTIPLY_FLOAT8 = ("sm_89", "sm_90", "sm_100", "sm_120")
# The least shared memory, the most used, and the other backend with its warps of 64 threads.
EVERY_KERNEL_FOR = ("sm_75", "sm_90", "gfx942")


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel needs of a card: registers a thread, spilled bytes a thread."""

    card: str
    kernel: str
    setting: str
    warps: int
    shared: int
    registers: int
    spilled: int

    def problems(self) -> Iterator[str]:
        """Why it cannot be launched there."""
        card = CARDS[self.card]
        if self.shared > card.shared:
            yield f"{self.shared} bytes of shared memory, of {card.shared}"
        if self.warps * card.warp_size > 1024:
            yield f"{self.warps * card.warp_size} threads, of 1024"
        registers = math.ceil(self.warps / 4) * math.ceil(self.registers / card.granule)
        if registers * card.granule > card.registers:
            yield f"{registers * card.granule} registers, of {card.registers}"


@dataclass(frozen=True)
class Launch:
    """A launch as it was asked for."""

    kernel: Any  # a triton.JITFunction
    arguments: tuple[Any, ...]
    grid: tuple[int, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def setting(self) -> str:
        """What it is compiled for: options, and of each argument its dtype or kind."""
        named = (
            f"{name}={value if _is_compiled_in(name) else _kind(value)}"
            for name, value in self.options.items()
        )
        return " ".join([*named, *map(_kind, self.arguments)])

    @property
    def has_float8(self) -> bool:
        return "float8" in self.setting

    @property
    def size(self) -> int:
        """How much a program does at once, as far as its tiles tell."""
        tiles = (value for name, value in self.options.items() if _is_compiled_in(name))
        return math.prod(value for value in tiles if type(value) is int)


def _is_compiled_in(name: str) -> bool:
    """Whether each value of an argument is compiled for: tiles have long names in capitals."""
    return name == "num_warps" or (name.isupper() and len(name) > 1)


def _kind(argument: Any) -> str:
    """Dtype of a tensor; of a whole number what Triton tells apart; else a type, or the value of a
    compile-time argument.
    """
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype).removeprefix("torch.")
    if isinstance(argument, tuple):
        return f"({' '.join(map(_kind, argument))})"
    if type(argument) is int:
        return "1" if argument == 1 else "16n" if argument % 16 == 0 else "int"
    return "float" if type(argument) is float else str(argument)


@dataclass(frozen=True)
class Shape:
    """Of an SAE and its batch, with the dtype of its weights and that of dense products."""

    d_in: int
    d_sae: int
    k: int
    dtype: torch.dtype = torch.float32
    product_dtype: torch.dtype = torch.float32
    n_rows: int = 4096


SIZES = (
    (768, 24_576, 32),  # GPT-2 small
    (2304, 65_536, 64),  # Gemma-2-2B
    (4096, 131_072, 1),
    (16_384, 131_072, 512),
    (765, 24_575, 33),  # no multiple of anything
)
PRECISIONS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),  # autocast
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
)
SHAPES = [Shape(*size, *precision) for size, precision in product(SIZES, PRECISIONS)]
# Larger than a second dimension of a grid may be, or than a program's list.
LARGE_SHAPES = [
    Shape(16, 512, 1, n_rows=1_200_000),  # chunks of the screen
    Shape(16, 256, 1, n_rows=5_000_000),  # blocks of rows between dense products
    Shape(16, 40_000_000, 2, n_rows=2),  # words of marked latents
    Shape(16, 2_400_000, 1_200_000, n_rows=1),  # pairs of a row
]


def kernel_modules() -> list[Any]:
    """The modules of this package that define kernels."""
    root = Path(import_module("saelens_sparse").__path__[0])
    has_kernel = re.compile(r"^@(kernel|triton\.jit)$", re.M)
    files = [file for file in sorted(root.rglob("*.py")) if has_kernel.search(file.read_text())]
    names = (".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files)
    return [import_module(name) for name in names]


def launched_kernels() -> set[str]:
    """Names of the kernels that are there to be launched: no other function calls them."""
    triton = import_module("triton")
    functions: dict[str, Any] = {}
    for module in kernel_modules():
        for name, value in vars(module).items():
            function = getattr(value, "jitted", value)
            if isinstance(function, triton.JITFunction) and function.module == module.__name__:
                functions[name] = function
    called = {
        name
        for name, caller in product(functions, functions.values())
        if re.search(rf"(?<!def )\b{name}\(", caller.src)
    }
    return set(functions) - called


@contextmanager
def recording(launches: list[Launch], warp_size: int) -> Generator[None]:
    """Collect launches instead of making them, on a card whose warps have so many threads."""
    jit_function = import_module("triton").JITFunction
    screen = import_module("saelens_sparse.ops.screen.gpu")
    launch = import_module("saelens_sparse.ops.common.launch")

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert not warmup
        # By position, whichever were given by name: compile-time arguments are the last ones.
        named = [p.name for p in kernel.params[len(arguments) :] if not p.is_constexpr]
        arguments += tuple(options.pop(name) for name in named if name in options)
        launches.append(Launch(kernel, arguments, tuple(grid), options))

    with (
        mock.patch.object(jit_function, "run", record),
        mock.patch.object(launch, "max_warps", return_value=1024 // warp_size),
        # There is nothing to multiply.
        mock.patch.object(screen, "multiply_float16"),
        mock.patch.object(screen, "multiply_float8"),
    ):
        yield


def record_launches(shapes: list[Shape], warp_size: int = 32) -> list[Launch]:
    """All that the launchers launch for SAEs of these shapes."""
    launches: list[Launch] = []
    with recording(launches, warp_size):
        for shape in shapes:
            _run_launchers(shape)
    return launches


def _run_launchers(shape: Shape) -> None:
    from saelens_sparse.architectures.parameters import SALTS
    from saelens_sparse.ops.activation.dense_kernels import (
        dense_jumprelu,
        dense_jumprelu_gradients,
    )
    from saelens_sparse.ops.activation.ghost_kernels import (
        ghost_gradient,
        ghost_losses,
        ghost_values,
    )
    from saelens_sparse.ops.activation.pairs_kernels import jumprelu, jumprelu_gradients
    from saelens_sparse.ops.common.precision import FLOAT8
    from saelens_sparse.ops.pairs import ActivePairs, LatentOrder, Rows
    from saelens_sparse.ops.rows import error_kernels as errors
    from saelens_sparse.ops.rows import kernels as row_ops
    from saelens_sparse.ops.rows import segment_kernels as segments
    from saelens_sparse.ops.rows.block import RowBlock
    from saelens_sparse.ops.search.batch_topk_kernels import find_largest
    from saelens_sparse.ops.search.threshold_kernels import find_pattern
    from saelens_sparse.ops.search.topk_kernels import (
        MAX_KEEP_COLUMNS,
        can_screen,
        select_topk,
        topk_values,
    )
    from saelens_sparse.ops.update import row_gradient_kernels as row_gradient
    from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_update
    from saelens_sparse.ops.update.row_gradient import RowGradient
    from saelens_sparse.ops.update.weight_cache import WeightCopy

    n, d_in, d_sae, k = shape.n_rows, shape.d_in, shape.d_sae, shape.k
    dtype, low = shape.dtype, shape.product_dtype
    empty: Callable[..., torch.Tensor] = partial(torch.empty, device="meta")
    buffer_bytes = 2**30
    weight, bias = empty(d_sae, d_in, dtype=dtype), empty(d_sae, dtype=dtype)
    x, screened = empty(n, d_in, dtype=low), empty(d_sae, d_in, dtype=low)

    takes_float8 = dtype == torch.float32 and d_in % 16 == d_sae % 16 == 0
    screen_dtypes = ("auto", "float8") if takes_float8 and low == dtype else ("auto",)
    for norms, screen_dtype in product((None, bias), screen_dtypes):
        if can_screen(x, screened, k, screen_dtype):
            select_topk(x, screened, bias, norms, k, buffer_bytes, None, screen_dtype)
        find_largest(x, screened, bias, norms, n * k, buffer_bytes, None, screen_dtype)
    width = min(d_sae // 2, MAX_KEEP_COLUMNS)
    for norms in (None, bias[:width]):
        topk_values(empty(n, width, dtype=low), bias[:width], norms, min(k, width))

    pattern = (x, screened, bias, bias, 0.1, n * k, buffer_bytes, None)
    pairs, _ = find_pattern(*pattern)
    if "float8" in screen_dtypes:
        find_pattern(*pattern, "float8")
    dead = empty(n, d_sae // 2, dtype=low)
    ghost_values(dead, bias[: d_sae // 2 - 1])
    ghosts, residual = empty(n, d_in, dtype=low), empty(n, d_in, dtype=dtype)
    _, coefficients = ghost_losses(ghosts, residual, 1e-6)
    ghost_gradient(ghosts, residual, coefficients)

    jumprelu(bias, pairs)
    products = empty(n, d_sae, dtype=low)
    dense_jumprelu(products, bias, bias, 0.1, low)
    for has_acts, has_l0, to_input in product((False, True), repeat=3):
        grad_l0 = empty(n) if has_l0 else None
        grad_acts = pairs.pre_acts if has_acts else None
        jumprelu_gradients(bias, pairs, 0.1, to_input, grad_acts, grad_l0)
        grad_acts = products if has_acts else None
        dense_jumprelu_gradients(products, bias, bias, 0.1, to_input, grad_acts, grad_l0)

    batch, one = empty(n, d_in, dtype=dtype), empty(1)
    moments = empty(d_sae, d_in, dtype=torch.bfloat16)
    updates = [
        (AdamSettings(one, 0.9, 0.999, 1e-8), weight),
        (AdamSettings(one, 0.9, 0.999, 1e-8, SALTS["W_enc"]), moments),
    ]
    adam_update(bias, bias, bias, bias, one, one, updates[0][0])
    for settings, moment in updates:
        adam_update(weight, weight, moment, moment, one, one, settings)
    latents, keys = empty(n * k, dtype=torch.int64), empty(n * k, dtype=torch.int32)
    coefficients, latent_offsets = empty(n * k, dtype=dtype), empty(d_sae + 1, dtype=torch.int64)
    for rows in (Rows.regular(n, k), Rows.ragged(empty(n + 1, dtype=torch.int64), keys)):
        for added in (None, empty(d_in, dtype=dtype)):
            row_ops.gather_sum(coefficients, latents, rows, weight, added)
        row_ops.gather_dot(batch, latents, rows, weight)
        if dtype == torch.float32:
            pairs = ActivePairs(latents, keys, coefficients, rows)
            for summed_dtype in (torch.float32, torch.bfloat16):
                decoded = errors.decode_errors(
                    coefficients, pairs, weight, None, batch, summed_dtype
                )
                dots, residual = decoded.dots, decoded.residual
                errors.pair_gradients(coefficients, pairs, weight, residual, dots, empty(n))
        order = LatentOrder(latents, keys, latent_offsets, rows)
        segments.segment_sum(order, coefficients, batch, dtype)
        segments.segment_totals(order, coefficients)
        copies = [None, WeightCopy.of(weight, "norms", dtype)]
        if low != dtype:
            copies.append(WeightCopy.of(weight, "rounded", low))
        if takes_float8:
            copies += [WeightCopy.of(weight, "scaled", low) for low in (torch.float16, FLOAT8)]
        dead = RowBlock(empty(100, dtype=torch.int64), 128)
        for block, block_gradient in ((None, None), (dead, empty(128, d_in, dtype=dtype))):
            gradient = RowGradient(order, coefficients, batch, block, block_gradient, False)
            sums = row_gradient.RowGradientSums(gradient)
            sums.square_sum()
            for copy, (settings, moment) in product(copies, updates):
                sums.update(weight, moment, moment, one, one, settings, copy)
    row_ops.add_rows(weight, empty(100, dtype=torch.int64), empty(100, d_in, dtype=dtype))
    for rounded_to in {dtype, torch.bfloat16}:
        row_ops.row_combination(bias, weight, rounded_to)
    row_ops.row_norms(weight)
    if dtype == torch.float32:
        errors.error_gradient(batch, batch, empty(n))
    with mock.patch.object(torch.Tensor, "item", return_value=1):
        row_ops.launch_probe(torch.device("meta"))


class _Driver:
    """What Triton's compiler asks of a driver, of a card that need not be there."""

    def __init__(self, card: str) -> None:
        self._card = card

    def get_current_target(self) -> Any:
        card = CARDS[self._card]
        target = import_module("triton.backends.compiler").GPUTarget
        return target(card.backend, card.arch, card.warp_size)

    def get_current_device(self) -> str:
        return self._card

    def get_current_stream(self, _: str) -> int:
        return 0


def compile_launches(card: str, launches: list[Launch]) -> list[Usage]:
    """What the kernels of these launches need of a card, compiled as when they are launched."""
    import_module("triton").runtime.driver.set_active(_Driver(card))
    read = _usage_on_cuda if CARDS[card].backend == "cuda" else _usage_on_hip
    usages: list[Usage] = []
    for launch in launches:
        arguments, options = launch.arguments, launch.options
        compiled = launch.kernel.run(*arguments, grid=launch.grid, warmup=True, **options)
        warps = compiled.metadata.num_warps
        usages.append(Usage(card, launch.name, launch.setting, warps, *read(compiled)))
    return usages


def _usage_on_cuda(compiled: Any) -> tuple[int, int, int]:
    """Shared memory, registers and spilled bytes."""
    tool = import_module("triton").knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (_number(f"{name}:", report) for name in ("REG", "STACK", "LOCAL"))
    return compiled.metadata.shared, registers, stack + local


def _usage_on_hip(compiled: Any) -> tuple[int, int, int]:
    """As `_usage_on_cuda`."""
    assembly = compiled.asm["amdgcn"]
    registers, spilled = (
        _number(f".{name}: +", assembly) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return compiled.metadata.shared, registers, spilled


def _number(label: str, text: str) -> int:
    found = re.search(rf"{label}(\d+)", text)
    assert found is not None, (label, text)
    return int(found[1])


def distinct(launches: list[Launch]) -> list[Launch]:
    """One launch of each kernel in each setting."""
    return list({(launch.name, launch.setting): launch for launch in launches}.values())


def largest(launches: list[Launch]) -> list[Launch]:
    """One launch of each kernel, that which does most at once, with float8 and without."""
    by_size = sorted(launches, key=lambda launch: launch.size)
    return list({(launch.name, launch.has_float8): launch for launch in by_size}.values())


def for_ci(card: str, launches: list[Launch]) -> list[Launch]:
    """All for the cards that differ most, and for each of the others some, without float8."""
    if card in EVERY_KERNEL_FOR:
        return launches
    launches = [launch for launch in launches if not launch.has_float8]
    others = [name for name in CARDS if name not in EVERY_KERNEL_FOR]
    return sorted(launches, key=lambda launch: launch.name)[others.index(card) :: len(others)]


def _compile_part(job: tuple[str, str, int, int]) -> list[Usage]:
    """Every `n_parts`-th launch from `part` on."""
    card, what, part, n_parts = job
    launches = record_launches(SHAPES, CARDS[card].warp_size)
    if card not in MULTIPLY_FLOAT8:
        launches = [launch for launch in launches if not launch.has_float8]
    launches = distinct(launches) if what == "settings" else largest(launches)
    if what == "some":
        launches = for_ci(card, launches)
    return compile_launches(card, launches[part::n_parts])


def main(what: str, *cards: str) -> None:
    """Print launches, or what they need of cards, of all if none is named."""
    if what == "launches":
        print(json.dumps({"kernels": sorted(launched_kernels())}))
        for launch in record_launches(SHAPES + LARGE_SHAPES):
            options = {name: str(value) for name, value in launch.options.items()}
            print(json.dumps({"kernel": launch.name, "grid": launch.grid, "options": options}))
        return
    n_parts = 8 if what == "settings" else 1
    jobs = list(product(cards or CARDS, (what,), range(n_parts), (n_parts,)))
    kernel_modules()  # imported once, before the processes part
    n_processes = len(os.sched_getaffinity(0))
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
        multiprocessing.get_context("fork").Pool(n_processes) as pool,
    ):
        for usages in pool.imap_unordered(_compile_part, jobs):
            for usage in usages:
                print(json.dumps({**asdict(usage), "problems": list(usage.problems())}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
