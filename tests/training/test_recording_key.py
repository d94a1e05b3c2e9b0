"""What gives up a recorded step, which needs no recording to be seen."""

import pytest
import torch

from saelens_sparse.ops.update.weight_cache import WeightCache
from saelens_sparse.training.graphs import _recording_key
from tests.support.saes import make_stock, sparse_like


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("moments", "bfloat16"),
        ("fused_adam", False),
        ("gradient_buffers", True),
        ("screen_dtype", "float8"),
    ],
)
def test_a_setting_that_a_replay_does_not_read(field: str, value: object) -> None:
    sae = sparse_like(make_stock(), "torch")
    batch, weights = torch.zeros(4, sae.cfg.d_in), WeightCache()
    before = _recording_key(sae, batch, weights)
    assert _recording_key(sae, batch, weights) == before
    assert getattr(sae.cfg, field) != value
    setattr(sae.cfg, field, value)
    assert _recording_key(sae, batch, weights) != before
