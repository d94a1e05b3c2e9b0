"""What a subclass overrides, or somebody patches, is called by the package's own trainer too."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    TrainingSAE,
)

from saelens_sparse import SparseMultiSAETrainingRunner, SparseTrainingRunner
from saelens_sparse.architectures import ARCHITECTURES
from saelens_sparse.codes.step import StepContext
from tests.support.architectures import Subject, architectures
from tests.support.runs import BATCH, config_of, multi_config, runner_config, what_libraries_say
from tests.support.saes import assert_same_training, make_stock, sparse_like, superposed_rows
from tests.support.trainers import own_trainer, state_of, stock_trainer, train

pytestmark = what_libraries_say
N_STEPS = 4
Sae = TrainingSAE[Any]


def another_loss(output: Any) -> Any:
    output.loss = output.loss + 3 * output.sae_out.square().mean()
    return output


def other_losses(losses: Any) -> Any:
    return {name: 1.5 * loss for name, loss in losses.items()}


def twice_the_acts(result: Any) -> Any:
    acts, hidden_pre = result
    return 2 * acts, hidden_pre


CHANGES: dict[str, Callable[[Any], Any]] = {
    "training_forward_pass": another_loss,
    "calculate_aux_loss": other_losses,
    "encode_with_hidden_pre": twice_the_acts,
    "decode": lambda reconstruction: 0.9 * reconstruction,
    "mse_loss_fn": lambda loss: 2 * loss,
}
WAYS = [
    (name, way)
    for name in CHANGES
    for way in ("subclass", "instance", "class")
    if name != "mse_loss_fn" or way == "instance"  # where it is an attribute
]


def change(sae: Sae, name: str, way: str, patch: pytest.MonkeyPatch) -> list[int]:
    """Change what a method returns; the list gets longer with each call."""
    calls: list[int] = []
    original = getattr(sae if way == "instance" else type(sae), name)

    def changed(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return CHANGES[name](original(*args, **options))

    if way == "subclass":
        sae.__class__ = type("Changed", (type(sae),), {name: changed})
    elif way == "class":
        patch.setattr(type(sae), name, changed)
    else:
        setattr(sae, name, changed)
    return calls


def calls_a_step(sae: Sae, name: str) -> int:
    """How often a step calls a method of an SAE: the error, once for each level of a Matryoshka."""
    levels = getattr(sae.cfg, "matryoshka_widths", [])
    return max(1, len(levels)) if name == "mse_loss_fn" else 1


@pytest.mark.parametrize(("name", "way"), WAYS)
@architectures
def test_is_called_in_each_step_and_trained(
    subject: Subject, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = subject.sparse(subject.stock())
    batches = [superposed_rows(sae, 32) for _ in range(N_STEPS)]
    options = {"dead_feature_window": 1}  # for Top-K's auxiliary loss
    unchanged = own_trainer(copy.deepcopy(sae), **options)
    train(unchanged, batches)
    states: list[dict[str, torch.Tensor]] = []
    for make in (stock_trainer, own_trainer):
        with monkeypatch.context() as patch:
            trained = copy.deepcopy(sae)
            calls = change(trained, name, way, patch)
            trainer = make(trained, **options)
            train(trainer, batches)
            assert len(calls) == N_STEPS * calls_a_step(sae, name)
            states.append(state_of(trainer))
    for part, value in states[0].items():
        torch.testing.assert_close(states[1][part], value, rtol=1e-4, atol=1e-6, msg=part)
    assert not torch.equal(state_of(unchanged)["W_dec exp_avg"], states[1]["W_dec exp_avg"])


class Missing:
    def passed(self) -> bool:
        return False

    def renewed(self) -> Any:
        return self


@architectures
def test_is_never_given_an_incomplete_code(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = subject.sparse(subject.stock())
    batch = superposed_rows(sae, 32)
    propose = type(sae).propose

    def incomplete(self: Sae, step_input: Any, step: StepContext) -> Any:
        output = propose(self, step_input, step)
        if not step.asks_at_once:
            output.loss = output.loss * 1e6
            step.checks.append(Missing())
        return output

    states: list[dict[str, torch.Tensor]] = []
    for finds_all in (True, False):
        with monkeypatch.context() as patch:
            if not finds_all:
                patch.setattr(type(sae), "propose", incomplete)
            trained = copy.deepcopy(sae)
            calls = change(trained, "training_forward_pass", "subclass", patch)
            trainer = own_trainer(trained)
            train(trainer, [batch])
            assert len(calls) == 1
            states.append(state_of(trainer))
    for part, value in states[0].items():
        assert torch.equal(states[1][part], value), part


def test_sparse_tensors_of_an_override_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of SAELens's own Top-K."""
    sae = sparse_like(make_stock())
    batch = superposed_rows(sae, 32)

    def to_sparse(output: Any) -> Any:
        output.feature_acts = output.feature_acts.detach().clone().to_sparse()
        return output

    monkeypatch.setitem(CHANGES, "training_forward_pass", to_sparse)
    scores = []
    for make in (stock_trainer, own_trainer):
        trained = copy.deepcopy(sae)
        change(trained, "training_forward_pass", "instance", monkeypatch)
        trainer = make(trained)
        train(trainer, [batch])
        scores.append((trainer.act_freq_scores, trainer.n_forward_passes_since_fired))
    for expected, actual in zip(*scores, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("compile_sae", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("way", ["subclass", "instance"])
@pytest.mark.parametrize("name", ["training_forward_pass", "calculate_aux_loss"])
@pytest.mark.pairwise
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_trained_by_the_runner(
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    name: str,
    way: str,
    compile_sae: bool,
) -> None:
    saes = []
    for runner_class in (LanguageModelSAETrainingRunner, SparseTrainingRunner):
        torch.manual_seed(0)
        sae = TrainingSAE.from_dict(config_of(architecture).to_dict())
        calls = change(sae, name, way, monkeypatch)
        cfg = runner_config(
            sae.cfg, tmp_path, training_tokens=N_STEPS * BATCH, compile_sae=compile_sae
        )
        runner = runner_class(cfg, override_model=model, override_dataset=dataset, override_sae=sae)
        saes.append(runner.run())
        assert len(calls) == N_STEPS * calls_a_step(sae, name)
    assert_same_training(saes[1], saes[0])


@pytest.mark.parametrize("name", CHANGES)
def test_is_trained_by_the_runner_of_several(
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    trained = []
    for runner_class in (MultiSAETrainingRunner, SparseMultiSAETrainingRunner):
        torch.manual_seed(0)
        configs = {name: config_of(name) for name in ARCHITECTURES}
        saes = {name: TrainingSAE.from_dict(cfg.to_dict()) for name, cfg in configs.items()}
        calls = [change(sae, name, "instance", monkeypatch) for sae in saes.values()]
        runner = runner_class(
            multi_config(configs, tmp_path, training_tokens=N_STEPS * BATCH),
            override_model=model, override_dataset=dataset, override_saes=saes,
        )  # fmt: skip
        trained.append(runner.run())
        expected = [N_STEPS * calls_a_step(sae, name) for sae in saes.values()]
        assert [len(part) for part in calls] == expected
    for architecture, sae in trained[0].items():
        assert_same_training(trained[1][architecture], sae)
