"""What the progress bar says of a training's pace."""

import itertools
import re

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.training import SparseMultiSAETrainer, SparseSAETrainer, progress
from saelens_sparse.training.interruption import StopSignals
from saelens_sparse.training.progress import RecentPace, shortened
from tests.support.runs import sae_config


class Bar:
    """What a bar of tqdm was told, last."""

    postfix = ""
    told = 0

    def set_postfix_str(self, text: str) -> None:
        self.postfix, self.told = text, self.told + 1


def test_the_pace_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, pace, now = Bar(), RecentPace(), [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    pace.show(bar, 4096)
    assert bar.told == 0  # one moment has no pace
    for step in range(2, 30):
        now[0] += 0.5
        pace.show(bar, 4096 * step)
    assert bar.postfix == "tokens/s=8.2k"
    assert bar.told <= 15
    now[0] += 9.5  # an eval
    pace.show(bar, 4096 * 30)
    assert bar.postfix == "tokens/s=819"
    for step in range(31, 60):
        now[0] += 0.5
        pace.show(bar, 4096 * step)
    assert bar.postfix == "tokens/s=8.2k"


def test_a_step_that_takes_longer_has_its_own_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    bar, pace, now = Bar(), RecentPace(), [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    for step in range(1, 4):
        now[0] += 20
        pace.show(bar, 1000 * step)
    assert bar.postfix == "tokens/s=50"


def test_numbers_are_short() -> None:
    numbers = (0.4, 12, 999.4, 999.6, 41_234, 412_345, 1e6, 2.5e9)
    assert [shortened(n) for n in numbers] == [
        "0", "12", "999", "1.0k", "41.2k", "412k", "1.0M", "2.5G",
    ]  # fmt: skip


@pytest.mark.parametrize("several", [False, True], ids=["one SAE", "several"])
def test_trainers_show_it(
    several: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "UPDATE_SECONDS", 0.0)
    sae = TrainingSAE.from_dict(sae_config().to_dict())
    cfg = SAETrainerConfig(
        total_training_samples=5 * 32,
        train_batch_size_samples=32,
        device="cpu",
        lr=1e-3,
        lr_end=1e-4,
        logger=LoggingConfig(log_to_wandb=False),
    )
    batch = torch.randn(32, sae.cfg.d_in)
    if several:
        stock = MultiSAETrainer(cfg, {"a": sae}, {"a": "hook"}, itertools.repeat({"hook": batch}))
        SparseMultiSAETrainer.taking_over(stock, StopSignals()).fit()
    else:
        SparseSAETrainer.taking_over(SAETrainer(cfg, sae, itertools.repeat(batch))).fit()
    assert re.search(r"tokens/s=\d", capsys.readouterr().err)
