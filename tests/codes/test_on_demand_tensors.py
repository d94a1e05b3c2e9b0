"""`feature_acts` and `hidden_pre` of a training step: seldom computed, always ordinary to see."""

from collections.abc import Callable, Iterator

import pytest
import torch
from sae_lens.saes.sae import TrainStepOutput
from torch.utils._pytree import tree_flatten

from saelens_sparse.codes.on_demand import FiringPattern, SparseFeatureActs
from tests.support.pair import N_ROWS, Pair
from tests.support.saes import (
    LargestTensor,
    dead_mask,
    forward_pass,
    make_stock,
    sparse_like,
    zipf_inputs,
)
from tests.support.trainers import make_trainer


def test_a_trainer_step_computes_neither(materializations: list[type]) -> None:
    stock = make_stock()
    sparse = sparse_like(stock)
    trainer = make_trainer(sparse, feature_sampling_window=1, dead_feature_window=1)
    outputs: list[TrainStepOutput] = []
    for _ in range(4):
        trainer.maybe_reset_sparsity()
        outputs.append(trainer.step(zipf_inputs(stock, N_ROWS)))
        trainer.n_training_steps += 1
        trainer.build_train_step_log_dict(outputs[-1], trainer.n_training_samples)
    output = outputs[-1]
    assert output.losses["auxiliary_reconstruction_loss"] > 0
    assert materializations == []
    # The recorder works.
    output.feature_acts.max()
    assert materializations == [SparseFeatureActs]


def test_no_tensor_of_a_trainer_step_is_dense() -> None:
    n_rows, d_sae = 64, 2**14
    stock = make_stock(d_in=4, d_sae=d_sae, k=5)
    sparse = sparse_like(stock, screen_buffer_mib=1)
    trainer = make_trainer(sparse)
    trainer.n_forward_passes_since_fired[:20] = 10**6
    x = zipf_inputs(stock, n_rows)
    with LargestTensor() as largest:
        output = trainer.step(x)
        trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    bound_of_the_screen = 2**20 // 4
    assert largest.numel <= bound_of_the_screen < n_rows * d_sae

    # The recorder works.
    with LargestTensor() as largest:
        forward_pass(stock, x)
    assert largest.numel == n_rows * d_sae


def statistics() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    return {
        "did fire": lambda acts: acts.bool().float().sum(-2).bool(),
        "firing counts": lambda acts: acts.bool().float().sum(0),
        "l0": lambda acts: acts.bool().float().sum(-1).to_dense(),
        "dim=0": lambda acts: acts.bool().float().sum(dim=0),
        "dim=-1": lambda acts: acts.bool().float().sum(dim=-1),
        "torch.sum": lambda acts: torch.sum(acts.bool().float(), 1),
        "torch.sum dim=": lambda acts: torch.sum(acts.bool().float(), dim=-2),
    }


@pytest.mark.parametrize("name", statistics())
@pytest.mark.parametrize("clipped", [False, True], ids=["all-positive", "clipped"])
def test_statistics_without_computing_activations(
    name: str, clipped: bool, materializations: list[type]
) -> None:
    stock = make_stock()
    if clipped:
        with torch.no_grad():
            stock.b_enc.sub_(3)
    x = zipf_inputs(stock, N_ROWS)
    expected = statistics()[name](stock.encode_with_hidden_pre(x)[0])
    acts, _ = sparse_like(stock).encode_with_hidden_pre(x)
    with LargestTensor() as largest:
        actual = statistics()[name](acts)
    assert materializations == []
    assert largest.numel <= max(N_ROWS * stock.cfg.k, stock.cfg.d_sae + 1)
    assert type(actual) is torch.Tensor
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype


PATTERN_USES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "fired.sum()": lambda fired: fired.sum(),
    "fired.sum(dim=-1, keepdim=True)": lambda fired: fired.sum(dim=-1, keepdim=True),
    "fired.sum(0, keepdim=True)": lambda fired: fired.sum(0, keepdim=True),
    "fired.sum(dim=(0, 1))": lambda fired: fired.sum(dim=(0, 1)),
    "fired.sum(dim=[0])": lambda fired: fired.sum(dim=[0]),
    "fired.sum(0, dtype=torch.float64)": lambda fired: fired.sum(0, dtype=torch.float64),
    "fired.sum(dim=0, dtype=torch.float64)": lambda fired: fired.sum(dim=0, dtype=torch.float64),
    "fired.float().mean(0)": lambda fired: fired.float().mean(0),
    "fired.max()": lambda fired: fired.max(),
    "fired.any(0)": lambda fired: fired.any(0),
    "fired[2]": lambda fired: fired[2],
    "fired * 2.0": lambda fired: fired * 2.0,
    "fired.to(torch.int32)": lambda fired: fired.to(torch.int32),
    "fired.nonzero()": lambda fired: fired.nonzero(),
    "fired.clone().detach()": lambda fired: fired.clone().detach(),
    "~fired.bool()": lambda fired: ~fired.bool(),
}


@pytest.mark.parametrize("use", PATTERN_USES)
@pytest.mark.parametrize("as_float", [False, True], ids=["bool", "float"])
def test_other_uses_of_the_firing_pattern(pair: Pair, as_float: bool, use: str) -> None:
    expected, actual = (
        acts.bool().float() if as_float else acts.bool()
        for acts in (pair.stock_output.feature_acts, pair.output.feature_acts)
    )
    assert isinstance(actual, FiringPattern)
    expected, actual = PATTERN_USES[use](expected), PATTERN_USES[use](actual)
    assert type(actual) is torch.Tensor
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
def test_firing_pattern_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    stock = make_stock()
    x = zipf_inputs(stock, max(1, torch.Size(shape).numel())).view(*shape, stock.cfg.d_in)
    expected = stock.encode_with_hidden_pre(x)[0].bool().float()
    actual = sparse_like(stock).encode_with_hidden_pre(x)[0].bool().float()
    for dim in (0, -1):
        assert torch.equal(actual.sum(dim), expected.sum(dim))


@pytest.fixture(params=["no_grad", "inference_mode", "eval"])
def context(request: pytest.FixtureRequest) -> Iterator[str]:
    request.getfixturevalue("pair")  # Made outside of the context.
    contexts = {
        "no_grad": torch.no_grad(),
        "inference_mode": torch.inference_mode(),
        "eval": torch.enable_grad(),
    }
    with contexts[request.param]:
        yield request.param


@pytest.mark.usefixtures("context")
def test_public_methods_without_gradients(pair: Pair) -> None:
    for sae in (pair.stock, pair.sparse):
        sae.eval()
    for method in ("encode", "forward"):
        actual = getattr(pair.sparse, method)(pair.x)
        assert type(actual) is torch.Tensor
        torch.testing.assert_close(actual, getattr(pair.stock, method)(pair.x))
    acts, hidden_pre = pair.sparse.encode_with_hidden_pre(pair.x)
    expected_acts, expected_pre = pair.stock.encode_with_hidden_pre(pair.x)
    torch.testing.assert_close(pair.sparse.decode(acts), pair.stock.decode(expected_acts))
    torch.testing.assert_close(acts.clone(), expected_acts)
    torch.testing.assert_close(hidden_pre.clone(), expected_pre)


def test_a_first_look_in_inference_mode(pair: Pair) -> None:
    with torch.inference_mode():
        expected = pair.stock_output.feature_acts.max().item()
        assert pair.output.feature_acts.max().item() == pytest.approx(expected)


def test_nested_in_containers(pair: Pair) -> None:
    lazy = pair.output.feature_acts
    expected = pair.stock_output.feature_acts
    torch.testing.assert_close(torch.cat([lazy, lazy]), torch.cat([expected, expected]))
    leaves, _ = tree_flatten({"acts": [lazy]})
    assert leaves == [lazy] or leaves[0] is lazy
    torch.testing.assert_close(
        torch.block_diag(lazy.detach(), lazy.detach()),
        torch.block_diag(expected.detach(), expected.detach()),
    )
    torch.testing.assert_close(
        torch.func.vjp(lambda a: a * 2, lazy.detach())[0], 2 * expected.detach()
    )


def test_zeros_are_not_stored_in_compressed_tensors() -> None:
    stock = make_stock()
    with torch.no_grad():
        stock.b_enc.sub_(3)
    x = zipf_inputs(stock, N_ROWS)
    acts, _ = sparse_like(stock).encode_with_hidden_pre(x)
    n_active = int(stock.encode(x).count_nonzero())
    assert acts.to_sparse_coo().values().numel() == n_active
    assert acts.to_sparse_csr().values().numel() == n_active
    assert 0 < n_active < N_ROWS * stock.cfg.k


def test_dead_latents_are_read_from_the_same_pattern() -> None:
    """`n_forward_passes_since_fired` and the firing counts of stock, with clipped zeros."""
    stock = make_stock()
    with torch.no_grad():
        stock.b_enc.sub_(3)
    x = zipf_inputs(stock, N_ROWS)
    sparse = sparse_like(stock)
    trainers = [make_trainer(sae) for sae in (stock, sparse)]
    for trainer in trainers:
        trainer.n_forward_passes_since_fired += 5
        trainer.step(x)
    assert torch.equal(
        trainers[0].n_forward_passes_since_fired, trainers[1].n_forward_passes_since_fired
    )
    assert torch.equal(trainers[0].act_freq_scores, trainers[1].act_freq_scores)
    assert 0 < trainers[0].act_freq_scores.sum() < N_ROWS * stock.cfg.k


def test_auxk_with_a_hidden_pre_that_was_read(pair: Pair) -> None:
    mask = dead_mask(pair.stock, 10)
    losses = []
    for sae in (pair.stock, pair.sparse):
        acts, hidden_pre = sae.encode_with_hidden_pre(pair.x)
        hidden_pre.max()
        sae_out = sae.decode(acts)
        losses.append(sae.calculate_topk_aux_loss(pair.x, sae_out, hidden_pre, mask))
    torch.testing.assert_close(losses[1], losses[0])
