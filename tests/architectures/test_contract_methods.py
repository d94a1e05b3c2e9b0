"""What users call beside a training step, with any input, against SAELens's own SAEs."""

import math
from typing import Any

import pytest
import torch

from tests.support.architectures import (
    ALL_OR_NO_OPTIONS,
    ON_CPU,
    TOPK_OPTIONS,
    Arm,
    arms,
    every_arm,
)
from tests.support.jumprelu import FAST_PATHS, MODES, OPTIONS, PATHS
from tests.support.saes import (
    N_DEAD,
    dead_mask,
    error,
    forward_pass,
    make_trainer,
    step_values,
    superposed_rows,
    trajectory,
)

CENTRED_OR_NOT = {
    "topk": ALL_OR_NO_OPTIONS,
    "jumprelu": {
        "centred": {"apply_b_dec_to_input": True},
        "uncentred": {"apply_b_dec_to_input": False},
    },
}


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (0,)], ids=str)
@arms(options=CENTRED_OR_NOT)
def test_any_leading_shape(arm: Arm, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    stock = arm.stock(**options)
    n_rows = torch.Size(shape).numel()
    rows = arm.inputs(stock, max(1, n_rows))
    x = rows[:n_rows].reshape(*shape, stock.cfg.d_in)
    acts = stock.encode(x)
    for expected, actual in (
        (acts, arm.sparse(stock).encode(x)),
        (stock(x), arm.sparse(stock)(x)),
        (stock.decode(acts), arm.sparse(stock).decode(acts)),
    ):
        assert type(actual) is torch.Tensor
        assert actual.shape == expected.shape
        torch.testing.assert_close(actual, expected)
    sparse = arm.sparse(stock)
    torch.testing.assert_close(sparse.decode(sparse.encode(x)), stock(x))
    feature_acts, hidden_pre = arm.sparse(stock).encode_with_hidden_pre(x)
    expected_acts, expected_pre = stock.encode_with_hidden_pre(x)
    assert feature_acts.shape == expected_acts.shape == hidden_pre.shape
    torch.testing.assert_close(feature_acts.clone(), expected_acts)
    torch.testing.assert_close(hidden_pre.clone(), expected_pre)
    sparse = arm.sparse(stock)
    torch.testing.assert_close(sparse.decode(sparse.encode_with_hidden_pre(x)[0]), stock(x))


@pytest.mark.parametrize("name", ["no_grad", "inference_mode"])
@every_arm
def test_without_gradients(arm: Arm, name: str) -> None:
    stock, x = arm.case()
    sparse = arm.sparse(stock)
    with getattr(torch, name)():
        output = forward_pass(sparse, x)
        expected = forward_pass(stock, x)
        assert not output.feature_acts.requires_grad
        torch.testing.assert_close(output.feature_acts.clone(), expected.feature_acts)
        torch.testing.assert_close(output.loss, expected.loss)


@arms(topk=ON_CPU)
def test_head_reshaping(arm: Arm) -> None:
    stock, flat = arm.case(n_rows=20, d_in=12, reshape_activations="hook_z")
    x = flat.view(-1, 4, 3)
    stock.turn_on_forward_pass_hook_z_reshaping()

    def sparse() -> Any:
        sae = arm.sparse(stock)
        sae.turn_on_forward_pass_hook_z_reshaping()
        return sae

    expected = step_values(stock, x, input_gradient=True)
    actual = step_values(sparse(), x, input_gradient=True)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert error(actual[name], value) <= 1e-5 * value.norm(), name
    torch.testing.assert_close(sparse().encode(x), stock.encode(x))
    torch.testing.assert_close(sparse()(x), stock(x))
    assert sparse()(x).shape == x.shape
    with pytest.raises(ValueError, match="x must have d_in=12"):
        sparse().encode(torch.zeros(2, 4, 4, device=arm.target.device))


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float64])
@arms(topk=ON_CPU)
def test_inputs_of_other_dtypes(arm: Arm, x_dtype: torch.dtype) -> None:
    if x_dtype not in (*arm.target.dtypes, torch.float16):
        pytest.skip("not a dtype of the target")
    stock, x = arm.case()
    x = x.to(x_dtype)
    torch.testing.assert_close(arm.sparse(stock).encode(x), stock.encode(x))
    torch.testing.assert_close(arm.sparse(stock)(x), stock(x))
    expected, actual = (forward_pass(sae, x) for sae in (stock, arm.sparse(stock)))
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
@arms(topk=ON_CPU, jumprelu={name: FAST_PATHS[name] for name in ("torch-cpu", "fused-cpu")})
def test_bad_inputs(arm: Arm, x: Any, error: type[Exception], message: str, dense: bool) -> None:
    sae = arm.sparse(arm.stock(d_in=16), "dense" if dense else None)
    for method in (sae.encode, sae.forward, sae.encode_with_hidden_pre):
        with pytest.raises(error, match=message):
            method(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@arms(options={"topk": ALL_OR_NO_OPTIONS, "jumprelu": {"defaults": {}}})
def test_bad_activations_surface_as_in_stock(arm: Arm, options: dict[str, Any], bad: float) -> None:
    stock, x = arm.case(n_rows=20, **options)
    sparse = arm.sparse(stock)
    x[3, 2] = bad
    bad_rows: list[list[int]] = []
    counts: list[torch.Tensor] = []
    for sae in (stock, sparse):
        trainer = make_trainer(sae)
        trainer.n_forward_passes_since_fired[:20] = 10**6
        output = trainer.step(x)
        assert not torch.isfinite(output.loss)
        assert all(not torch.isfinite(p).all() for p in sae.parameters())
        bad_rows.append((~torch.isfinite(output.sae_out).all(-1)).nonzero().flatten().tolist())
        counts.append(trainer.act_freq_scores.sum())
    assert bad_rows == [[3], [3]]
    if arm.architecture == "topk":
        # JumpReLU's stock counts every latent of a bad row as firing.
        assert counts[0] == counts[1]


@arms(jumprelu=PATHS)
def test_a_row_of_nan_weights_surfaces(arm: Arm) -> None:
    stock, x = arm.case(n_rows=20)
    sparse = arm.sparse(stock)
    with torch.no_grad():
        sparse.W_enc[:, 5] = float("nan")
    assert torch.isnan(forward_pass(sparse, x).loss)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@arms(
    topk=ON_CPU,
    options={"topk": TOPK_OPTIONS, "jumprelu": MODES},
)
def test_a_bad_decoder_row_matters_when_its_latent_fires(
    arm: Arm, options: dict[str, Any], bad: float
) -> None:
    """Dense products multiply it by zero, which gives NaN at once. Sparse ones do not read it, so
    that only a decoder norm that is NaN tells of it before."""
    stock, x = arm.case(n_rows=20, **options)
    latent = int(stock.encode(x).sum(0).argmax())
    biases = stock.b_enc.detach().clone()
    with torch.no_grad():
        stock.b_enc[latent] = -1e3
    expected = forward_pass(stock, x)
    sparse = arm.sparse(stock)
    with torch.no_grad():
        stock.W_dec[latent] = sparse.W_dec[latent] = bad
    assert not torch.isfinite(forward_pass(stock, x).loss)
    output = forward_pass(sparse, x)
    if arm.target.backend == "fused" or (
        options.get("rescale_acts_by_decoder_norm") and math.isnan(bad)
    ):
        assert torch.isnan(output.loss)
    else:
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.sae_out, expected.sae_out)
    with torch.no_grad():
        sparse.b_enc.copy_(biases)
    assert not torch.isfinite(forward_pass(sparse, x).loss)


@pytest.mark.parametrize("dead", N_DEAD)
@arms(topk=ON_CPU, jumprelu=ON_CPU, options={"topk": TOPK_OPTIONS, "jumprelu": OPTIONS})
def test_dense_implementation_is_stock_bit_for_bit(
    arm: Arm, options: dict[str, Any], dead: str
) -> None:
    stock, x = arm.case(**options)
    dense = arm.sparse(stock, "dense")
    assert dense.implementation.name == "dense"
    mask = dead_mask(stock, min(N_DEAD[dead], stock.cfg.d_sae))
    assert type(forward_pass(dense, x, mask).feature_acts) is torch.Tensor
    expected, actual = (step_values(sae, x, mask, input_gradient=True) for sae in (stock, dense))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    batches = [superposed_rows(stock, 32) for _ in range(5)]
    expected, actual = trajectory(stock, batches), trajectory(dense, batches)
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
