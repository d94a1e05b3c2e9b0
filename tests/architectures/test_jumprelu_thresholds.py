"""What is JumpReLU's alone about changes of an SAE and its files: thresholds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from safetensors.torch import load_file, save_file

from saelens_sparse import SparseJumpReLUTrainingSAE
from tests.support.jumprelu import PATHS, make_case, make_jumprelu, sparse_jumprelu
from tests.support.saes import forward_pass


def test_folding_keeps_what_is_active() -> None:
    stock, x = make_case(PATHS["torch-cpu"])
    sparse = sparse_jumprelu(stock)
    norms = stock.W_dec.norm(dim=-1)
    acts, recons = sparse.encode(x), sparse(x)
    sparse.fold_W_dec_norm()
    torch.testing.assert_close(sparse.threshold, stock.threshold * norms)
    torch.testing.assert_close(sparse.encode(x), acts * norms)
    torch.testing.assert_close(sparse(x), recons)


def test_thresholds_stay_float32_in_every_cast() -> None:
    casts: list[Callable[[TrainingSAE[Any]], Any]] = [
        lambda sae: sae.bfloat16(),
        lambda sae: sae.double(),
        lambda sae: sae.half().float(),
        lambda sae: sae.to(torch.zeros(1, dtype=torch.bfloat16)),
    ]
    for cast in casts:
        sparse = sparse_jumprelu(make_jumprelu())
        parameter = sparse.threshold
        cast(sparse)
        assert sparse.threshold is parameter
        assert sparse.threshold.dtype == torch.float32
    assert sparse_jumprelu(make_jumprelu(dtype=torch.bfloat16)).threshold.dtype == torch.float32


def test_older_checkpoints_hold_log_threshold(tmp_path: Path) -> None:
    stock, x = make_case(PATHS["torch-cpu"])
    stock.save_model(tmp_path)
    weights_path = tmp_path / "sae_weights.safetensors"
    weights = load_file(weights_path)
    threshold = weights.pop("threshold").clamp(min=0.01)
    save_file({**weights, "log_threshold": threshold.log()}, weights_path)
    cfg = {**stock.cfg.to_dict(), "architecture": "jumprelu_sparse", "implementation": "torch"}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is SparseJumpReLUTrainingSAE
    torch.testing.assert_close(loaded.threshold.detach(), threshold)
    sparse = sparse_jumprelu(make_jumprelu())
    sparse.load_weights_from_checkpoint(tmp_path)
    torch.testing.assert_close(sparse.threshold.detach(), threshold)
    torch.testing.assert_close(sparse.W_enc, stock.W_enc)
    assert torch.isfinite(forward_pass(loaded, x).loss)
