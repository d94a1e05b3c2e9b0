"""Steps of several SAEs as CUDA graphs, which share their memory."""

from itertools import cycle, islice
from typing import Any

import pytest
import torch
import wandb
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from saelens_sparse.training.graphs import STEPS_BEFORE
from saelens_sparse.training.interruption import StopSignals
from saelens_sparse.training.multi_trainer import SparseMultiSAETrainer
from tests.conftest import TARGETS
from tests.support.architectures import Subject
from tests.support.saes import sparse_like, superposed_rows
from tests.support.trainers import own_trainer, state_of, train

pytestmark = [pytest.mark.gpu, pytest.mark.default_algorithms]
N_ROWS, N_STEPS = 64, STEPS_BEFORE + 12
ARCHITECTURES = ["topk_sparse", "batchtopk_sparse", "topk_sparse"]


def make_saes(d_sae: int = 2048, architectures: list[str] = ARCHITECTURES) -> dict[str, Any]:
    saes: dict[str, Any] = {}
    for index, architecture in enumerate(architectures):
        torch.manual_seed(index)
        stock = Subject(architecture, TARGETS["triton-cuda"]).stock(d_sae=d_sae)
        saes[f"{index}"] = sparse_like(stock, "triton")
    return saes


def make_batches(sae: Any, n: int = N_STEPS) -> list[torch.Tensor]:
    torch.manual_seed(100)
    return [superposed_rows(sae, N_ROWS) for _ in range(n)]


def multi_trainer(
    saes: dict[str, Any], batches: list[torch.Tensor], **options: Any
) -> SparseMultiSAETrainer:
    settings: dict[str, Any] = {
        "total_training_samples": N_STEPS * N_ROWS,
        "train_batch_size_samples": N_ROWS,
        "device": "cuda",
        "lr": 1e-3,
        "lr_end": 1e-5,
        "lr_warm_up_steps": 2,
        "lr_decay_steps": 4,
        "dead_feature_window": 10_000,
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    hooks = dict.fromkeys(saes, "hook")
    source = cycle([{"hook": batch} for batch in batches])
    trainer = MultiSAETrainer(SAETrainerConfig(**settings), saes, hooks, source)
    return SparseMultiSAETrainer.taking_over(trainer, StopSignals())


def take_step(trainer: SparseMultiSAETrainer, batch: torch.Tensor) -> dict[str, Any]:
    """As SAELens's `fit`."""
    outputs = {name: one.step(batch) for name, one in trainer.trainers.items()}
    for one in (trainer, *trainer.trainers.values()):
        one.n_training_steps += 1
    return outputs


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_each_is_trained_as_alone_bit_for_bit(autocast: bool) -> None:
    saes = make_saes()
    batches = make_batches(saes["0"])
    schedule = {"lr_warm_up_steps": 2, "lr_decay_steps": 4, "dead_feature_window": 10_000}
    alone: dict[str, dict[str, torch.Tensor]] = {}
    for name, sae in make_saes().items():
        single = own_trainer(
            sae, autocast=autocast, total_training_samples=N_STEPS * N_ROWS,
            train_batch_size_samples=N_ROWS, **schedule,
        )  # fmt: skip
        train(single, batches)
        assert single._graphs.current is not None
        alone[name] = state_of(single)
    several = multi_trainer(saes, batches, autocast=autocast)
    several.fit()
    for name, trainer in several.trainers.items():
        assert trainer._graphs.current is not None
        found = state_of(trainer)
        for part, value in alone[name].items():
            assert torch.equal(found[part], value), (name, part)


def test_graphs_share_their_stream_and_their_pool() -> None:
    saes = make_saes()
    trainer = multi_trainer(saes, make_batches(saes["0"]))
    trainer.fit()
    graphs: list[Any] = []
    for one in trainer.trainers.values():
        current = one._graphs.current
        assert current is not None
        graphs += [
            current._forward,
            current._backward,
            *(r[0] for r in current.followups._recorded.values() if r),
        ]
    assert len(graphs) == 4 * len(saes)
    assert len({graph.pool() for graph in graphs}) == 1


def test_more_saes_take_little_more_memory_for_graphs() -> None:
    """What is reserved beyond what is allocated is what runs in between need."""
    beyond: dict[int, int] = {}
    for n in (1, 6):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        saes = make_saes(8192, ["topk_sparse"] * n)
        trainer = multi_trainer(saes, make_batches(saes["0"]))
        trainer.fit()
        torch.cuda.empty_cache()
        beyond[n] = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - before
        del trainer, saes
    assert beyond[6] <= 2 * beyond[1] + 2**21 * 6  # the allocator's blocks are of 2 MiB


def test_a_graph_given_up_is_recorded_again_beside_the_others() -> None:
    saes = make_saes()
    batches = make_batches(saes["0"], 3 * N_STEPS)
    trainer = multi_trainer(saes, batches)
    expected = multi_trainer(make_saes(), batches)
    for one in expected.trainers.values():
        one.sae.cfg.cuda_graph = False
    for number, batch in enumerate(batches):
        for several in (trainer, expected):
            if number == N_STEPS:  # takes another place in memory
                sae = several.trainers["1"].sae
                sae.W_dec.data = 1.5 * sae.W_dec.data
            take_step(several, batch)
    for name, one in trainer.trainers.items():
        assert one._graphs.current is not None
        for part, value in state_of(expected.trainers[name]).items():
            assert torch.equal(state_of(one)[part], value), (name, part)


def test_a_step_of_all_never_waits_for_the_device() -> None:
    saes = make_saes()
    batches = make_batches(saes["0"])
    trainer = multi_trainer(saes, batches)
    for batch in batches:
        take_step(trainer, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in islice(batches, 6):
            trainer._maybe_log_sparsity()
            take_step(trainer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_log_of_all_waits_once_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "log", lambda record, **_: records.append(record))
    saes = make_saes()
    batches = make_batches(saes["0"])
    logger = LoggingConfig(wandb_log_frequency=1, eval_every_n_wandb_logs=10**6)
    trainer = multi_trainer(saes, batches, logger=logger)
    outputs = take_step(trainer, batches[0])
    waits = 0
    to_list = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal waits
        waits += 1
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", to_list)
            torch.cuda.set_sync_debug_mode("default")
            found = tensor.tolist()
            torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer._log_train_step(outputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits <= 3
    assert records[-1]["0/losses/mse_loss"] == outputs["0"].losses["mse_loss"].item()
