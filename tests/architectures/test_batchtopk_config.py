"""Values that a BatchTopK configuration refuses, and what it says."""

from typing import Any

import pytest

from saelens_sparse import SparseBatchTopKTrainingSAEConfig


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be above 0 and at most d_sae=128; got 0"),
        ({"k": -0.5}, ValueError, "k must be above 0 and at most d_sae=128; got -0.5"),
        ({"k": 128.5}, ValueError, "k must be above 0 and at most d_sae=128; got 128.5"),
        ({"k": True}, TypeError, "k must be a number; got True"),
        ({"k": "4"}, TypeError, "k must be a number; got '4'"),
        ({"k": float("nan")}, ValueError, "k must be finite; got nan"),
        ({"topk_threshold_lr": -0.1}, ValueError, r"topk_threshold_lr must be in \[0, 1\]; got"),
        ({"topk_threshold_lr": 1.1}, ValueError, r"topk_threshold_lr must be in \[0, 1\]; got"),
        ({"topk_threshold_lr": None}, TypeError, "topk_threshold_lr must be a number; got None"),
        ({"aux_loss_coefficient": float("inf")}, ValueError, "aux_loss_coefficient must be finite"),
        ({"rescale_acts_by_decoder_norm": 1}, TypeError, "rescale_acts_by_decoder_norm must be a"),
        ({"d_sae": -1}, ValueError, "d_sae must be at least 1; got -1"),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], error: type[Exception], message: str) -> None:
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 128, "k": 4, **options}
    with pytest.raises(error, match=message):
        SparseBatchTopKTrainingSAEConfig(**settings)


@pytest.mark.parametrize("k", [0.25, 3, 4.75, 128])
def test_k_may_be_a_fraction(k: float) -> None:
    cfg = SparseBatchTopKTrainingSAEConfig(d_in=16, d_sae=128, k=k)
    assert SparseBatchTopKTrainingSAEConfig.from_dict(cfg.to_dict()).k == k
