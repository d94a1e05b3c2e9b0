"""Whether two checkouts of this package train the same SAEs, bit for bit.

    python benchmarks/same_bits.py OTHER_CHECKOUT [--device cuda] [--steps 50]

Trains a matrix of architectures, options, runners and precisions with each checkout, in a process
of its own, and compares losses and final parameters. Exit status 1 if any of them differ.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
SIZES = {"cpu": (48, 1024, 128, 16), "cuda": (256, 8192, 1024, 32)}
"""d_in, d_sae, rows of a batch and k, by device."""

TOPK: list[dict[str, Any]] = [
    {"rescale_acts_by_decoder_norm": rescaled, "apply_b_dec_to_input": centred}
    for rescaled, centred in ((True, True), (False, True), (True, False))
]
JUMPRELU: list[dict[str, Any]] = [
    {"jumprelu_sparsity_loss_mode": "step", "pre_act_loss_coefficient": 3e-3},
    {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True},
    {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 20.0, "apply_b_dec_to_input": False},
]
MATRYOSHKA: list[dict[str, Any]] = [
    {"use_matryoshka_aux_loss": by_level, "levels": 3, **option}
    for by_level, option in ((True, TOPK[0]), (False, TOPK[2]))
]
OPTIONS = {
    "topk": TOPK,
    "batchtopk": TOPK,
    "matryoshka_batchtopk": MATRYOSHKA,
    "jumprelu": JUMPRELU,
}
PRECISIONS = {"float32": ("float32", False), "bfloat16": ("bfloat16", False),
              "autocast": ("float32", True)}  # fmt: skip
RUNNERS = ("SAELens's", "own")


def cases(device: str) -> Iterator[dict[str, Any]]:
    """The matrix: every option in every precision and runner, and each implementation once more."""
    for architecture, options in OPTIONS.items():
        for option, precision, runner in itertools.product(options, PRECISIONS, RUNNERS):
            yield {"architecture": architecture, "precision": precision, "runner": runner, **option}
        for implementation in ("dense", "torch", *(["triton"] if device == "cuda" else [])):
            yield {"architecture": architecture, "precision": "float32", "runner": "own",
                   "implementation": implementation, **options[0]}  # fmt: skip
    yield {"architecture": "topk", "precision": "float32", "runner": "own",
           "gradient_buffers": True, "cuda_graph": False, **TOPK[0]}  # fmt: skip


def train(case: dict[str, Any], device: str, steps: int) -> dict[str, Any]:
    """Losses of every step, in hexadecimal, and a hash of each parameter at the end."""
    import torch
    from sae_lens import TrainingSAE
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from saelens_sparse.training import SparseSAETrainer

    d_in, d_sae, n_rows, k = SIZES[device]
    options = dict(case)
    dtype, autocast = PRECISIONS[options.pop("precision")]
    runner, architecture = options.pop("runner"), options.pop("architecture")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"k": k}
    if architecture == "jumprelu":
        sizes = {"l0_coefficient": 0.1, "l0_warm_up_steps": 5}
    if n_levels := options.pop("levels", 0):
        sizes["matryoshka_widths"] = [d_sae >> 2 * level for level in reversed(range(n_levels))]
    sae: Any = TrainingSAE.from_dict(
        {"architecture": f"{architecture}_sparse", "d_in": d_in, "d_sae": d_sae, "dtype": dtype,
         "device": device, **sizes, **options}
    )  # fmt: skip
    cfg = SAETrainerConfig(
        total_training_samples=10**9, train_batch_size_samples=n_rows, device=device, lr=3e-3,
        lr_end=1e-4, autocast=autocast, dead_feature_window=10,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer: Any = SAETrainer(cfg, sae, iter(()))
    if runner == "own":
        trainer = SparseSAETrainer.taking_over(trainer)
    # Few directions are present on most rows, most of them on hardly any.
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4 * d_in, d_in, generator=generator) / d_in**0.5
    presence = (4.0 / torch.arange(1, 4 * d_in + 1)).clamp(max=0.9)
    losses: list[str] = []
    ran_on: list[str] = []
    for _ in range(steps):
        present = torch.rand(n_rows, 4 * d_in, generator=generator) < presence
        strengths = present * torch.randn(n_rows, 4 * d_in, generator=generator).exp()
        noise = 0.05 * torch.randn(n_rows, d_in, generator=generator)
        batch = (strengths @ directions + noise).to(device, getattr(torch, dtype))
        with trainer.autocast_if_enabled:
            ran_on.append(sae.implementation.name)
        losses.append(trainer.step(batch).loss.item().hex())
        trainer.n_training_steps += 1
    return {
        "losses": losses,
        "ran_on": ran_on,
        "parameters": {
            name: hashlib.sha256(
                parameter.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes()
            ).hexdigest()
            for name, parameter in sae.named_parameters()
        },
    }


def record(checkout: Path, device: str, steps: int, file: Path) -> None:
    """Train every case with the package of a checkout."""
    import torch

    import saelens_sparse

    if not Path(saelens_sparse.__file__).is_relative_to(checkout):
        raise RuntimeError(f"{checkout} is not what was imported: {saelens_sparse.__file__}")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for case in cases(device):
        name = ", ".join(f"{key}={value}" for key, value in case.items())
        try:
            results[name] = train(case, device, steps)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    file.write_text(json.dumps(results))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("other", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--device", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record is not None:
        record(options.other, options.device, options.steps, options.record)
        return 0
    if not (options.other / "saelens_sparse").is_dir():
        parser.error(f"other: {options.other} is no checkout of this package")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for checkout in (options.other.resolve(), HERE):
            file = Path(folder) / f"{len(found)}.json"
            path = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
            subprocess.run(
                [sys.executable, "-P", __file__, str(checkout), "--device", options.device,
                 "--steps", str(options.steps), "--record", str(file)],
                env={**os.environ, "PYTHONPATH": path}, check=True,
            )  # fmt: skip
            found.append(json.loads(file.read_text()))
    other, own = found
    n_different = 0
    for name, result in own.items():
        before = other.get(name)
        if result == before and "error" not in result:
            counts = collections.Counter(result["ran_on"])
            ran_on = ", ".join(f"{path} {count}" for path, count in counts.items())
            print(f"same       {name} (steps: {ran_on})")
            continue
        n_different += 1
        print(f"DIFFERENT  {name}: {_difference(before, result)}")
    print(f"{len(own) - n_different} of {len(own)} trainings of {options.steps} steps are the same")
    return int(n_different > 0)


def _difference(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    if before is None or "error" in before or "error" in after:
        return f"{(before or {}).get('error')} there, {after.get('error')} here"
    for step, (a, b) in enumerate(zip(before["losses"], after["losses"], strict=True)):
        if a != b:
            return f"the loss from step {step + 1} on, {float.fromhex(a)} and {float.fromhex(b)}"
    changed = [n for n, value in after["parameters"].items() if before["parameters"][n] != value]
    return f"in the end, {', '.join(changed)}"


if __name__ == "__main__":
    sys.exit(main())
