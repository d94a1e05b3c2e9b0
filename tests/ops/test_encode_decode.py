from dataclasses import dataclass, field

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.activation.pairs import ReLU
from saelens_sparse.ops.activation.topk import keep_topk
from saelens_sparse.ops.decode import decode_pairs
from saelens_sparse.ops.encode import encode_pairs
from saelens_sparse.ops.pairs import LatentOrder
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.search.topk import search_topk
from tests.conftest import Target
from tests.support.ops import assert_within_budget

N_ROWS, D_IN, D_SAE, K = 9, 10, 30, 5


@dataclass
class Parameters:
    """Leaves of the graph, and random upstream gradients for its outputs."""

    x: torch.Tensor  # [n_rows, d_in], the input before the bias is subtracted
    W_enc: torch.Tensor  # [d_in, d_sae], latent-major
    b_enc: torch.Tensor  # [d_sae]
    b_dec: torch.Tensor  # [d_in]
    W_dec: torch.Tensor  # [d_sae, d_in]
    upstream_acts: torch.Tensor  # [n_rows, k]
    upstream_recons: torch.Tensor  # [n_rows, d_in]
    upstream_aux: torch.Tensor  # [n_rows, d_in]
    rows: torch.Tensor  # latents whose weights are also used as a dense block

    @classmethod
    def random(cls, n_rows: int = N_ROWS, k: int = K) -> "Parameters":
        return cls(
            x=torch.randn(n_rows, D_IN),
            W_enc=torch.randn(D_SAE, D_IN).T,
            b_enc=torch.randn(D_SAE) - 4,  # some of the selected latents are clipped
            b_dec=torch.randn(D_IN),
            W_dec=torch.randn(D_SAE, D_IN),
            upstream_acts=torch.randn(n_rows, k),
            upstream_recons=torch.randn(n_rows, D_IN),
            upstream_aux=torch.randn(n_rows, D_IN),
            rows=torch.randperm(D_SAE)[:13].sort().values,
        )

    def to(
        self, device: torch.device, dtype: torch.dtype, *, x_requires_grad: bool = True
    ) -> "Parameters":
        """Fresh leaves with the same values."""

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(device, dtype).requires_grad_()

        return Parameters(
            x=leaf(self.x).requires_grad_(x_requires_grad),
            W_enc=leaf(self.W_enc),
            b_enc=leaf(self.b_enc),
            b_dec=leaf(self.b_dec),
            W_dec=leaf(self.W_dec),
            upstream_acts=self.upstream_acts.to(device, dtype),
            upstream_recons=self.upstream_recons.to(device, dtype),
            upstream_aux=self.upstream_aux.to(device, dtype),
            rows=self.rows.to(device),
        )

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        tensors = {
            "x": self.x,
            "W_enc": self.W_enc,
            "b_enc": self.b_enc,
            "b_dec": self.b_dec,
            "W_dec": self.W_dec,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


@dataclass
class Outputs:
    """Each with its upstream gradient."""

    acts: torch.Tensor
    recons: torch.Tensor
    aux: torch.Tensor
    latents: torch.Tensor
    upstream: Parameters
    kept: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def loss(self, *names: str) -> torch.Tensor:
        """Sum over the named outputs of output times upstream gradient."""
        parts = [
            (getattr(self, name) * getattr(self.upstream, f"upstream_{name}")).sum()
            for name in names
        ]
        return torch.stack(parts).sum()


def sparse_outputs(
    p: Parameters, backend: Backend, k: int = K, k_aux: int | None = 4, padding: int = 3
) -> Outputs:
    """An encoder, a decoder, and a second use of some rows of both weights."""
    x = p.x - p.b_dec
    input_bias = None
    if not p.x.requires_grad:
        x, input_bias = x.detach(), p.b_dec
    rows = p.W_enc.detach().T
    pairs = search_topk(x.detach(), rows, p.b_enc, None, k, backend, 2**20).complete().pairs
    order = LatentOrder.of(pairs, D_SAE)
    n = p.rows.numel()
    block = RowBlock(p.rows, n + padding)
    acts, l0, W_enc = encode_pairs(
        x, p.W_enc, p.b_enc, input_bias, pairs, order, ReLU(), block, backend
    )
    assert l0 is None
    recons, W_dec, _ = decode_pairs(acts, p.W_dec, p.b_dec, pairs, order, block, backend)
    acts, latents = acts.view(x.shape[0], k), pairs.latents.view(x.shape[0], k)
    assert W_enc is not None
    assert W_dec is not None
    bias = p.b_enc[p.rows]
    if input_bias is not None:
        bias = bias - W_enc.detach()[:n] @ (input_bias - input_bias.detach())
    products = x @ W_enc.T
    if k_aux is None:
        values = products + torch.nn.functional.pad(bias, (0, padding))
    else:
        values = keep_topk(products, bias, None, k_aux, backend)
    return Outputs(acts, recons, values @ W_dec, latents, p, values[:, :n] != 0)


def dense_outputs(p: Parameters, of: Outputs) -> Outputs:
    """The same by dense products, with the latents that `of` selected."""
    pre_acts = (p.x - p.b_dec) @ p.W_enc + p.b_enc
    selected = torch.zeros_like(pre_acts).scatter(1, of.latents, 1.0)
    code = pre_acts.relu() * selected
    values = pre_acts[:, p.rows] * of.kept
    return Outputs(
        code.gather(1, of.latents),
        code @ p.W_dec + p.b_dec,
        values @ p.W_dec[p.rows],
        of.latents,
        p,
    )


def gradients(outputs: Outputs, *names: str) -> dict[str, torch.Tensor | None]:
    outputs.loss(*names).backward()
    return {name: leaf.grad for name, leaf in outputs.upstream.leaves.items()}


def as_rows(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.reshape(1, -1) if gradient.ndim == 1 else gradient


def assert_gradients_match(
    actual: dict[str, torch.Tensor | None],
    plain: dict[str, torch.Tensor | None],
    exact: dict[str, torch.Tensor | None],
) -> None:
    assert actual.keys() == plain.keys() == exact.keys()
    for name, gradient in actual.items():
        reference, plain_gradient = exact[name], plain[name]
        if reference is None or plain_gradient is None:
            # A sparse use that got no gradient leaves zeros where autograd leaves nothing.
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, name
        assert gradient.dtype == plain_gradient.dtype, name
        try:
            assert_within_budget(
                as_rows(gradient),
                as_rows(plain_gradient),
                as_rows(reference),
                as_rows(reference.abs().amax().expand_as(reference)),
            )
        except AssertionError as error:
            raise AssertionError(f"gradient of {name}: {error}") from error


@pytest.mark.parametrize("x_requires_grad", [False, True], ids=["constant x", "x on the graph"])
@pytest.mark.parametrize(
    "losses",
    [("acts",), ("recons",), ("aux",), ("recons", "aux"), ("acts", "recons", "aux")],
    ids="+".join,
)
def test_gradients_match_a_dense_float64_graph(
    losses: tuple[str, ...],
    x_requires_grad: bool,
    backend: Backend,
    device: torch.device,
) -> None:
    values = Parameters.random()
    sparse = sparse_outputs(
        values.to(device, torch.float32, x_requires_grad=x_requires_grad), backend
    )
    plain = dense_outputs(values.to(device, torch.float32, x_requires_grad=x_requires_grad), sparse)
    exact = dense_outputs(values.to(device, torch.float64, x_requires_grad=x_requires_grad), sparse)
    for name in ("acts", "recons", "aux"):
        assert_within_budget(
            getattr(sparse, name), getattr(plain, name), getattr(exact, name), torch.tensor([[8.0]])
        )
    assert (sparse.acts == 0).any()
    assert (sparse.acts > 0).any()
    assert_gradients_match(
        gradients(sparse, *losses), gradients(plain, *losses), gradients(exact, *losses)
    )


@pytest.mark.parametrize("x_requires_grad", [False, True], ids=["constant x", "x on the graph"])
def test_gradients_in_bfloat16_match_a_dense_bfloat16_graph(
    x_requires_grad: bool, backend: Backend, device: torch.device, target: Target
) -> None:
    if torch.bfloat16 not in target.dtypes:
        pytest.skip("Triton's interpreter does not round to bfloat16")
    values = Parameters.random()
    p = values.to(device, torch.bfloat16, x_requires_grad=x_requires_grad)
    sparse = sparse_outputs(p, backend)
    # The parameters' own rounding is part of the problem, not of the error.
    exact_values = p.to(device, torch.float64, x_requires_grad=x_requires_grad)
    exact = dense_outputs(exact_values, sparse)
    actual = gradients(sparse, "acts", "recons", "aux")
    expected = gradients(exact, "acts", "recons", "aux")
    for name, gradient in actual.items():
        reference = expected[name]
        assert gradient is not None
        assert reference is not None
        assert gradient.dtype == torch.bfloat16
        error = (gradient.double() - reference).norm() / reference.norm()
        assert error < 0.02, f"gradient of {name}: relative error {error:.3g}"


@pytest.mark.parametrize("x_requires_grad", [False, True], ids=["constant x", "x on the graph"])
def test_gradients_in_torch_match_a_dense_graph_to_float64_precision(x_requires_grad: bool) -> None:
    values, cpu = Parameters.random(), torch.device("cpu")
    sparse = sparse_outputs(values.to(cpu, torch.float64, x_requires_grad=x_requires_grad), "torch")
    dense = dense_outputs(values.to(cpu, torch.float64, x_requires_grad=x_requires_grad), sparse)
    actual = gradients(sparse, "acts", "recons", "aux")
    for name, expected in gradients(dense, "acts", "recons", "aux").items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-12, atol=1e-12)


def test_gradcheck_in_torch() -> None:
    """Against finite differences of the values themselves, selection included."""
    values = Parameters.random(n_rows=3, k=4).to(torch.device("cpu"), torch.float64)

    def outputs(
        x: torch.Tensor,
        encoder: torch.Tensor,
        b_enc: torch.Tensor,
        b_dec: torch.Tensor,
        W_dec: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        centred = x - b_dec
        pairs = search_topk(centred, encoder, b_enc, None, 4, "torch", 2**20).complete().pairs
        order = LatentOrder.of(pairs, D_SAE)
        acts, _, no_block = encode_pairs(
            centred, encoder.T, b_enc, None, pairs, order, ReLU(), None, "torch"
        )
        assert no_block is None
        recons, _, _ = decode_pairs(acts, W_dec, b_dec, pairs, order, None, "torch")
        # By latent, so that the order of the pairs does not matter.
        code = torch.zeros(3, D_SAE, dtype=acts.dtype)
        code = code.scatter(1, pairs.latents.view(3, 4), acts.view(3, 4))
        return code, recons

    encoder = values.W_enc.detach().T.clone().requires_grad_()
    inputs = (values.x, encoder, values.b_enc, values.b_dec, values.W_dec)
    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("k", [1, D_SAE])
def test_gradients_for_extreme_k(k: int, backend: Backend, device: torch.device) -> None:
    values = Parameters.random(n_rows=3, k=k)
    sparse = sparse_outputs(values.to(device, torch.float32), backend, k)
    plain = dense_outputs(values.to(device, torch.float32), sparse)
    exact = dense_outputs(values.to(device, torch.float64), sparse)
    losses = ("acts", "recons", "aux")
    assert_gradients_match(
        gradients(sparse, *losses), gradients(plain, *losses), gradients(exact, *losses)
    )


def test_gradients_of_one_row_and_of_an_empty_batch(backend: Backend, device: torch.device) -> None:
    for n_rows in (0, 1):
        values = Parameters.random(n_rows=n_rows)
        sparse = sparse_outputs(values.to(device, torch.float32), backend)
        exact = dense_outputs(values.to(device, torch.float64), sparse)
        actual = gradients(sparse, "acts", "recons", "aux")
        for name, expected in gradients(exact, "acts", "recons", "aux").items():
            assert expected is not None
            torch.testing.assert_close(
                actual[name], expected.float(), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
            )


def test_gradients_through_expanded_and_strided_upstream_gradients(
    backend: Backend, device: torch.device
) -> None:
    """`sum` sends an expanded gradient, a transposition a strided one."""
    values = Parameters.random()
    grads: list[dict[str, torch.Tensor | None]] = []
    p = values.to(device, torch.float32)
    outputs = sparse_outputs(p, backend)
    for q, o in [
        (p, outputs),
        (other := values.to(device, torch.float64), dense_outputs(other, outputs)),
    ]:
        (o.acts.sum() + (o.recons.T @ q.upstream_recons.T[:, :N_ROWS].T).sum()).backward()
        grads.append({name: leaf.grad for name, leaf in q.leaves.items()})
    for name, expected in grads[1].items():
        assert expected is not None
        torch.testing.assert_close(grads[0][name], expected.float(), rtol=1e-4, atol=1e-4)


def test_gradients_have_the_strides_of_their_parameters(
    backend: Backend, device: torch.device
) -> None:
    """As they are built: `backward` would copy any other layout into that of the parameter."""
    p = Parameters.random().to(device, torch.float32)
    assert not p.W_enc.is_contiguous()
    outputs = sparse_outputs(p, backend)
    found = torch.autograd.grad(outputs.loss("recons", "aux"), (p.W_enc, p.W_dec))
    for weight, gradient in zip((p.W_enc, p.W_dec), found, strict=True):
        assert gradient.shape == weight.shape
        assert gradient.stride() == weight.stride()


def test_clipped_latents_get_no_gradient(backend: Backend, device: torch.device) -> None:
    p = Parameters.random().to(device, torch.float32)
    with torch.no_grad():
        p.b_enc.fill_(-100.0)
    outputs = sparse_outputs(p, backend)
    assert not outputs.acts.any()
    grads = gradients(outputs, "acts", "recons")
    # The decoder's bias is added to every row, whatever fires.
    torch.testing.assert_close(grads.pop("b_dec"), p.upstream_recons.sum(0))
    for name, gradient in grads.items():
        assert gradient is not None
        assert not gradient.any(), name


def test_a_nan_input_shows_in_the_outputs_and_in_the_gradients(
    backend: Backend, device: torch.device
) -> None:
    p = Parameters.random().to(device, torch.float32)
    with torch.no_grad():
        p.x[3, 2] = torch.nan
    outputs = sparse_outputs(p, backend)
    assert outputs.acts[3].isnan().all()
    assert outputs.recons[3].isnan().all()
    assert outputs.recons[[0, 1, 2, 4]].isfinite().all()
    grads = gradients(outputs, "recons")
    for name in ("W_enc", "W_dec"):
        gradient = grads[name]
        assert gradient is not None
        assert gradient.isnan().any(), name


def test_unused_parameters_get_no_gradient(backend: Backend, device: torch.device) -> None:
    """Frozen ones are left alone, and the others do not change."""
    values = Parameters.random()
    expected = gradients(sparse_outputs(values.to(device, torch.float32), backend), "recons", "aux")
    for frozen in ("W_enc", "b_enc", "b_dec", "W_dec"):
        p = values.to(device, torch.float32)
        getattr(p, frozen).requires_grad_(False)
        actual = gradients(sparse_outputs(p, backend), "recons", "aux")
        assert getattr(p, frozen).grad is None
        for name, gradient in actual.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.default_algorithms
def test_gradients_repeat_bit_for_bit(backend: Backend, device: torch.device) -> None:
    values = Parameters.random()
    first, second = (
        gradients(sparse_outputs(values.to(device, torch.float32), backend), "recons", "aux")
        for _ in range(2)
    )
    for name, gradient in first.items():
        assert gradient is not None
        other = second[name]
        assert other is not None
        assert torch.equal(gradient, other), name


# Gradients of rows that a weight's second use leaves to its first.


@pytest.mark.parametrize("rows", ["some", "none", "active", "all"])
def test_blocks_add_to_the_weights_gradient_once(
    rows: str, backend: Backend, device: torch.device
) -> None:
    values = Parameters.random()
    if rows == "active":
        selected = sparse_outputs(values.to(device, torch.float32), backend)
        values.rows = selected.latents[selected.acts > 0].unique().cpu()
    else:
        values.rows = {
            "some": values.rows,
            "none": values.rows[:0],
            "all": torch.randperm(D_SAE),
        }[rows]
    k_aux = 4 if values.rows.numel() > 4 else None
    sparse = sparse_outputs(values.to(device, torch.float32), backend, k_aux=k_aux)
    plain = dense_outputs(values.to(device, torch.float32), sparse)
    exact = dense_outputs(values.to(device, torch.float64), sparse)
    losses = ("recons", "aux")
    assert_gradients_match(
        gradients(sparse, *losses), gradients(plain, *losses), gradients(exact, *losses)
    )


def test_blocks_are_rows_of_the_weights(backend: Backend, device: torch.device) -> None:
    p = Parameters.random().to(device, torch.float32)
    pairs = search_topk(p.x, p.W_enc.T, p.b_enc, None, K, backend, 2**20).complete().pairs
    order = LatentOrder.of(pairs, D_SAE)
    n = p.rows.numel()
    for width in (n, n + 5):
        block = RowBlock(p.rows, width)
        acts, _, W_enc = encode_pairs(
            p.x, p.W_enc, p.b_enc, None, pairs, order, ReLU(), block, backend
        )
        _, W_dec, _ = decode_pairs(acts, p.W_dec, None, pairs, order, block, backend)
        for rows, expected in ((W_enc, p.W_enc[:, p.rows].T), (W_dec, p.W_dec[p.rows])):
            assert rows is not None
            assert rows.requires_grad
            assert torch.equal(rows[:n], expected)
            assert torch.equal(rows[n:], torch.zeros_like(rows[n:]))


def all_gradients(outputs: Outputs, loss: torch.Tensor, *, retain: bool) -> dict[str, torch.Tensor]:
    leaves = outputs.upstream.leaves
    found = torch.autograd.grad(
        loss, list(leaves.values()), retain_graph=retain, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("losses", [("aux",), ("recons", "aux")], ids="+".join)
def test_blocks_under_autograd_grad(
    losses: tuple[str, ...], backend: Backend, device: torch.device
) -> None:
    values = Parameters.random()
    sparse = sparse_outputs(values.to(device, torch.float32), backend)
    exact = dense_outputs(values.to(device, torch.float64), sparse)
    actual = all_gradients(sparse, sparse.loss(*losses), retain=False)
    for name, expected in all_gradients(exact, exact.loss(*losses), retain=False).items():
        torch.testing.assert_close(actual[name], expected.float(), rtol=1e-4, atol=1e-4)
    assert all(leaf.grad is None for leaf in sparse.upstream.leaves.values())


def test_blocks_through_two_backwards_of_one_graph(backend: Backend, device: torch.device) -> None:
    values = Parameters.random()
    sparse = sparse_outputs(values.to(device, torch.float32), backend)
    exact = dense_outputs(values.to(device, torch.float64), sparse)
    for losses in [("recons", "aux"), ("recons", "aux"), ("recons",), ("aux",)]:
        for outputs in (sparse, exact):
            outputs.loss(*losses).backward(retain_graph=True)
        for name, leaf in exact.upstream.leaves.items():
            actual = sparse.upstream.leaves[name].grad
            assert leaf.grad is not None
            torch.testing.assert_close(actual, leaf.grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["x", "b_enc", "b_dec", "W_enc", "W_dec", "acts", "recons"])
def test_blocks_after_a_gradient_of_something_else(
    first: str, backend: Backend, device: torch.device
) -> None:
    """A partial backward leaves nothing behind that a later backward would add again."""
    values = Parameters.random()
    sparse = sparse_outputs(values.to(device, torch.float32), backend)
    exact = dense_outputs(values.to(device, torch.float64), sparse)
    for outputs in (sparse, exact):
        wanted = getattr(outputs if first in ("acts", "recons") else outputs.upstream, first)
        loss = outputs.loss("recons", "aux")
        torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
    actual = all_gradients(sparse, sparse.loss("recons"), retain=True)
    for name, expected in all_gradients(exact, exact.loss("recons"), retain=True).items():
        torch.testing.assert_close(actual[name], expected.float(), rtol=1e-4, atol=1e-4)
    actual = all_gradients(sparse, sparse.loss("recons", "aux"), retain=False)
    for name, expected in all_gradients(exact, exact.loss("recons", "aux"), retain=False).items():
        torch.testing.assert_close(actual[name], expected.float(), rtol=1e-4, atol=1e-4)


def test_blocks_under_no_grad(backend: Backend, device: torch.device) -> None:
    p = Parameters.random().to(device, torch.float32)
    with torch.no_grad():
        outputs = sparse_outputs(p, backend)
    expected = sparse_outputs(p, backend)
    for name in ("acts", "recons", "aux"):
        assert not getattr(outputs, name).requires_grad
        assert torch.equal(getattr(outputs, name), getattr(expected, name))


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("n", "width"), [(1, 1), (9, 9), (9, 16), (64, 64), (50, 64)])
def test_keep_topk_matches_a_masked_graph(
    n: int, width: int, with_norms: bool, backend: Backend, device: torch.device
) -> None:
    k = (n + 1) // 2
    products = torch.randn(5, width).to(device).requires_grad_()
    bias = torch.randn(n).to(device).requires_grad_()
    norms = (torch.rand(n) + 0.1).to(device) if with_norms else None
    kept = keep_topk(products, bias, norms, k, backend)

    values = products[:, :n] + bias
    scores = values if norms is None else values * norms
    mask = torch.zeros_like(scores).scatter_(1, scores.topk(k).indices, 1.0)
    expected = torch.cat([values * mask, values.new_zeros(5, width - n)], dim=1)
    assert torch.equal(kept, expected)

    upstream = torch.randn(5, width).to(device)
    actual_gradients = torch.autograd.grad(kept, (products, bias), upstream)
    expected_gradients = torch.autograd.grad(expected, (products, bias), upstream)
    for actual, gradient in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-6, atol=1e-6)


def test_keep_topk_drops_nan_where_it_is_not_kept(backend: Backend, device: torch.device) -> None:
    """Of the gradient, that is: a NaN value is larger than any number, so it is kept."""
    nan = torch.nan
    products = torch.tensor([[0.0, 1.0, 2.0], [3.0, nan, 4.0]], device=device).requires_grad_()
    bias = torch.zeros(3, device=device, requires_grad=True)
    kept = keep_topk(products, bias, None, 1, backend)
    assert torch.equal(kept[0], torch.tensor([0.0, 0.0, 2.0], device=device))
    assert torch.equal(kept[1].isnan(), torch.tensor([False, True, False], device=device))
    upstream = torch.tensor([[nan, nan, 5.0], [nan, 6.0, nan]], device=device)
    gradients = torch.autograd.grad(kept, (products, bias), upstream)
    assert torch.equal(
        gradients[0], torch.tensor([[0.0, 0.0, 5.0], [0.0, 6.0, 0.0]], device=device)
    )
    assert torch.equal(gradients[1], torch.tensor([0.0, 6.0, 5.0], device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("gpu_backend", ["torch", "triton"])
def test_gradients_under_autocast_match_the_dense_encoder_under_autocast(
    gpu_backend: Backend,
) -> None:
    device = torch.device("cuda")
    values = Parameters.random()
    with torch.autocast("cuda", torch.bfloat16):
        sparse = sparse_outputs(values.to(device, torch.float32), gpu_backend)
    plain_values, exact_values = (
        values.to(device, dtype) for dtype in (torch.float32, torch.float64)
    )
    with torch.autocast("cuda", torch.bfloat16):
        plain = dense_outputs(plain_values, sparse)
    exact = dense_outputs(exact_values, sparse)
    losses = ("acts", "recons")
    grads = [gradients(outputs, *losses) for outputs in (sparse, plain, exact)]
    for name in ("W_enc", "b_enc", "b_dec", "W_dec", "x"):
        actual, dense, reference = (grad[name] for grad in grads)
        assert actual is not None
        assert dense is not None
        assert reference is not None
        assert actual.dtype == torch.float32
        error = (actual.double() - reference).norm()
        assert error <= 2 * (dense.double() - reference).norm() + 1e-3 * reference.norm(), name


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_kernels_sum_rows_of_bfloat16_into_gradients_of_weights(
    low: torch.dtype, backend: Backend, device: torch.device
) -> None:
    """And of what else there is a gradient, that is a sum of unrounded terms."""
    p = Parameters.random().to(device, torch.float32)
    rows = p.W_enc.detach().T
    pairs = search_topk(p.x.detach(), rows, p.b_enc, None, K, backend, 2**20).complete().pairs
    order = LatentOrder.of(pairs, D_SAE)
    with torch.autocast(device.type, low):
        acts, _, _ = encode_pairs(p.x, p.W_enc, p.b_enc, None, pairs, order, ReLU(), None, backend)
        recons, _, _ = decode_pairs(acts, p.W_dec, p.b_dec, pairs, order, None, backend)
    (recons * p.upstream_recons).sum().backward()

    code = torch.zeros(N_ROWS, D_SAE, dtype=torch.float64, device=device)
    code.scatter_(1, pairs.latents.view(N_ROWS, K), acts.detach().double().view(N_ROWS, K))
    x, upstream = p.x.detach(), p.upstream_recons
    W_enc, W_dec = p.W_enc.detach().double(), p.W_dec.detach().double()
    grad_code = (upstream.double() @ W_dec.T) * (code > 0)
    is_rounded = backend == "triton" and low == torch.bfloat16
    summed_x, summed_upstream = (
        (part.bfloat16() if is_rounded else part).double() for part in (x, upstream)
    )
    expected = {
        "x": grad_code @ W_enc.T,
        "W_enc": summed_x.T @ grad_code,
        "b_enc": grad_code.sum(0),
        "b_dec": upstream.double().sum(0),
        "W_dec": code.T @ summed_upstream,
    }
    for name, gradient in expected.items():
        actual = p.leaves[name].grad
        assert actual is not None and actual.dtype == torch.float32, name
        assert (actual.double() - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_the_input_bias_gets_the_gradient_of_rounded_rows(low: torch.dtype) -> None:
    """Under an autocast in bfloat16: the same with a copy of the rows in it, and without."""
    device = torch.device("cuda")
    p = Parameters.random().to(device, torch.float32, x_requires_grad=False)
    x, rows = (p.x - p.b_dec).detach(), p.W_enc.detach().T
    pairs = search_topk(x, rows, p.b_enc, None, K, "triton", 2**20).complete().pairs
    order = LatentOrder.of(pairs, D_SAE)
    found: list[torch.Tensor] = []
    for rounded in (None, rows.to(low)):
        with torch.autocast("cuda", low):
            acts, _, _ = encode_pairs(
                x, p.W_enc, p.b_enc, p.b_dec, pairs, order, ReLU(), None, "triton", None, rounded
            )
        found += torch.autograd.grad((acts * p.upstream_acts.flatten()).sum(), p.b_dec)
    assert torch.equal(*found)
    active = torch.zeros(N_ROWS, D_SAE, dtype=torch.float64, device=device)
    upstream = (p.upstream_acts.flatten() * (pairs.pre_acts > 0)).view(N_ROWS, K).double()
    totals = active.scatter(1, pairs.latents.view(N_ROWS, K), upstream).sum(0)
    summed = rows.to(torch.bfloat16) if low == torch.bfloat16 else rows
    torch.testing.assert_close(found[0].double(), -totals @ summed.double(), rtol=1e-5, atol=1e-5)
