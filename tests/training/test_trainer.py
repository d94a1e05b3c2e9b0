"""The package's own trainer and runners: SAELens's training, taken in fewer passes."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.config import LoggingConfig
from sae_lens.saes.sae import TrainStepInput

from saelens_sparse.codes.step import StepContext
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.support.architectures import ON_CPU, SPARSE, Subject, subjects
from tests.support.drift import nudges
from tests.support.saes import make_stock, sparse_like, stock_like, superposed_rows
from tests.support.trainers import N_ROWS, own_trainer, state_of, stock_trainer, train

architectures = subjects(SPARSE)


class TestTrainer:
    @architectures
    @pytest.mark.parametrize("strength", [1.0, 1e-3], ids=["clipped", "not clipped"])
    def test_200_steps_end_where_stock_s_do(self, subject: Subject, strength: float) -> None:
        stock = subject.stock(**subject.traits.reconstruction_alone if strength < 1 else {})
        sparse = subject.sparse(stock)
        with torch.no_grad():
            for sae, (name, parameter) in itertools.product(
                (stock, sparse), stock.named_parameters()
            ):
                if parameter.ndim == 1:
                    getattr(sae, name).mul_(strength)
        batches = [strength * superposed_rows(stock, N_ROWS) for _ in range(200)]
        # Stock in float64. How far float32 strays from it is the tolerance: that of stock, and of
        # stock on nudged batches, for rounding may decide a gate otherwise.
        reference = stock_trainer(stock_like(stock))
        controls = [stock_trainer(copy.deepcopy(stock)) for _ in range(3)]
        trainers = [reference, own_trainer(sparse), *controls]
        norms: list[float] = []
        reference.optimizer.register_step_pre_hook(
            lambda optimizer, *_: norms.append(gradient_norm(optimizer))
        )
        inputs = [batches, batches, batches, *nudges(batches, n_pairs=1)]
        losses = [train(*run) for run in zip(trainers, inputs, strict=True)]
        clipped = [norm > 0.99 for norm in norms]
        assert all(clipped) if strength == 1.0 else not any(clipped)

        expected, actual, *yardsticks = (state_of(trainer) for trainer in trainers)
        for name, value in expected.items():
            stray = max((yardstick[name] - value).norm() for yardstick in yardsticks)
            floor = 1e-5 * value.norm()
            assert (actual[name] - value).norm() <= 3 * stray + floor, name
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    @architectures
    def test_takes_over_in_the_middle(self, subject: Subject, tmp_path: Path) -> None:
        """Ours, then stock's trainer, then ours: the state passes on whole."""
        sparse = subject.sparse(subject.stock())
        batches = [superposed_rows(sparse, N_ROWS) for _ in range(9)]
        start = {name: value.clone() for name, value in sparse.state_dict().items()}
        expected = stock_trainer(sparse)
        train(expected, batches)
        expected = state_of(expected)

        sparse.load_state_dict(start)
        trainer = stock_trainer(sparse)
        for index, ours in enumerate((True, False, True)):
            trainer = stock_trainer(sparse)
            if index:
                trainer.load_trainer_state(tmp_path)
            if ours:
                trainer = SparseSAETrainer.taking_over(trainer)
            assert trainer.n_training_steps == 3 * index
            train(trainer, batches[3 * index : 3 * index + 3])
            trainer.save_trainer_state(tmp_path)
        for name, value in state_of(trainer).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    @architectures
    def test_resumes_bit_for_bit(self, subject: Subject, tmp_path: Path) -> None:
        sparse = subject.sparse(subject.stock())
        batches = [superposed_rows(sparse, N_ROWS) for _ in range(6)]
        start = {name: value.clone() for name, value in sparse.state_dict().items()}
        whole = own_trainer(sparse)
        train(whole, batches)
        expected = state_of(whole)

        sparse.load_state_dict(start)
        first = own_trainer(sparse)
        train(first, batches[:3])
        first.save_trainer_state(tmp_path)
        resumed = stock_trainer(sparse)
        resumed.load_trainer_state(tmp_path)
        taken_over, resumed = resumed, SparseSAETrainer.taking_over(resumed)
        assert taken_over.optimizer is resumed.optimizer  # moments are held once
        assert resumed.lr_scheduler.get_last_lr() == first.lr_scheduler.get_last_lr()
        train(resumed, batches[3:])
        for name, value in state_of(resumed).items():
            assert torch.equal(value, expected[name]), name

    @architectures
    def test_what_it_saves_is_what_stock_saves(self, subject: Subject, tmp_path: Path) -> None:
        stock = subject.stock()
        sparse = subject.sparse(stock)
        states = []
        for name, trainer in (("stock", stock_trainer(stock)), ("own", own_trainer(sparse))):
            train(trainer, [superposed_rows(stock, N_ROWS)])
            trainer.save_trainer_state(tmp_path / name)
            states.append(torch.load(tmp_path / name / "trainer_state.pt"))
        assert states[0].keys() == states[1].keys()
        for part in ("param_groups", "state"):
            expected, actual = (state["optimizer"][part] for state in states)
            if part == "param_groups":
                assert actual == expected
                continue
            for index, moments in expected.items():
                assert moments.keys() == actual[index].keys()
                for name, value in moments.items():
                    assert value.shape == actual[index][name].shape
                    assert value.dtype == actual[index][name].dtype

    def test_nothing_of_what_it_takes_over_is_lost(self) -> None:
        """Whatever SAELens's trainer has, now or in a later release, both have."""
        sparse = sparse_like(make_stock())
        trainer: Any = stock_trainer(sparse)
        trainer.of_a_later_release = object()
        names = {name for name in vars(trainer) if name not in ("optimizer", "lr_scheduler")}
        before = {name: getattr(trainer, name) for name in names}
        own: Any = SparseSAETrainer.taking_over(trainer)
        assert {name: getattr(own, name) for name in names} == before
        train(own, [superposed_rows(sparse, N_ROWS)] * 3)
        own._reset_running_sparsity_stats()
        train(own, [superposed_rows(sparse, N_ROWS)])
        assert torch.equal(trainer.log_feature_sparsity, own.log_feature_sparsity)
        assert trainer.n_training_steps == 4
        assert SparseSAETrainer.taking_over(own) is own

    def test_a_step_that_fails_is_not_counted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sparse = sparse_like(make_stock())
        trainer = own_trainer(sparse)
        train(trainer, [superposed_rows(sparse, N_ROWS)])
        before = state_of(trainer)

        def failing(*_: Any, **__: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(type(sparse), "mse_loss_fn", failing, raising=False)
        monkeypatch.delattr(sparse, "mse_loss_fn")
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.step(superposed_rows(sparse, N_ROWS))
        for name, value in state_of(trainer).items():
            assert torch.equal(value, before[name]), name

    @subjects(ON_CPU)
    def test_says_in_which_steps_saelens_logs(self, subject: Subject) -> None:
        sparse = subject.sparse(subject.stock())
        batches = [superposed_rows(sparse, N_ROWS) for _ in range(7)]
        said: list[list[bool]] = []
        for make, log_to_wandb in itertools.product((stock_trainer, own_trainer), (True, False)):
            trained, steps = copy.deepcopy(sparse), []
            original = trained.training_forward_pass

            def recorded(step_input: TrainStepInput, original=original, steps=steps) -> Any:
                steps.append(step_input.is_logging_step)
                return original(step_input)

            trained.training_forward_pass = recorded
            logger = LoggingConfig(log_to_wandb=log_to_wandb, wandb_log_frequency=3)
            train(make(trained, logger=logger), batches)
            said.append(steps)
        assert said[0] == [False, False, True, False, False, True, False]
        assert said[2:] == said[:2]

    def test_other_architectures_train_as_in_stock(self) -> None:
        batches = [torch.randn(N_ROWS, 12) for _ in range(5)]
        states = []
        for make in (stock_trainer, own_trainer):
            torch.manual_seed(1)
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=12, d_sae=48))
            trainer = make(sae)
            train(trainer, batches)
            states.append(state_of(trainer))
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name

    @subjects(ON_CPU)
    def test_an_incomplete_code_is_never_trained_on(self, subject: Subject) -> None:
        """The step is taken again, and counts once."""
        sparse = subject.sparse(subject.stock())
        batch = superposed_rows(sparse, N_ROWS)
        start = {name: value.clone() for name, value in sparse.state_dict().items()}
        expected = own_trainer(sparse)
        train(expected, [batch])
        expected = state_of(expected)

        sparse.load_state_dict(start)
        original, asked_at_once = sparse.propose, list[bool]()

        class Missing:
            def passed(self) -> bool:
                return False

            def renewed(self) -> Any:
                return self

        def incomplete(step_input: TrainStepInput, step: StepContext) -> Any:
            asked_at_once.append(step.asks_at_once)
            output = original(step_input, step)
            if not step.asks_at_once:
                output.loss = output.loss * 1e6
                step.checks.append(Missing())
            return output

        sparse.propose = incomplete
        trainer = own_trainer(sparse)
        train(trainer, [batch])
        assert asked_at_once == [False, True]
        for name, value in state_of(trainer).items():
            assert torch.equal(value, expected[name]), name


def gradient_norm(optimizer: torch.optim.Optimizer) -> float:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()
