"""`feature_acts` and `hidden_pre` of a training step: seldom computed, always ordinary to see."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sae_lens import TopKTrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch.utils._pytree import tree_flatten

from saelens_sparse import SparseTopKTrainingSAE
from saelens_sparse.codes.on_demand import FiringPattern, OnDemandTensor, SparseFeatureActs
from tests.support.saes import (
    LargestTensor,
    dead_mask,
    forward_pass,
    gradients,
    make_stock,
    make_trainer,
    record_materializations,
    sparse_like,
    zipf_inputs,
)

N_ROWS = 10
TENSORS = ("feature_acts", "hidden_pre")


@dataclass
class Pair:
    """A stock and a sparse SAE with the same weights, and one forward pass of each."""

    x: torch.Tensor
    stock: TopKTrainingSAE
    sparse: SparseTopKTrainingSAE
    stock_output: TrainStepOutput
    output: TrainStepOutput


@pytest.fixture
def pair() -> Pair:
    # float64, so that the two differ by no more than the last digits.
    stock = make_stock(dtype=torch.float64)
    sparse = sparse_like(stock)
    x = zipf_inputs(stock, N_ROWS)
    return Pair(x, stock, sparse, forward_pass(stock, x), forward_pass(sparse, x))


@pytest.fixture
def materializations(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """Collects the class of every on-demand tensor that is computed."""
    return record_materializations(monkeypatch)


def test_a_trainer_step_computes_neither(materializations: list[type]) -> None:
    stock = make_stock()
    sparse = sparse_like(stock)
    trainer = make_trainer(sparse, feature_sampling_window=1, dead_feature_window=1)
    outputs: list[TrainStepOutput] = []
    for _ in range(4):
        trainer.maybe_reset_sparsity()
        outputs.append(trainer.step(zipf_inputs(stock, N_ROWS)))
        trainer.n_training_steps += 1
        trainer.build_train_step_log_dict(outputs[-1], trainer.n_training_samples)
    output = outputs[-1]
    assert output.losses["auxiliary_reconstruction_loss"] > 0
    assert materializations == []
    # The recorder works.
    output.feature_acts.max()
    assert materializations == [SparseFeatureActs]


def test_no_tensor_of_a_trainer_step_is_dense() -> None:
    n_rows, d_sae = 64, 2**14
    stock = make_stock(d_in=4, d_sae=d_sae, k=5)
    sparse = sparse_like(stock, screen_buffer_mib=1)
    trainer = make_trainer(sparse)
    trainer.n_forward_passes_since_fired[:20] = 10**6
    x = zipf_inputs(stock, n_rows)
    with LargestTensor() as largest:
        output = trainer.step(x)
        trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    bound_of_the_screen = 2**20 // 4
    assert largest.numel <= bound_of_the_screen < n_rows * d_sae

    # The recorder works.
    with LargestTensor() as largest:
        forward_pass(stock, x)
    assert largest.numel == n_rows * d_sae


def statistics() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {
        "did fire": lambda acts: acts.bool().float().sum(-2).bool(),
        "firing counts": lambda acts: acts.bool().float().sum(0),
        "l0": lambda acts: acts.bool().float().sum(-1).to_dense(),
        "dim=0": lambda acts: acts.bool().float().sum(dim=0),
        "dim=-1": lambda acts: acts.bool().float().sum(dim=-1),
        "torch.sum": lambda acts: torch.sum(acts.bool().float(), 1),
        "torch.sum dim=": lambda acts: torch.sum(acts.bool().float(), dim=-2),
    }


@pytest.mark.parametrize("name", statistics())
@pytest.mark.parametrize("clipped", [False, True], ids=["all-positive", "clipped"])
def test_statistics_without_computing_activations(
    name: str, clipped: bool, materializations: list[type]
) -> None:
    stock = make_stock()
    if clipped:
        with torch.no_grad():
            stock.b_enc.sub_(3)
    x = zipf_inputs(stock, N_ROWS)
    expected = statistics()[name](stock.encode_with_hidden_pre(x)[0])
    acts, _ = sparse_like(stock).encode_with_hidden_pre(x)
    with LargestTensor() as largest:
        actual = statistics()[name](acts)
    assert materializations == []
    assert largest.numel <= max(N_ROWS * stock.cfg.k, stock.cfg.d_sae + 1)
    assert type(actual) is torch.Tensor
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype


PATTERN_USES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fired.sum()": lambda fired: fired.sum(),
    "fired.sum(dim=-1, keepdim=True)": lambda fired: fired.sum(dim=-1, keepdim=True),
    "fired.sum(0, keepdim=True)": lambda fired: fired.sum(0, keepdim=True),
    "fired.sum(dim=(0, 1))": lambda fired: fired.sum(dim=(0, 1)),
    "fired.sum(dim=[0])": lambda fired: fired.sum(dim=[0]),
    "fired.sum(0, dtype=torch.float64)": lambda fired: fired.sum(0, dtype=torch.float64),
    "fired.sum(dim=0, dtype=torch.float64)": lambda fired: fired.sum(dim=0, dtype=torch.float64),
    "fired.float().mean(0)": lambda fired: fired.float().mean(0),
    "fired.max()": lambda fired: fired.max(),
    "fired.any(0)": lambda fired: fired.any(0),
    "fired[2]": lambda fired: fired[2],
    "fired * 2.0": lambda fired: fired * 2.0,
    "fired.to(torch.int32)": lambda fired: fired.to(torch.int32),
    "fired.nonzero()": lambda fired: fired.nonzero(),
    "fired.clone().detach()": lambda fired: fired.clone().detach(),
    "~fired.bool()": lambda fired: ~fired.bool(),
}


@pytest.mark.parametrize("use", PATTERN_USES)
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
def test_other_uses_of_the_firing_pattern(pair: Pair, as_float: bool, use: str) -> None:
    expected, actual = (
        acts.bool().float() if as_float else acts.bool()
        for acts in (pair.stock_output.feature_acts, pair.output.feature_acts)
    )
    assert isinstance(actual, FiringPattern)
    expected, actual = PATTERN_USES[use](expected), PATTERN_USES[use](actual)
    assert type(actual) is torch.Tensor
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_firing_pattern_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    stock = make_stock()
    x = zipf_inputs(stock, max(1, torch.Size(shape).numel())).view(*shape, stock.cfg.d_in)
    expected = stock.encode_with_hidden_pre(x)[0].bool().float()
    actual = sparse_like(stock).encode_with_hidden_pre(x)[0].bool().float()
    for dim in (0, -1):
        assert torch.equal(actual.sum(dim), expected.sum(dim))


def save_and_load(tensor: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    buffer.seek(0)
    return torch.load(buffer)


USES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a + 1": lambda a: a + 1,
    "1 + a": lambda a: 1 + a,
    "a * tensor": lambda a: a * torch.arange(a.shape[-1]),
    "tensor * a": lambda a: torch.arange(a.shape[-1]) * a,
    "tensor -= a": lambda a: torch.ones(a.shape).double().sub_(a.detach()),
    "a @ matrix": lambda a: a @ torch.ones(a.shape[-1], 2, dtype=a.dtype),
    "matrix @ a": lambda a: torch.ones(2, a.shape[0], dtype=a.dtype) @ a,
    "a @ a.T": lambda a: a @ a.T,
    "-a": lambda a: -a,
    "a ** 2": lambda a: a**2,
    "a > 0": lambda a: a > 0,
    "0 < a": lambda a: 0 < a,  # noqa: SIM300
    "a == a": lambda a: a == a,
    "tensor == a": lambda a: torch.zeros(a.shape) == a,
    "a[2]": lambda a: a[2],
    "a[:, 3:7]": lambda a: a[:, 3:7],
    "a[mask]": lambda a: a[a > 0.5],
    "tensor[a > 0]": lambda a: torch.ones(a.shape)[a > 0],
    "iteration": lambda a: torch.stack(list(a)),
    "unpacking": lambda a: [*a][1],
    "a.sum()": lambda a: a.sum(),
    "a.sum(-1)": lambda a: a.sum(-1),
    "a.mean(0)": lambda a: a.mean(0),
    "a.max(-1)": lambda a: a.max(-1).values,
    "a.sort()": lambda a: a.sort(dim=-1).values,
    "a.topk(3)": lambda a: a.topk(3).values,
    "a.norm()": lambda a: a.norm(),
    "a.nonzero()": lambda a: a.nonzero(),
    "a.abs().max()": lambda a: a.abs().max(),
    "a.T": lambda a: a.T,
    "a.view(-1)": lambda a: a.view(-1),
    "a.reshape": lambda a: a.reshape(2, -1),
    "a.flatten()": lambda a: a.flatten(),
    "a.unsqueeze(0)": lambda a: a.unsqueeze(0),
    "a.expand": lambda a: a.expand(3, *a.shape),
    "a.clone()": lambda a: a.clone(),
    "a.detach()": lambda a: a.detach(),
    "a.data": lambda a: a.data,
    "a.cpu()": lambda a: a.cpu(),
    "a.float()": lambda a: a.float(),
    "a.bfloat16()": lambda a: a.detach().round().bfloat16(),
    "a.to(dtype)": lambda a: a.to(torch.float32),
    "a.to(device)": lambda a: a.to("cpu"),
    "a.to(other)": lambda a: a.to(torch.zeros(1)),
    "tensor.to(a)": lambda a: torch.ones(3).to(a),
    "a.type_as": lambda a: torch.ones(3).type_as(a),
    "a.contiguous()": lambda a: a.contiguous(),
    "a.to_dense()": lambda a: a.to_dense(),
    "a.to_sparse()": lambda a: a.detach().to_sparse().to_dense(),
    "a.new_zeros": lambda a: a.new_zeros(3),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "cat": lambda a: torch.cat([a, a.new_ones(1, a.shape[1])]),
    "stack": lambda a: torch.stack([a, a]),
    "where": lambda a: torch.where(a > 0, a, -1.0),
    "einsum": lambda a: torch.einsum("bs,bs->b", a, a),
    "einops": lambda a: einops.rearrange(a, "b s -> s b"),
    "relu": F.relu,
    "mse_loss": lambda a: F.mse_loss(a, torch.zeros_like(a)),
    "linear": lambda a: F.linear(a, torch.ones(3, a.shape[-1], dtype=a.dtype)),
    "numpy": lambda a: torch.from_numpy(a.detach().numpy()),
    "np.asarray": lambda a: torch.from_numpy(np.asarray(a.detach())),
    "dlpack": lambda a: torch.from_dlpack(a.detach()),
    "tolist": lambda a: torch.tensor(a.tolist(), dtype=torch.float64),
    "item": lambda a: torch.tensor(a.max().item()),
    "float()": lambda a: torch.tensor(float(a.max())),
    "is_contiguous": lambda a: a.is_contiguous(),
    "stride": lambda a: a.stride(),
    "len": len,
    "shape": lambda a: a.shape,
    "size(0)": lambda a: a.size(0),
    "numel": lambda a: a.numel(),
    "ndim": lambda a: (a.ndim, a.dim()),
    "dtype": lambda a: a.dtype,
    "device": lambda a: a.device,
    "layout": lambda a: a.layout,
    "is_sparse": lambda a: a.is_sparse,
    "is_floating_point": lambda a: a.is_floating_point(),
    "element_size": lambda a: a.element_size(),
    "nbytes": lambda a: a.nbytes,
    "requires_grad": lambda a: a.requires_grad,
    "is_leaf": lambda a: a.is_leaf,
    "grad_fn": lambda a: a.grad_fn is not None,
    "is_tensor": torch.is_tensor,
    "torch.save": save_and_load,
    "pickle": lambda a: pickle.loads(pickle.dumps(a.detach())),
    "deepcopy": lambda a: copy.deepcopy(a.detach()),
    "copy": copy.copy,
    "allclose": lambda a: torch.allclose(a, a.clone()),
    "bool of a comparison": lambda a: bool((a >= a).all()),
    "isnan": lambda a: torch.isnan(a).any(),
    "histc": lambda a: a.detach().histc(5, -1000, 1000),
    "vmap": lambda a: torch.vmap(lambda row: row * 2)(a.detach()),
}


# Of each way in which PyTorch and others get at a tensor, one.
SAMPLE = {
    "1 + a", "a @ a.T", "tensor == a", "a[mask]", "iteration", "a.bfloat16()", "tensor.to(a)",
    "zeros_like", "cat", "einops", "numpy", "dlpack", "item", "shape", "vmap",
}  # fmt: skip
uses = [pytest.param(use, marks=[] if use in SAMPLE else [pytest.mark.exhaustive]) for use in USES]


def test_the_sample_is_of_the_uses() -> None:
    assert USES.keys() >= SAMPLE


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("use", uses)
def test_every_use_sees_an_ordinary_tensor(pair: Pair, use: str, name: str) -> None:
    lazy = getattr(pair.output, name)
    assert isinstance(lazy, OnDemandTensor)
    expected = USES[use](getattr(pair.stock_output, name))
    actual = USES[use](lazy)
    if not isinstance(expected, torch.Tensor):
        assert actual == expected
        return
    assert type(actual) is torch.Tensor
    assert actual.dtype == expected.dtype
    assert actual.requires_grad == expected.requires_grad
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", TENSORS)
def test_printing_shows_the_values(pair: Pair, name: str) -> None:
    actual = getattr(pair.output, name)
    for text in (repr(actual), str(actual), f"{actual}"):
        assert text.startswith("tensor(")
        assert "grad_fn" in text
    assert f"{actual.max():.3f}" == f"{getattr(pair.stock_output, name).max():.3f}"


def test_without_gradients_nothing_requires_them(pair: Pair) -> None:
    with torch.no_grad():
        output = forward_pass(pair.sparse, pair.x)
    for name in TENSORS:
        assert not getattr(output, name).requires_grad
        assert not getattr(output, name).clone().requires_grad


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "a[0] = 0": lambda a: a.__setitem__(0, 0.0),
    "a[:, 3] = 1": lambda a: a.__setitem__((slice(None), 3), 1.0),
    "a[mask] = 2": lambda a: a.__setitem__(a > 0.5, 2.0),
    "mul_": lambda a: a.mul_(2),
    "zero_": lambda a: a.zero_(),
    "fill_": lambda a: a.fill_(0.5),
    "clamp_": lambda a: a.clamp_(max=0.3),
    "copy_": lambda a: a.copy_(torch.ones(a.shape)),
    "index_fill_": lambda a: a.index_fill_(1, torch.tensor([3]), 1.0),
    "of a view": lambda a: a[1].mul_(3),
    "of a detached alias": lambda a: a.detach()[2].zero_(),
    "F.relu inplace": lambda a: F.relu(a.sub_(0.5), inplace=True),
    "out=": lambda a: torch.add(torch.zeros(a.shape), 1, out=a.detach()),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_are_seen_by_decode(pair: Pair, write: str) -> None:
    sums = []
    for sae in (pair.stock, pair.sparse):
        acts, _ = sae.encode_with_hidden_pre(pair.x)
        unwritten = sae.decode(acts)
        WRITES[write](acts)
        written = sae.decode(acts)
        assert not torch.allclose(written, unwritten)
        with torch.no_grad():
            pattern = acts.bool().float()
            sums.append((written, pattern.sum(0), pattern.sum(-1), acts.clone()))
        sae.zero_grad()
        (written * torch.arange(sae.cfg.d_in)).sum().backward()
    for expected, actual in zip(*sums, strict=True):
        torch.testing.assert_close(actual, expected)
    expected, actual = gradients(pair.stock), gradients(pair.sparse)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)


@pytest.mark.parametrize("write", WRITES)
def test_writes_to_hidden_pre_are_kept(pair: Pair, write: str) -> None:
    with torch.no_grad():
        for output in (pair.stock_output, pair.output):
            WRITES[write](output.hidden_pre.detach())
    torch.testing.assert_close(pair.output.hidden_pre.clone(), pair.stock_output.hidden_pre)


def test_auxk_sees_a_write_to_hidden_pre(pair: Pair) -> None:
    losses = []
    for sae in (pair.stock, pair.sparse):
        acts, hidden_pre = sae.encode_with_hidden_pre(pair.x)
        sae_out = sae.decode(acts)
        hidden_pre.mul_(2)
        mask = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
        mask[:10] = True
        losses.append(sae.calculate_topk_aux_loss(pair.x, sae_out, hidden_pre, mask))
    torch.testing.assert_close(losses[1], losses[0])


def test_a_tensor_is_computed_once(pair: Pair, materializations: list[type]) -> None:
    acts = pair.output.feature_acts
    assert acts.detach().data_ptr() == acts.detach().data_ptr()
    assert materializations == [SparseFeatureActs] * 2, "both looks asked for the same tensor"


@pytest.mark.parametrize("name", TENSORS)
def test_a_first_look_without_gradients_does_not_cut_the_graph(pair: Pair, name: str) -> None:
    with torch.no_grad():
        getattr(pair.output, name).max()
    value = getattr(pair.output, name) * 1.0
    assert value.requires_grad
    for output in (pair.stock_output, pair.output):
        (getattr(output, name) ** 2).sum().backward()
    actual = gradients(pair.sparse)
    for parameter, gradient in gradients(pair.stock).items():
        torch.testing.assert_close(actual[parameter], gradient, msg=parameter)


@pytest.fixture
def gradient_readers() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    def retained(acts: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out.sum().backward()
        assert acts.grad is not None, "no gradient was retained"
        return acts.grad

    return {
        "autograd.grad": lambda acts, out: torch.autograd.grad(out.sum(), acts)[0],
        "retain_grad": retained,
    }


@pytest.mark.parametrize("reader", ["autograd.grad", "retain_grad"])
def test_gradient_with_respect_to_activations(
    pair: Pair,
    gradient_readers: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
    reader: str,
) -> None:
    """As in attributions, where activations are looked at before they are decoded."""
    results = []
    for sae in (pair.stock, pair.sparse):
        acts, _ = sae.encode_with_hidden_pre(pair.x)
        acts.retain_grad()
        results.append(gradient_readers[reader](acts, sae.decode(acts)))
    torch.testing.assert_close(results[1], results[0])


def test_gradient_with_respect_to_encode(pair: Pair) -> None:
    results = []
    for sae in (pair.stock, pair.sparse):
        acts = sae.encode(pair.x)
        results.append(torch.autograd.grad(sae.decode(acts).sum(), acts)[0])
    torch.testing.assert_close(results[1], results[0])


def test_reads_after_the_optimizer_step() -> None:
    stock = make_stock()
    x = zipf_inputs(stock, N_ROWS)
    expected_acts, expected_pre = (tensor.detach() for tensor in stock.encode_with_hidden_pre(x))
    sparse = sparse_like(stock)
    trainer = make_trainer(sparse)

    output = trainer.step(x)
    torch.testing.assert_close(output.feature_acts.detach(), expected_acts)
    with pytest.raises(RuntimeError, match=r"hidden_pre .* weights have changed .*'dense'"):
        output.hidden_pre.max()
    # Its shape is still known.
    assert output.hidden_pre.shape == (N_ROWS, stock.cfg.d_sae)

    kept = forward_pass(sparse_like(stock), x).hidden_pre
    kept.max()
    torch.testing.assert_close(kept.detach(), expected_pre)


def test_hidden_pre_read_in_time_outlives_the_step() -> None:
    stock = make_stock()
    x, sparse = zipf_inputs(stock, N_ROWS), sparse_like(stock)
    expected = stock.encode_with_hidden_pre(x)[1].detach()
    optimizer = torch.optim.Adam(sparse.parameters(), lr=0.1)
    output = forward_pass(sparse, x)
    output.hidden_pre.max()
    output.loss.backward()
    optimizer.step()
    torch.testing.assert_close(output.hidden_pre.detach(), expected)


CHANGES: dict[str, Callable[[TopKTrainingSAE], Any]] = {
    "load_state_dict": lambda sae: sae.load_state_dict(
        {name: 2 * value for name, value in sae.state_dict().items()}
    ),
    "in place": lambda sae: sae.W_enc.detach().mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_hidden_pre_is_never_that_of_other_weights(pair: Pair, change: str) -> None:
    """It raises, or it is what it was; it is not silently computed from the new weights."""
    with torch.no_grad():
        CHANGES[change](pair.sparse)
    try:
        actual = pair.output.hidden_pre.detach()
    except RuntimeError as error:
        assert "hidden_pre" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(actual, pair.stock_output.hidden_pre.detach())


def test_decode_after_the_decoder_changed(pair: Pair) -> None:
    results = []
    for sae in (pair.stock, pair.sparse):
        acts, _ = sae.encode_with_hidden_pre(pair.x)
        with torch.no_grad():
            sae.W_dec.mul_(torch.linspace(0.5, 2, sae.cfg.d_sae).unsqueeze(1))
        results.append(sae.decode(acts))
    torch.testing.assert_close(results[1], results[0])


def test_outputs_of_earlier_steps_keep_their_values() -> None:
    """As SAELens's trainer of several SAEs needs it, which logs after all of them stepped."""
    stock = make_stock()
    trainers = [make_trainer(sae) for sae in (stock, sparse_like(stock))]
    batches = [zipf_inputs(stock, N_ROWS) for _ in range(3)]
    outputs = [[trainer.step(batch) for batch in batches] for trainer in trainers]
    for expected, actual in zip(*outputs, strict=True):
        for name in ("feature_acts", "sae_out", "loss"):
            torch.testing.assert_close(
                getattr(actual, name).detach(), getattr(expected, name).detach(), rtol=1e-3,
                atol=1e-4,
            )  # fmt: skip


@pytest.fixture(params=["no_grad", "inference_mode", "eval"])
def context(request: pytest.FixtureRequest) -> Iterator[str]:
    request.getfixturevalue("pair")  # Made outside of the context.
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "eval": torch.enable_grad(),
    }
    with contexts[request.param]:
        yield request.param


@pytest.mark.usefixtures("context")
def test_public_methods_without_gradients(pair: Pair) -> None:
    for sae in (pair.stock, pair.sparse):
        sae.eval()
    for method in ("encode", "forward"):
        actual = getattr(pair.sparse, method)(pair.x)
        assert type(actual) is torch.Tensor
        torch.testing.assert_close(actual, getattr(pair.stock, method)(pair.x))
    acts, hidden_pre = pair.sparse.encode_with_hidden_pre(pair.x)
    expected_acts, expected_pre = pair.stock.encode_with_hidden_pre(pair.x)
    torch.testing.assert_close(pair.sparse.decode(acts), pair.stock.decode(expected_acts))
    torch.testing.assert_close(acts.clone(), expected_acts)
    torch.testing.assert_close(hidden_pre.clone(), expected_pre)


def test_a_first_look_in_inference_mode(pair: Pair) -> None:
    with torch.inference_mode():
        expected = pair.stock_output.feature_acts.max().item()
        assert pair.output.feature_acts.max().item() == pytest.approx(expected)


def test_nested_in_containers(pair: Pair) -> None:
    lazy = pair.output.feature_acts
    expected = pair.stock_output.feature_acts
    torch.testing.assert_close(torch.cat([lazy, lazy]), torch.cat([expected, expected]))
    leaves, _ = tree_flatten({"acts": [lazy]})
    assert leaves == [lazy] or leaves[0] is lazy
    torch.testing.assert_close(
        torch.block_diag(lazy.detach(), lazy.detach()),
        torch.block_diag(expected.detach(), expected.detach()),
    )
    torch.testing.assert_close(
        torch.func.vjp(lambda a: a * 2, lazy.detach())[0], 2 * expected.detach()
    )


def test_dead_latents_are_read_from_the_same_pattern() -> None:
    """`n_forward_passes_since_fired` and the firing counts of stock, with clipped zeros."""
    stock = make_stock()
    with torch.no_grad():
        stock.b_enc.sub_(3)
    x = zipf_inputs(stock, N_ROWS)
    sparse = sparse_like(stock)
    trainers = [make_trainer(sae) for sae in (stock, sparse)]
    for trainer in trainers:
        trainer.n_forward_passes_since_fired += 5
        trainer.step(x)
    assert torch.equal(
        trainers[0].n_forward_passes_since_fired, trainers[1].n_forward_passes_since_fired
    )
    assert torch.equal(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    assert 0 < trainers[0].act_freq_scores.sum() < N_ROWS * stock.cfg.k


def test_auxk_with_a_hidden_pre_that_was_read(pair: Pair) -> None:
    mask = dead_mask(pair.stock, 10)
    losses = []
    for sae in (pair.stock, pair.sparse):
        acts, hidden_pre = sae.encode_with_hidden_pre(pair.x)
        hidden_pre.max()
        sae_out = sae.decode(acts)
        losses.append(sae.calculate_topk_aux_loss(pair.x, sae_out, hidden_pre, mask))
    torch.testing.assert_close(losses[1], losses[0])
