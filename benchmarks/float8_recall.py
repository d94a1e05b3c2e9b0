"""
What a float8 screen misses, and how many candidates it lists, on a real model's activations.

    python -m benchmarks.float8_recall --out float8_recall.json

A Top-K SAE is trained on SmolLM2-135M's activations (`real_activations.py`). Its operands, and
those of an untrained SAE, are rounded as the kernels round them, in PyTorch, which needs no GPU. By
margin, the results say how many of the rows' top k are no candidates, and how many candidates rows
have.
So do those of planted features at 2304 -> 65,536, k 64, on which steps are timed.
They also say how far products are off, in standard deviations of errors that are independent from
column to column, and which share of the top k is found by a product in bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.cases import GEMMA
from benchmarks.harness import say
from benchmarks.real_activations import make_activations
from benchmarks.rows import CHECKOUT
from benchmarks.trade_offs import Batches
from saelens_sparse.ops.common.precision import FLOAT8
from saelens_sparse.ops.screen.gpu import float8_deviations
from saelens_sparse.profile.cases import PRECISIONS
from saelens_sparse.profile.trainers import prepare_inputs
from saelens_sparse.training import SparseSAETrainer

AUTOCAST, FLOAT32 = (float8_deviations(dtype) for dtype in (torch.bfloat16, torch.float32))
MARGINS = (AUTOCAST / 2, AUTOCAST, FLOAT32, 2 * AUTOCAST)
N_OUTLIERS = 3


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Rows `[n, d]`, each scaled by a power of two to a norm of 64 to 128 and rounded to float8."""
    scale = torch.exp2(6 - rows.norm(dim=1, keepdim=True).log2().floor())
    return (rows * scale).to(FLOAT8).float() / scale


@torch.no_grad()
def measure(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int) -> dict[str, Any]:
    """
    Args:
        x: `[n_rows, d_in]`, centred.
        weight: `[d_sae, d_in]`.
        bias: `[d_sae]`.
        k: of the top k.
    """
    x8, weight8 = rounded(x), rounded(weight)
    dx, dw = x - x8, weight - weight8
    products = x @ weight.T
    scores, screened = products + bias, (x8 @ weight8.T).half().float() + bias
    in_top = torch.zeros_like(scores, dtype=torch.bool)
    in_top.scatter_(1, scores.topk(k).indices, True)
    independent = (dx.square() @ weight.T.square() + x.square() @ dw.T.square()).sqrt()
    off = (screened - scores) / independent
    size = dx.norm(dim=1)[:, None] * weight.norm(dim=1) + x.norm(dim=1)[:, None] * dw.norm(dim=1)
    found = (x.bfloat16() @ weight.bfloat16().T).float() + bias
    in_bfloat16 = in_top.gather(1, found.topk(k).indices).float().mean().item()
    margins: dict[str, dict[str, float]] = {}
    for deviations in MARGINS:
        margin = deviations * size / x.shape[1] ** 0.5
        reached = (screened - margin).topk(k).values[:, -1:]
        is_candidate = screened + margin >= reached
        counts = is_candidate.sum(1).float()
        margins[str(deviations)] = {
            "missed": int((in_top & ~is_candidate).sum()),
            "of": int(in_top.sum()),
            "candidates": counts.mean().item(),
            "most_candidates": counts.max().item(),
        }
    return {
        "deviations": off.std().item(),
        "deviations_of_the_top": off[in_top].std().item(),
        "most_deviations": off.abs().max().item(),
        "recall_of_bfloat16": in_bfloat16,
        "margins": margins,
    }


def measure_planted(n_rows: int) -> dict[str, Any]:
    """As `measure`, of the weights and inputs that steps are timed on, before their training."""
    inputs = prepare_inputs(GEMMA, PRECISIONS["float32"], "cpu", warmup_train=0)
    weights = inputs.weights
    x = inputs.batches[0][:n_rows] - weights["b_dec"]
    weight = weights["W_enc"].T.contiguous()
    return measure(x, weight, weights["b_enc"], int(GEMMA.sparsity))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.float8_recall", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", type=Path, default=CHECKOUT / ".cache" / "smollm2-135m")
    add("--tokens", type=int, default=30_000)
    add("--rows", type=int, default=1024, help="that are measured, and not trained on")
    add("--planted-rows", type=int, default=128, help="of planted features")
    add("--steps", type=int, default=150)
    add("--batch", type=int, default=1024)
    add("--d-sae", type=int, default=8192)
    add("--k", type=int, default=32)
    add("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.manual_seed(0)
    pool = make_activations(args.model, args.tokens, "cpu").rows
    x, d_in = pool[: args.rows].float(), pool.shape[1]
    sae: Any = TrainingSAE.from_dict(
        {"architecture": "topk_sparse", "d_in": d_in, "d_sae": args.d_sae, "k": args.k}
    )
    initial = sae.W_enc.detach().T.clone(), sae.b_enc.detach().clone()
    cfg = SAETrainerConfig(
        total_training_samples=args.steps * args.batch, train_batch_size_samples=args.batch,
        device="cpu", lr=1e-3, lr_end=1e-4, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SparseSAETrainer.taking_over(SAETrainer(cfg, sae, iter(())))
    batches = Batches(pool[args.rows :], args.batch)
    for step in range(args.steps):
        trainer.step(batches[step])
        trainer.n_training_steps += 1
    weight, bias = sae.W_enc.detach().T.contiguous(), sae.b_enc.detach()
    centred = x - sae.b_dec.detach()
    outlying_x, outlying_weight = centred.clone(), weight.clone()
    outlying_x[:, :N_OUTLIERS] *= 40
    outlying_weight[:, :N_OUTLIERS] *= 10
    results: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items() if name != "out"},
        "trained": measure(centred, weight, bias, args.k),
        "initialized": measure(x - x.mean(0), *initial, args.k),
        "columns of x": measure(outlying_x, weight, bias, args.k),
        "columns of both": measure(outlying_x, outlying_weight, bias, args.k),
        "planted": measure_planted(args.planted_rows),
    }
    results["settings"]["model"] = args.model.name
    for name, found in results.items():
        say(f"{name}: {json.dumps(found)}")
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
