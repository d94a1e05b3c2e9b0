"""The package's own trainer and runners: SAELens's training, taken in fewer passes."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from torch.optim import Adam

from saelens_sparse.architectures.parameters import mark_parameter
from saelens_sparse.codes.step import StepContext
from saelens_sparse.ops.update.adam_kernels import AdamSettings, adam_update
from saelens_sparse.training.optimizer import ClippingAdam, prepare_optimizers
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.conftest import Target, target_parameters
from tests.support.jumprelu import make_jumprelu, sparse_jumprelu
from tests.support.saes import make_stock, sparse_like, stock_like, superposed_rows

N_ROWS = 32
Trainer = SAETrainer[Any, Any]


def make_trainer(sae: TrainingSAE[Any], **settings: Any) -> Trainer:
    settings = {
        "total_training_samples": 200 * N_ROWS,
        "train_batch_size_samples": N_ROWS,
        "device": str(sae.device),
        "lr": 1e-3,
        "lr_end": 1e-5,
        "lr_warm_up_steps": 20,
        "lr_decay_steps": 60,
        "dead_feature_window": 15,
        "logger": LoggingConfig(log_to_wandb=False),
        **settings,
    }
    return SAETrainer(SAETrainerConfig(**settings), sae, iter(()))


def own_trainer(sae: TrainingSAE[Any], **settings: Any) -> SparseSAETrainer:
    return SparseSAETrainer.taking_over(make_trainer(sae, **settings))


def train(trainer: Trainer, batches: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in batches:
        losses.append(trainer.step(batch.to(trainer.sae.dtype)).loss.item())
        trainer.n_training_steps += 1
    return losses


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All that a step changes."""
    state = {name: value.detach() for name, value in trainer.sae.named_parameters()}
    for parameter, moments in zip(
        state, trainer.optimizer.state_dict()["state"].values(), strict=True
    ):
        state = state | {f"{parameter} {name}": value for name, value in moments.items()}
    counts = ("act_freq_scores", "n_forward_passes_since_fired")
    state |= {name: getattr(trainer, name) for name in counts}
    state["samples"] = torch.tensor([trainer.n_training_samples, trainer.n_frac_active_samples])
    return {name: value.double().cpu() for name, value in state.items()}


def pair(architecture: str, target: Target, **options: Any) -> tuple[Any, Any]:
    """A stock SAE and a sparse one with its weights."""
    if architecture == "topk":
        stock = make_stock(device=target.device, **options)
        return stock, sparse_like(stock, target.backend)
    stock = make_jumprelu(device=target.device, **options)
    return stock, sparse_jumprelu(stock, target.backend)


architectures = pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
# Kernels of the step itself have their own tests.
everywhere = pytest.mark.parametrize("target", target_parameters(interpreted=False))


class TestTrainer:
    @everywhere
    @architectures
    @pytest.mark.parametrize("strength", [1.0, 1e-3], ids=["clipped", "not clipped"])
    def test_200_steps_end_where_stock_s_do(
        self, architecture: str, target: Target, strength: float
    ) -> None:
        options = {"l0_coefficient": strength**2} if architecture == "jumprelu" else {}
        stock, sparse = pair(architecture, target, **options)
        with torch.no_grad():
            for sae, (name, parameter) in itertools.product(
                (stock, sparse), stock.named_parameters()
            ):
                if parameter.ndim == 1:
                    getattr(sae, name).mul_(strength)
        batches = [strength * superposed_rows(stock, N_ROWS) for _ in range(200)]
        # Stock in float64; how far float32 strays from it is the tolerance.
        reference = make_trainer(stock_like(stock))
        trainers = [reference, make_trainer(stock), own_trainer(sparse)]
        norms: list[float] = []
        reference.optimizer.register_step_pre_hook(
            lambda optimizer, *_: norms.append(gradient_norm(optimizer))
        )
        losses = [train(trainer, batches) for trainer in trainers]
        clipped = [norm > 0.99 for norm in norms]
        assert all(clipped) if strength == 1.0 else not any(clipped)

        expected, yardstick, actual = (state_of(trainer) for trainer in trainers)
        for name, value in expected.items():
            stray = (yardstick[name] - value).norm()
            floor = 1e-5 * value.norm()
            assert (actual[name] - value).norm() <= 3 * stray + floor, name
        assert losses[2] == pytest.approx(losses[0], rel=1e-3)

    @everywhere
    @architectures
    def test_takes_over_in_the_middle(
        self, architecture: str, target: Target, tmp_path: Path
    ) -> None:
        """Ours, then stock's trainer, then ours: the state passes on whole."""
        _, sparse = pair(architecture, target)
        batches = [superposed_rows(sparse, N_ROWS) for _ in range(9)]
        start = {name: value.clone() for name, value in sparse.state_dict().items()}
        expected = make_trainer(sparse)
        train(expected, batches)
        expected = state_of(expected)

        sparse.load_state_dict(start)
        trainer = make_trainer(sparse)
        for index, ours in enumerate((True, False, True)):
            trainer = make_trainer(sparse)
            if index:
                trainer.load_trainer_state(tmp_path)
            if ours:
                trainer = SparseSAETrainer.taking_over(trainer)
            assert trainer.n_training_steps == 3 * index
            train(trainer, batches[3 * index : 3 * index + 3])
            trainer.save_trainer_state(tmp_path)
        for name, value in state_of(trainer).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)

    @everywhere
    @architectures
    def test_resumes_bit_for_bit(self, architecture: str, target: Target, tmp_path: Path) -> None:
        _, sparse = pair(architecture, target)
        batches = [superposed_rows(sparse, N_ROWS) for _ in range(6)]
        start = {name: value.clone() for name, value in sparse.state_dict().items()}
        whole = own_trainer(sparse)
        train(whole, batches)
        expected = state_of(whole)

        sparse.load_state_dict(start)
        first = own_trainer(sparse)
        train(first, batches[:3])
        first.save_trainer_state(tmp_path)
        resumed = make_trainer(sparse)
        resumed.load_trainer_state(tmp_path)
        taken_over, resumed = resumed, SparseSAETrainer.taking_over(resumed)
        assert taken_over.optimizer is resumed.optimizer  # moments are held once
        assert resumed.lr_scheduler.get_last_lr() == first.lr_scheduler.get_last_lr()
        train(resumed, batches[3:])
        for name, value in state_of(resumed).items():
            assert torch.equal(value, expected[name]), name

    @everywhere
    @architectures
    def test_what_it_saves_is_what_stock_saves(
        self, architecture: str, target: Target, tmp_path: Path
    ) -> None:
        stock, sparse = pair(architecture, target)
        states = []
        for name, trainer in (("stock", make_trainer(stock)), ("own", own_trainer(sparse))):
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
        _, sparse = pair("topk", Target("torch", "cpu", (torch.float32,)))
        trainer: Any = make_trainer(sparse)
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
        _, sparse = pair("topk", Target("torch", "cpu", (torch.float32,)))
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

    @architectures
    def test_says_in_which_steps_saelens_logs(self, architecture: str) -> None:
        _, sparse = pair(architecture, Target("torch", "cpu", (torch.float32,)))
        batches = [superposed_rows(sparse, N_ROWS) for _ in range(7)]
        said: list[list[bool]] = []
        for make, log_to_wandb in itertools.product((make_trainer, own_trainer), (True, False)):
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
        for make in (make_trainer, own_trainer):
            torch.manual_seed(1)
            sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=12, d_sae=48))
            trainer = make(sae)
            train(trainer, batches)
            states.append(state_of(trainer))
        for name, value in states[0].items():
            assert torch.equal(value, states[1][name]), name

    @architectures
    def test_an_incomplete_code_is_never_trained_on(self, architecture: str) -> None:
        """The step is taken again, and counts once."""
        target = Target("torch", "cpu", (torch.float32,))
        _, sparse = pair(architecture, target)
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


def parameters(
    dtype: torch.dtype, device: torch.device, *, marked: bool = True
) -> list[torch.nn.Parameter]:
    """Two matrices, one with rows that are not the first dimension of its memory, and a vector."""
    torch.manual_seed(0)
    values = [torch.randn(30, 47), torch.randn(47, 30).T, torch.randn(1030)]
    made = [torch.nn.Parameter(value.to(device, dtype)) for value in values]
    for parameter in made if marked else ():
        mark_parameter(parameter, True)
    return made


class TestClippingAdam:
    @everywhere
    @pytest.mark.parametrize("max_norm", [1e-2, 1e9], ids=["clipped", "not clipped"])
    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)], ids=str)
    @pytest.mark.parametrize("marked", [True, False], ids=["fused", "as it is"])
    def test_is_clipping_and_then_adam(
        self, target: Target, max_norm: float, betas: tuple[float, float], marked: bool
    ) -> None:
        prepare_optimizers()
        for dtype in target.dtypes:
            device = torch.device(target.device)
            actual = parameters(dtype, device, marked=marked)
            expected = parameters(torch.float64, device, marked=False)
            yardstick = parameters(dtype, device, marked=False)
            optimizer = ClippingAdam(actual, max_norm=max_norm, lr=1e-2, betas=betas)
            references = [Adam(made, lr=1e-2, betas=betas) for made in (expected, yardstick)]
            for _ in range(5):
                for trio in zip(actual, expected, yardstick, strict=True):
                    gradient = torch.randn_like(trio[0])
                    for parameter in trio:
                        parameter.grad = torch.empty_like(parameter).copy_(gradient)
                optimizer.step()
                for made, reference in zip((expected, yardstick), references, strict=True):
                    torch.nn.utils.clip_grad_norm_(made, max_norm)
                    reference.step()
            eps = torch.finfo(dtype).eps
            for ours, exact, theirs in zip(actual, expected, yardstick, strict=True):
                allowed = 2 * (theirs - exact).norm() + 4 * eps * exact.norm()
                assert (ours - exact).norm() <= allowed
                state = optimizer.state[ours]
                assert state["step"].item() == 5
                assert state["exp_avg"].stride() == ours.stride()

    @everywhere
    def test_a_nan_and_an_infinity_go_where_they_do_in_stock(self, target: Target) -> None:
        prepare_optimizers()
        for bad in (float("nan"), float("inf")):
            results = []
            for clipping in (True, False):
                made = parameters(torch.float32, torch.device(target.device), marked=clipping)
                for parameter in made:
                    parameter.grad = torch.ones_like(parameter)
                assert made[0].grad is not None
                made[0].grad[3, 4] = bad
                if clipping:
                    ClippingAdam(made, max_norm=1.0).step()
                else:
                    torch.nn.utils.clip_grad_norm_(made, 1.0)
                    Adam(made).step()
                results.append([parameter.isnan() for parameter in made])
            for ours, theirs in zip(*results, strict=True):
                assert torch.equal(ours, theirs)

    @everywhere
    def test_parameters_without_a_gradient_stay_as_they_are(self, target: Target) -> None:
        made = parameters(torch.float32, torch.device(target.device))
        before = made[1].detach().clone()
        optimizer = ClippingAdam(made, max_norm=1.0)
        optimizer.step()
        for index in (0, 2):
            made[index].grad = torch.ones_like(made[index])
        optimizer.step()
        assert torch.equal(made[1], before)
        assert len(optimizer.state_dict()["state"]) == 2

    @everywhere
    def test_tells_autograd_that_parameters_changed(self, target: Target) -> None:
        made = parameters(torch.float32, torch.device(target.device))
        for parameter in made:
            parameter.grad = torch.ones_like(parameter)
        versions = [parameter._version for parameter in made]
        ClippingAdam(made, max_norm=1.0).step()
        assert all(p._version > version for p, version in zip(made, versions, strict=True))

    @everywhere
    @pytest.mark.parametrize(
        "settings", [{"weight_decay": 0.5}, {"maximize": True}, {"amsgrad": True}], ids=str
    )
    def test_other_settings_of_adam_are_obeyed(
        self, target: Target, settings: dict[str, Any]
    ) -> None:
        prepare_optimizers()
        device = torch.device(target.device)
        ours, theirs = (
            parameters(torch.float32, device, marked=marked) for marked in (True, False)
        )
        clipping = ClippingAdam(ours, max_norm=1e-2, lr=1e-2, **settings)
        reference = Adam(theirs, lr=1e-2, **settings)
        for _ in range(3):
            for a, b in zip(ours, theirs, strict=True):
                a.grad = torch.empty_like(a).copy_(torch.randn_like(a))
                b.grad = a.grad.clone()
            clipping.step()
            torch.nn.utils.clip_grad_norm_(theirs, 1e-2)
            reference.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    def test_survives_a_copy(self) -> None:
        made = parameters(torch.float32, torch.device("cpu"))
        optimizer = copy.deepcopy(ClippingAdam(made, max_norm=2.0))
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert optimizer.max_norm == 2.0

    def test_a_closure_is_refused(self) -> None:
        optimizer = ClippingAdam(parameters(torch.float32, torch.device("cpu")), max_norm=1.0)
        with pytest.raises(ValueError, match="closure must be None"):
            optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("n", [1, 1023, 1024, 5000])
def test_adam_update(target: Target, n: int) -> None:
    if target.backend != "triton":
        pytest.skip("a kernel")
    for dtype, betas in itertools.product(target.dtypes, [(0.9, 0.999), (0.0, 0.99)]):
        p, g, m, v = (torch.randn(n, device=target.device, dtype=dtype) for _ in range(4))
        v = v.square()
        (beta1, beta2), step, divisor, lr, eps = betas, 3, 1.7, 0.02, 1e-8
        first = beta1 * m.double() + (1 - beta1) * g.double() / divisor
        second = beta2 * v.double() + (1 - beta2) * (g.double() / divisor) ** 2
        change = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
        expected = (p.double() - lr * change, first, second)
        scalars = [torch.tensor(x, device=target.device) for x in (float(step), divisor, lr)]
        settings = AdamSettings(scalars[2], beta1, beta2, eps)
        adam_update(p, g, m, v, scalars[0], scalars[1], settings)
        for actual, value in zip((p, m, v), expected, strict=True):
            distance = (actual.double() - value).norm()
            assert distance <= 8 * torch.finfo(dtype).eps * value.norm(), (dtype, betas)
