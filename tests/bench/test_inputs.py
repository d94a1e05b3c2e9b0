"""What all contenders start from: batches like activations, and weights like trained ones."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES
from saelens_sparse.profile.cases import FLOAT32
from saelens_sparse.profile.data import COMMON_FEATURES, ActivationStream
from saelens_sparse.profile.trainers import build_sae, implementation_of
from saelens_sparse.profile.weights import calibrate, plant_features
from tests.support.saes import make_stock, sparse_like

TINY, TINY_JUMPRELU = CASES["tiny"], CASES["tiny_jumprelu"]


def test_features_are_present_as_often_as_they_should_be():
    n, rows = 4 * COMMON_FEATURES, 4096
    stream = ActivationStream(8, n, features_per_row=60.0, device="cpu")
    # With one dimension for each feature and nothing else, a batch shows the code.
    stream.directions, stream.spread = torch.eye(n), torch.ones(n)
    stream.mean, stream.scale = torch.zeros(n), 1.0
    present = (stream.batch(rows, 0) > 0.05).float()
    rank = torch.arange(1, n + 1)
    expected = (60.0 / rank / (1 / rank).sum()).clamp(max=1.0)
    frequencies = present.mean(0)
    torch.testing.assert_close(frequencies[:50], expected[:50], rtol=0.15, atol=0.02)
    for first in range(0, n, COMMON_FEATURES // 2):
        part = slice(first, first + COMMON_FEATURES // 2)
        assert frequencies[part].sum() == pytest.approx(expected[part].sum().item(), rel=0.05)
    # No row gets the others' share.
    assert present[:, COMMON_FEATURES:].sum(1).std() < 1.3 * expected[COMMON_FEATURES:].sum().sqrt()
    assert torch.equal(stream.batch(64, 3), stream.batch(64, 3))


def test_features_are_planted_all_over_the_latents():
    case = TINY
    stream = ActivationStream(case.d_in, case.d_sae // 4, 4, "cpu")
    sae = build_sae(case.registered.stock, case, FLOAT32, "cpu")
    untouched = sae.W_dec.detach().clone()
    plant_features(sae, stream)
    planted = (sae.W_dec != untouched).any(1).nonzero().squeeze(1)
    assert planted.numel() == case.d_sae // 4
    halves = (planted < case.d_sae // 2).float().mean().item()
    assert 0.3 < halves < 0.7
    # Every feature has its own latent, in the encoder as in the decoder.
    directions = torch.nn.functional.normalize(stream.spread * stream.directions, dim=-1)
    for weight in (sae.W_dec, sae.W_enc.T):
        latents = torch.nn.functional.normalize(weight[planted], dim=-1)
        assert (latents @ directions.T).argmax(1).unique().numel() == case.d_sae // 4


@pytest.mark.parametrize("l0", [2.0, 20.0])
def test_thresholds_are_calibrated_to_the_l0(l0: float):
    case = TINY_JUMPRELU
    stream = ActivationStream(case.d_in, case.d_sae, case.features_per_row, "cpu")
    batches = [stream.batch(case.batch, index) for index in range(2)]
    sae: Any = build_sae(case.registered.stock, case, FLOAT32, "cpu")
    plant_features(sae, stream)
    calibrate(sae, batches, l0)
    x = torch.cat(batches)
    active = sae.encode(x) > 0
    assert active.sum(-1).float().mean().item() == pytest.approx(l0, rel=0.01)
    assert sae.threshold.min() >= 0
    # The scale is the best one: the error is orthogonal to the reconstruction.
    recons = sae(x) - sae.b_dec
    assert (recons * (x - sae(x))).sum().abs() < 1e-2 * recons.square().sum()


def test_rows_name_what_runs_under_their_autocast() -> None:
    sae = sparse_like(make_stock(d_sae=200, k=6), "auto")
    assert implementation_of(sae, nullcontext()) == "torch"
    assert implementation_of(sae, torch.autocast("cpu", torch.bfloat16)) == "dense"
