"""Times each kernel of a step at one shape, beside the bytes it moves at the measured bandwidth.

    python -m saelens_sparse.evaluation.bench.kernels --shape 2304,65536,64,4096 --dtype float32

Latents are selected from activation-like data by encoder vectors of unequal norm, so that they
fire with heavy tails.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import triton
import triton.testing

from saelens_sparse.evaluation.data import ActivationStream
from saelens_sparse.ops import LatentOrder, gather_dot, gather_sum, segment_sum, select_topk
from saelens_sparse.ops import select_triton as selection


@dataclass
class Problem:
    """One batch, its weights and its selection."""

    x: torch.Tensor  # [N, d_in]
    weight: torch.Tensor  # [d_sae, d_in]
    bias: torch.Tensor  # [d_sae]
    norms: torch.Tensor  # [d_sae]
    k: int


def make_problem(d_in: int, d_sae: int, k: int, n_rows: int, dtype: torch.dtype) -> Problem:
    stream = ActivationStream(d_in, 8192, 40.0, "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(d_sae, d_in, device="cuda", generator=generator)
    # A third of the latents point along features of the data, as trained latents do.
    trained = stream.directions.repeat(-(-d_sae // 3 // stream.directions.shape[0]), 1)
    n_trained = min(d_sae // 3, trained.shape[0])
    weight = torch.nn.functional.normalize(weight, dim=-1)
    weight[:n_trained] = torch.nn.functional.normalize(
        trained[:n_trained] + 0.5 * weight[:n_trained], dim=-1
    )
    strength = torch.rand(d_sae, 1, device="cuda", generator=generator) + 0.5
    return Problem(
        x=(stream.batch(n_rows, 0) - stream.mean * stream.scale).to(dtype),
        weight=(weight * strength).to(dtype),
        bias=(0.01 * torch.randn(d_sae, device="cuda", generator=generator)).to(dtype),
        norms=torch.rand(d_sae, device="cuda", generator=generator).to(dtype) + 0.5,
        k=k,
    )


def milliseconds(function: Callable[[], object]) -> float:
    return cast(float, triton.testing.do_bench(function, warmup=20, rep=60, return_mode="median"))


def copy_bandwidth() -> float:
    """Bytes per millisecond, read plus written, of a device-to-device copy."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def measure(problem: Problem, buffer_bytes: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of each kernel and the bytes that it cannot avoid moving."""
    x, weight, k = problem.x, problem.weight, problem.k
    n_rows, d_in = x.shape
    d_sae = weight.shape[0]
    item = x.element_size()
    times: dict[str, tuple[float, float]] = {}

    def select() -> object:
        return select_topk(x, weight, problem.bias, problem.norms, k, "triton", buffer_bytes)

    times["select_topk"] = milliseconds(select), n_rows * d_sae * 4
    times.update(_measure_select_kernels(problem))
    chosen = select_topk(x, weight, problem.bias, problem.norms, k, "triton", buffer_bytes)
    active = chosen.scores > 0
    acts = chosen.pre_acts.relu()
    order = LatentOrder.of(chosen.latents, active, d_sae)
    counts = order.counts
    print(
        f"rows recomputed {chosen.rows_recomputed}, pairs {int(counts.sum())}, "
        f"largest segment {int(counts.max())}, never firing {(counts == 0).float().mean():.0%}"
    )
    pairs = n_rows * k
    grad = torch.randn_like(x)
    times["sort by latent"] = (
        milliseconds(lambda: LatentOrder.of(chosen.latents, active, d_sae)),
        pairs * 24,
    )
    times["gather_sum"] = (
        milliseconds(lambda: gather_sum(acts, chosen.latents, weight, "triton")),
        pairs * d_in * item,
    )
    times["gather_dot"] = (
        milliseconds(lambda: gather_dot(grad, chosen.latents, weight, "triton")),
        pairs * d_in * item,
    )
    times["segment_sum"] = (
        milliseconds(lambda: segment_sum(order, acts, grad, weight.dtype, "triton")),
        (pairs + d_sae) * d_in * item,
    )
    times["decoder norms"] = milliseconds(lambda: weight.norm(dim=-1)), d_sae * d_in * item
    return times


def _measure_select_kernels(problem: Problem) -> dict[str, tuple[float, float]]:
    """The stages of a float32 or bfloat16 selection, by the profiler's kernel times."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            select_topk(
                problem.x, problem.weight, problem.bias, problem.norms, problem.k, "triton", 2**30
            )
        torch.cuda.synchronize()
    return {
        f"  {event.key[:48]}": (event.self_device_time_total / 5e3, 0.0)
        for event in sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
        if event.self_device_time_total > 5 * 3
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="2304,65536,64,4096", help="d_in,d_sae,k,rows")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, help="append a JSON line here")
    args = parser.parse_args()
    d_in, d_sae, k, n_rows = (int(part) for part in args.shape.split(","))
    bandwidth = copy_bandwidth()
    problem = make_problem(d_in, d_sae, k, n_rows, getattr(torch, args.dtype))
    times = measure(problem, 2**30)
    print(f"{args.shape} {args.dtype}, copy {bandwidth / 1e9:.2f} TB/s, "
          f"{selection.group_count(d_sae, k)} groups")  # fmt: skip
    for name, (ms, moved) in times.items():
        floor = f"{moved / bandwidth:8.3f}" if moved else " " * 8
        print(f"{name:52s} {ms:8.3f} ms   floor {floor}")
    if args.out:
        row = {"shape": args.shape, "dtype": args.dtype, "gpu": torch.cuda.get_device_name()}
        row |= {"copy_TB_s": bandwidth / 1e9, "ms": {name: ms for name, (ms, _) in times.items()}}
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
