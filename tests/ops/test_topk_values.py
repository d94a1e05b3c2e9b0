"""The k largest of dense products, in their place."""

from importlib import import_module
from typing import Any

import pytest
import torch

from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.search.topk import topk_values
from tests.conftest import Target


def assert_keeps_topk(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    k: int,
    backend: Backend,
) -> None:
    values, kept = topk_values(products, bias, norms, k, backend)
    assert values.dtype == products.dtype
    assert kept.dtype == torch.bool
    assert values.shape == kept.shape == products.shape
    n = bias.numel()
    assert (kept.sum(1) == k).all()
    assert not kept[:, n:].any()
    assert torch.equal(values[~kept], torch.zeros_like(values[~kept]))
    # Of the sums in float32 the k largest, NaN above everything.
    pre_acts = products[:, :n].float() + bias.float()
    scores = pre_acts if norms is None else pre_acts * norms
    actual = scores[kept[:, :n]].view(-1, k).topk(k).values
    torch.testing.assert_close(actual, scores.topk(k).values, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        values[kept], pre_acts.to(products.dtype)[kept[:, :n]], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(
    ("n", "width", "k"),
    [
        (1, 1, 1),
        (7, 7, 3),
        (100, 128, 50),
        (128, 128, 128),
        (129, 129, 1),
        (255, 256, 254),
        (250, 257, 31),
        (3, 64, 2),
    ],
)
def test_topk_values_is_the_set_of_torch_topk(
    n: int, width: int, k: int, with_norms: bool, backend: Backend, device: torch.device
) -> None:
    products, bias = torch.randn(5, width).to(device), torch.randn(n).to(device)
    norms = (torch.rand(n) + 0.1).to(device) if with_norms else None
    assert_keeps_topk(products, bias, norms, k, backend)
    scores = products[:, :n] + bias
    if norms is not None:
        scores = scores * norms
    expected = torch.zeros_like(products, dtype=torch.bool)
    expected.scatter_(1, scores.topk(k).indices, True)
    assert torch.equal(topk_values(products, bias, norms, k, backend)[1], expected)


def test_topk_values_keeps_exactly_k_on_ties_infinities_and_nan(
    backend: Backend, device: torch.device
) -> None:
    inf, nan = torch.inf, torch.nan
    negative_nan = float(torch.tensor(nan).copysign(torch.tensor(-1.0)))
    products = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-0.0, 0.0, -0.0, 0.0, -1.0, 0.0],
            [-inf, -inf, -inf, -inf, -inf, -inf],
            [-inf, 1.0, -inf, -inf, -2.0, -inf],
            [nan, nan, nan, nan, nan, nan],
            [1.0, negative_nan, inf, -inf, 2.0, negative_nan],
            [1.0, nan, 2.0, inf, nan, -inf],
            [inf, inf, inf, inf, inf, 5.0],
            [1.0, 2.0, 2.0, 2.0, 2.0, 3.0],
            [-1.0, -2.0, -3.0, -1e-30, 1e-30, -1e38],
        ],
        device=device,
    )
    bias = torch.zeros(6, device=device)
    padded = torch.nn.functional.pad(products, (0, 2), value=9.0)
    for k in (1, 2, 3, 5, 6):
        assert_keeps_topk(products, bias, None, k, backend)
        assert_keeps_topk(padded, bias, None, k, backend)


def test_topk_values_takes_bfloat16_and_non_contiguous_products(
    target: Target, backend: Backend, device: torch.device
) -> None:
    assert_keeps_topk(
        torch.randn(70, 5).to(device).T, torch.randn(66).to(device), None, 20, backend
    )
    products = torch.randn(1, 70).to(device).expand(4, 70)
    assert_keeps_topk(products, torch.randn(140).to(device)[::2], None, 20, backend)
    if not target.interpreted:
        # A bfloat16 product and a float32 bias, as under autocast.
        products = torch.randn(6, 300).to(device, torch.bfloat16)
        assert_keeps_topk(products, torch.randn(300).to(device), None, 150, backend)


def test_topk_values_of_an_empty_batch(backend: Backend, device: torch.device) -> None:
    values, kept = topk_values(
        torch.zeros(0, 9, device=device), torch.zeros(8, device=device), None, 4, backend
    )
    assert values.shape == kept.shape == (0, 9)


@pytest.mark.parametrize(("k", "n"), [(0, 9), (10, 9), (9, 8), (3, 10)])
def test_topk_values_names_sizes_out_of_range(
    k: int, n: int, backend: Backend, device: torch.device
) -> None:
    with pytest.raises(ValueError, match=rf"got k={k}, {n} and 9"):
        topk_values(
            torch.zeros(2, 9, device=device), torch.zeros(n, device=device), None, k, backend
        )


def test_topk_values_in_triton_is_for_rows_that_fit_into_registers(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "triton":
        pytest.skip("about the Triton backend")
    select_triton = import_module("saelens_sparse.ops.search.topk_kernels")
    widths: list[int] = []
    original = select_triton.topk_values

    def spy(products: torch.Tensor, *args: Any) -> Any:
        widths.append(products.shape[1])
        return original(products, *args)

    monkeypatch.setattr(select_triton, "topk_values", spy)
    widest = select_triton.MAX_KEEP_COLUMNS
    for width in (widest, widest + 1):
        products, bias = torch.randn(2, width).to(device), torch.randn(width).to(device)
        assert_keeps_topk(products, bias, None, 1000, backend)
    assert widths == [widest]
