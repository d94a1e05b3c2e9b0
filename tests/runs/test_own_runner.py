"""How `SparseTrainingRunner` gets along with threads, handlers, prefetching and subclasses."""

import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse import SparseTrainingRunner
from tests.support.runs import (
    BATCH,
    N_TOKENS,
    checkpoints,
    names_in,
    runner_config,
    sae_config,
    what_libraries_say,
)
from tests.support.saes import assert_same_training

pytestmark = what_libraries_say
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Generator[list[Any]]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def make(model: HookedSAETransformer, dataset: Dataset, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    cfg = runner_config(sae_config(), folder, **options)
    return SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)


def test_it_trains_in_a_thread(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    """Where Python takes no handlers."""
    expected = make(model, dataset, tmp_path).run()
    trained: list[Any] = []
    thread = threading.Thread(
        target=lambda: trained.append(make(model, dataset, tmp_path, n_checkpoints=1).run())
    )
    thread.start()
    thread.join()
    assert_same_training(trained[0], expected, tolerance=0)


def test_handlers_are_those_of_before(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, handlers: list[Any]
) -> None:
    runner = make(model, dataset, tmp_path)
    runner.run()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def stop_at_batch(patch: pytest.MonkeyPatch, last: int) -> None:
    original, n_batches = ActivationsStore.__next__, 0

    def stopping(self: ActivationsStore) -> torch.Tensor:
        nonlocal n_batches
        n_batches += 1
        if n_batches == last:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    patch.setattr(ActivationsStore, "__next__", stopping)


def test_a_prefetching_run_is_stopped(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at_batch(monkeypatch, 9)
    runner = make(model, dataset, tmp_path, prefetch_llm_batches=2)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    (checkpoint,) = checkpoints(runner.cfg)
    assert int(checkpoint.name) % BATCH == 0
    resumed = make(model, dataset, tmp_path, resume_from_checkpoint=str(checkpoint))
    resumed.run()
    assert resumed.trainer.n_training_samples == N_TOKENS


def test_a_subclass_may_make_do_with_what_is_trained(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Runner(SparseTrainingRunner):
        def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
            try:
                return super().run_trainer_with_interruption_handling(trainer)
            except KeyboardInterrupt:
                return self.sae

    stop_at_batch(monkeypatch, 9)
    cfg = runner_config(sae_config(), tmp_path)
    Runner(cfg, override_model=model, override_dataset=dataset).run()
    assert "sae_weights.safetensors" in names_in(tmp_path / "output")


def test_a_keyboard_interrupt_of_another_origin_leaves_a_checkpoint_too(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make(model, dataset, tmp_path)
    original, n_batches = ActivationsStore.__next__, 0

    def interrupting(self: ActivationsStore) -> torch.Tensor:
        nonlocal n_batches
        n_batches += 1
        if n_batches == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(ActivationsStore, "__next__", interrupting)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert [checkpoint.name for checkpoint in checkpoints(runner.cfg)] == [str(3 * BATCH)]


def test_a_checkpoint_of_the_same_name_is_written_again(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    """As `checkpoints/latest`, which a callback asks for now and then."""
    runner = make(model, dataset, tmp_path)
    counts: list[int] = []
    runner.run()
    latest = tmp_path / "checkpoints" / "latest"
    for extra in (0, 64):
        runner.trainer.n_training_samples += extra
        runner.save_checkpoint(latest)
        counts.append(torch.load(latest / "trainer_state.pt")["n_training_samples"])
    assert counts == [N_TOKENS, N_TOKENS + 64]
