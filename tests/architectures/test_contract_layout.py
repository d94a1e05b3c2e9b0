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

from tests.support.architectures import ON_CPU, Subject, subjects
from tests.support.saes import error, forward_pass, gradients, step_values


def is_latent_major(sae: Any) -> bool:
    return sae.W_enc.T.is_contiguous()


class TestStateDict:
    @subjects(ON_CPU)
    def test_its_tensors_are_the_parameters(self, subject: Subject) -> None:
        sparse = subject.sparse(subject.stock())
        forward_pass(sparse, subject.inputs(subject.stock(), 4))
        for value in sparse.state_dict().values():
            value.fill_(0.5)
        for name, parameter in sparse.named_parameters():
            assert (parameter == 0.5).all(), name

    @subjects(ON_CPU)
    def test_a_moving_average_follows_every_weight(self, subject: Subject) -> None:
        sparse = subject.sparse(subject.stock())
        average = copy.deepcopy(sparse)
        with torch.no_grad():
            for parameter in sparse.parameters():
                parameter.add_(1)
            weights = sparse.state_dict()
            for name, value in average.state_dict().items():
                value.lerp_(weights[name], 0.25)
        for name, parameter in average.named_parameters():
            torch.testing.assert_close(parameter, getattr(sparse, name) - 0.75)

    @subjects(ON_CPU)
    def test_files_hold_stock_s_layout(self, subject: Subject, tmp_path: Path) -> None:
        stock = subject.stock()
        sparse = subject.sparse(stock)
        sparse.save_model(tmp_path / "training")
        sparse.save_inference_model(tmp_path / "inference")
        save_model(sparse, str(tmp_path / "safetensors"))
        for name, value in stock.state_dict().items():
            for file in ("training/sae_weights.safetensors", "safetensors"):
                assert torch.equal(load_file(tmp_path / file)[name], value), (file, name)
        assert is_latent_major(sparse), "saving moved a weight"


class TestConstruction:
    """The layout is made with the SAE, not in its first forward pass."""

    @subjects(ON_CPU)
    def test_a_new_sae_has_it(self, subject: Subject) -> None:
        sparse = subject.sparse(subject.stock())
        assert is_latent_major(sparse)
        assert is_latent_major(copy.deepcopy(sparse))

    @pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
    @subjects(ON_CPU)
    def test_loading_keeps_it(self, subject: Subject, assign: bool) -> None:
        stock, x = subject.case(n_rows=8)
        sparse = subject.sparse(stock)
        weights = {name: value.clone() for name, value in stock.state_dict().items()}
        sparse.load_state_dict(weights, assign=assign)
        assert is_latent_major(sparse)
        torch.testing.assert_close(sparse(x), stock(x))

    @subjects(ON_CPU)
    def test_a_forward_pass_moves_nothing(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=8)
        sparse = subject.sparse(stock)
        before = {name: (p.data_ptr(), p.stride()) for name, p in sparse.named_parameters()}
        forward_pass(sparse, x).loss.backward()
        after = {name: (p.data_ptr(), p.stride()) for name, p in sparse.named_parameters()}
        assert after == before

    @subjects(ON_CPU)
    def test_shared_memory_stays_shared(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=8)
        sparse = subject.sparse(stock)
        sparse.share_memory()
        forward_pass(sparse, x).loss.backward()
        assert all(parameter.is_shared() for parameter in sparse.parameters())

    @subjects(ON_CPU)
    def test_a_weight_of_another_layout_is_moved_and_said_so(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=8)
        sparse = subject.sparse(stock)
        sparse.W_enc.data = stock.W_enc.data.clone()
        for call in (sparse.encode, lambda x: forward_pass(sparse, x)):
            sparse.W_enc.data = stock.W_enc.data.clone()
            with pytest.warns(UserWarning, match="W_enc .* another layout") as record:
                call(x)
            assert Path(record[0].filename).is_relative_to(Path(__file__).parents[1]), "its caller"
        assert is_latent_major(sparse)
        torch.testing.assert_close(sparse(x), stock(x))

    @subjects(ON_CPU)
    def test_dense_keeps_stock_s(self, subject: Subject) -> None:
        stock, x = subject.case(n_rows=8)
        dense = subject.sparse(stock, "dense")
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
@subjects(ON_CPU)
def test_distributed_data_parallel(subject: Subject, find_unused: bool) -> None:
    stock, x = subject.case(n_rows=16)
    expected = step_values(stock, x)
    sparse = subject.sparse(stock)
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
@subjects(ON_CPU)
def test_casts_keep_the_layout(subject: Subject, cast: str) -> None:
    sparse = subject.sparse(subject.stock())
    CASTS[cast](sparse)
    assert is_latent_major(sparse)
