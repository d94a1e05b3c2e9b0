"""The package in a fresh process where Triton is missing, or turned off."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# As if it had never been installed.
HIDE_TRITON = """\
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: (
        None if name.partition(".")[0] == "triton" else find_spec(name, path, target)
    )
)
"""

# Installed, and its import fails.
BLOCK_TRITON = """\
import sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Block())
"""

TRAIN = """\
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import saelens_sparse

x = torch.randn(20, 8)
losses = {}
for name, config_class, sae_class in (
    ("stock", TopKTrainingSAEConfig, TopKTrainingSAE),
    ("sparse", saelens_sparse.SparseTopKTrainingSAEConfig, saelens_sparse.SparseTopKTrainingSAE),
):
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=8, d_sae=64, k=2))
    cfg = SAETrainerConfig(
        total_training_samples=60,
        train_batch_size_samples=20,
        lr_end=1e-4,
        dead_feature_window=1,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg, sae, iter([x] * 3))
    trained = trainer.fit()
    losses[name] = trained.W_dec.detach()
torch.testing.assert_close(losses["sparse"], losses["stock"])
assert sae.implementation.name == "torch", sae.implementation
assert not any("kernels" in name for name in sys.modules if name.startswith("saelens_sparse.ops"))

sae.cfg.implementation = "triton"
try:
    sae.encode(x)
except ValueError as error:
    print(error)
else:
    raise SystemExit("implementation='triton' did not raise")
"""


@pytest.mark.parametrize(
    ("script", "environment", "reason"),
    [
        (HIDE_TRITON + TRAIN, {}, "the package triton is not installed"),
        (BLOCK_TRITON + TRAIN, {}, "[^:]*"),
        (
            "import sys\n" + TRAIN,
            {"SAELENS_SPARSE_NO_TRITON": "1"},
            "Triton is turned off by SAELENS_SPARSE_NO_TRITON",
        ),
    ],
    ids=["missing", "blocked", "turned-off"],
)
def test_trains_without_triton(
    script: str, environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(script)
    # In Triton's interpreter, so that nothing but its absence keeps it from running on a CPU.
    process = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert re.fullmatch(
        f"implementation='triton' cannot run here: {reason}. "
        "Use 'auto' to let the plugin choose, or 'torch'.",
        process.stdout.strip(),
    )
