"""
Each operation of a step alone, beside the dense one that it replaces and the device's limits.

Rows hold the milliseconds, the floating point operations, the bytes that cannot be avoided (every
input and output moved once, of a weight only the rows of latents that fire), and the rates of a
device copy and of large products, measured in the same run. On a GPU caches are emptied between
calls. Latents are selected from activation-like data by encoder vectors of unequal norm, so that
they fire with heavy tails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
from torch.nn.functional import normalize

from benchmarks.harness import say
from benchmarks.rows import Row
from saelens_sparse.choice.availability import Backend, triton_problem
from saelens_sparse.ops.pairs import ActivePairs, LatentOrder
from saelens_sparse.ops.rows.operations import gather_dot, gather_sum, segment_sum
from saelens_sparse.ops.search.topk import search_topk
from saelens_sparse.profile.ceilings import copy_bandwidth, product_flops
from saelens_sparse.profile.data import ActivationStream
from saelens_sparse.profile.measure import time_calls

DTYPES = ("float32", "bfloat16")
BUFFER_BYTES = 2**30


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem, named by `str`."""

    d_in: int
    d_sae: int
    k: int
    rows: int

    def __str__(self) -> str:
        return f"{self.d_in},{self.d_sae},{self.k},{self.rows}"


DEFAULT_SHAPE = {"cuda": Shape(2304, 65_536, 64, 4096), "cpu": Shape(512, 16_384, 32, 1024)}


@dataclass
class OperationInputs:
    """One batch, its weights and how the operations are run."""

    shape: Shape
    backend: Backend
    x: torch.Tensor  # [rows, d_in]
    weight: torch.Tensor  # [d_sae, d_in]
    bias: torch.Tensor  # [d_sae]
    norms: torch.Tensor  # [d_sae]

    def search(self) -> ActivePairs:
        found = search_topk(
            self.x, self.weight, self.bias, self.norms, self.shape.k, self.backend, BUFFER_BYTES
        )
        return found.complete().pairs

    def select_densely(self) -> torch.Tensor:
        scores = torch.addmm(self.bias, self.x, self.weight.T) * self.norms
        return scores.topk(self.shape.k, sorted=False).indices


class Operation(NamedTuple):
    """A call, and what it cannot do without; `side` is "sparse", "stock" or "both"."""

    kernel: str
    side: str
    call: Callable[[], object]
    bytes: float
    flops: float


def make_inputs(shape: Shape, dtype: torch.dtype, device: str) -> OperationInputs:
    """A batch of activations, and weights of which a third point along its features."""
    stream = ActivationStream(shape.d_in, 8192, 40.0, device)
    generator = torch.Generator(device).manual_seed(1)
    weight = normalize(torch.randn(shape.d_sae, shape.d_in, device=device, generator=generator))
    n_trained = shape.d_sae // 3
    trained = stream.directions.repeat(n_trained // len(stream.directions) + 1, 1)[:n_trained]
    weight[:n_trained] = normalize(trained + 0.5 * weight[:n_trained])
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
    dense_bytes = batch_bytes + weight_bytes + shape.rows * shape.d_sae * item
    dense_flops = 2.0 * x.numel() * shape.d_sae
    pairs = shape.rows * shape.k
    pair_bytes, pair_flops = pairs * (item + 8), 2.0 * pairs * shape.d_in

    found = inputs.search()
    latents, rows, acts = found.latents, found.rows, found.pre_acts.relu()
    make_order = partial(LatentOrder.of, found, shape.d_sae)
    order = make_order()
    used = int((order.counts > 0).sum())
    gathered = batch_bytes + used * shape.d_in * item + pair_bytes
    grad = torch.randn_like(x)
    say(
        f"{shape}: {found.rows_recomputed} rows recomputed, largest segment "
        f"{int(order.counts.max())}, {1 - used / shape.d_sae:.0%} of latents never firing"
    )
    summed = partial(segment_sum, order, acts, grad, weight.dtype, backend)
    searched = batch_bytes + weight_bytes + pair_bytes
    decoded = partial(gather_sum, acts, latents, rows, weight, backend)
    differentiated = partial(gather_dot, grad, latents, rows, weight, backend)
    yield Operation("search", "sparse", inputs.search, searched, dense_flops)
    yield Operation("sort by latent", "sparse", make_order, pairs * 24.0, 0.0)
    yield Operation("decode", "sparse", decoded, gathered, pair_flops)
    yield Operation("gradient of activations", "sparse", differentiated, gathered, pair_flops)
    yield Operation("gradient of a weight", "sparse", summed, searched, pair_flops)
    row_norms = partial(weight.norm, dim=-1)
    yield Operation("decoder norms", "both", row_norms, weight_bytes, 2.0 * weight.numel())

    code = x @ weight.T  # [rows, d_sae]
    for name, call in {
        "select": inputs.select_densely,
        "decode": lambda: code @ weight,
        "gradient of activations": lambda: grad @ weight.T,
        "gradient of a weight": lambda: code.T @ grad,
    }.items():
        yield Operation(name, "stock", call, dense_bytes, dense_flops)

    # Each parameter, its gradient and two moments read; all but the gradient written.
    for side, fused in (("sparse", True), ("stock", False)):
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.Adam([parameter], fused=fused, foreach=not fused)
        yield Operation("Adam on a weight", side, optimizer.step, 7.0 * weight_bytes, 0.0)


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median time of a call."""
    if device == "cpu":
        return time_calls(call, device, repeats).to_row()["ms"]
    from triton.testing import do_bench

    return cast(float, do_bench(call, warmup=20, rep=60, return_mode="median"))


def selection_stages(inputs: OperationInputs, repeats: int) -> list[tuple[str, float]]:
    """The kernels of a selection and their milliseconds, by PyTorch's profiler; CUDA only."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            inputs.search()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    times = [(event.key[:60], event.self_device_time_total / repeats / 1e3) for event in events]
    return [(name, ms) for name, ms in times if ms > 0.003]


def measure(shape: Shape, dtype_name: str, device: str, repeats: int) -> Iterator[Row]:
    """A row for each operation at one shape."""
    dtype: torch.dtype = getattr(torch, dtype_name)
    low = torch.float16 if device == "cuda" else dtype
    inputs = make_inputs(shape, dtype, device)
    common: Row = {
        "status": "ok",
        "shape": str(shape),
        **asdict(shape),
        "dtype": dtype_name,
        "copy_tb_s": copy_bandwidth(device) / 1e12,
        "product_tflops": product_flops(dtype, device) / 1e12,
        "screen_tflops": product_flops(low, device) / 1e12,
        "backend": inputs.backend,
    }
    for kernel, side, call, n_bytes, flops in operations(inputs):
        ms = milliseconds(call, device, repeats)
        yield {**common, "kernel": kernel, "side": side, "ms": ms, "bytes": n_bytes, "flops": flops}
    if device == "cuda" and inputs.backend == "triton":
        for name, ms in selection_stages(inputs, repeats):
            stage: Row = {"kernel": name, "part_of": "select", "side": "sparse", "ms": ms}
            yield {**common, **stage, "bytes": None, "flops": None}
