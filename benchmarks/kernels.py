"""
Time each operation of a step alone, beside the dense one that it replaces and the device's limits.

    saelens-sparse bench kernels --shape 2304,65536,64,4096 --dtype float32

Rows hold the milliseconds, the floating point operations, the bytes that cannot be avoided (every
input and output moved once, of a weight only the rows of latents that fire), and the rates of a
device copy and of large products, measured in the same run. On a GPU caches are emptied between
calls. Latents are selected from activation-like data by encoder vectors of unequal norm, so that
they fire with heavy tails.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import cast

import torch
from tqdm import tqdm

from benchmarks.contest import say
from benchmarks.report import kernel_table
from benchmarks.session import add_common_options, open_results
from saelens_sparse.choice.availability import Backend, triton_problem
from saelens_sparse.config.files import UsageError
from saelens_sparse.ops import LatentOrder, gather_dot, gather_sum, segment_sum, select_topk
from saelens_sparse.profile.data import ActivationStream
from saelens_sparse.profile.measure import measure_calls
from saelens_sparse.reports.command_line import DEFAULT_STEPS, Parser, parse_shape
from saelens_sparse.reports.presentation import plain_table
from saelens_sparse.reports.results import Row

DTYPES = ("float32", "bfloat16")
DEFAULT_SHAPE = {"cuda": "2304,65536,64,4096", "cpu": "512,16384,32,1024"}
BUFFER_BYTES = 2**30
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem, named by `text`."""

    d_in: int
    d_sae: int
    k: int
    rows: int

    @property
    def text(self) -> str:
        return f"{self.d_in},{self.d_sae},{self.k},{self.rows}"


@dataclass
class OperationInputs:
    """One batch, its weights and how the operations are run."""

    shape: Shape
    backend: Backend
    x: torch.Tensor  # [rows, d_in]
    weight: torch.Tensor  # [d_sae, d_in]
    bias: torch.Tensor  # [d_sae]
    norms: torch.Tensor  # [d_sae]


@dataclass(frozen=True)
class Operation:
    """A call, and what it cannot do without."""

    kernel: str
    """What it is called in tables and figures."""
    side: str
    """"sparse", or "stock" for what stock does in its place."""
    call: Callable[[], object]
    bytes: float
    flops: float


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> OperationInputs:
    """A batch of activations, and weights of which a third point along its features."""
    stream = ActivationStream(shape.d_in, 8192, 40.0, device)
    generator = torch.Generator(device).manual_seed(1)
    weight = torch.randn(shape.d_sae, shape.d_in, device=device, generator=generator)
    trained = stream.directions.repeat(-(-shape.d_sae // 3 // stream.directions.shape[0]), 1)
    n_trained = min(shape.d_sae // 3, trained.shape[0])
    weight = torch.nn.functional.normalize(weight, dim=-1)
    weight[:n_trained] = torch.nn.functional.normalize(
        trained[:n_trained] + 0.5 * weight[:n_trained], dim=-1
    )
    strength = torch.rand(shape.d_sae, 1, device=device, generator=generator) + 0.5
    bias = 0.01 * torch.randn(shape.d_sae, device=device, generator=generator)
    norms = torch.rand(shape.d_sae, device=device, generator=generator) + 0.5
    runs_triton = device == "cuda" and triton_problem(torch.device(device), dtype) is None
    return OperationInputs(
        shape=shape,
        backend="triton" if runs_triton else "torch",
        x=(stream.batch(shape.rows, 0) - stream.mean * stream.scale).to(dtype),
        weight=(weight * strength).to(dtype),
        bias=bias.to(dtype),
        norms=norms.to(dtype),
    )


def operations(inputs: OperationInputs) -> Iterator[Operation]:
    """The operations of a step, each with the dense one that it replaces."""
    shape, x, weight, backend = inputs.shape, inputs.x, inputs.weight, inputs.backend
    item = x.element_size()
    batch_bytes, weight_bytes = x.numel() * item, weight.numel() * item
    code_bytes = shape.rows * shape.d_sae * item
    product = 2.0 * x.numel() * shape.d_sae

    def select() -> object:
        return select_topk(x, weight, inputs.bias, inputs.norms, shape.k, backend, BUFFER_BYTES)

    selection = select_topk(x, weight, inputs.bias, inputs.norms, shape.k, backend, BUFFER_BYTES)
    active, acts = selection.scores > 0, selection.pre_acts.relu()
    order = LatentOrder.of(selection.latents, active, shape.d_sae)
    pairs = shape.rows * shape.k
    used = int((order.counts > 0).sum())
    used_bytes, pair_bytes = used * shape.d_in * item, pairs * (item + 8)
    say(
        f"{shape.text}: {selection.rows_recomputed} rows recomputed, largest segment "
        f"{int(order.counts.max())}, {1 - used / shape.d_sae:.0%} of latents never firing"
    )
    yield Operation("select", "sparse", select, batch_bytes + weight_bytes + pair_bytes, product)
    yield Operation(
        "sort by latent",
        "sparse",
        lambda: LatentOrder.of(selection.latents, active, shape.d_sae),
        pairs * 24.0,
        0.0,
    )
    gathered = batch_bytes + used_bytes + pair_bytes
    yield Operation(
        "decode",
        "sparse",
        lambda: gather_sum(acts, selection.latents, weight, backend),
        gathered,
        2.0 * pairs * shape.d_in,
    )
    grad = torch.randn_like(x)
    yield Operation(
        "gradient of activations",
        "sparse",
        lambda: gather_dot(grad, selection.latents, weight, backend),
        gathered,
        2.0 * pairs * shape.d_in,
    )
    yield Operation(
        "gradient of a weight",
        "sparse",
        lambda: segment_sum(order, acts, grad, weight.dtype, backend),
        batch_bytes + weight_bytes + pair_bytes,
        2.0 * pairs * shape.d_in,
    )
    norms = Operation("decoder norms", "both", lambda: weight.norm(dim=-1), weight_bytes, 0.0)
    yield replace(norms, flops=2.0 * weight.numel())

    code = x @ weight.T  # [rows, d_sae]
    dense_bytes = batch_bytes + weight_bytes + code_bytes
    yield Operation("select", "stock", lambda: _dense_select(inputs), dense_bytes, product)
    yield Operation("decode", "stock", lambda: code @ weight, dense_bytes, product)
    yield Operation(
        "gradient of activations", "stock", lambda: grad @ weight.T, dense_bytes, product
    )
    yield Operation("gradient of a weight", "stock", lambda: code.T @ grad, dense_bytes, product)

    # Each parameter, its gradient and two moments read; all but the gradient written.
    for side, fused in (("sparse", True), ("stock", False)):
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.Adam([parameter], fused=fused, foreach=not fused)
        yield Operation("Adam on a weight", side, optimizer.step, 7.0 * weight_bytes, 0.0)


def _dense_select(inputs: OperationInputs) -> torch.Tensor:
    scores = torch.addmm(inputs.bias, inputs.x, inputs.weight.T) * inputs.norms
    return scores.topk(inputs.shape.k, sorted=False).indices


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median time of a call."""
    if device == "cpu":
        return measure_calls(call, device, repeats)["ms"]
    from triton.testing import do_bench

    return cast(float, do_bench(call, warmup=20, rep=60, return_mode="median"))


def copy_rate(device: str, repeats: int) -> float:
    """TB/s, read plus written, of a copy from memory to memory."""
    source = torch.empty(COPIED_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device, repeats)
    return 2 * source.numel() / ms / 1e9


def product_rate(dtype: torch.dtype, device: str, repeats: int) -> float:
    """TFLOP/s of a product of large square matrices."""
    n = PRODUCT_SIZE[device]
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: left @ right, device, repeats) / 1e9


def selection_stages(inputs: OperationInputs, repeats: int) -> list[tuple[str, float]]:
    """The kernels of a selection and their milliseconds, by PyTorch's profiler; CUDA only."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            select_topk(
                inputs.x, inputs.weight, inputs.bias, inputs.norms, inputs.shape.k,
                inputs.backend, BUFFER_BYTES,
            )  # fmt: skip
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    times = [(event.key[:60], event.self_device_time_total / repeats / 1e3) for event in events]
    return [(name, ms) for name, ms in times if ms > 0.003]


def measure(shape: Shape, dtype_name: str, device: str, repeats: int) -> Iterator[Row]:
    """A row for each operation at one shape."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    low = torch.float16 if device == "cuda" else dtype
    common: Row = {
        "status": "ok",
        "shape": shape.text,
        **asdict(shape),
        "dtype": dtype_name,
        "copy_tb_s": copy_rate(device, repeats),
        "product_tflops": product_rate(dtype, device, repeats),
        "screen_tflops": product_rate(low, device, repeats),
    }
    inputs = make_inputs(shape, dtype, device)
    common["backend"] = inputs.backend
    for operation in tqdm(operations(inputs), total=12, unit="kernel", disable=None):
        yield {
            **common,
            "kernel": operation.kernel,
            "side": operation.side,
            "ms": milliseconds(operation.call, device, repeats),
            "bytes": operation.bytes,
            "flops": operation.flops,
        }
    if device == "cuda" and inputs.backend == "triton":
        for name, ms in selection_stages(inputs, repeats):
            stage: Row = {"kernel": name, "part_of": "select", "side": "sparse", "ms": ms}
            yield {**common, **stage, "bytes": None, "flops": None}


def shape_of(text: str) -> Shape:
    """argparse type: the sizes of a problem."""
    shape = Shape(*parse_shape(text))
    if min(astuple(shape)) < 1 or shape.k > shape.d_sae:
        raise argparse.ArgumentTypeError(f"all must be above 0 and K at most D_SAE; got {text!r}")
    return shape


def main(argv: Sequence[str]) -> int:
    parser = Parser("bench kernels", __doc__)
    parser.add_argument(
        "--shape",
        type=shape_of,
        metavar="D_IN,D_SAE,K,BATCH",
        help=f"by default {DEFAULT_SHAPE['cuda']}, on a CPU {DEFAULT_SHAPE['cpu']}",
    )
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES)
    add_common_options(parser, training=False)
    args = parser.parse_args(argv)
    steps = args.steps or DEFAULT_STEPS[args.device]
    shape: Shape = args.shape or shape_of(DEFAULT_SHAPE[args.device])
    results = open_results(args)
    # The last of the operations: with it, all have rows.
    whole = {"shape": shape.text, "dtype": args.dtype, "kernel": "Adam on a weight"}
    if results.measured(**whole, side="stock") and not args.again:
        print(f"{shape.text} {args.dtype} is measured already; --again measures it again.")
        return 0
    try:
        for row in measure(shape, args.dtype, args.device, steps):
            results.append(row)
    except torch.OutOfMemoryError as error:
        raise UsageError(f"--shape {shape.text} needs more memory than there is") from error
    print(f"\n{plain_table(kernel_table(results.rows))}\n\nRows are in {results.path}.")
    if args.device == "cpu":
        print("On a CPU kernels have no stages, and caches are as the last call left them.")
    return 0
