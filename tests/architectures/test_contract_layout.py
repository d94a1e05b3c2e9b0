"""Where `W_enc` lies in memory, and who may rely on it: state dicts, processes, optimizers."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_model
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from tests.support.architectures import ON_CPU, Arm, arms
from tests.support.saes import error, forward_pass, gradients, step_values

both_on_cpu = arms(topk=ON_CPU, jumprelu=ON_CPU)


def is_latent_major(sae: Any) -> bool:
    return sae.W_enc.T.is_contiguous()


class TestStateDict:
    @both_on_cpu
    def test_its_tensors_are_the_parameters(self, arm: Arm) -> None:
        sparse = arm.sparse(arm.stock())
        forward_pass(sparse, arm.inputs(arm.stock(), 4))
        for value in sparse.state_dict().values():
            value.fill_(0.5)
        for name, parameter in sparse.named_parameters():
            assert (parameter == 0.5).all(), name

    @both_on_cpu
    def test_a_moving_average_follows_every_weight(self, arm: Arm) -> None:
        sparse = arm.sparse(arm.stock())
        average = copy.deepcopy(sparse)
        with torch.no_grad():
            for parameter in sparse.parameters():
                parameter.add_(1)
            weights = sparse.state_dict()
            for name, value in average.state_dict().items():
                value.lerp_(weights[name], 0.25)
        for name, parameter in average.named_parameters():
            torch.testing.assert_close(parameter, getattr(sparse, name) - 0.75)

    @both_on_cpu
    def test_files_hold_stock_s_layout(self, arm: Arm, tmp_path: Path) -> None:
        stock = arm.stock()
        sparse = arm.sparse(stock)
        sparse.save_model(tmp_path / "training")
        sparse.save_inference_model(tmp_path / "inference")
        save_model(sparse, str(tmp_path / "safetensors"))
        for name, value in stock.state_dict().items():
            for file in ("training/sae_weights.safetensors", "safetensors"):
                assert torch.equal(load_file(tmp_path / file)[name], value), (file, name)
        assert is_latent_major(sparse), "saving moved a weight"


class TestConstruction:
    """The layout is made with the SAE, not in its first forward pass."""

    @both_on_cpu
    def test_a_new_sae_has_it(self, arm: Arm) -> None:
        sparse = arm.sparse(arm.stock())
        assert is_latent_major(sparse)
        assert is_latent_major(copy.deepcopy(sparse))

    @pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
    @both_on_cpu
    def test_loading_keeps_it(self, arm: Arm, assign: bool) -> None:
        stock, x = arm.case(n_rows=8)
        sparse = arm.sparse(stock)
        weights = {name: value.clone() for name, value in stock.state_dict().items()}
        sparse.load_state_dict(weights, assign=assign)
        assert is_latent_major(sparse)
        torch.testing.assert_close(sparse(x), stock(x))

    @both_on_cpu
    def test_a_forward_pass_moves_nothing(self, arm: Arm) -> None:
        stock, x = arm.case(n_rows=8)
        sparse = arm.sparse(stock)
        before = {name: (p.data_ptr(), p.stride()) for name, p in sparse.named_parameters()}
        forward_pass(sparse, x).loss.backward()
        after = {name: (p.data_ptr(), p.stride()) for name, p in sparse.named_parameters()}
        assert after == before

    @both_on_cpu
    def test_shared_memory_stays_shared(self, arm: Arm) -> None:
        stock, x = arm.case(n_rows=8)
        sparse = arm.sparse(stock)
        sparse.share_memory()
        forward_pass(sparse, x).loss.backward()
        assert all(parameter.is_shared() for parameter in sparse.parameters())

    @both_on_cpu
    def test_a_weight_of_another_layout_is_moved_and_said_so(self, arm: Arm) -> None:
        stock, x = arm.case(n_rows=8)
        sparse = arm.sparse(stock)
        sparse.W_enc.data = stock.W_enc.data.clone()
        for call in (sparse.encode, lambda x: forward_pass(sparse, x)):
            sparse.W_enc.data = stock.W_enc.data.clone()
            with pytest.warns(UserWarning, match="W_enc .* another layout") as record:
                call(x)
            assert Path(record[0].filename).parent == Path(__file__).parent
        assert is_latent_major(sparse)
        torch.testing.assert_close(sparse(x), stock(x))

    @both_on_cpu
    def test_dense_keeps_stock_s(self, arm: Arm) -> None:
        stock, x = arm.case(n_rows=8)
        dense = arm.sparse(stock, "dense")
        forward_pass(dense, x).loss.backward()
        assert dense.W_enc.is_contiguous()
        flat = parameters_to_vector(dense.parameters())
        vector_to_parameters(2 * flat, dense.parameters())
        torch.testing.assert_close(parameters_to_vector(dense.parameters()), 2 * flat)
        optimizer = torch.optim.LBFGS(dense.parameters())

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = forward_pass(dense, x).loss
            loss.backward()
            return loss

        before = float(closure())
        optimizer.step(closure)
        assert float(closure()) < before


class Step(torch.nn.Module):
    """A training step as a module that DistributedDataParallel can wrap."""

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return forward_pass(self.sae, x).loss


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process is enough for gradients to go through buckets with their own strides."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("find_unused", [False, True], ids=["", "find_unused_parameters"])
@both_on_cpu
def test_distributed_data_parallel(arm: Arm, find_unused: bool) -> None:
    stock, x = arm.case(n_rows=16)
    expected = step_values(stock, x)
    sparse = arm.sparse(stock)
    model = DistributedDataParallel(Step(sparse), find_unused_parameters=find_unused)
    for step in range(3):
        sparse.zero_grad()
        model(x).backward()
        for name, gradient in gradients(sparse).items():
            distance = error(gradient.double(), expected[name])
            assert distance <= 1e-5 * expected[name].norm() + 1e-9, (step, name)


CASTS: dict[str, Callable[[Any], Any]] = {
    "to dtype": lambda sae: sae.to(torch.float64),
    "bfloat16": lambda sae: sae.bfloat16(),
    "to_empty": lambda sae: sae.to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", CASTS)
@both_on_cpu
def test_casts_keep_the_layout(arm: Arm, cast: str) -> None:
    sparse = arm.sparse(arm.stock())
    CASTS[cast](sparse)
    assert is_latent_major(sparse)
