"""How long `feature_acts` and `hidden_pre` are known, and gradients with respect to them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAE

from saelens_sparse.codes.on_demand import SparseFeatureActs
from tests.support.pair import N_ROWS, TENSORS, Pair
from tests.support.saes import forward_pass, gradients, make_stock, sparse_like, zipf_inputs
from tests.support.trainers import make_trainer


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
