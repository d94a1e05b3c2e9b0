"""
What trains dead latents, on real activations: AuxK, ghost gradients, or nothing.

Each loss trains an SAE from the same weights on the same batches by SparseTrainingRunner's trainer.
A row says how many latents were dead at some time, how many of these are alive at the end, the mean
squared error over the last tenth of the steps, and how long a step took with dead latents and
without. The activations are those that `saelens-sparse compare` makes of SmolLM2-135M, or a file.
Their rows have a mean norm of the square root of d_in.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from safetensors.torch import load_file

from benchmarks.harness import describe, say
from benchmarks.rows import ResultsFile, Row
from benchmarks.wall_clock import peak_gib, start_peak
from saelens_sparse.config.files import UsageError
from saelens_sparse.profile.cases import PRECISIONS, Case
from saelens_sparse.profile.trainers import Trainer, build_trainer, release_memory
from saelens_sparse.whole_run.clock import now

LOSSES: dict[str, dict[str, Any]] = {
    "auxk": {"dead_latent_loss": "auxk"},
    "ghost": {"dead_latent_loss": "ghost"},
    "none": {"aux_loss_coefficient": 0.0},
}
# The first steps compile kernels and reserve memory.
UNTIMED_STEPS = 10
DEFAULT_ACTIVATIONS = Path.home() / ".cache" / "saelens-sparse" / "activations"


def load_activations(path: Path) -> torch.Tensor:
    """
    Rows of activations, `[n, d_in]` float32, on the host.

    Args:
        path: a safetensors file with one tensor, or a folder of SAELens's cached activations.

    Raises:
        UsageError: there are none.
    """
    if path.suffix == ".safetensors" and path.is_file():
        (rows,) = load_file(path).values()
    elif path.is_dir():
        cached = datasets.load_from_disk(str(path))
        assert isinstance(cached, datasets.Dataset)
        (name,) = (name for name in cached.column_names if name != "token_ids")
        rows = torch.as_tensor(cached.with_format("torch")[:][name])
        rows = rows.flatten(0, -2)
    else:
        made = "saelens-sparse compare makes some in ~/.cache/saelens-sparse"
        raise UsageError(f"--activations: {path} is no safetensors file and no folder; {made}")
    rows = rows.float()
    return rows * (rows.shape[1] ** 0.5 / rows.norm(dim=1).mean())


def batches_of(rows: torch.Tensor, batch: int, seed: int, device: str) -> Iterator[torch.Tensor]:
    """Batches `[batch, d_in]` without end, each pass in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for places in order.split(batch):
            if len(places) == batch:
                yield rows[places].to(device)


def train(trainer: Trainer, batches: Iterator[torch.Tensor], steps: int, device: str) -> Row:
    """Train, and say what became of dead latents."""
    ever_dead = torch.zeros_like(trainer.dead_neurons)
    errors: list[torch.Tensor] = []
    ms: dict[bool, list[float]] = {True: [], False: []}
    before = start_peak(device)
    for step in range(steps):
        dead, batch = trainer.dead_neurons, next(batches)
        ever_dead |= dead
        has_dead, begin = bool(dead.any()), now(device)
        output = trainer.step(batch)
        taken = 1e3 * (now(device) - begin)
        trainer.n_training_steps += 1
        errors.append(output.losses["mse_loss"].detach())
        if step >= UNTIMED_STEPS:
            ms[has_dead].append(taken)
    dead = trainer.dead_neurons
    return {
        "mse": torch.stack(errors[-max(1, steps // 10) :]).mean().item(),
        "ever_dead": int(ever_dead.sum()),
        "revived": int((ever_dead & ~dead).sum()),
        "dead": int(dead.sum()),
        "ms": median(ms[False]) if ms[False] else None,
        "ms_with_dead": median(ms[True]) if ms[True] else None,
        "steps_with_dead": len(ms[True]),
        "peak_gib": peak_gib(device, before),
    }


def run(results: ResultsFile, args: Namespace) -> int:
    """
    Measure each loss; returns 1 if any could not be measured.

    Args:
        results: where a row for each loss and seed goes.
        args: the options of `python -m benchmarks dead_latents`.
    """
    rows, precision = load_activations(args.activations), PRECISIONS[args.precision]
    variance = (rows - rows.mean(0)).pow(2).sum(1).mean().item()
    sizes = {"d_in": rows.shape[1], "d_sae": args.d_sae, "k": args.k, "batch": args.batch}
    if len(rows) < args.batch:
        raise UsageError(f"--batch: {args.batch} is more than the {len(rows)} activations")
    key = {"operation": "dead_latents", "architecture": args.architecture, **sizes}
    key |= {"precision": precision.name, "steps": args.steps, "window": args.window}
    key |= {"lr": args.lr, "coefficient": args.coefficient}
    for seed in range(args.seeds):
        for loss in args.losses:
            case = Case(
                "dead_latents", args.architecture, rows.shape[1], args.d_sae, args.k, args.batch,
                options={"aux_loss_coefficient": args.coefficient, **LOSSES[loss]},
            )  # fmt: skip
            torch.manual_seed(seed)
            try:
                trainer = build_trainer(
                    case.architecture, case, precision, args.device, (), sparse_runner=True,
                    learning_rate=args.lr,
                )  # fmt: skip
                trainer.cfg.dead_feature_window = args.window
                batches = batches_of(rows, args.batch, seed, args.device)
                found = train(trainer, batches, args.steps, args.device)
                row: Row = {"status": "ok", **found}
                row["explained_variance"] = 1 - found["mse"] / variance
                del trainer
            except (RuntimeError, ValueError) as error:
                row = describe(error)
            release_memory(args.device)
            results.append({**key, "contender": loss, "seed": seed, **row})
            say(f"{loss}, seed {seed}: {said_of(row)}")
    return int(any(row["status"] != "ok" for row in results.rows))


def said_of(row: Row) -> str:
    """A row in one line."""
    if row["status"] != "ok":
        return row["message"]
    ms, with_dead = (
        "-" if row[name] is None else f"{row[name]:.2f}" for name in ("ms", "ms_with_dead")
    )
    return (
        f"{row['revived']:,} of {row['ever_dead']:,} dead latents revived, {row['dead']:,} dead at "
        f"the end; MSE {row['mse']:.4f}, explained variance {row['explained_variance']:.4f}; "
        f"{ms} ms a step, {with_dead} with dead latents ({row['steps_with_dead']} steps)"
    )
