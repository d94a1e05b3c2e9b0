"""Gradients that are never held: their norm, the update that takes them, and what it writes."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.codes.on_demand import code_of
from saelens_sparse.codes.step import Offer, current_step, offer_to
from saelens_sparse.ops.common.precision import FLOAT8
from saelens_sparse.ops.pairs import LatentOrder, Rows
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import row_norms
from saelens_sparse.ops.screen.round_kernels import round_rows, settle_rows
from saelens_sparse.ops.update.adam_kernels import AdamSettings
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.row_gradient_kernels import RowGradientSums
from saelens_sparse.ops.update.weight_cache import WeightCopy, WeightView
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.conftest import Target, target_parameters
from tests.support.architectures import Subject, subjects
from tests.support.ops import rows_of_lengths
from tests.support.saes import make_stock, sparse_like, superposed_rows
from tests.support.trainers import own_trainer, state_of, train

pytestmark = pytest.mark.filterwarnings("ignore:The AccumulateGrad node")

LR, BETA1, BETA2, EPS = 0.01, 0.9, 0.999, 1e-8
STEP, DIVISOR = 3, 1.7

KERNELS = frozenset({"triton-interpreter", "triton-cuda"})
kernels = pytest.mark.parametrize(
    "target", [p for p in target_parameters(interpreted=True) if p.values[0].backend == "triton"]
)


@pytest.fixture(autouse=True)
def pairs_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SAEs of these tests have few latents."""
    monkeypatch.setattr("saelens_sparse.codes.step.MAX_PAIRS_PER_LATENT", 1e9)


def make_gradient(
    target: Target, d: int, *, block: bool, ragged: bool, dtype: torch.dtype = torch.float32
) -> RowGradient:
    """A gradient over 21 latents: one fires on every row, some on none, one pair is clipped."""
    n_rows, d_sae, k = (150, 21, 3) if not target.interpreted else (140, 21, 2)
    latents = 2 + torch.rand(n_rows, d_sae - 2).argsort(1)[:, :k] // 2
    latents[:, 0] = 0
    latents[5, 1] = d_sae  # clipped
    coefficients = torch.randn(n_rows, k)
    batch = torch.randn(n_rows, d, dtype=dtype)
    if ragged:
        lengths = torch.randint(1, k + 1, (n_rows,))
        inside = torch.arange(k) < lengths[:, None]
        rows = rows_of_lengths(lengths.to(target.device))
        latents, coefficients = latents[inside], coefficients[inside]
    else:
        rows = Rows.regular(n_rows, k)
        latents, coefficients = latents.flatten(), coefficients.flatten()
    order = LatentOrder.of_keys(latents.int().to(target.device), rows, d_sae)
    some = RowBlock(torch.tensor([20, 4, 0], device=target.device), 5) if block else None
    added = torch.randn(5, d, device=target.device) if block else None
    return RowGradient(
        order, coefficients.to(target.device), batch.to(target.device), some, added, False
    )


def exact_rows(gradient: RowGradient) -> torch.Tensor:
    """The gradient in float64, summed pair by pair."""
    order = gradient.order
    rows = torch.zeros(order.d_sae + 1, gradient.batch.shape[1], dtype=torch.float64)
    coefficients = gradient.coefficients[order.pairs].double().cpu()
    batch = gradient.batch.double().cpu()[order.rows.of(order.pairs).cpu()]
    rows.index_add_(0, order.keys.long().cpu(), coefficients[:, None] * batch)
    if gradient.block is not None and gradient.block_gradient is not None:
        latents = gradient.block.latents.cpu()
        rows[latents] += gradient.block_gradient[: latents.numel()].double().cpu()
    return rows[:-1]


@pytest.fixture(params=["one tile", "tile by tile", "latent by latent"])
def launch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that one program holds, and rows that it does not, in either order."""
    if request.param != "one tile":
        module = import_module("saelens_sparse.ops.update.row_gradient_kernels")
        pairs = math.inf if request.param == "latent by latent" else 0
        launch = replace(module.LAUNCH, COLS=16, BY_LATENT_PAIRS=pairs)
        monkeypatch.setattr(module, "LAUNCH", launch)
        monkeypatch.setattr("saelens_sparse.ops.rows.kernels.NORM_COLS", 16)


@kernels
@pytest.mark.pairwise
@pytest.mark.usefixtures("launch")
@pytest.mark.parametrize("ragged", [False, True], ids=["k a row", "ragged"])
@pytest.mark.parametrize("block", [False, True], ids=["no block", "block"])
def test_norm_and_update_are_those_of_the_dense_gradient(
    target: Target, ragged: bool, block: bool
) -> None:
    for d, dtype in [(37, target.dtypes[0]), (24, target.dtypes[-1])]:
        gradient = make_gradient(target, d, block=block, ragged=ragged, dtype=dtype)
        exact = exact_rows(gradient)
        weight, first, second = torch.randn(3, 21, d).to(target.device, dtype)
        second = second.square()
        expected = adam_in_float64(weight, first, second, exact)

        sums = RowGradientSums(gradient)
        assert sums.square_sum().item() == pytest.approx(exact.square().sum().item(), rel=1e-5)
        rounded = WeightCopy.of(weight, "rounded", torch.bfloat16)
        norms = WeightCopy.of(weight, "norms", torch.float32)
        copy = rounded if block else norms
        step, divisor, lr = (torch.tensor(x, device=target.device) for x in (3.0, DIVISOR, LR))
        sums.update(weight, first, second, step, divisor, AdamSettings(lr, BETA1, BETA2, EPS), copy)
        eps = torch.finfo(dtype).eps
        for actual, value in zip((weight, first, second), expected, strict=True):
            assert (actual.double().cpu() - value).norm() <= 8 * eps * value.norm()
        if not block:
            assert torch.equal(norms.values, row_norms(weight, "triton"))
            exact_norms = weight.double().norm(dim=1).float()
            torch.testing.assert_close(norms.values, exact_norms, rtol=1e-6, atol=0)
        elif target.interpreted:  # whose conversion truncates
            torch.testing.assert_close(rounded.values.float(), weight, rtol=2**-7, atol=0)
        else:
            assert torch.equal(rounded.values, weight.bfloat16())


@kernels
@pytest.mark.usefixtures("launch")
def test_updates_round_rows_with_the_scales_of_before(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds scales that fit most rows."""
    shares: list[float] = []

    def settle(*arguments: torch.Tensor) -> None:
        norms = arguments[3].sum(1).sqrt()
        shares.append(((norms >= 64) & (norms < 128)).float().mean().item())
        settle_rows(*arguments)

    monkeypatch.setattr("saelens_sparse.ops.update.row_gradient_kernels.settle_rows", settle)
    gradient = make_gradient(target, 37, block=False, ragged=False)
    weight = torch.randn(21, 37, device=target.device)
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    copy = WeightCopy.of(weight, "scaled", FLOAT8)
    step, divisor, lr = (torch.tensor(x, device=target.device) for x in (1.0, DIVISOR, 0.3))
    for _ in range(2):
        sums = RowGradientSums(gradient)
        sums.update(weight, first, second, step, divisor, AdamSettings(lr, BETA1, BETA2, EPS), copy)
        rounded, errors = round_rows(weight, FLOAT8)
        assert copy.errors is not None
        assert torch.equal(copy.values.float(), rounded.float())
        torch.testing.assert_close(copy.errors, errors, rtol=1e-5, atol=0)
    assert shares[0] == 0
    assert 0.5 < shares[1] < 1


def adam_in_float64(
    weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    weight, first, second = (part.double().cpu() for part in (weight, first, second))
    gradient = gradient / DIVISOR
    first = BETA1 * first + (1 - BETA1) * gradient
    second = BETA2 * second + (1 - BETA2) * gradient**2
    root = (second / (1 - BETA2**STEP)).sqrt() + EPS
    return weight - LR * first / (1 - BETA1**STEP) / root, first, second


def test_a_copy_is_known_to_be_stale() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    rounded = WeightCopy.of(weight, "rounded", torch.bfloat16)
    assert not rounded.is_of(weight)
    rounded.is_written()
    assert rounded.is_of(weight)
    with torch.no_grad():
        weight.mul_(2)
    assert not rounded.is_of(weight)
    rounded.is_written()
    weight.data = weight.data.clone()
    assert not rounded.is_of(weight)


def train_both_ways(
    subject: Subject, n_steps: int, *, autocast: bool, **settings: Any
) -> list[SparseSAETrainer]:
    """Trainers with and without buffers for gradients, after the same steps."""
    trainers: list[SparseSAETrainer] = []
    for buffers in (True, False):
        torch.manual_seed(0)
        sparse = subject.sparse(subject.stock())
        sparse.cfg.gradient_buffers = buffers
        sparse.cfg.cuda_graph = False
        trainer = own_trainer(sparse, autocast=autocast, **settings)
        torch.manual_seed(1)
        n_rows = subject.target.few_rows(32)
        batches = [superposed_rows(sparse, n_rows) for _ in range(n_steps)]
        train(trainer, batches)
        trainers.append(trainer)
    return trainers


def reads_decoder_norms(sae: Any) -> bool:
    return getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)


def rows_of(sae: Any, name: str) -> torch.Tensor:
    return sae.W_enc.T if name == "W_enc" else sae.W_dec


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
@subjects(KERNELS)
def test_trains_as_with_buffers(subject: Subject, dtype: torch.dtype) -> None:
    """With latents that die at once, so that AuxK adds rows to the gradients."""
    n_steps = 40
    if subject.target.interpreted:
        # The interpreter cuts a bfloat16 copy of W_enc off, where a GPU and PyTorch round it.
        n_steps = 2 if subject.traits.steps_interpreted and dtype == torch.float32 else 1
    with_buffers, without = train_both_ways(
        subject, n_steps, dead_feature_window=0, autocast=dtype == torch.bfloat16
    )
    assert without.dead_neurons.any()
    expected, actual = state_of(with_buffers), state_of(without)
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name
    assert not with_buffers.optimizer.weights.copies
    expected_copies = {"W_enc"} if dtype == torch.bfloat16 else set()
    expected_copies |= {"W_dec"} if reads_decoder_norms(without.sae) else set()
    copies = without.optimizer.weights.copies
    assert len(copies) == len(expected_copies)
    for name in expected_copies:
        assert any(copy.is_of(rows_of(without.sae, name)) for copy in copies), name


@kernels
def test_no_weight_has_a_gradient(target: Target) -> None:
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    trainer = own_trainer(sparse)
    held: list[bool] = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: held.extend([sparse.W_enc.grad is None, sparse.W_dec.grad is None])
    )
    batches = [superposed_rows(stock, target.few_rows(32))]
    train(trainer, batches)
    assert held == [True, True]
    # Whoever hooks into a parameter gets a gradient.
    shapes: list[torch.Size] = []
    sparse.W_enc.register_post_accumulate_grad_hook(lambda p: shapes.append(p.grad.shape))
    train(trainer, batches)
    assert shapes == [sparse.W_enc.shape]
    assert held[2:] == [False, True]


def with_penalty(
    sae: Any, original: Callable[..., dict[str, torch.Tensor]], **kwargs: Any
) -> dict[str, torch.Tensor]:
    """An SAE's auxiliary losses and one more, which reads `W_dec` on its own."""
    return original(**kwargs) | {"penalty": 0.1 * sae.W_dec.pow(2).sum()}


@kernels
def test_a_weight_with_another_use_gets_both_gradients(target: Target) -> None:
    """A subclass's loss on `W_dec` is added to the gradient that no parameter holds."""
    stock = make_stock(device=target.device)
    states: list[dict[str, torch.Tensor]] = []
    batches = [superposed_rows(stock, target.few_rows(32)) for _ in range(2)]
    for buffers in (True, False):
        sparse: Any = sparse_like(stock, target.backend)
        sparse.cfg.gradient_buffers = buffers
        sparse.calculate_aux_loss = partial(with_penalty, sparse, sparse.calculate_aux_loss)
        trainer = own_trainer(sparse)
        train(trainer, batches)
        states.append(state_of(trainer))
    for name, value in states[0].items():
        assert (states[1][name] - value).norm() <= 1e-5 * value.norm() + 1e-7, name


@subjects(KERNELS)
def test_a_frozen_weight_stays_and_counts_for_nothing(subject: Subject) -> None:
    states: list[dict[str, torch.Tensor]] = []
    for buffers in (True, False):
        torch.manual_seed(0)
        sparse = subject.sparse(subject.stock())
        sparse.cfg.gradient_buffers, sparse.cfg.cuda_graph = buffers, False
        sparse.W_enc.requires_grad_(False)
        before = sparse.W_enc.detach().clone()
        trainer = own_trainer(sparse)
        torch.manual_seed(1)
        n_rows = subject.target.few_rows(32)
        train(trainer, [superposed_rows(sparse, n_rows) for _ in range(2)])
        assert torch.equal(sparse.W_enc, before)
        states.append({name: p.detach().double() for name, p in sparse.named_parameters()})
    for name, value in states[0].items():
        assert (states[1][name] - value).norm() <= 1e-6 * value.norm() + 1e-9, name


@subjects(KERNELS)
def test_the_decoder_of_another_sae_keeps_its_gradient(subject: Subject) -> None:
    decoders: list[torch.Tensor] = []
    for buffers in (True, False):
        torch.manual_seed(0)
        sparse, other = (subject.sparse(subject.stock()) for _ in range(2))
        # Counted alike, so that nothing but the decoder itself tells one from the other.
        assert sparse.W_dec._version == other.W_dec._version
        sparse.cfg.gradient_buffers, sparse.cfg.cuda_graph = buffers, False
        if reads_decoder_norms(sparse):
            sparse.cfg.rescale_acts_by_decoder_norm = False
        own_loss = sparse.calculate_aux_loss

        def with_other(own_loss: Any = own_loss, other: Any = other, **of_step: Any) -> Any:
            recons = other.decode(of_step["feature_acts"])
            apart = (recons - of_step["step_input"].sae_in).pow(2).mean()
            return {**own_loss(**of_step), "apart": apart}

        sparse.calculate_aux_loss = with_other
        torch.manual_seed(1)
        rows = superposed_rows(sparse, subject.target.few_rows(32))
        train(own_trainer(sparse), [rows])
        assert other.W_dec.grad is not None
        decoders += [sparse.W_dec.detach(), other.W_dec.grad]
    for held, summed in zip(decoders[:2], decoders[2:], strict=True):
        assert (summed - held).norm() <= 1e-6 * held.norm()


@kernels
def test_activations_may_be_read_after_the_step(target: Target) -> None:
    """The update writes the norms of the next step, not over those of this one."""
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    sparse.cfg.cuda_graph = False
    trainer = own_trainer(sparse, lr=0.05, lr_warm_up_steps=0)
    batch = superposed_rows(stock, target.few_rows(32))
    train(trainer, [batch])
    before = sparse.encode(batch)
    after = trainer.step(batch).feature_acts + 0
    torch.testing.assert_close(after.detach(), before.detach(), rtol=1e-5, atol=1e-6)


@kernels
def test_what_a_step_leaves_behind(target: Target) -> None:
    """Nothing that an evaluation, a copy of the SAE or a kept loss would hold or go by."""
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    sparse.cfg.cuda_graph = False
    trainer = own_trainer(sparse)
    output = trainer.step(superposed_rows(stock, target.few_rows(32)))
    assert current_step(sparse) is None
    assert offer_to(sparse) == Offer()
    code = code_of(output.feature_acts)
    assert code is not None
    assert code.step.offer == Offer()
    assert output.loss.grad_fn is not None


@kernels
def test_many_pairs_a_latent_go_through_buffers(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make_stock(device=target.device)
    sparse = sparse_like(stock, target.backend)
    trainer = own_trainer(sparse)
    held: list[bool] = []
    trainer.optimizer.register_step_pre_hook(lambda *_: held.append(sparse.W_enc.grad is not None))
    batch = superposed_rows(stock, target.few_rows(32))
    pairs_per_latent = len(batch) * stock.cfg.k / stock.cfg.d_sae
    # The optimizer's own hooks may run twice where it leaves the update to PyTorch.
    for limit in (1.01 * pairs_per_latent, 0.99 * pairs_per_latent):
        monkeypatch.setattr("saelens_sparse.codes.step.MAX_PAIRS_PER_LATENT", limit)
        train(trainer, [batch])
    assert not held[0]
    assert all(held[1:])


@pytest.mark.parametrize("view", ["norms", "scaled"])
def test_room_for_a_copy_does_not_depend_on_the_default_dtype(view: WeightView) -> None:
    weight, default = torch.randn(6, 4), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        copy = WeightCopy.of(weight, view, FLOAT8)
    finally:
        torch.set_default_dtype(default)
    sizes = copy.values if copy.errors is None else copy.errors
    assert sizes.dtype == torch.float32
