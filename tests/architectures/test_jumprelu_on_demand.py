"""A JumpReLU's training step computes no dense activations unless somebody looks at them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepOutput

from saelens_sparse.codes.on_demand import OnDemandTensor
from tests.conftest import Target
from tests.support.jumprelu import (
    MODES,
    every_mode,
    make_case,
    make_jumprelu,
    sparse_jumprelu,
)
from tests.support.saes import (
    LargestTensor,
    forward_pass,
    not_interpreted,
    record_materializations,
    superposed_rows,
)
from tests.support.trainers import make_trainer


class TestNothingIsDense:
    @pytest.fixture
    def materializations(self, monkeypatch: pytest.MonkeyPatch) -> list[type]:
        return record_materializations(monkeypatch)

    @not_interpreted
    @every_mode
    def test_a_trainer_step_computes_neither_activations_nor_pre_activations(
        self, target: Target, mode: str, materializations: list[type]
    ) -> None:
        stock, x = make_case(target, n_rows=10, pre_act_loss_coefficient=0.3, **MODES[mode])
        with torch.no_grad():
            stock.b_enc[:9] = -30.0
        trainer = make_trainer(
            sparse_jumprelu(stock, target.backend),
            feature_sampling_window=1,
            dead_feature_window=1,
        )
        outputs: list[TrainStepOutput] = []
        for _ in range(4):
            trainer.maybe_reset_sparsity()
            outputs.append(trainer.step(x))
            trainer.n_training_steps += 1
            trainer.build_train_step_log_dict(outputs[-1], trainer.n_training_samples)
        output = outputs[-1]
        assert isinstance(output.feature_acts, OnDemandTensor)
        assert isinstance(output.hidden_pre, OnDemandTensor)
        assert trainer.dead_neurons.sum() >= 9
        assert output.losses["pre_act_loss"] > 0
        assert materializations == []
        # The recorder works.
        output.feature_acts.max()
        assert len(materializations) == 1

    @every_mode
    @not_interpreted
    def test_no_tensor_of_a_trainer_step_is_dense(self, target: Target, mode: str) -> None:
        n_rows, d_sae = 64, 2**14
        stock = make_jumprelu(
            d_in=4,
            d_sae=d_sae,
            device=target.device,
            pre_act_loss_coefficient=0.3,
            **MODES[mode],
        )
        with torch.no_grad():
            # Some tens of latents are active on a row.
            stock.b_enc.fill_(-1e3)
            stock.b_enc[::200] = 0.1
        sparse = sparse_jumprelu(stock, target.backend, screen_buffer_mib=1)
        trainer = make_trainer(sparse)
        trainer.n_forward_passes_since_fired[:20] = 10**6
        x = superposed_rows(stock, n_rows)
        for _ in range(2):
            with LargestTensor() as largest:
                output = trainer.step(x)
                trainer.build_train_step_log_dict(output, trainer.n_training_samples)
            assert output.losses["pre_act_loss"] > 0
            bound_of_the_screen = 2**20 // 2
            assert largest.numel <= bound_of_the_screen < n_rows * d_sae

    @not_interpreted
    @pytest.mark.parametrize("name", ["feature_acts", "hidden_pre"])
    def test_a_use_sees_an_ordinary_tensor(self, target: Target, name: str) -> None:
        stock, x = make_case(target)
        uses: list[Callable[[torch.Tensor], Any]] = [
            lambda a: a + 1, lambda a: a[2], lambda a: a @ a.T, lambda a: a.sum(-1),
            lambda a: (a > 0).float().mean(0), lambda a: a.detach().clone(), lambda a: a.max(),
            lambda a: torch.cat([a, a]), lambda a: a.shape, lambda a: a.dtype,
            lambda a: a.requires_grad, lambda a: a.nonzero(), lambda a: a.bool().float().sum(0),
            lambda a: a.bool().float().sum(-1), lambda a: a.bool().any(0), len,
        ]  # fmt: skip
        for use in uses:
            expected, actual = (
                use(getattr(forward_pass(sae, x), name))
                for sae in (stock, sparse_jumprelu(stock, target.backend))
            )
            if isinstance(expected, torch.Tensor):
                assert type(actual) is torch.Tensor
                torch.testing.assert_close(actual, expected)
            else:
                assert actual == expected

    @not_interpreted
    def test_writes_to_activations_are_seen_by_decode(self, target: Target) -> None:
        stock, x = make_case(target)
        recons = []
        for sae in (stock, sparse_jumprelu(stock, target.backend)):
            acts, _ = sae.encode_with_hidden_pre(x)
            acts = acts * 1
            acts[:, 3] = 2.0
            recons.append(sae.decode(acts))
        torch.testing.assert_close(recons[1], recons[0])

    @not_interpreted
    def test_pre_activations_of_changed_weights_are_refused(self, target: Target) -> None:
        stock, x = make_case(target)
        output = make_trainer(sparse_jumprelu(stock, target.backend)).step(x)
        with pytest.raises(RuntimeError, match="weights have changed"):
            output.hidden_pre.max()
