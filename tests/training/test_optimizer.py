"""SAELens's own Adam on a sparse SAE: prepared before each step, and saved as stock's."""

from typing import Any

import pytest
import torch

from tests.support.saes import (
    assert_same_training,
    forward_pass,
    make_stock,
    sparse_like,
    zipf_inputs,
)
from tests.support.trainers import make_trainer


def test_adam_is_fused_unless_told_otherwise() -> None:
    stock = make_stock()
    for fused_adam in (True, False):
        sparse = sparse_like(stock, fused_adam=fused_adam)
        trainer = make_trainer(sparse)
        trainer.step(zipf_inputs(stock, 9))
        (group,) = trainer.optimizer.param_groups
        assert group["fused"] is (True if fused_adam else None)
        (written,) = trainer.optimizer.state_dict()["param_groups"]
        assert written["fused"] is None


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}])
def test_a_choice_is_respected(options: dict[str, Any]) -> None:
    sparse = sparse_like(make_stock())
    optimizer = torch.optim.Adam(sparse.parameters(), **options)
    forward_pass(sparse, zipf_inputs(sparse, 9)).loss.backward()
    optimizer.step()
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in options} == options
    assert not group["fused"]


def test_other_optimizers_are_left_alone() -> None:
    layer = torch.nn.Linear(3, 4)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is None
    assert optimizer.state_dict()["param_groups"][0]["fused"] is None
    stock = make_stock()
    trainer = make_trainer(stock)
    trainer.step(zipf_inputs(stock, 9))
    assert trainer.optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_other_optimizers_train(optimizer_class: Any) -> None:
    stock = make_stock(dtype=torch.float64)
    sparse = sparse_like(stock)
    batches = [zipf_inputs(stock, 32) for _ in range(3)]
    for sae in (stock, sparse):
        optimizer = optimizer_class(sae.parameters(), lr=1e-3)
        for x in batches:
            optimizer.zero_grad()
            forward_pass(sae, x).loss.backward()
            optimizer.step()
    assert_same_training(sparse, stock, tolerance=1e-10)


class Quantized(torch.Tensor):
    """Stands for an optimizer's state of another library."""


def test_quantized_states_are_left_alone() -> None:
    sparse = sparse_like(make_stock())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)
    forward_pass(sparse, zipf_inputs(sparse, 9)).loss.backward()
    state = torch.zeros(sparse.W_enc.shape).as_subclass(Quantized)
    assert state.stride() != sparse.W_enc.stride()
    optimizer.state[sparse.W_enc]["exp_avg"] = state
    optimizer.step()
    assert optimizer.state[sparse.W_enc]["exp_avg"] is state


def test_writing_a_checkpoint_leaves_the_moments_in_place() -> None:
    sparse = sparse_like(make_stock())
    trainer = make_trainer(sparse)
    trainer.step(zipf_inputs(sparse, 9))
    live = trainer.optimizer.state[sparse.W_enc]
    written = trainer.optimizer.state_dict()["state"][
        [name for name, _ in sparse.named_parameters()].index("W_enc")
    ]
    for name in ("exp_avg", "exp_avg_sq"):
        assert written[name].is_contiguous()
        assert live[name].stride() == sparse.W_enc.stride() != written[name].stride()
        assert torch.equal(live[name], written[name])
