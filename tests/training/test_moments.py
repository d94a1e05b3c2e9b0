"""`moments="bfloat16"`: what holds them, what refuses them, and their way through files."""

import copy
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Adam

from saelens_sparse.training.optimizer import ClippingAdam
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.conftest import TARGETS
from tests.support.architectures import ON_CPU, SPARSE, Subject, subjects
from tests.support.saes import forward_pass, make_stock, sparse_like, superposed_rows
from tests.support.trainers import N_ROWS, own_trainer, state_of, stock_trainer, train

KERNELS = frozenset({"triton-interpreter", "triton-cuda"})
WEIGHTS = ("W_enc", "W_dec")


def light(subject: Subject, **changes: Any) -> Any:
    return subject.sparse(subject.stock(), moments="bfloat16", **changes)


def moments_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Live ones, by names of the parameter and of the moment."""
    return {
        f"{name} {moment}": trainer.optimizer.state[parameter][moment]
        for name, parameter in trainer.sae.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }


def assert_light(moments: dict[str, torch.Tensor]) -> None:
    for name, value in moments.items():
        expected = torch.bfloat16 if name.startswith(WEIGHTS) else torch.float32
        assert value.dtype == expected, name


def batches_for(sae: Any, n: int) -> list[torch.Tensor]:
    return [superposed_rows(sae, N_ROWS) for _ in range(n)]


class TestTraining:
    @subjects(SPARSE)
    def test_moments_of_weights_take_half_and_those_of_biases_do_not(
        self, subject: Subject
    ) -> None:
        sae = light(subject)
        trainer = own_trainer(sae)
        train(trainer, batches_for(sae, 5))
        moments = moments_of(trainer)
        assert_light(moments)
        for name in WEIGHTS:
            parameter = getattr(sae, name)
            for moment in ("exp_avg", "exp_avg_sq"):
                value = moments[f"{name} {moment}"]
                assert value.stride() == parameter.stride()
                assert 2 * value.nbytes == parameter.nbytes
                assert value.any()

    @subjects(SPARSE)
    def test_trains_as_with_float32_moments_but_for_rounding(self, subject: Subject) -> None:
        torch.manual_seed(0)
        stock = subject.stock()
        batches = batches_for(stock, 30)
        states: list[dict[str, torch.Tensor]] = []
        for moments in (None, "bfloat16"):
            trainer = own_trainer(subject.sparse(stock, moments=moments))
            train(trainer, batches)
            states.append(state_of(trainer))
        start = {name: value.double().cpu() for name, value in stock.named_parameters()}
        for name in WEIGHTS:
            moved = (states[0][name] - start[name]).norm()
            apart = (states[1][name] - states[0][name]).norm()
            assert 0 < apart < 0.03 * moved, name

    @subjects(SPARSE)
    def test_the_same_steps_give_the_same_bits(self, subject: Subject) -> None:
        sae = light(subject)
        other = copy.deepcopy(sae)
        batches = batches_for(sae, 6)
        trainers = [own_trainer(each) for each in (sae, other)]
        for trainer in trainers:
            train(trainer, batches)
        expected, actual = map(state_of, trainers)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name

    @subjects(KERNELS)
    def test_kernels_round_as_pytorch(
        self, subject: Subject, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each weight's update sums its gradient over pairs, and no parameter holds it."""
        monkeypatch.setattr("saelens_sparse.codes.step.MAX_PAIRS_PER_LATENT", 1e9)
        stock = subject.stock()
        batches = [superposed_rows(stock, subject.target.few_rows(N_ROWS)) for _ in range(2)]
        found: list[dict[str, torch.Tensor]] = []
        for implementation in ("triton", "torch"):
            sae = subject.sparse(stock, implementation, moments="bfloat16", cuda_graph=False)
            trainer = own_trainer(sae)
            held: list[bool] = []
            trainer.optimizer.register_step_pre_hook(
                lambda *_, sae=sae, held=held: held.append(sae.W_dec.grad is not None)
            )
            train(trainer, batches)
            assert any(held) == (implementation == "torch")
            found.append(moments_of(trainer))
        assert_light(found[0])
        for name, value in found[0].items():
            if name.startswith(WEIGHTS):
                assert (value != found[1][name]).float().mean() < 0.02, name
                torch.testing.assert_close(value, found[1][name], rtol=0.02, atol=1e-9)

    @pytest.mark.gpu
    def test_a_gpu_without_triton_rounds_as_the_kernels(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("saelens_sparse.codes.step.MAX_PAIRS_PER_LATENT", 1e9)
        subject = Subject("topk_sparse", TARGETS["triton-cuda"])
        stock = subject.stock()
        batches = batches_for(stock, 3)
        found: list[dict[str, torch.Tensor]] = []
        for implementation, is_off in (("triton", "0"), ("torch", "1")):
            monkeypatch.setenv("SAELENS_SPARSE_NO_TRITON", is_off)
            trainer = own_trainer(subject.sparse(stock, implementation, moments="bfloat16"))
            train(trainer, batches)
            found.append(moments_of(trainer))
        assert_light(found[1])
        for name, value in found[0].items():
            if name.startswith(WEIGHTS):
                assert (value != found[1][name]).float().mean() < 0.02, name

    @subjects(ON_CPU)
    def test_a_dense_step_rounds_too(self, subject: Subject) -> None:
        """`auto` takes dense steps where many latents are active."""
        sae = light(subject, implementation="dense")
        assert sae.implementation.name == "dense"
        trainer = own_trainer(sae)
        train(trainer, batches_for(sae, 3))
        assert_light(moments_of(trainer))

    def test_rows_are_those_of_the_memory(self) -> None:
        """Both weights have one row a latent, and no bits in common."""
        sae = sparse_like(make_stock(), moments="bfloat16")
        trainer = own_trainer(sae)
        train(trainer, batches_for(sae, 1))
        with torch.no_grad():
            sae.W_enc.grad, sae.W_dec.grad = torch.ones_like(sae.W_enc), torch.ones_like(sae.W_dec)
            for parameter in (sae.W_enc, sae.W_dec):
                for moment in ("exp_avg", "exp_avg_sq"):
                    trainer.optimizer.state[parameter][moment].fill_(0.3)
        trainer.optimizer.step()
        moments = moments_of(trainer)
        assert sae.W_enc.T.is_contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            encoder, decoder = moments[f"W_enc {moment}"].T, moments[f"W_dec {moment}"]
            assert len(encoder.unique()) == len(decoder.unique()) == 2
            assert 0.2 < (encoder != decoder).float().mean() < 0.8

    def test_no_temporary_is_as_large_as_a_weight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("saelens_sparse.ops.update.adam._BLOCK", 64)
        sizes: list[int] = []
        original = torch.Tensor.float

        def recorded(self: torch.Tensor) -> torch.Tensor:
            if self.dtype == torch.bfloat16:
                sizes.append(self.numel())
            return original(self)

        sae = sparse_like(make_stock(), moments="bfloat16")
        trainer = own_trainer(sae)
        batches = batches_for(sae, 1)
        monkeypatch.setattr(torch.Tensor, "float", recorded)
        train(trainer, batches)
        assert sum(sizes) == 2 * 2 * sae.W_enc.numel()
        assert max(sizes) <= 64


class TestRefusals:
    def assert_refused(self, step: Any, sae: Any, *parts: str) -> None:
        before = {name: value.clone() for name, value in sae.state_dict().items()}
        with pytest.raises(ValueError, match="moments='bfloat16'") as raised:
            step()
        for part in parts:
            assert part in str(raised.value)
        for name, value in sae.named_parameters():
            assert torch.equal(value, before[name]), name

    @subjects(ON_CPU)
    @pytest.mark.parametrize("implementation", ["torch", "dense"])
    def test_other_trainers(self, subject: Subject, implementation: str) -> None:
        sae = light(subject, implementation=implementation)
        trainer = stock_trainer(sae)
        (batch,) = batches_for(sae, 1)
        self.assert_refused(lambda: trainer.step(batch), sae, "SparseTrainingRunner", "Adam")
        assert not trainer.optimizer.state

    @pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
    def test_other_optimizers(self, optimizer_class: Any) -> None:
        sae = sparse_like(make_stock(), moments="bfloat16")
        optimizer = optimizer_class(sae.parameters(), lr=1e-3)
        forward_pass(sae, superposed_rows(sae, 9)).loss.backward()
        self.assert_refused(optimizer.step, sae, optimizer_class.__name__)

    @pytest.mark.parametrize(
        "setting",
        [
            {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}, {"foreach": True},
            {"capturable": True}, {"differentiable": True}, {"fused": False},
        ],
        ids=str,
    )  # fmt: skip
    def test_other_settings_of_adam(self, setting: dict[str, Any]) -> None:
        sae = sparse_like(make_stock(), moments="bfloat16")
        trainer = own_trainer(sae)
        (batch,) = batches_for(sae, 1)
        trainer.optimizer.param_groups[0].update(setting)
        ((name, value),) = setting.items()
        self.assert_refused(lambda: trainer.step(batch), sae, f"{name}={value!r}")

    def test_parameters_of_others(self) -> None:
        sae = sparse_like(make_stock(), moments="bfloat16")
        other = torch.nn.Parameter(torch.ones(3, 5))
        optimizer = ClippingAdam([*sae.parameters(), other], max_norm=1.0)
        forward_pass(sae, superposed_rows(sae, 9)).loss.backward()
        self.assert_refused(optimizer.step, sae, "[3, 5]")

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_another_dtype(self, dtype: torch.dtype) -> None:
        sae = sparse_like(make_stock(), moments="bfloat16").to(dtype)
        trainer = own_trainer(sae)
        (batch,) = batches_for(sae, 1)
        name = str(dtype).removeprefix("torch.")
        self.assert_refused(lambda: trainer.step(batch.to(dtype)), sae, "float32", name)

    @subjects(ON_CPU)
    def test_configurations(self, subject: Subject) -> None:
        for changes in ({"dtype": "float64"}, {"dtype": "float16"}, {"dtype": "bfloat16"}):
            with pytest.raises(ValueError, match="moments='bfloat16'.*" + changes["dtype"]):
                light(subject, **changes)
        with pytest.raises(ValueError, match=r"moments='bfloat16'.*fused_adam=False"):
            light(subject, fused_adam=False)


class TestState:
    @subjects(SPARSE)
    def test_resumes_bit_for_bit(self, subject: Subject, tmp_path: Path) -> None:
        sae = light(subject)
        batches = batches_for(sae, 6)
        start = {name: value.clone() for name, value in sae.state_dict().items()}
        whole = own_trainer(sae)
        train(whole, batches)
        expected = state_of(whole)

        sae.load_state_dict(start)
        first = own_trainer(sae)
        train(first, batches[:3])
        first.save_trainer_state(tmp_path)
        # Loaded by this package's trainer, and by SAELens's before it is taken over.
        weights = {name: value.clone() for name, value in sae.state_dict().items()}
        for load_first in (False, True):
            sae.load_state_dict(weights)
            resumed: Any = stock_trainer(sae)
            if load_first:
                resumed.load_trainer_state(tmp_path)
            resumed = SparseSAETrainer.taking_over(resumed)
            if not load_first:
                resumed.load_trainer_state(tmp_path)
                assert_light(moments_of(resumed))
            train(resumed, batches[3:])
            for name, value in state_of(resumed).items():
                assert torch.equal(value, expected[name]), (name, load_first)

    def test_moments_are_not_widened_while_they_are_loaded(self) -> None:
        sae = sparse_like(make_stock(), moments="bfloat16")
        trainer = own_trainer(sae)
        train(trainer, batches_for(sae, 2))
        state_dict = trainer.optimizer.state_dict()
        resumed = own_trainer(sae)
        resumed.optimizer.load_state_dict(state_dict)
        index = [name for name, _ in sae.named_parameters()].index("W_dec")
        for name in ("exp_avg", "exp_avg_sq"):
            value = resumed.optimizer.state[sae.W_dec][name]
            assert value.data_ptr() == state_dict["state"][index][name].data_ptr()
        assert set(state_dict["state"][index]) == {"step", "exp_avg", "exp_avg_sq"}

    @subjects(ON_CPU)
    def test_a_checkpoint_loads_in_stock(self, subject: Subject, tmp_path: Path) -> None:
        """Converted to float32 there, and training goes on."""
        stock = subject.stock()
        sae = subject.sparse(stock, moments="bfloat16")
        trainer = own_trainer(sae)
        train(trainer, batches_for(sae, 3))
        trainer.save_checkpoint("light", base_path=tmp_path)
        written = torch.load(tmp_path / "light" / "trainer_state.pt")["optimizer"]["state"]
        resumed = stock_trainer(stock)
        resumed.load_trainer_state(tmp_path / "light")
        stock.load_weights_from_checkpoint(tmp_path / "light")
        for index, (name, parameter) in enumerate(stock.named_parameters()):
            for moment in ("exp_avg", "exp_avg_sq"):
                saved = written[index][moment]
                assert saved.dtype == (torch.bfloat16 if name in WEIGHTS else torch.float32)
                assert saved.is_contiguous()
                loaded = resumed.optimizer.state[parameter][moment]
                assert loaded.dtype == torch.float32
                assert torch.equal(loaded, saved.float())
        (loss,) = train(resumed, batches_for(sae, 1))
        assert isfinite(loss)

    @subjects(SPARSE)
    def test_a_checkpoint_of_float32_moments_is_converted_once(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        stock = subject.stock()
        begun = stock_trainer(stock)
        train(begun, batches_for(stock, 3))
        begun.save_trainer_state(tmp_path)
        sae = subject.sparse(stock, moments="bfloat16")
        for load_first in (True, False):
            resumed: Any = stock_trainer(sae)
            if load_first:
                resumed.load_trainer_state(tmp_path)
            resumed = SparseSAETrainer.taking_over(resumed)
            if not load_first:
                resumed.load_trainer_state(tmp_path)
            for name, value in moments_of(resumed).items():
                parameter, moment = name.split()
                given = begun.optimizer.state[getattr(stock, parameter)][moment]
                assert torch.equal(value, given.bfloat16() if parameter in WEIGHTS else given)
            train(resumed, batches_for(sae, 1))
            assert_light(moments_of(resumed))
            assert resumed.optimizer.state[sae.W_dec]["step"].item() == 4

    def test_a_changed_setting_is_followed(self) -> None:
        sae = sparse_like(make_stock())
        trainer = own_trainer(sae)
        for moments in (None, "bfloat16", None):
            sae.cfg.moments = moments
            train(trainer, batches_for(sae, 2))
            found = moments_of(trainer)
            if moments is None:
                assert {value.dtype for value in found.values()} == {torch.float32}
            else:
                assert_light(found)

    def test_an_optimizer_that_learns_of_it_late_converts(self) -> None:
        sae = sparse_like(make_stock(), moments="bfloat16")
        plain = Adam(sae.parameters())
        optimizer = ClippingAdam(sae.parameters(), max_norm=1.0)
        optimizer.load_state_dict(plain.state_dict())
        forward_pass(sae, superposed_rows(sae, 9)).loss.backward()
        optimizer.step()
        assert optimizer.state[sae.W_enc]["exp_avg"].dtype == torch.bfloat16
