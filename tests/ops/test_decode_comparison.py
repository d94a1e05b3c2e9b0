"""A decoder that compares its reconstruction with a target as it makes it."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.decode import Comparison, Decoded, can_compare, decode_pairs
from saelens_sparse.ops.pairs import ActivePairs, LatentOrder, Rows
from saelens_sparse.ops.rows import error_kernels
from saelens_sparse.ops.update.row_gradient import RowGradient
from tests.conftest import TARGETS, marks
from tests.support.ops import assert_within_budget, random_latents, rows_of_lengths

D_SAE = 90


@pytest.fixture(
    params=[
        pytest.param(target, id=name, marks=marks(target))
        for name, target in TARGETS.items()
        if target.backend == "triton" and target.runs_here
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run."""
    return torch.device(request.param.device)


@dataclass
class Case:
    """Leaves of the graph, the pairs of a batch, and what its reconstruction is compared with."""

    acts: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor  # of the rows in the loss
    pairs: ActivePairs
    order: LatentOrder

    @classmethod
    def random(
        cls, device: torch.device, k: int, d_in: int, *, ragged: bool = False, n_rows: int = 5
    ) -> "Case":
        latents = random_latents(n_rows, D_SAE, k, "zipf", device)
        acts = torch.randn(n_rows, k, device=device).relu()
        rows = Rows.regular(n_rows, k)
        if ragged:
            # Rows of 0 to k pairs, and one pair that is on no row.
            lengths = torch.arange(n_rows, device=device) * k // max(n_rows - 1, 1)
            kept = torch.arange(k, device=device) < lengths.unsqueeze(1)
            latents = torch.nn.functional.pad(latents[kept], (0, 1))
            acts = torch.nn.functional.pad(acts[kept], (0, 1), value=3.0)
            rows = rows_of_lengths(lengths)
            assert rows.offsets is not None and rows.of_pairs is not None
            rows = Rows.ragged(rows.offsets, torch.nn.functional.pad(rows.of_pairs, (0, 1)))
        acts, latents = acts.flatten(), latents.flatten()
        keys = latents.int().masked_fill(acts == 0, D_SAE)
        if ragged:
            keys[-1] = D_SAE
        pairs = ActivePairs(latents, keys, acts, rows)
        return cls(
            acts=acts.requires_grad_(),
            W_dec=torch.randn(D_SAE, d_in, device=device).requires_grad_(),
            b_dec=torch.randn(d_in, device=device).requires_grad_(),
            target=torch.randn(n_rows, d_in, device=device),
            weights=torch.rand(n_rows, device=device),
            pairs=pairs,
            order=LatentOrder.of(pairs, D_SAE),
        )

    def decode(self, row_gradients: list[RowGradient] | None = None) -> tuple[Decoded, Comparison]:
        decoded = decode_pairs(
            self.acts, self.W_dec, self.b_dec, self.pairs, self.order, None, "triton",
            row_gradients, self.target,
        )  # fmt: skip
        assert decoded.comparison is not None
        return decoded, decoded.comparison

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        return {"acts": self.acts, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(self.leaves.values()))
        return dict(zip(self.leaves, found, strict=True))

    def plain(
        self, dtype: torch.dtype, loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Squared errors and gradients by dense products in a dtype."""
        acts, W_dec, b_dec = (
            leaf.detach().to(dtype).requires_grad_() for leaf in self.leaves.values()
        )
        n_rows, n_pairs = self.target.shape[0], self.pairs.rows.count()
        rows = self.pairs.rows.of(torch.arange(n_pairs, device=acts.device))
        code = acts.new_zeros(n_rows, D_SAE)
        code = code.index_put((rows, self.pairs.latents[:n_pairs]), acts[:n_pairs])
        recons = code @ W_dec + b_dec
        squares = (recons - self.target.to(dtype)).square().sum(-1)
        found = torch.autograd.grad(loss_of(squares, recons), (acts, W_dec, b_dec))
        return squares.detach(), dict(zip(self.leaves, found, strict=True))

    def check(
        self,
        squares: torch.Tensor,
        gradients: dict[str, torch.Tensor],
        loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        plain_squares, plain = self.plain(torch.float32, loss_of)
        exact_squares, exact = self.plain(torch.float64, loss_of)
        _within(squares, plain_squares, exact_squares)
        for name, gradient in gradients.items():
            _within(gradient, plain[name], exact[name])


def _within(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    actual, plain, exact = (value.detach().reshape(1, -1) for value in (actual, plain, exact))
    assert_within_budget(actual, plain, exact, exact.abs().amax().reshape(1, 1) * 8)


@pytest.mark.parametrize("ragged", [False, True], ids=["k pairs", "ragged"])
@pytest.mark.parametrize("d_in", [1, 37, 300])
@pytest.mark.parametrize("k", [1, 5, 64, 65])
def test_errors_and_gradients_match_float64(
    k: int, d_in: int, ragged: bool, device: torch.device
) -> None:
    case = Case.random(device, k, d_in, ragged=ragged)
    decoded, comparison = case.decode()
    assert comparison.is_of(decoded.recons, case.target)
    squares = comparison.squared_errors(decoded.recons)

    def loss_of(squares: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (squares * case.weights).sum()

    case.check(squares, case.gradients(loss_of(squares, decoded.recons)), loss_of)


@pytest.mark.parametrize("k", [5, 65])
def test_a_gradient_beside_that_of_the_errors_is_added(k: int, device: torch.device) -> None:
    case = Case.random(device, k, 37)
    decoded, comparison = case.decode()
    squares = comparison.squared_errors(decoded.recons)

    def loss_of(squares: torch.Tensor, recons: torch.Tensor) -> torch.Tensor:
        return (squares * case.weights).sum() + recons.sin().sum()

    case.check(squares, case.gradients(loss_of(squares, decoded.recons)), loss_of)


def _double(gradient: torch.Tensor) -> torch.Tensor:
    return 2 * gradient


def _double_in_place(gradient: torch.Tensor) -> None:
    gradient.mul_(2)


@pytest.mark.parametrize("hook", [_double, _double_in_place])
def test_a_hook_on_the_reconstruction_is_obeyed(
    hook: Callable[[torch.Tensor], torch.Tensor | None], device: torch.device
) -> None:
    case = Case.random(device, 5, 37)
    decoded, comparison = case.decode()
    plain = case.gradients(comparison.squared_errors(decoded.recons).sum())
    decoded, comparison = case.decode()
    decoded.recons.register_hook(hook)
    doubled = case.gradients(comparison.squared_errors(decoded.recons).sum())
    for name, gradient in plain.items():
        torch.testing.assert_close(doubled[name], 2 * gradient, rtol=1e-5, atol=1e-4)


def test_the_reconstruction_has_its_gradient(device: torch.device) -> None:
    case = Case.random(device, 5, 37)
    decoded, comparison = case.decode()
    decoded.recons.retain_grad()
    (comparison.squared_errors(decoded.recons) * case.weights).sum().backward()
    expected = 2 * case.weights.unsqueeze(1) * (decoded.recons.detach() - case.target)
    torch.testing.assert_close(decoded.recons.grad, expected)


def test_errors_have_a_second_derivative(device: torch.device) -> None:
    """By the reconstruction; the decoder has none."""
    case = Case.random(device, 5, 37)
    decoded, comparison = case.decode()
    squares = comparison.squared_errors(decoded.recons)
    loss = (squares.square() * case.weights).sum()
    (gradient,) = torch.autograd.grad(loss, decoded.recons, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), decoded.recons, retain_graph=True)
    recons = decoded.recons.detach().requires_grad_()
    plain = ((recons - case.target).square().sum(-1).square() * case.weights).sum()
    (expected,) = torch.autograd.grad(plain, recons, create_graph=True)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(second, *torch.autograd.grad(expected.square().sum(), recons))
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, case.W_dec, create_graph=True)


def test_both_ways_give_an_optimizer_the_same_gradient(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pairs held in registers and without, to `.grad` and to a list of sums."""
    case = Case.random(device, 5, 37)
    found: list[torch.Tensor] = []
    for most in (64, 0):
        launch = error_kernels.DecodeLaunch(MAX_K=most)
        monkeypatch.setattr(error_kernels, "DECODE", launch)
        for row_gradients in (None, list[RowGradient]()):
            decoded, comparison = case.decode(row_gradients)
            comparison.squared_errors(decoded.recons).sum().backward()
            if row_gradients is None:
                assert case.W_dec.grad is not None
                found.append(case.W_dec.grad)
            else:
                (gradient,) = row_gradients
                found.append(gradient.dense(torch.float32, "triton")[0])
            case.W_dec.grad = None
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-5)


def test_a_gradient_whose_origin_has_changed_is_taken_as_it_is(device: torch.device) -> None:
    case = Case.random(device, 5, 37)
    decoded, comparison = case.decode()
    plain = case.gradients(comparison.squared_errors(decoded.recons).sum())
    decoded, comparison = case.decode()
    weights = torch.ones_like(case.weights)
    squares = comparison.squared_errors(decoded.recons)
    (gradient,) = torch.autograd.grad(squares, decoded.recons, weights, retain_graph=True)
    weights.mul_(2)
    found = torch.autograd.grad(decoded.recons, list(case.leaves.values()), gradient)
    for name, value in zip(case.leaves, found, strict=True):
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-4)


def test_what_has_changed_since_is_not_what_was_compared(device: torch.device) -> None:
    case = Case.random(device, 5, 37)
    decoded, comparison = case.decode()
    recons, target = decoded.recons, case.target
    assert comparison.is_of(recons.view(1, 5, 37), target.view(1, 5, 37))
    assert not comparison.is_of(recons.clone(), target)
    assert not comparison.is_of(recons, target.clone())
    assert not comparison.is_of(recons[:3], target[:3])
    assert not comparison.is_of(recons.view(37, 5).T, target)
    assert not comparison.is_of(recons.view(37, 5), target.view(37, 5))
    assert not comparison.is_of(recons.view(1, 5, 37), target)
    assert not comparison.is_of(recons, target.detach().requires_grad_())
    assert not comparison.is_of(recons.view(5, 1, 37, 1), target.view(5, 1, 37, 1))
    with torch.no_grad():
        recons.add_(1)
    assert not comparison.is_of(recons, target)
    decoded, comparison = case.decode()
    target.add_(1)
    assert not comparison.is_of(decoded.recons, target)


def test_a_comparison_leaves_no_cycle(device: torch.device) -> None:
    """What a graph has saved is given back when the last output goes, not when Python collects."""
    import gc
    import weakref

    case = Case.random(device, 5, 37)
    gc.collect()
    gc.disable()
    try:
        decoded, comparison = case.decode()
        loss = comparison.squared_errors(decoded.recons).sum()
        alive = weakref.ref(comparison)
        loss.backward()
        del decoded, comparison
        assert alive() is None, "a loss that somebody keeps holds a batch"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("weight", "target", "backend", "can"),
    [
        (torch.float32, torch.float32, "triton", True),
        (torch.float32, torch.float32, "torch", False),
        (torch.bfloat16, torch.bfloat16, "triton", False),
        (torch.float32, torch.bfloat16, "triton", False),
    ],
)
def test_what_can_be_compared(
    weight: torch.dtype, target: torch.dtype, backend: Backend, can: bool
) -> None:
    W_dec, x = torch.zeros(4, 3, dtype=weight), torch.zeros(2, 3, dtype=target)
    assert can_compare(W_dec, x, backend) == can
    if can:
        assert not can_compare(W_dec, x.requires_grad_(), backend)


def test_a_bad_row_counts_if_its_latent_is_active(device: torch.device) -> None:
    case = Case.random(device, 5, 37)
    clipped = int(case.pairs.latents[case.acts.detach() == 0][0])
    with torch.no_grad():
        case.acts[case.pairs.latents == clipped] = 0
        case.W_dec[clipped] = torch.nan
    decoded, comparison = case.decode()
    assert comparison.squared_errors(decoded.recons).isfinite().all()
    with torch.no_grad():
        case.acts[case.pairs.latents == clipped] = 1
    decoded, comparison = case.decode()
    bad = (case.pairs.latents == clipped).view(5, 5).any(1)
    assert torch.equal(comparison.squared_errors(decoded.recons).isnan(), bad)


@pytest.mark.parametrize("k", [5, 65])
def test_an_infinite_activation(k: int, device: torch.device) -> None:
    """Its row is infinitely far off, not nowhere, also where a tile has columns to spare."""
    case = Case.random(device, k, 37)
    with torch.no_grad():
        case.acts[0] = torch.inf
        case.W_dec.abs_()
    decoded, comparison = case.decode()
    squares = comparison.squared_errors(decoded.recons)
    assert torch.equal(squares.isinf(), torch.arange(5, device=device) == 0)


def test_an_empty_batch(device: torch.device) -> None:
    case = Case.random(device, 5, 37, n_rows=0)
    decoded, comparison = case.decode()
    gradients = case.gradients(comparison.squared_errors(decoded.recons).sum())
    assert not gradients["W_dec"].any() and not gradients["b_dec"].any()
