"""Each use of `feature_acts` and `hidden_pre` of a training step sees an ordinary tensor."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saelens_sparse.codes.on_demand import OnDemandTensor
from tests.support.pair import TENSORS, Pair
from tests.support.saes import (
    forward_pass,
    gradients,
)


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
