"""Values that a Top-K configuration refuses, and what it says."""

import warnings
from typing import Any

import pytest
import torch

from saelens_sparse import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saelens_sparse.architectures import topk
from tests.support.saes import forward_pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1; got 0"),
        ({"k": -3}, ValueError, "k must be at least 1; got -3"),
        ({"k": 129}, ValueError, "k must be at most d_sae=128; got 129"),
        ({"k": 2.5}, TypeError, "k must be an int; got 2.5"),
        ({"k": True}, TypeError, "k must be an int; got True"),
        ({"k": "4"}, TypeError, "k must be an int; got '4'"),
        ({"k": float("nan")}, TypeError, "k must be an int; got nan"),
        ({"d_in": 0}, ValueError, "d_in must be at least 1; got 0"),
        ({"d_in": 3.0}, TypeError, "d_in must be an int; got 3.0"),
        ({"d_sae": -1, "k": 1}, ValueError, "d_sae must be at least 1; got -1"),
        ({"screen_buffer_mib": 0}, ValueError, "screen_buffer_mib must be at least 1; got 0"),
        ({"aux_loss_coefficient": float("nan")}, ValueError, "aux_loss_coefficient must be"),
        ({"aux_loss_coefficient": float("inf")}, ValueError, "aux_loss_coefficient must be"),
        ({"decoder_init_norm": float("nan")}, ValueError, "decoder_init_norm must be"),
        ({"decoder_init_norm": 0.0}, ValueError, "decoder_init_norm must be"),
        ({"implementation": "cuda"}, ValueError, "implementation must be one of auto, triton"),
        ({"normalize_activations": "l2"}, ValueError, "normalize_activations must be"),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], error: type[Exception], message: str) -> None:
    settings: dict[str, Any] = {"d_in": 16, "d_sae": 128, "k": 4, **options}
    with pytest.raises(error, match=message):
        SparseTopKTrainingSAEConfig(**settings)


def test_use_sparse_activations_warns_once() -> None:
    def config() -> SparseTopKTrainingSAEConfig:
        return SparseTopKTrainingSAEConfig(
            d_in=16, d_sae=128, k=4, implementation="torch", use_sparse_activations=True
        )

    topk._say_sparse_activations_are_moot.cache_clear()
    with pytest.warns(UserWarning, match="use_sparse_activations=True has nothing left"):
        cfg = config()
    assert cfg.use_sparse_activations
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae = SparseTopKTrainingSAE(config())
    output = forward_pass(sae, torch.randn(5, 16))
    output.loss.backward()
    assert not output.feature_acts.is_sparse
