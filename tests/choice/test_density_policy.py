"""`auto` of a JumpReLU SAE: what it measures, when it decides, what a checkpoint keeps of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.architectures.jumprelu import MAX_MEASURED_DENSITY, SparseJumpReLUTrainingSAE
from saelens_sparse.choice.policy import PairTotals
from saelens_sparse.codes.step import StepContext
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.support.jumprelu import make_jumprelu, sparse_jumprelu
from tests.support.saes import forward_pass
from tests.support.trainers import make_trainer, structured_batches

N_STEPS, D_IN, D_SAE = 60, 16, 128
TRAINERS = {"SAELens's": SAETrainer, "own": SparseSAETrainer}


@pytest.fixture(autouse=True)
def switch_within_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in MAX_MEASURED_DENSITY:
        monkeypatch.setitem(MAX_MEASURED_DENSITY, key, 0.2)


def sae_that_thins_out() -> SparseJumpReLUTrainingSAE:
    torch.manual_seed(3)
    stock = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=D_IN, d_sae=D_SAE, l0_coefficient=0.3, l0_warm_up_steps=10, jumprelu_bandwidth=0.3
        )
    )
    return sparse_jumprelu(stock, "auto")


def trainer_of(sae: SparseJumpReLUTrainingSAE, runner: str) -> SAETrainer[Any, Any]:
    trainer = make_trainer(sae, lr=2e-2)
    return SparseSAETrainer.taking_over(trainer) if runner == "own" else trainer


def take_steps(trainer: SAETrainer[Any, Any], batches: list[torch.Tensor]) -> list[str]:
    """Train; returns what each step ran on."""
    ran_on: list[str] = []
    for batch in batches:
        ran_on.append(trainer.sae.implementation.name)
        trainer.step(batch)
        trainer.n_training_steps += 1
    return ran_on


def parameters(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}


@pytest.mark.parametrize("runner", TRAINERS)
def test_a_resumed_run_goes_on_bit_for_bit(runner: str, tmp_path: Path) -> None:
    """Interrupted before, at and after the change from dense to sparse products."""
    torch.manual_seed(0)
    batches = structured_batches(N_STEPS, 64, D_IN)
    whole = trainer_of(sae_that_thins_out(), runner)
    ran_on: list[str] = []
    for step, batch in enumerate(batches):
        whole.save_checkpoint(str(step), base_path=tmp_path)
        ran_on += take_steps(whole, [batch])
    switch = ran_on.index("torch")
    assert 5 < switch < N_STEPS - 10, "the run does not change over"
    for interrupted in (switch - 2, switch, switch + 1, switch + 5):
        checkpoint = tmp_path / str(interrupted)
        resumed = trainer_of(sae_that_thins_out(), runner)
        resumed.load_trainer_state(checkpoint)
        resumed.sae.load_weights_from_checkpoint(checkpoint)
        assert take_steps(resumed, batches[interrupted:]) == ran_on[interrupted:], interrupted
        for name, value in parameters(whole.sae).items():
            assert torch.equal(getattr(resumed.sae, name), value), (interrupted, name)


def test_a_stock_checkpoint_starts_to_measure_anew(tmp_path: Path) -> None:
    stock = make_jumprelu()
    stock.save_model(tmp_path)
    sparse = sparse_jumprelu(stock, "auto")
    sparse.load_weights_from_checkpoint(tmp_path)
    assert sparse.implementation.name == "fused"
    assert "not known yet" in sparse.implementation.reason


def test_the_checkpoint_says_what_was_measured(tmp_path: Path) -> None:
    sparse = sparse_jumprelu(make_jumprelu(), "auto")
    make_trainer(sparse).step(torch.randn(8, sparse.cfg.d_in))
    sparse.save_model(tmp_path)
    state = json.loads((tmp_path / "saelens_sparse_state.json").read_text())
    assert 0 < state["density"]["share"] <= 1
    assert state["density"]["mean_l0"] <= sparse.cfg.d_sae


@pytest.mark.parametrize("limit_of_the_reader", [1e-6, 0.9])
def test_reading_changes_nothing(
    limit_of_the_reader: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads under autocast does so with another limit than that of the float32 steps."""
    for backend, full_precision in MAX_MEASURED_DENSITY:
        if not full_precision:
            monkeypatch.setitem(
                MAX_MEASURED_DENSITY, (backend, full_precision), limit_of_the_reader
            )
    torch.manual_seed(0)
    batches = structured_batches(N_STEPS, 64, D_IN)
    runs: list[tuple[list[str], dict[str, torch.Tensor]]] = []
    for reads in (0, 3):
        trainer = make_trainer(sae_that_thins_out(), lr=2e-2)
        ran_on: list[str] = []
        for batch in batches:
            for _ in range(reads):
                with torch.autocast("cpu", torch.bfloat16):
                    assert trainer.sae.implementation.reason
            ran_on += take_steps(trainer, [batch])
        runs.append((ran_on, parameters(trainer.sae)))
    assert "torch" in runs[0][0]
    assert runs[1][0] == runs[0][0]
    for name, value in runs[0][1].items():
        assert torch.equal(runs[1][1][name], value), name


def test_evaluations_in_between_do_not_disturb_the_training() -> None:
    sparse = sparse_jumprelu(make_jumprelu(), "auto")
    x = torch.randn(8, sparse.cfg.d_in)
    forward_pass(sparse, x)
    before = sparse.implementation
    with torch.no_grad():
        sparse.eval()
        sparse.encode(100 * x)
        sparse.train()
    assert sparse.implementation == before


@pytest.mark.parametrize("share_of_limit", [0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_float8_screen_which_lists_more_does_not_make_the_choice_flip(
    share_of_limit: float,
) -> None:
    sae = sparse_jumprelu(make_jumprelu(d_in=16, d_sae=208), "auto", screen_dtype="float8")
    ran_on: list[str] = []
    for n_steps in range(8):
        choice = sae.implementation
        ran_on.append(choice.name)
        density = share_of_limit * 0.2 * (1 if choice.name == "fused" else 1.5)
        n_pairs = torch.tensor([round(density * 1000 * 208), 0])
        totals = PairTotals(HostCopy(n_pairs), 1000, 208)
        sae.commit(StepContext(choice, False, n_training_steps=n_steps, pair_totals=totals))
    assert ran_on[0] == "fused"
    assert len(set(ran_on[1:])) == 1
