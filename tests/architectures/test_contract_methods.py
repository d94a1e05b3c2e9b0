"""What users call beside a training step, with any input, against SAELens's own SAEs."""

import math
from typing import Any

import pytest
import torch

from tests.support.architectures import NOT_INTERPRETED, Subject, subjects
from tests.support.saes import dead_mask, error, forward_pass, step_values


@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (2, 1, 4), (0,)], ids=str)
@subjects(options="centred or not")
def test_any_leading_shape(
    subject: Subject, options: dict[str, Any], shape: tuple[int, ...]
) -> None:
    stock = subject.stock(**options)
    n_rows = torch.Size(shape).numel()
    rows = subject.inputs(stock, max(1, n_rows))
    x = rows[:n_rows].reshape(*shape, stock.cfg.d_in)
    acts = stock.encode(x)
    for expected, actual in (
        (acts, subject.sparse(stock).encode(x)),
        (stock(x), subject.sparse(stock)(x)),
        (stock.decode(acts), subject.sparse(stock).decode(acts)),
    ):
        assert type(actual) is torch.Tensor
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected)
    sparse = subject.sparse(stock)
    torch.testing.assert_close(sparse.decode(sparse.encode(x)), stock(x))
    feature_acts, hidden_pre = subject.sparse(stock).encode_with_hidden_pre(x)
    expected_acts, expected_pre = stock.encode_with_hidden_pre(x)
    assert feature_acts.shape == expected_acts.shape == hidden_pre.shape
    torch.testing.assert_close(feature_acts.clone(), expected_acts)
    torch.testing.assert_close(hidden_pre.clone(), expected_pre)
    sparse = subject.sparse(stock)
    torch.testing.assert_close(sparse.decode(sparse.encode_with_hidden_pre(x)[0]), stock(x))


@pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
@subjects()
def test_without_gradients(subject: Subject, name: str) -> None:
    stock, x = subject.case()
    sparse = subject.sparse(stock)
    with getattr(torch, name)():
        output = forward_pass(sparse, x)
        expected = forward_pass(stock, x)
        assert not output.feature_acts.requires_grad
        torch.testing.assert_close(output.feature_acts.clone(), expected.feature_acts)
        torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("n_dead", [0, 5, 20])
@subjects(NOT_INTERPRETED, any_input=True)
def test_head_reshaping(subject: Subject, n_dead: int) -> None:
    stock, flat = subject.case(n_rows=20, d_in=12, reshape_activations="hook_z")
    x, dead = flat.view(-1, 4, 3), dead_mask(stock, n_dead)
    stock.turn_on_forward_pass_hook_z_reshaping()

    def sparse() -> Any:
        sae = subject.sparse(stock)
        sae.turn_on_forward_pass_hook_z_reshaping()
        return sae

    expected = step_values(stock, x, dead, input_gradient=True)
    actual = step_values(sparse(), x, dead, input_gradient=True)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert error(actual[name], value) <= 1e-5 * value.norm(), name
    torch.testing.assert_close(sparse().encode(x), stock.encode(x))
    torch.testing.assert_close(sparse()(x), stock(x))
    assert sparse()(x).shape == x.shape
    with pytest.raises(ValueError, match="x must have d_in=12"):
        sparse().encode(torch.zeros(2, 4, 4, device=subject.target.device))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float64])
@subjects(NOT_INTERPRETED)
def test_inputs_of_other_dtypes(subject: Subject, x_dtype: torch.dtype) -> None:
    if x_dtype not in (*subject.target.dtypes, torch.float16):
        pytest.skip("not a dtype of the target")
    stock, x = subject.case()
    x = x.to(x_dtype)
    torch.testing.assert_close(subject.sparse(stock).encode(x), stock.encode(x))
    torch.testing.assert_close(subject.sparse(stock)(x), stock(x))
    expected, actual = (forward_pass(sae, x) for sae in (stock, subject.sparse(stock)))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.sae_out, expected.sae_out)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(4, 17), ValueError, r"x must have d_in=16 .*\[4, 17\]"),
        (torch.zeros(4, 1), ValueError, "x must have d_in"),
        (torch.zeros(()), ValueError, "x must have d_in"),
        (torch.zeros(4, 16, dtype=torch.int64), TypeError, "x must have a floating"),
        (torch.zeros(4, 16, dtype=torch.complex64), TypeError, "x must have a floating"),
        (torch.zeros(4, 16, device="meta"), ValueError, "x must be on the SAE's device"),
        ([[0.0] * 16], TypeError, "x must be a torch.Tensor; got list"),
    ],
    ids=["width", "width-1", "scalar", "integer", "complex", "device", "list"],
)
@pytest.mark.parametrize("dense", [False, True], ids=["own path", "dense"])
@subjects(frozenset({"torch-cpu", "fused-cpu"}))
def test_bad_inputs(
    subject: Subject, x: Any, error: type[Exception], message: str, dense: bool
) -> None:
    sae = subject.sparse(subject.stock(d_in=16), "dense" if dense else None)
    for method in (sae.encode, sae.forward, sae.encode_with_hidden_pre):
        with pytest.raises(error, match=message):
            method(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@subjects(NOT_INTERPRETED, options="few")
def test_a_bad_decoder_row_matters_when_its_latent_fires(
    subject: Subject, options: dict[str, Any], bad: float
) -> None:
    """Dense products multiply it by zero, which gives NaN at once. Sparse ones do not need it, so
    that only a decoder norm that is NaN tells of it before. Kernels do not even read it then: the
    latent takes a place among the k, and its activation is zero."""
    stock, x = subject.case(n_rows=20, **options)
    latent = int(stock.encode(x).sum(0).argmax())
    biases = stock.b_enc.detach().clone()
    with torch.no_grad():
        stock.b_enc[latent] = -1e3
    expected = forward_pass(stock, x)
    sparse = subject.sparse(stock)
    with torch.no_grad():
        stock.W_dec[latent] = sparse.W_dec[latent] = bad
    assert not torch.isfinite(forward_pass(stock, x).loss)
    output = forward_pass(sparse, x)
    reads_norms = getattr(stock.cfg, "rescale_acts_by_decoder_norm", False)
    if reads_norms and math.isnan(bad) and subject.target.backend == "triton":
        assert torch.isfinite(output.loss)
    elif subject.target.backend == "fused" or (reads_norms and math.isnan(bad)):
        assert torch.isnan(output.loss)
    else:
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.sae_out, expected.sae_out)
    with torch.no_grad():
        sparse.b_enc.copy_(biases)
    assert not torch.isfinite(forward_pass(sparse, x).loss)
