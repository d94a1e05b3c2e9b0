"""Whole runs on a GPU: clocks that do not wait, and how busy the device is."""

import time
from pathlib import Path

import pytest
import torch

from saelens_sparse.config.files import load_config
from saelens_sparse.whole_run.clock import PartClock
from saelens_sparse.whole_run.profiled import profile_run
from saelens_sparse.whole_run.windows import MODEL, STEP, STORE
from tests.support.compare import make_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_parts_are_those_of_the_device_and_nothing_waits() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    (x @ x).sum().item()
    clock = PartClock("cuda", "rest")
    clock.start()
    begin = time.perf_counter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with clock.part("short"):
            y = x @ x
        with clock.part("long"):
            for _ in range(9):
                y = x @ y
    finally:
        torch.cuda.set_sync_debug_mode("default")
    queued = time.perf_counter() - begin
    parts = clock.stop()
    assert 1e3 * queued < sum(parts.values())
    assert 5 < parts["long"] / parts["short"] < 15


def test_a_run_is_taken_apart(tmp_path: Path) -> None:
    config = make_config(tmp_path, device="cuda", logger={"log_to_wandb": False})
    run = profile_run(load_config(config), 2)
    record = run.record
    assert record.busy_share is not None
    assert 0 < record.busy_share < 1
    assert min(record.parts_ms[part] for part in (MODEL, STORE, STEP)) > 0
    assert record.steps >= 80 and record.whole_fillings
    assert record.ms_min <= record.ms <= record.ms_max
    changes = [trial.change for trial in run.trials]
    assert changes == ["autocast_lm=true", "store_batch_size_prompts=32", "autocast=true"]
