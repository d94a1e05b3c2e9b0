"""
Quality, time and memory of what does not train the very same SAE, on a real model's activations.

    python -m benchmarks.trade_offs --device cuda --steps 6000 --out trade_offs.json
    python -m benchmarks.trade_offs --d-sae 1024 --k 8 --batch 128 --tokens 40000 --steps 1400
    python -m benchmarks.trade_offs --architecture jumprelu --sae '{"l0_coefficient": 2}'

Every arm trains an SAE, a Top-K one by default, from the same weights on the same batches of
SmolLM2-135M's activations (`real_activations.py`). Arms are:

- float32: the sparse architecture in `SparseSAETrainer`
- stock: SAELens's architecture and trainer
- nudged_N: as float32, each weight of `W_enc` moved once by at most a unit in the last place
- bfloat16, bfloat16_nudged_N: as float32 and nudged_N, with `moments="bfloat16"`
- float8: as float32, with `screen_dtype="float8"`, where a GPU multiplies that
- float8_bfloat16: with both
- nearest: as float32, moments of weights rounded to the nearest bfloat16 after each step
- torchao_8bit: the sparse architecture in SAELens's trainer with torchao's `Adam8bit`, where that
  is installed

Ten times, and at the end, every arm is measured on held-out rows. At the end it reconstructs the
activations of held-out prompts inside the model: the results have the share of the cross-entropy
loss that it recovers, of what is lost if the activations are zero. Latents that fire in the float32
arm are put in ten groups by their frequency there, the rarest first. By group, the results say for
each arm:

- cosine: of decoder rows to those of float32, the median
- second_moment: of rows of `W_dec` over those of float32, the median
- silent: share of the latents that fire on no held-out row
- mse_rise: what the MSE gains if the arm's own group of that frequency is left out
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.contenders import has_float8
from benchmarks.harness import say
from benchmarks.real_activations import RealActivations, loss_recovered, make_activations
from benchmarks.rows import CHECKOUT
from benchmarks.wall_clock import Clock, peak_gib, start_peak
from saelens_sparse.profile.trainers import release_memory
from saelens_sparse.training import SparseSAETrainer

N_GROUPS, N_POINTS = 10, 10
ROWS = 1024
"""How many are measured at once."""
WARM_UP_STEPS = 20
"""Steps that are not timed."""
Trainer = SAETrainer[Any, Any]


@dataclass
class Arm:
    """A contender: the SAE's extra configuration, and what its trainer is."""

    name: str
    sparse: bool = True
    own: bool = True
    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    nudge: int | None = None
    nearest: bool = False
    torchao: bool = False

    def trainer(self, sae: dict[str, Any], cfg: SAETrainerConfig) -> Trainer:
        """
        Args:
            sae: configuration of the SAE, with stock's architecture.
            cfg: of the training.
        """
        ending = "_sparse" if self.sparse else ""
        torch.manual_seed(0)
        made: Any = TrainingSAE.from_dict(
            {**sae, **self.fields, "architecture": sae["architecture"] + ending}
        )
        if self.nudge is not None:
            generator = torch.Generator().manual_seed(self.nudge)
            ulps = torch.randint(-1, 2, made.W_enc.shape, generator=generator).to(made.W_enc)
            with torch.no_grad():
                made.W_enc.mul_(1 + ulps * 2**-23)
        trainer: Trainer = SAETrainer(cfg, made, iter(()))
        if self.own:
            trainer = SparseSAETrainer.taking_over(trainer)
        if self.nearest:
            trainer.optimizer.register_step_post_hook(round_to_nearest)
        if self.torchao:
            from torchao.optim import Adam8bit  # pyright: ignore[reportMissingImports]

            betas = cfg.adam_beta1, cfg.adam_beta2
            trainer.optimizer = Adam8bit(made.parameters(), lr=cfg.lr, betas=betas)
        return trainer


def round_to_nearest(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for parameter, state in optimizer.state.items():
        if parameter.ndim == 2:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(state[name].bfloat16())


def arms(n_nudged: int, device: str) -> list[Arm]:
    """All that can run here, the reference first."""
    light, screen = {"moments": "bfloat16"}, {"screen_dtype": "float8"}
    seeds = range(1, n_nudged + 1)
    found = [Arm("float32"), Arm("stock", sparse=False, own=False)]
    found += [Arm(f"nudged_{seed}", nudge=seed) for seed in seeds]
    found += [Arm("bfloat16", fields=light)]
    found += [Arm(f"bfloat16_nudged_{seed}", fields=light, nudge=seed) for seed in seeds]
    if has_float8(device):
        found += [Arm("float8", fields=screen), Arm("float8_bfloat16", fields=light | screen)]
    found += [Arm("nearest", nearest=True)]
    if importlib.util.find_spec("torchao") is not None:
        found.append(Arm("torchao_8bit", own=False, torchao=True))
    return found


class Batches:
    """Rows of a pool, one epoch after the other, each in an order of its own."""

    def __init__(self, pool: torch.Tensor, size: int) -> None:
        self._pool, self._size = pool, size
        self._per_epoch = len(pool) // size
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, step: int) -> torch.Tensor:
        epoch, index = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(epoch)
            order = torch.randperm(len(self._pool), generator=generator)
            self._epoch, self._order = epoch, order.to(self._pool.device)
        rows = self._order[index * self._size : (index + 1) * self._size]
        return self._pool[rows].float()


@dataclass
class Final:
    """What is kept of a trained arm.

    Attributes:
        decoder: `[d_sae, d_in]`.
        second: `[d_sae]`, mean second moment of each row of the decoder.
        fired: `[d_sae]`, on how many held-out rows each latent fires.
        errors: MSE, as SAELens's, and explained variance on the held-out rows.
        rises: of the MSE where the latents of a group are left out, the rarest group first.
    """

    decoder: torch.Tensor
    second: torch.Tensor
    fired: torch.Tensor
    errors: tuple[float, float]
    rises: list[float]


@torch.no_grad()
def errors(
    sae: Any, held_out: torch.Tensor, keep: torch.Tensor | float = 1.0
) -> tuple[float, float]:
    """MSE and explained variance with the activations times `keep`."""
    rows = held_out.float()
    squares = sum(
        (sae.decode(sae.encode(x) * keep) - x).pow(2).sum().item() for x in rows.split(ROWS)
    )
    variance = (rows - rows.mean(0)).pow(2).sum().item()
    return squares / len(rows), 1 - squares / variance


@torch.no_grad()
def final_of(trainer: Trainer, held_out: torch.Tensor) -> Final:
    sae: Any = trainer.sae
    fired = torch.zeros(sae.cfg.d_sae, device=held_out.device)
    for x in held_out.float().split(ROWS):
        fired += (sae.encode(x) > 0).sum(0)
    second: Any = trainer.optimizer.state[sae.W_dec]["exp_avg_sq"]
    if hasattr(second, "codes"):
        second = second.dequantize()
    few = held_out[: 4 * ROWS]
    whole, rises = errors(sae, few)[0], list[float]()
    for latents in groups_of(fired):
        keep = torch.ones_like(fired)
        keep[latents] = 0
        rises.append(errors(sae, few, keep)[0] - whole)
    decoder = sae.W_dec.detach().cpu()
    return Final(decoder, second.float().mean(1).cpu(), fired.cpu(), errors(sae, held_out), rises)


def groups_of(fired: torch.Tensor) -> list[torch.Tensor]:
    """Latents that fire, in ten groups by frequency."""
    order = fired.argsort(stable=True)
    return [*order[fired[order] > 0].tensor_split(N_GROUPS)]


def by_group(final: Final, reference: Final, n_held_out: int) -> dict[str, list[float]]:
    """Comparisons with the reference, by frequency there."""
    cosine = torch.cosine_similarity(final.decoder, reference.decoder)
    ratio = final.second / reference.second.clamp(min=torch.finfo(torch.float32).tiny)
    groups = groups_of(reference.fired)
    return {
        "frequency": [reference.fired[g].mean().item() / n_held_out for g in groups],
        "cosine": [cosine[group].median().item() for group in groups],
        "second_moment": [ratio[group].median().item() for group in groups],
        "silent": [(final.fired[group] == 0).float().mean().item() for group in groups],
        "mse_rise": final.rises,
    }


def train(arm: Arm, args: argparse.Namespace, pool: torch.Tensor) -> tuple[Trainer, dict[str, Any]]:
    """Train an arm; gives its trainer, and its curves, time and memory."""
    sae = {"d_in": pool.shape[1], "d_sae": args.d_sae, "device": args.device, **args.sae}
    sae["architecture"] = args.architecture
    if args.architecture != "jumprelu":
        sae["k"] = args.k
    cfg = SAETrainerConfig(
        total_training_samples=args.steps * args.batch, train_batch_size_samples=args.batch,
        device=args.device, lr=args.lr, lr_end=args.lr, autocast=args.autocast,
        dead_feature_window=args.dead_feature_window, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    batches, held_out = Batches(pool[args.held_out :], args.batch), pool[: args.held_out]
    before = start_peak(args.device)
    trainer = arm.trainer(sae, cfg)
    clock, points, losses = Clock(args.device), list[Any](), list[Any]()
    recalls: list[tuple[int, Any, Any]] = []
    for step in range(args.steps):
        batch = batches[step]
        if step < WARM_UP_STEPS:
            output = trainer.step(batch)
        else:
            with clock:
                output = trainer.step(batch)
        trainer.n_training_steps += 1
        losses.append(output.losses["mse_loss"].detach().float())
        if (recall := output.metrics.get("screen_recall")) is not None:
            recalls.append((step, recall, output.metrics["screen_whole_rows"]))
        if (step + 1) % (args.steps // N_POINTS) == 0:
            mse, explained = errors(trainer.sae, held_out)
            points.append(
                {
                    "step": step + 1,
                    "mse": mse,
                    "explained": explained,
                    "dead": int(trainer.dead_neurons.sum()),
                }
            )
            say(f"{arm.name}: {points[-1]}")
    values = (v for state in trainer.optimizer.state.values() for v in state.values())
    return trainer, {
        "ms": 1e3 * clock.seconds / max(1, args.steps - WARM_UP_STEPS),
        "peak_gib": peak_gib(args.device, before),
        "state_mib": sum(map(bytes_of, values)) / 2**20,
        "points": points,
        "recalls": recalls,
        "train_mse": torch.stack(losses).cpu().unflatten(0, (-1, args.window)).mean(1).tolist()
        if args.steps % args.window == 0 else [],
    }  # fmt: skip


def bytes_of(value: Any) -> int:
    """Of a tensor, or of the tensors that torchao makes one of."""
    if hasattr(value, "codes"):
        return value.codes.nbytes + value.scale.nbytes
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.trade_offs", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", type=Path, default=CHECKOUT / ".cache" / "smollm2-135m")
    parser.add_argument("--architecture", default="topk", choices=("topk", "batchtopk", "jumprelu"))
    parser.add_argument("--sae", type=json.loads, default={}, help="more fields of the SAE, JSON")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="of the pool")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens not trained on")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d-sae", type=int, default=32_768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--dead-feature-window", type=int, default=300)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--nudged", type=int, default=2, help="arms that are nudged")
    parser.add_argument("--window", type=int, default=50, help="steps of a point of train_mse")
    parser.add_argument("--pool", type=Path, help="a file that keeps the activations")
    parser.add_argument("--arms", help="names, separated by commas; float32 is always there")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.steps < N_POINTS:
        parser.error(f"--steps must be at least {N_POINTS}; got {args.steps}")
    return args


def main() -> None:
    args = parse()
    torch.manual_seed(0)
    if args.pool is not None and args.pool.exists():
        real = RealActivations(**torch.load(args.pool))
    else:
        real = make_activations(args.model, args.tokens, args.device)
        if args.pool is not None:
            torch.save(vars(real), args.pool)
    pool = real.rows.to(args.device)
    reference: Final | None = None
    results: dict[str, Any] = {
        # Without paths of the machine, and with what all arms share.
        "settings": {
            name: value.name if isinstance(value, Path) else str(value)
            for name, value in vars(args).items()
            if name not in ("pool", "arms", "out")
        },
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "arms": {},
    }
    for arm in arms(args.nudged, args.device):
        if args.arms is not None and arm.name not in ("float32", *args.arms.split(",")):
            continue
        trainer, found = train(arm, args, pool)
        final = final_of(trainer, pool[: args.held_out])
        reference = final if reference is None else reference
        found["mse"], found["explained"] = final.errors
        found["l0"] = final.fired.sum().item() / args.held_out
        found["loss_recovered"] = loss_recovered(args.model, real, trainer.sae)
        found["by_frequency"] = by_group(final, reference, args.held_out)
        results["arms"][arm.name] = found
        del trainer
        release_memory(args.device)
        if args.out is not None:
            args.out.write_text(json.dumps(results))
    for name, found in results["arms"].items():
        last, groups = found["points"][-1], found["by_frequency"]
        say(
            f"{name:18} MSE {found['mse']:.4f}  explained {found['explained']:.4f}  "
            f"loss recovered {found['loss_recovered']:.4f}  L0 {found['l0']:.1f}  dead "
            f"{last['dead']}  {found['ms']:.2f} ms  state {found['state_mib']:.0f} MiB  "
            f"peak {found['peak_gib']}"
        )
        for step, recall, whole_rows in found["recalls"]:
            say(f"    recall at step {step}: {recall:.5f}, whole rows {whole_rows:.5f}")
        for quantity, values in groups.items():
            say(f"    {quantity:13} " + " ".join(f"{value:9.3g}" for value in values))


if __name__ == "__main__":
    main()
