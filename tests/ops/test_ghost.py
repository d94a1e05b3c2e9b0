"""Ghost gradients: values, loss and gradients against the formula, and against SAELens 5."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.activation.ghost import (
    EPS,
    dense_ghost_grad_loss,
    ghost_grad_loss,
    ghost_loss,
    ghost_values,
)
from tests.conftest import Target
from tests.support.ghost import formula
from tests.support.ops import assert_within_budget

FLOAT64 = torch.float64
GOLDEN = Path(__file__).with_name("data") / "ghost_saelens_5.11.0.json"

Leaves = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def leaves_of(n_rows: int, n: int, width: int, d_in: int) -> Leaves:
    """Random inputs of `ghost_grad_loss`; what padding holds must not matter."""
    products, W_dec = torch.randn(n_rows, width), torch.randn(width, d_in)
    products[:, n:], W_dec[n:] = 9.0, 0.0
    return {
        "products": products,
        "bias": torch.randn(n),
        "W_dec": W_dec,
        "residual": torch.randn(n_rows, d_in),
    }


def values_of(loss: Loss, leaves: Leaves, device: Any, dtype: torch.dtype) -> Leaves:
    """The loss, `[1, 1]`, and the gradients of products, bias and weights, by name."""
    inputs = {
        name: value.detach().to(device, dtype).requires_grad_(name != "residual")
        for name, value in leaves.items()
    }
    out = loss(*inputs.values())
    (3.0 * out).backward()
    found = {"loss": out.detach().view(1, 1)}
    for name in ("products", "bias", "W_dec"):
        gradient = inputs[name].grad
        assert gradient is not None
        found[name] = gradient.view(-1, gradient.shape[-1])
    return found


def assert_is_formula(leaves: Leaves, backend: Backend, device: Any, dtype: torch.dtype) -> None:
    """No more than twice as far from the formula in float64 as the formula in the same dtype."""
    leaves = {name: value.to(dtype) for name, value in leaves.items()}
    actual = values_of(partial(ghost_grad_loss, backend=backend), leaves, device, dtype)
    plain = values_of(formula, leaves, device, dtype)
    exact = values_of(formula, leaves, device, FLOAT64)
    for name, value in actual.items():
        assert value.isfinite().all(), name
        assert value.dtype == dtype
        # By the size of the whole: a gradient is a difference of two terms of each row.
        scale = exact[name].abs().amax().expand(exact[name].shape)
        if dtype == FLOAT64:
            atol = 1e-12 * scale.amax().item()
            torch.testing.assert_close(value, exact[name], rtol=1e-9, atol=atol)
        else:
            eps = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
            assert_within_budget(value, plain[name], exact[name], 4 * eps * scale)


@pytest.mark.parametrize(
    ("n_rows", "n", "width", "d_in"),
    [(5, 3, 64, 7), (1, 1, 64, 4), (9, 64, 64, 13), (4, 65, 128, 1), (3, 9, 9, 33)],
)
def test_is_the_formula(
    n_rows: int,
    n: int,
    width: int,
    d_in: int,
    target: Target,
    dtype: torch.dtype,
    backend: Backend,
) -> None:
    leaves = leaves_of(n_rows, n, width, d_in)
    assert_is_formula(leaves, backend, target.device, dtype)


@pytest.mark.parametrize("size", [1e3, -1e3, 88.0, 3e4])
def test_pre_activations_whose_exponentials_overflow(
    size: float, backend: Backend, device: torch.device
) -> None:
    leaves = leaves_of(6, 5, 64, 7)
    assert not (size + leaves["products"]).abs().exp().isfinite().all()
    leaves["products"][:3] += size
    leaves["products"][3:] *= abs(size)
    assert_is_formula(leaves, backend, device, torch.float32)


def test_the_loss_does_not_change_when_a_row_is_shifted(
    backend: Backend, device: torch.device
) -> None:
    leaves = {name: value.to(device) for name, value in leaves_of(4, 5, 64, 7).items()}
    shifted = {
        **leaves,
        "products": leaves["products"] + 64 * torch.arange(4.0).to(device)[:, None],
    }
    losses = [ghost_grad_loss(*one.values(), backend=backend) for one in (leaves, shifted)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def zero_residual(leaves: Leaves) -> None:
    leaves["residual"][2] = 0


def zero_decoder_row(leaves: Leaves) -> None:
    leaves["W_dec"][1] = 0


def tiny_residual(leaves: Leaves) -> None:
    leaves["residual"] *= 1e-4  # eps counts


def huge_residual(leaves: Leaves) -> None:
    leaves["residual"] *= 1e6


def tiny_decoder(leaves: Leaves) -> None:
    leaves["W_dec"] *= 1e-6  # eps counts


@pytest.mark.parametrize(
    "change", [zero_residual, zero_decoder_row, tiny_residual, huge_residual, tiny_decoder]
)
def test_edges(change: Callable[[Leaves], None], backend: Backend, device: torch.device) -> None:
    leaves = leaves_of(5, 4, 64, 6)
    change(leaves)
    assert_is_formula(leaves, backend, device, torch.float32)


def test_a_residual_of_zero_gives_nothing(backend: Backend, device: torch.device) -> None:
    leaves = leaves_of(5, 4, 64, 6)
    leaves["residual"].zero_()
    found = values_of(partial(ghost_grad_loss, backend=backend), leaves, device, torch.float32)
    assert all(value.count_nonzero() == 0 for value in found.values())


def test_a_decoder_of_zero_is_finite(backend: Backend, device: torch.device) -> None:
    leaves = leaves_of(5, 4, 64, 6)
    leaves["W_dec"].zero_()
    assert_is_formula(leaves, backend, device, torch.float32)


def test_rows_wider_than_a_program_holds(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Largest values in the last block: what a first block alone would give overflows."""
    kernels = pytest.importorskip("saelens_sparse.ops.activation.ghost_kernels")
    monkeypatch.setattr(kernels, "LAUNCH", kernels.GhostLaunch(BLOCK=32))
    leaves = leaves_of(3, 100, 128, 75)
    leaves["products"][:, 97] = 200.0
    assert_is_formula(leaves, backend, device, torch.float32)


@pytest.mark.parametrize("n", [4095, 4096, 4097, 9000])
def test_widths_about_what_a_program_holds(n: int, backend: Backend, device: torch.device) -> None:
    width = -(-n // 64) * 64
    products, bias = torch.randn(2, width).to(device), torch.randn(n).to(device)
    products[:, n:] = torch.nan
    values = ghost_values(products, bias, backend)
    pre_acts = products[:, :n].double() + bias.double()
    expected = (pre_acts - pre_acts.amax(1, keepdim=True)).exp().float()
    torch.testing.assert_close(values[:, :n], expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(values[:, n:], torch.zeros_like(values[:, n:]))


def test_a_bad_row_spoils_the_loss(backend: Backend, device: torch.device) -> None:
    for name in ("products", "residual", "W_dec"):
        leaves = {key: value.to(device) for key, value in leaves_of(5, 4, 64, 6).items()}
        leaves[name][2, 1] = torch.nan
        assert ghost_grad_loss(*leaves.values(), backend=backend).isnan(), name


def test_an_empty_batch(backend: Backend, device: torch.device) -> None:
    products = torch.zeros(0, 64, device=device, requires_grad=True)
    values = ghost_values(products, torch.zeros(3, device=device), backend)
    assert values.shape == (0, 64)
    ghosts = torch.zeros(0, 5, device=device, requires_grad=True)
    ghost_loss(ghosts, torch.zeros(0, 5, device=device), backend).backward()
    assert ghosts.grad is not None
    assert ghosts.grad.shape == (0, 5)


def test_what_lies_in_other_ways(backend: Backend, device: torch.device) -> None:
    leaves = leaves_of(5, 4, 64, 6)
    strided: Leaves = {
        "products": leaves["products"].T.contiguous().T,
        "bias": leaves["bias"].repeat_interleave(2)[::2],
        "W_dec": leaves["W_dec"].T.contiguous().T,
        "residual": leaves["residual"].T.contiguous().T,
    }
    found = [
        values_of(partial(ghost_grad_loss, backend=backend), one, device, torch.float32)
        for one in (leaves, strided)
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 2, 6), (1, 4, 6), (4, 1, 6)], ids=str)
def test_vectors_of_the_residual_are_rows(
    shape: tuple[int, ...], backend: Backend, device: torch.device
) -> None:
    """As where heads are apart: the reported MSE is a mean over all that is not the last."""
    leaves = leaves_of(4, 3, 64, 6)
    ghosts, residual = torch.randn(4, 6).to(device), leaves["residual"].to(device)
    d = shape[-1]
    expected = ghost_loss(ghosts.view(-1, d), residual.view(-1, d), backend)
    torch.testing.assert_close(
        ghost_loss(ghosts.view(shape), residual.view(shape), backend), expected
    )
    products, bias, W_dec = (leaves[name].to(device) for name in ("products", "bias", "W_dec"))
    whole, by_row = (
        ghost_grad_loss(products, bias, W_dec, one, backend)
        for one in (residual.view(shape), residual)
    )
    assert (whole == by_row) == (d == 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_float32_under_autocast(
    dtype: torch.dtype, target: Target, backend: Backend, device: torch.device
) -> None:
    if target.interpreted:
        pytest.skip("the interpreter is right in float32 only")
    ghosts = torch.randn(4, 20_000).to(device, dtype)
    residual = torch.randn(4, 20_000).to(device)
    with torch.autocast(device.type, dtype):
        actual = ghost_loss(ghosts, residual, backend)
    exact = ghost_loss(ghosts.double(), residual.double(), "torch")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_sums_are_float32_in_low_precision(
    target: Target, backend: Backend, device: torch.device
) -> None:
    """Rounding of a gradient's elements averages out along it; that of its sums does not."""
    if target.interpreted:
        pytest.skip("the interpreter is right in float32 only")
    rows = [torch.randn(4, 20_000).to(device, torch.bfloat16) for _ in range(2)]
    ghosts, exact = rows[0].clone().requires_grad_(), rows[0].double().requires_grad_()
    ghost_loss(ghosts, rows[1], backend).backward()
    ghost_loss(exact, rows[1].double(), "torch").backward()
    assert ghosts.grad is not None
    assert exact.grad is not None
    assert ghosts.grad.dtype == torch.bfloat16
    along = (ghosts.grad.double() * exact.grad).sum(1) / exact.grad.pow(2).sum(1)
    torch.testing.assert_close(along, torch.ones_like(along), rtol=2e-4, atol=0)


class Allocated(TorchDispatchMode):
    """Records the largest number of elements of a tensor with memory of its own."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor):
                continue
            if leaf.untyped_storage().data_ptr() not in self._known:
                self.numel = max(self.numel, leaf.numel())
        return out


@pytest.mark.default_algorithms
def test_the_loss_takes_no_memory_of_the_size_of_the_residual() -> None:
    ghosts = torch.randn(3000, 512, requires_grad=True)
    residual = torch.randn(3000, 512)
    with Allocated(ghosts, residual) as allocated:
        loss = ghost_loss(ghosts, residual, "torch")
    assert 0 < allocated.numel < residual.numel() / 4
    with Allocated(ghosts, residual) as allocated:
        loss.backward()
    assert allocated.numel == residual.numel(), "the recorder works"


@pytest.mark.gpu
def test_the_kernels_take_no_memory_but_their_results() -> None:
    ghosts = torch.randn(4096, 2048, device="cuda", requires_grad=True)
    residual = torch.randn(4096, 2048, device="cuda")
    products = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(8190, device="cuda")
    for call, expected in (
        (lambda: ghost_loss(ghosts, residual, "triton"), 0),
        (lambda: ghost_values(products, bias, "triton"), products.nbytes),
    ):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        taken = torch.cuda.max_memory_allocated() - before
        assert kept.numel() > 0
        assert expected <= taken < expected + 2**20


def test_the_same_bits_twice(backend: Backend, device: torch.device) -> None:
    leaves = leaves_of(9, 50, 64, 33)
    found = [
        values_of(partial(ghost_grad_loss, backend=backend), leaves, device, torch.float32)
        for _ in range(2)
    ]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_graph_of_the_gradient_is_refused(backend: Backend, device: torch.device) -> None:
    leaves = {name: value.to(device) for name, value in leaves_of(5, 4, 64, 6).items()}
    for name in ("products", "bias", "W_dec"):
        inputs = {key: value.clone().requires_grad_(key == name) for key, value in leaves.items()}
        loss = ghost_grad_loss(*inputs.values(), backend=backend)
        with pytest.raises(RuntimeError, match=r"create_graph=True.*implementation='dense'"):
            torch.autograd.grad(loss, inputs[name], create_graph=True)
    products = leaves["products"].requires_grad_()
    values = ghost_values(products, leaves["bias"], backend)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(values.sum(), products, create_graph=True)


def test_sizes_that_do_not_fit_are_named(backend: Backend, device: torch.device) -> None:
    products, rows = torch.zeros(2, 9, device=device), torch.zeros(2, 5, device=device)
    for n in (0, 10):
        with pytest.raises(ValueError, match=rf"len\(bias\) <= width; got {n} and 9"):
            ghost_values(products, torch.zeros(n, device=device), backend)
    with pytest.raises(ValueError, match=r"ghosts must have shape \[2, 5\]; got \[2, 9\]"):
        ghost_loss(products, rows, backend)


class TestDense:
    """The loss from all pre-activations, by operations of PyTorch."""

    @pytest.mark.parametrize("is_rescaled", [False, True])
    def test_is_the_formula(self, is_rescaled: bool) -> None:
        for n_dead in (1, 4, 9):
            hidden_pre = torch.randn(5, 9, dtype=FLOAT64)
            W_dec = torch.randn(9, 6, dtype=FLOAT64)
            residual = torch.randn(5, 6, dtype=FLOAT64)
            dead = torch.zeros(9, dtype=torch.bool)
            dead[torch.randperm(9)[:n_dead]] = True
            found: list[Leaves] = []
            for is_dense in (True, False):
                pre_acts, rows = (value.clone().requires_grad_() for value in (hidden_pre, W_dec))
                scaled = pre_acts * rows.norm(dim=1) if is_rescaled else pre_acts
                if is_dense:
                    loss = dense_ghost_grad_loss(
                        scaled, dead, rows, residual, is_rescaled=is_rescaled
                    )
                else:
                    none = torch.zeros(n_dead, dtype=FLOAT64)
                    loss = formula(pre_acts[:, dead], none, rows[dead], residual)
                loss.backward()
                assert pre_acts.grad is not None
                assert rows.grad is not None
                found.append({"loss": loss, "pre_acts": pre_acts.grad, "rows": rows.grad})
            for name, value in found[1].items():
                torch.testing.assert_close(found[0][name], value, rtol=1e-9, atol=1e-12)

    def test_is_zero_without_dead_latents(self) -> None:
        none = torch.zeros(9, dtype=torch.bool)
        loss = dense_ghost_grad_loss(
            torch.randn(5, 9), none, torch.randn(9, 6), torch.randn(5, 6), is_rescaled=True
        )
        assert loss == 0

    def test_has_second_derivatives(self) -> None:
        pre_acts = torch.randn(5, 9, requires_grad=True)
        dead = torch.ones(9, dtype=torch.bool)
        loss = dense_ghost_grad_loss(
            pre_acts, dead, torch.randn(9, 6), torch.randn(5, 6), is_rescaled=False
        )
        (gradient,) = torch.autograd.grad(loss, pre_acts, create_graph=True)
        gradient.pow(2).sum().backward()
        assert pre_acts.grad is not None
        assert pre_acts.grad.norm() > 0


CASES = {case["name"]: case for case in json.loads(GOLDEN.read_text())}
# Eps counts by a millionth where maxima are not zero.
TOLERANCE = {"some": 1e-12, "one": 1e-12, "all": 1e-12, "other_maxima": 1e-5}


class TestSAELens5:
    """
    Values of `sae_lens.training.training_sae.TrainingSAE.calculate_ghost_grad_loss` of SAELens
    5.11.0, an independent implementation.

    SAELens 5 divides by the loss of each element. Called with `self.mse_loss_fn =
    lambda p, t: (p - t).pow(2).sum(-1)`, and with `per_item_mse_loss` of the same function of
    `sae_out` and `x`, it divides by that of a row. It takes exponentials of the pre-activations as
    they are, without subtracting their maximum. In the cases "some", "one" and "all" the maximum of
    each row's dead latents is 0, so that eps counts as much as here. Gradients are autograd's, all
    in float64. The function was executed as it stands in the wheel's source.
    """

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {
            key: torch.tensor(value, dtype=torch.bool if key == "dead" else FLOAT64)
            for key, value in CASES[name].items()
            if key != "name"
        }

    @pytest.mark.parametrize("name", CASES)
    def test_loss_and_gradients(self, name: str) -> None:
        case, tolerance = self.tensors(name), TOLERANCE[name]
        dead, residual = case["dead"], case["sae_in"] - case["sae_out"]
        assert (case["hidden_pre"][:, dead].amax(1) == 0).all() == (name != "other_maxima")
        for is_dense in (True, False):
            hidden_pre, W_dec = (
                case[key].clone().requires_grad_() for key in ("hidden_pre", "W_dec")
            )
            if is_dense:
                loss = dense_ghost_grad_loss(hidden_pre, dead, W_dec, residual, is_rescaled=False)
            else:
                bias = torch.zeros(int(dead.sum()), dtype=FLOAT64)
                pad = torch.nn.functional.pad
                loss = ghost_grad_loss(
                    pad(hidden_pre[:, dead], (0, 3)), bias, pad(W_dec[dead], (0, 0, 0, 3)),
                    residual, "torch",
                )  # fmt: skip
            loss.backward()
            for actual, expected in (
                (loss, case["loss"]),
                (hidden_pre.grad, case["grad_hidden_pre"]),
                (W_dec.grad, case["grad_W_dec"]),
            ):
                assert actual is not None
                scale = expected.abs().amax().item()
                torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)

    @pytest.mark.parametrize("name", CASES)
    def test_by_each_backend(self, name: str, backend: Backend, device: torch.device) -> None:
        case = {
            key: value if key == "dead" else value.to(device, torch.float32)
            for key, value in self.tensors(name).items()
        }
        dead = case["dead"]
        products, W_dec = (
            value.contiguous().requires_grad_()
            for value in (case["hidden_pre"][:, dead], case["W_dec"][dead])
        )
        bias = torch.zeros(int(dead.sum()), device=device)
        loss = ghost_grad_loss(products, bias, W_dec, case["sae_in"] - case["sae_out"], backend)
        loss.backward()
        torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)
        for leaf, name in ((products, "grad_hidden_pre"), (W_dec, "grad_W_dec")):
            expected = case[name][:, dead] if leaf is products else case[name][dead]
            torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)


def test_eps_is_that_of_saelens() -> None:
    assert EPS == 1e-6
