"""A JumpReLU over dense products, and its gradients."""

from dataclasses import dataclass, replace

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.activation.dense import dense_jumprelu, dense_jumprelu_gradients
from tests.support.ops import require_gpu_memory, within


@dataclass(frozen=True)
class DenseProblem:
    """Arguments of `dense_jumprelu` and of its gradients."""

    products: torch.Tensor  # [n_rows, d_sae]
    bias: torch.Tensor  # [d_sae]
    threshold: torch.Tensor  # [d_sae]
    bandwidth: float
    grad_acts: torch.Tensor  # [n_rows, d_sae]
    grad_l0: torch.Tensor  # [n_rows]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "DenseProblem":
        products, bias, threshold, grad_acts, grad_l0 = (
            tensor.to(device, dtype)
            for tensor in (
                self.products, self.bias, self.threshold, self.grad_acts, self.grad_l0
            )
        )  # fmt: skip
        return DenseProblem(products, bias, threshold, self.bandwidth, grad_acts, grad_l0)

    def forward(
        self, backend: Backend, acts_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, ...]:
        acts_dtype = acts_dtype or self.products.dtype
        return dense_jumprelu(
            self.products, self.bias, self.threshold, self.bandwidth, acts_dtype, backend
        )

    def gradients(
        self, has_acts: bool, has_l0: bool, ste_to_input: bool, backend: Backend
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return dense_jumprelu_gradients(
            self.products, self.bias, self.threshold, self.bandwidth, ste_to_input,
            self.grad_acts if has_acts else None, self.grad_l0 if has_l0 else None, backend,
        )  # fmt: skip

    def exact_gradients(
        self, has_acts: bool, has_l0: bool, ste_to_input: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Terms `[n_rows, d_sae]` of the gradients of acts, of the window, and both together."""
        exact = self.to("cpu", torch.float64)
        above = exact.products + exact.bias - exact.threshold
        half = exact.bandwidth / 2
        inside = (above > -half) & (above < half)
        through, direct = torch.zeros_like(above), torch.zeros_like(above)
        if has_acts:
            through += exact.grad_acts * exact.threshold
            direct += torch.where(above > 0, exact.grad_acts, 0.0)
        if has_l0:
            through += exact.grad_l0.unsqueeze(1)
        through = torch.where(inside, through / exact.bandwidth, 0.0)
        return direct, through, direct + through * ste_to_input


def eighths(n_rows: int, d_sae: int) -> DenseProblem:
    """Small multiples of 1/8: exact in each dtype, and often on a gate or an edge of a window."""

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape) / 8

    problem = DenseProblem(
        draw(-16, 33, n_rows, d_sae), draw(-2, 3, d_sae), draw(0, 25, d_sae), 0.5,
        draw(-8, 9, n_rows, d_sae), draw(-8, 9, n_rows),
    )  # fmt: skip
    above = problem.products + problem.bias - problem.threshold
    if above.numel() > 100:
        for value in (-0.25, 0.0, 0.25):
            assert (above == value).any()
    return problem


def heavy_tailed(n_rows: int, d_sae: int) -> DenseProblem:
    """Scales of all sizes; no pre-activation within rounding of a gate or of an edge."""
    threshold = torch.randn(d_sae).exp()
    bias = torch.randn(d_sae)
    products = threshold - bias + torch.randn(n_rows, d_sae) / (torch.rand(n_rows, d_sae) + 1e-2)
    problem = DenseProblem(
        products, bias, threshold, 0.7,
        torch.randn(n_rows, d_sae) / (torch.rand(n_rows, d_sae) + 1e-2),
        torch.randn(n_rows) / (torch.rand(n_rows) + 1e-2),
    )  # fmt: skip
    above = (products.double() + bias - threshold).abs()
    unclear = (above < 1e-4) | ((above - 0.35).abs() < 1e-4)
    products[unclear] = -100
    return problem


DENSE_SIZES = [
    pytest.param(7, 33, id="odd"),
    pytest.param(1, 12, id="one row"),
    pytest.param(9, 1, id="one latent"),
    pytest.param(65, 257, id="just beyond a tile"),
    pytest.param(0, 12, id="no rows"),
]
DENSE_SIZE = pytest.mark.parametrize(("n_rows", "d_sae"), DENSE_SIZES)


@DENSE_SIZE
def test_dense_jumprelu_is_exact_where_sums_are(
    n_rows: int, d_sae: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Strictly above the threshold; pairs strictly above the window's lower edge."""
    problem = eighths(n_rows, d_sae)
    acts, row_counts, latent_counts, totals = problem.to(device, dtype).forward(backend)
    pre_acts = (problem.products + problem.bias).double()
    active = pre_acts > problem.threshold
    expected = torch.where(active, pre_acts, 0.0)
    assert acts.dtype == dtype
    assert row_counts.dtype == latent_counts.dtype == torch.int32
    assert totals.dtype == torch.int64
    assert torch.equal(acts.cpu().double(), expected)
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    n_pairs = int((pre_acts > problem.threshold.double() - problem.bandwidth / 2).sum())
    assert totals.tolist() == [n_pairs, int(active.sum())]


@DENSE_SIZE
def test_dense_jumprelu_matches_float64(
    n_rows: int, d_sae: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    """Activations are one rounding off, or of the dtype that the caller asks for."""
    if dtype == torch.bfloat16:
        pytest.skip("rounding to bfloat16 moves pre-activations across gates")
    problem = heavy_tailed(n_rows, d_sae)
    acts_dtype = torch.bfloat16 if device.type == "cuda" else dtype
    acts, row_counts, latent_counts, totals = problem.to(device, dtype).forward(backend, acts_dtype)
    pre_acts = problem.products.double() + problem.bias
    active = pre_acts > problem.threshold
    size = problem.products.double().abs() + problem.bias.abs()
    rounding = torch.finfo(dtype).eps * size + torch.finfo(acts_dtype).eps * pre_acts.abs()
    assert acts.dtype == acts_dtype
    error = (acts.cpu().double() - torch.where(active, pre_acts, 0.0)).abs()
    assert (error <= torch.where(active, rounding, 0.0)).all()
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    n_pairs = int((pre_acts > problem.threshold.double() - problem.bandwidth / 2).sum())
    assert totals.tolist() == [n_pairs, int(active.sum())]


@pytest.mark.parametrize("ste_to_input", [False, True])
@pytest.mark.parametrize("has_l0", [False, True])
@pytest.mark.parametrize("has_acts", [False, True])
@DENSE_SIZE
def test_dense_jumprelu_gradients_match_float64(
    n_rows: int,
    d_sae: int,
    has_acts: bool,
    has_l0: bool,
    ste_to_input: bool,
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """With strict inequalities at both edges of the window."""
    arguments = (has_acts, has_l0, ste_to_input)
    for problem in (eighths(n_rows, d_sae), heavy_tailed(n_rows, d_sae)):
        is_exact = problem.bandwidth == 0.5
        if dtype == torch.bfloat16 and not is_exact:
            continue
        direct, through, both = problem.exact_gradients(*arguments)
        moved = problem.to(device, dtype)
        grad_products, grad_bias, grad_threshold = moved.gradients(*arguments, backend)
        sum_dtype = torch.promote_types(dtype, torch.float32)
        assert grad_products.dtype == dtype
        assert grad_bias.dtype == grad_threshold.dtype == sum_dtype
        assert grad_bias.shape == grad_threshold.shape == (d_sae,)
        # Two factors and a sum are rounded, and at last the result; of the eighths nothing is
        # but products of bfloat16, and the result.
        eps = torch.finfo(dtype).eps
        term_error = 4 * eps * (direct.abs() + through.abs() + l0_size(problem, *arguments))
        if is_exact and dtype != torch.bfloat16:
            term_error = torch.zeros_like(term_error)
        assert within(grad_products, both, term_error)
        sum_eps = torch.finfo(sum_dtype).eps * n_rows
        assert within(grad_bias, both.sum(0), term_error.sum(0) + sum_eps * both.abs().sum(0))
        assert within(
            grad_threshold, -through.sum(0), term_error.sum(0) + sum_eps * through.abs().sum(0)
        )


def l0_size(
    problem: DenseProblem, has_acts: bool, has_l0: bool, ste_to_input: bool
) -> torch.Tensor:
    """Absolute values of the terms that a straight-through gradient adds, where they cancel."""
    del ste_to_input
    _, acts_part, _ = problem.exact_gradients(has_acts, False, True)
    _, l0_part, _ = problem.exact_gradients(False, has_l0, True)
    return acts_part.abs() + l0_part.abs()


def test_dense_jumprelu_gradients_take_expanded_gradients(
    backend: Backend, device: torch.device
) -> None:
    """As a sum's or a mean's backward gives them."""
    problem = eighths(6, 20)
    problem.grad_acts.copy_(problem.grad_acts[:1, :1].clone().expand(6, 20))
    problem.grad_l0.fill_(0.25)
    moved = problem.to(device, torch.float32)
    expanded = replace(
        moved,
        grad_acts=moved.grad_acts[:1, :1].expand(6, 20),
        grad_l0=moved.grad_l0[:1].expand(6),
    )
    _, through, both = problem.exact_gradients(True, True, True)
    grad_products, grad_bias, grad_threshold = expanded.gradients(True, True, True, backend)
    assert torch.equal(grad_products.cpu().double(), both)
    assert torch.equal(grad_bias.cpu().double(), both.sum(0))
    assert torch.equal(grad_threshold.cpu().double(), -through.sum(0))


def test_dense_jumprelu_keeps_a_nan_and_counts_it_nowhere(
    backend: Backend, device: torch.device
) -> None:
    problem = eighths(6, 20)
    problem.products[3, 7] = torch.nan
    problem.products[4, 8] = torch.inf
    moved = problem.to(device, torch.float32)
    acts, row_counts, latent_counts, totals = moved.forward(backend)
    pre_acts = problem.products + problem.bias
    active = pre_acts > problem.threshold
    assert acts.isnan().nonzero().tolist() == [[3, 7]]
    assert acts[4, 8] == torch.inf
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    assert totals.tolist()[1] == int(active.sum())
    grad_products, grad_bias, grad_threshold = moved.gradients(True, True, True, backend)
    _, through, both = problem.exact_gradients(True, True, True)
    assert both[3, 7] == 0
    assert torch.equal(grad_products.cpu().double(), both)
    assert torch.equal(grad_bias.cpu().double(), both.sum(0))
    assert torch.equal(grad_threshold.cpu().double(), -through.sum(0))


@pytest.mark.default_algorithms
@pytest.mark.parametrize(("n_rows", "d_sae"), [(7, 33), (130, 40)])
def test_dense_jumprelu_repeats_bit_for_bit_and_leaves_its_inputs_alone(
    n_rows: int, d_sae: int, backend: Backend, device: torch.device, dtype: torch.dtype
) -> None:
    problem = heavy_tailed(n_rows, d_sae).to(device, dtype)
    before = problem.to("cpu", dtype)
    results = [
        (*problem.forward(backend), *problem.gradients(True, True, True, backend)) for _ in range(2)
    ]
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    for name in ("products", "bias", "threshold", "grad_acts", "grad_l0"):
        assert torch.equal(getattr(problem, name).cpu(), getattr(before, name))


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
def test_dense_jumprelu_matches_float64_at_a_training_shape(gpu_backend: Backend) -> None:
    problem = eighths(1000, 12_289)
    moved = problem.to("cuda", torch.float32)
    acts, row_counts, latent_counts, totals = moved.forward(gpu_backend)
    pre_acts = problem.products + problem.bias
    active = pre_acts > problem.threshold
    assert torch.equal(acts.cpu(), pre_acts * active)
    assert row_counts.tolist() == active.sum(1).tolist()
    assert latent_counts.tolist() == active.sum(0).tolist()
    n_pairs = int((pre_acts > problem.threshold - problem.bandwidth / 2).sum())
    assert totals.tolist() == [n_pairs, int(active.sum())]
    grad_products, grad_bias, grad_threshold = moved.gradients(True, True, True, gpu_backend)
    _, through, both = problem.exact_gradients(True, True, True)
    # Multiples of 1/64, whose sums over rows stay far below 2^24 of them.
    assert torch.equal(grad_products.cpu().double(), both)
    assert torch.equal(grad_bias.cpu().double(), both.sum(0))
    assert torch.equal(grad_threshold.cpu().double(), -through.sum(0))


@pytest.mark.gpu
def test_dense_jumprelu_addresses_products_beyond_32_bits() -> None:
    """The last rows of a huge batch give what the same rows give by themselves."""
    require_gpu_memory(40)
    n_rows, d_sae, tail = 2**15 + 128, 2**16 + 5, 64
    assert (n_rows - tail) * d_sae > 2**31
    near = eighths(tail, d_sae).to("cuda", torch.bfloat16)
    far = replace(
        near,
        products=torch.full((n_rows, d_sae), -1e3, device="cuda", dtype=torch.bfloat16),
        grad_acts=torch.zeros(n_rows, d_sae, device="cuda", dtype=torch.bfloat16),
        grad_l0=torch.zeros(n_rows, device="cuda", dtype=torch.bfloat16),
    )
    far.products[-tail:] = near.products
    far.grad_acts[-tail:] = near.grad_acts
    far.grad_l0[-tail:] = near.grad_l0
    acts, row_counts, latent_counts, totals = far.forward("triton")
    near_acts, near_row_counts, near_latent_counts, near_totals = near.forward("triton")
    assert torch.equal(acts[-tail:], near_acts)
    assert not acts[:-tail].any()
    assert torch.equal(row_counts[-tail:], near_row_counts)
    assert torch.equal(latent_counts, near_latent_counts)
    assert torch.equal(totals, near_totals)
    del acts
    grads = far.gradients(True, True, True, "triton")
    near_grads = near.gradients(True, True, True, "triton")
    assert torch.equal(grads[0][-tail:], near_grads[0])
    assert not grads[0][:-tail].any()
    assert torch.equal(grads[1], near_grads[1])
    assert torch.equal(grads[2], near_grads[2])
