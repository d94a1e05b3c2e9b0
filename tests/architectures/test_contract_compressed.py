"""`feature_acts` as COO and CSR: what PyTorch makes of the dense tensor, without that tensor."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from saelens_sparse.codes.on_demand import SparseFeatureActs
from tests.conftest import TARGETS
from tests.support.architectures import (
    EVERYWHERE,
    NOT_INTERPRETED,
    ON_CPU,
    SPARSE,
    Subject,
    subjects,
)
from tests.support.saes import (
    AUTOCAST,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    LargestTensor,
    Precision,
    forward_pass,
    gradients,
    record_materializations,
    require_same_gradients,
)
from tests.support.trainers import make_trainer

CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "to_sparse()": lambda acts: acts.to_sparse(),
    "to_sparse_coo()": lambda acts: acts.to_sparse_coo(),
    "to_sparse_csr()": lambda acts: acts.to_sparse_csr(),
    "to_sparse(layout=sparse_coo)": lambda acts: acts.to_sparse(layout=torch.sparse_coo),
    "to_sparse(layout=sparse_csr)": lambda acts: acts.to_sparse(layout=torch.sparse_csr),
}
LAYOUTS = [CALLS["to_sparse_coo()"], CALLS["to_sparse_csr()"]]
layouts = pytest.mark.parametrize("call", LAYOUTS, ids=["coo", "csr"])


@pytest.fixture
def materializations(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    return record_materializations(monkeypatch)


def encode(sae: Any, x: torch.Tensor, *, autocast: bool = False) -> torch.Tensor:
    with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
        return sae.encode_with_hidden_pre(x)[0]


def clipped_case(subject: Subject, precision: Precision, **cfg: Any) -> tuple[Any, torch.Tensor]:
    """A ReLU, if there is one, clips some of what would be active."""
    stock = subject.stock(precision, **cfg)
    x = subject.inputs(stock, subject.target.few_rows(20), precision)
    with torch.no_grad():
        stock.b_enc.sub_(2)
    return stock, x


def indices_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices()]
    assert tensor.is_coalesced()
    return [tensor.indices()]


def assert_same_tensor(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, with the same indices."""
    assert type(actual) is torch.Tensor
    assert actual.layout == expected.layout
    assert actual.shape == expected.shape
    for mine, theirs in zip(indices_of(actual), indices_of(expected), strict=True):
        assert mine.dtype == theirs.dtype == torch.int64
        assert torch.equal(mine, theirs)
    assert actual.dtype == expected.dtype
    assert actual.device == expected.device
    torch.testing.assert_close(
        actual.detach().values(), expected.detach().values(), rtol=0, atol=0, equal_nan=True
    )


@subjects(NOT_INTERPRETED, precisions=(FLOAT32, FLOAT64, BFLOAT16, AUTOCAST), options="few")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.pairwise
def test_is_what_pytorch_makes_of_the_dense_tensor(
    subject: Subject,
    precision: Precision,
    options: dict[str, Any],
    call: str,
    materializations: list[type],
) -> None:
    stock, x = clipped_case(subject, precision, **options)
    sparse = subject.sparse(stock)
    acts = encode(sparse, x, autocast=precision.autocast)
    with torch.sparse.check_sparse_tensor_invariants():
        actual = CALLS[call](acts)
    assert materializations == []
    dense = encode(sparse, x, autocast=precision.autocast).detach()
    assert 0 < dense.count_nonzero() < dense.numel()
    assert_same_tensor(actual, CALLS[call](dense))
    assert actual.requires_grad


@subjects(SPARSE)
@layouts
def test_no_tensor_is_dense(subject: Subject, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    stock, x = clipped_case(subject, FLOAT32, **subject.traits.large)
    acts = encode(subject.sparse(stock), x)
    assert isinstance(acts, SparseFeatureActs)
    with LargestTensor() as largest:
        compressed = call(acts)
    n_pairs = acts.code.acts.numel()
    assert 2 * n_pairs < acts.numel()
    assert largest.numel <= max(2 * n_pairs, stock.cfg.d_sae), "norms have d_sae elements"
    # The recorder works.
    with LargestTensor() as largest:
        compressed.to_dense()
    assert largest.numel == acts.numel()


@pytest.mark.gpu
@layouts
def test_memory_is_a_fraction_of_the_dense_tensor_s(
    call: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """A dense tensor takes 256 MiB here, the values and indices of its active latents 1.3."""
    sae = Subject("topk_sparse", TARGETS["triton-cuda"])
    stock = sae.stock(d_in=64, d_sae=65_536, k=64)
    acts = encode(sae.sparse(stock), torch.randn(1024, 64, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    compressed = call(acts)
    taken = torch.cuda.max_memory_allocated() - before
    assert compressed.values().numel() <= 1024 * 64
    assert taken < acts.numel() * 4 / 10


@subjects(NOT_INTERPRETED)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 1, 3), (3, 1), (0,), (0, 3)], ids=str)
@layouts
def test_leading_dimensions(
    subject: Subject, shape: tuple[int, ...], call: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    n_rows = torch.Size(shape).numel()
    stock = subject.stock()
    x = subject.inputs(stock, max(1, n_rows))[:n_rows].view(*shape, stock.cfg.d_in)
    sparse = subject.sparse(stock)
    try:
        expected = call(encode(sparse, x).detach())
    except (IndexError, RuntimeError) as error:
        # PyTorch's CSR has rows, batches, and in each batch the same number of values.
        if n_rows > 0:
            with pytest.raises(type(error)):
                call(encode(sparse, x))
    else:
        assert_same_tensor(call(encode(sparse, x)), expected)


@subjects(ON_CPU)
def test_batches_of_different_numbers_are_no_csr(subject: Subject) -> None:
    stock = subject.stock(apply_b_dec_to_input=False)
    with torch.no_grad():
        stock.b_enc.fill_(-1.0)
    sparse = subject.sparse(stock)
    x = subject.inputs(stock, 6).view(2, 3, -1).clone()
    x[0] = 0.0  # where no latent is active
    with pytest.raises(RuntimeError, match=r"same number of active latents .*to_sparse_coo"):
        encode(sparse, x).to_sparse_csr()


# With deterministic algorithms, PyTorch 2.11 has no gradients of CSR on a GPU.
@pytest.mark.default_algorithms
@subjects(NOT_INTERPRETED, precisions=(FLOAT64,), options="few")
@layouts
def test_gradients_reach_what_is_stored(
    subject: Subject,
    precision: Precision,
    options: dict[str, Any],
    call: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """An activation that is zero, and thus not stored, has no part in a gradient."""
    stock, x = clipped_case(subject, precision, **options)
    sparse = subject.sparse(stock)
    weights = torch.randn(stock.cfg.d_sae, 3, dtype=x.dtype, device=x.device)
    for use in (
        lambda compressed: (compressed @ weights).pow(2).sum(),
        lambda compressed: compressed.to_dense().pow(2).sum(),
        lambda compressed: compressed.values().pow(3).sum(),
    ):
        for sae in (stock, sparse):
            sae.zero_grad()
        dense = encode(stock, x)
        use(call(dense.where(dense != 0, 0))).backward()
        use(call(encode(sparse, x))).backward()
        assert sparse.W_enc.grad is not None
        require_same_gradients(sparse, stock)


@subjects(NOT_INTERPRETED)
def test_without_a_graph_there_are_none(subject: Subject) -> None:
    stock, x = subject.case(n_rows=6)
    sparse = subject.sparse(stock)
    acts = encode(sparse, x)
    with torch.no_grad():
        assert not acts.to_sparse_csr().requires_grad
    assert acts.to_sparse_csr().requires_grad, "a first look cuts nothing"
    with torch.no_grad():
        acts = encode(sparse, x)
    assert not acts.to_sparse_coo().requires_grad


@subjects(EVERYWHERE)
@layouts
def test_nan_is_stored(subject: Subject, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    stock, x = subject.case(n_rows=6)
    x[2] = torch.nan
    sparse = subject.sparse(stock)
    actual = call(encode(sparse, x))
    assert actual.detach().values().isnan().any()
    assert_same_tensor(actual, call(encode(sparse, x).detach()))


@subjects(ON_CPU)
@layouts
def test_of_activations_that_were_written_to(
    subject: Subject, call: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    stock, x = subject.case(n_rows=6)
    acts = encode(subject.sparse(stock), x)
    unwritten = call(acts).detach()
    acts.mul_(2)
    assert torch.equal(call(acts).detach().values(), 2 * unwritten.values())


@subjects(NOT_INTERPRETED)
@layouts
def test_of_a_training_step(
    subject: Subject,
    call: Callable[[torch.Tensor], torch.Tensor],
    materializations: list[type],
) -> None:
    """Compressing takes nothing from the step: it stays sparse, and its gradients the same."""
    stock, x = subject.case(n_rows=20)
    expected = encode(stock, x).detach()
    sparse, alone = subject.sparse(stock), subject.sparse(stock)
    output = forward_pass(sparse, x)
    compressed = call(output.feature_acts)
    output.loss.backward()
    forward_pass(alone, x).loss.backward()
    actual = gradients(sparse)
    for name, gradient in gradients(alone).items():
        assert torch.equal(actual[name], gradient), name
    torch.testing.assert_close(compressed.to_dense().detach(), expected)
    assert materializations == []


@subjects(NOT_INTERPRETED)
def test_after_the_optimizer_has_stepped(subject: Subject) -> None:
    stock, x = subject.case(n_rows=20)
    expected = encode(stock, x).detach()
    output = make_trainer(subject.sparse(stock)).step(x)
    torch.testing.assert_close(output.feature_acts.to_sparse_csr().to_dense().detach(), expected)
