"""One training step against SAELens's own Matryoshka SAE, for what only that has: levels.

The oracle is stock in float64 on the same weights and inputs. The sparse SAE may be at most twice
as far from it as stock in the same dtype is.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE

from saelens_sparse.architectures.matryoshka import LeveledCode, rows_by_level
from saelens_sparse.codes.on_demand import SparseFeatureActs, code_of
from saelens_sparse.ops import decode
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.update import row_gradient
from tests.conftest import TARGETS, Target
from tests.support.matryoshka import levels_of, make_matryoshka, matryoshka_inputs
from tests.support.saes import (
    FLOAT32,
    PRECISIONS,
    LargestTensor,
    Precision,
    compare_steps,
    dead_mask,
    forward_pass,
    input_or_not,
    not_interpreted,
    record_materializations,
    sparse_like,
    superposed_rows,
    target_precision_parameters,
)
from tests.support.trainers import make_trainer

every_target_precision = pytest.mark.parametrize(
    ("target", "precision"), target_precision_parameters(*PRECISIONS)
)
not_interpreted_precision = pytest.mark.parametrize(
    ("target", "precision"),
    target_precision_parameters(
        *PRECISIONS, targets={n: t for n, t in TARGETS.items() if not t.interpreted}
    ),
)
AUX = {"level-error": True, "whole-error": False}
either_aux_loss = pytest.mark.parametrize("of_level", AUX.values(), ids=AUX)
WIDTHS: dict[str, list[int]] = {
    "one": [],
    "two": [11],
    "single-latents": [1, 2, 3, 47],
    "twelve": list(range(4, 48, 4)),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("n_dead", [0, 20, 48])
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "raw"])
@either_aux_loss
@input_or_not
@every_target_precision
def test_levels(
    target: Target,
    precision: Precision,
    widths: list[int],
    of_level: bool,
    n_dead: int,
    rescale: bool,
    input_gradient: bool,
) -> None:
    stock = make_matryoshka(
        dtype=precision.dtype, device=target.device, matryoshka_widths=widths,
        use_matryoshka_aux_loss=of_level, rescale_acts_by_decoder_norm=rescale,
    )  # fmt: skip
    dead = dead_mask(stock, n_dead)
    x = matryoshka_inputs(stock, target.few_rows(40), dead)
    sparse = sparse_like(stock, target.backend)
    compare_steps(stock, sparse, x, dead, precision, input_gradient=input_gradient)


def no_active_latent(stock: MatryoshkaBatchTopKTrainingSAE, level: slice) -> None:
    stock.W_enc[:, level] = 0.0
    stock.b_enc[level] = -1.0


def all_active_latents(stock: MatryoshkaBatchTopKTrainingSAE, level: slice) -> None:
    stock.b_enc.fill_(-1e3)
    stock.b_enc[level] = 1.0


@pytest.mark.pairwise
@pytest.mark.parametrize("change", [no_active_latent, all_active_latents])
@pytest.mark.parametrize("level", [0, 1, 2])
@either_aux_loss
@not_interpreted_precision
def test_a_level_has_none_or_all_of_the_active_latents(
    target: Target,
    precision: Precision,
    change: Callable[[MatryoshkaBatchTopKTrainingSAE, slice], None],
    level: int,
    of_level: bool,
) -> None:
    stock: Any = make_matryoshka(
        dtype=precision.dtype, device=target.device, use_matryoshka_aux_loss=of_level, k=2
    )
    latents, n_rows = levels_of(stock)[level], target.few_rows(40)
    with torch.no_grad():
        change(stock, latents)
    if change is no_active_latent:
        x, share = matryoshka_inputs(stock, n_rows), 0.0
    else:
        # More than are positive, so that no rank decides.
        stock.activation_fn.k = stock.cfg.k = float(latents.stop - latents.start)
        x, share = superposed_rows(stock, n_rows), 1.0
    active = stock.encode(x) > 0
    assert active[:, latents].sum() / active.sum() == share
    compare_steps(stock, sparse_like(stock, target.backend), x, None, precision)


@not_interpreted
@pytest.mark.parametrize("dead_levels", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_levels_without_dead_latents(target: Target, dead_levels: tuple[int, ...]) -> None:
    """Each level has an AuxK loss of its own, and none if none of its latents is dead."""
    stock = make_matryoshka(use_matryoshka_aux_loss=True, device=target.device)
    dead = torch.zeros(stock.cfg.d_sae, dtype=torch.bool, device=target.device)
    for level in dead_levels:
        latents = levels_of(stock)[level]
        dead[latents.start : latents.start + 2] = True
    x = matryoshka_inputs(stock, target.few_rows(40), dead)
    compare_steps(stock, sparse_like(stock, target.backend), x, dead, FLOAT32)


@not_interpreted
def test_losses_are_those_of_stock_by_name_and_add_up(target: Target) -> None:
    stock = make_matryoshka(device=target.device, matryoshka_widths=[3, 5, 20])
    x = matryoshka_inputs(stock, target.few_rows(20))
    expected, actual = (forward_pass(sae, x) for sae in (stock, sparse_like(stock, target.backend)))
    assert list(actual.losses) == list(expected.losses)
    assert list(actual.losses)[-3:] == [f"inner_mse_loss_{width}" for width in (3, 5, 20)]
    torch.testing.assert_close(actual.loss, sum(actual.losses.values()))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the passes over the pairs that the decoder and the gradient of its weight take."""
    counter: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counter[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for module, name in (
        (decode, "gather_sum"), (decode, "gather_dot"), (row_gradient, "segment_sum"),
    ):  # fmt: skip
        count(module, name)
    return counter


@either_aux_loss
def test_one_pass_over_the_pairs_serves_all_levels(
    target: Target, of_level: bool, passes: Counter[str]
) -> None:
    stock = make_matryoshka(
        device=target.device, matryoshka_widths=[2, 5, 9, 20, 30], use_matryoshka_aux_loss=of_level
    )
    x = matryoshka_inputs(stock, target.few_rows(20))
    output = forward_pass(sparse_like(stock, target.backend), x, dead_mask(stock, 10))
    assert passes == {"gather_sum": 1}
    assert len(output.losses) == 7
    output.loss.backward()
    # W_enc has a gradient too.
    assert passes == {"gather_sum": 1, "gather_dot": 1, "segment_sum": 2}


@either_aux_loss
def test_no_tensor_of_a_trainer_step_is_dense(
    of_level: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_rows, d_sae = 64, 2**14
    stock = make_matryoshka(
        d_in=4, d_sae=d_sae, k=5, matryoshka_widths=[64, 1024], use_matryoshka_aux_loss=of_level
    )
    trainer = make_trainer(sparse_like(stock, screen_buffer_mib=1))
    trainer.n_forward_passes_since_fired[::1000] = 10**6
    x = superposed_rows(stock, n_rows)
    materializations = record_materializations(monkeypatch)
    with LargestTensor() as largest:
        output = trainer.step(x)
        trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    assert output.losses["auxiliary_reconstruction_loss"] > 0
    assert materializations == []
    bound_of_the_screen = 2**20 // (2 if stock.W_enc.is_cuda else 4)  # scores of 2 or 4 bytes
    assert largest.numel <= bound_of_the_screen < n_rows * d_sae
    # Outputs may be kept. Reconstructions of levels are not kept with them.
    code = code_of(output.feature_acts)
    assert isinstance(code, LeveledCode)
    assert code.recons == []


@either_aux_loss
def test_levels_of_activations_that_somebody_changed(of_level: bool) -> None:
    """As in stock, inner losses are those of `feature_acts` as the losses before left it."""
    stock: Any = make_matryoshka(use_matryoshka_aux_loss=of_level, dtype=torch.float64)
    x, dead = matryoshka_inputs(stock, 20), dead_mask(stock, 20)
    outputs = []
    for sae in (stock, sparse_like(stock)):
        original = sae.calculate_aux_loss

        def changing(*, feature_acts: torch.Tensor, original: Any = original, **inputs: Any) -> Any:
            with torch.no_grad():
                feature_acts.mul_(2)
            return original(feature_acts=feature_acts, **inputs)

        sae.calculate_aux_loss = changing
        outputs.append(forward_pass(sae, x, dead))
    for name, loss in outputs[0].losses.items():
        torch.testing.assert_close(outputs[1].losses[name], loss, msg=name)


def test_decoding_beside_a_step_is_one_level(passes: Counter[str]) -> None:
    stock = make_matryoshka()
    x, sparse = matryoshka_inputs(stock, 20), sparse_like(stock)
    acts, _ = sparse.encode_with_hidden_pre(x)
    assert isinstance(acts, SparseFeatureActs)
    torch.testing.assert_close(sparse.decode(acts), stock(x))
    assert passes == {"gather_sum": 1}
    for (width, expected), (actual_width, actual) in zip(
        stock._iterable_decode(stock.encode(x), True), sparse._iterable_decode(acts, True),
        strict=True,
    ):  # fmt: skip
        assert actual_width == width
        torch.testing.assert_close(actual, expected)


@not_interpreted
def test_rows_by_level(target: Target) -> None:
    """Against one pair after the other. What lies beyond the last row is on none."""
    n_rows, widths = 7, (3, 4, 20)
    present = torch.rand(n_rows, widths[-1]) < 0.3
    present[2] = False
    present[5, :4] = False
    row, latents = present.nonzero().unbind(1)
    lists: dict[tuple[int, int], list[int]] = {}
    for place, (n, latent) in enumerate(zip(row.tolist(), latents.tolist(), strict=True)):
        level = sum(latent >= width for width in widths[:-1])
        lists.setdefault((n, level), []).append(place)
    device = torch.device(target.device)
    for n_beyond in (0, 5):
        of_ascending = Rows.of_ascending(row.to(device), n_rows)
        assert of_ascending.offsets is not None and of_ascending.of_pairs is not None
        rows = Rows.ragged(
            of_ascending.offsets, torch.nn.functional.pad(of_ascending.of_pairs, (0, n_beyond))
        )
        padded = torch.nn.functional.pad(latents, (0, n_beyond)).to(device)
        pairs = ActivePairs(padded, padded.to(torch.int32), padded.float(), rows)
        actual = rows_by_level(pairs, widths)
        assert actual.n_rows == n_rows * len(widths)
        starts = actual.starts(device).tolist()
        assert starts[-1] == len(latents)
        for n, level in itertools.product(range(n_rows), range(len(widths))):
            i = n * len(widths) + level
            expected = lists.get((n, level), [])
            assert list(range(starts[i], starts[i + 1])) == expected
            if expected:
                places = torch.tensor(expected, device=device)
                assert (actual.of(places) == i).all()
