"""What is saved is what SAELens saves, and opens as either architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file, save_file

from saelens_sparse import SparseJumpReLUTrainingSAE
from tests.conftest import TARGETS
from tests.support.architectures import ON_CPU, Arm, arms
from tests.support.jumprelu import FAST_PATHS, PATHS, make_case, make_jumprelu, sparse_jumprelu
from tests.support.saes import BFLOAT16, FLOAT32, Precision, forward_pass, make_trainer

both_on_cpu = arms(topk=ON_CPU, jumprelu=ON_CPU)


@arms(
    topk=ON_CPU,
    jumprelu={name: target for name, target in FAST_PATHS.items() if name in TARGETS},
    options={
        "topk": {
            "rescaled": {"rescale_acts_by_decoder_norm": True},
            "raw": {"rescale_acts_by_decoder_norm": False},
        },
        "jumprelu": {"defaults": {}},
    },
)
def test_inference_model_is_stock_s(arm: Arm, options: dict[str, Any], tmp_path: Path) -> None:
    stock, x = arm.case(n_rows=9, **options)
    sparse = arm.sparse(stock)
    forward_pass(sparse, x)
    assert sparse.W_enc.T.is_contiguous(), "the test is about the transposed layout"
    for folder, sae in (("stock", stock), ("sparse", sparse)):
        sae.save_inference_model(tmp_path / folder)
    for name, value in stock.named_parameters():
        assert torch.equal(getattr(sparse, name), value), "saving changed a weight"
    assert sparse.implementation.name == arm.target.backend
    for name, value in options.items():
        assert getattr(sparse.cfg, name) == value
    loaded = [
        SAE.load_from_disk(tmp_path / folder, device=arm.target.device)
        for folder in ("stock", "sparse")
    ]
    assert type(loaded[0]) is type(loaded[1])
    assert type(loaded[1]).__module__ == f"sae_lens.saes.{arm.architecture}_sae"
    assert loaded[1].cfg.architecture() == arm.architecture
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(loaded[1].state_dict()[name], value), name
    configs = [json.loads((tmp_path / f / "cfg.json").read_text()) for f in ("stock", "sparse")]
    assert configs[0].pop("metadata").keys() == configs[1].pop("metadata").keys()
    assert configs[0] == configs[1]
    torch.testing.assert_close(loaded[1].encode(x), stock.encode(x))
    torch.testing.assert_close(loaded[1].encode(x), sparse.encode(x))
    torch.testing.assert_close(loaded[1](x), stock(x))


@arms(topk=ON_CPU, jumprelu=ON_CPU, precisions=(FLOAT32, BFLOAT16))
def test_training_model_round_trip(arm: Arm, precision: Precision, tmp_path: Path) -> None:
    stock, x = arm.case(precision, n_rows=9)
    sparse = arm.sparse(stock)
    make_trainer(sparse).step(x)
    sparse.save_model(tmp_path)
    loaded: Any = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sparse)
    assert {**loaded.cfg.to_dict(), "metadata": None} == {
        **sparse.cfg.to_dict(),
        "metadata": None,
    }
    if arm.architecture == "jumprelu":
        assert loaded.threshold.dtype == torch.float32
        with torch.no_grad():
            # Stock's load_from_disk casts all, and thresholds back.
            sparse.threshold.copy_(sparse.threshold.to(sparse.dtype))
    for step in range(2):
        for name, value in sparse.named_parameters():
            assert torch.equal(getattr(loaded, name), value), (name, step)
        # And it goes on training, in the same layout.
        for sae in (sparse, loaded):
            make_trainer(sae).step(x)
        assert loaded.W_enc.T.is_contiguous()


@both_on_cpu
def test_state_dict_is_stock_s(arm: Arm, tmp_path: Path) -> None:
    stock, x = arm.case(n_rows=4)
    sparse = arm.sparse(stock)
    forward_pass(sparse, x)
    assert {n: v.shape for n, v in sparse.state_dict().items()} == {
        n: v.shape for n, v in stock.state_dict().items()
    }
    torch.save(sparse.state_dict(), tmp_path / "weights.pt")
    fresh = arm.stock()
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    for name, value in stock.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize("first", ["stock", "sparse"])
@both_on_cpu
def test_weights_of_one_architecture_load_as_the_other(
    arm: Arm, first: str, tmp_path: Path
) -> None:
    stock, x = arm.case(n_rows=8)
    saes = [stock, arm.sparse(stock)]
    for sae in saes:
        make_trainer(sae).step(x)
    saved, other = saes if first == "stock" else saes[::-1]
    saved.save_model(tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_weights_from_checkpoint(tmp_path)
    assert {n: v.shape for n, v in other.state_dict().items()} == {
        n: v.shape for n, v in saved.state_dict().items()
    }
    for name, value in saved.named_parameters():
        assert torch.equal(getattr(other, name), value), name


@both_on_cpu
def test_trainer_state_file_is_as_stock_writes_it(arm: Arm, tmp_path: Path) -> None:
    stock, x = arm.case(n_rows=8)
    states = []
    for name, sae in {"sparse": arm.sparse(stock), "stock": stock}.items():
        trainer = make_trainer(sae)
        trainer.step(x)
        trainer.save_checkpoint(name, base_path=tmp_path)
        states.append(torch.load(tmp_path / name / "trainer_state.pt"))
    own = {"saelens_sparse_state.json"} if arm.architecture == "jumprelu" else set[str]()
    assert {p.name for p in (tmp_path / "stock").iterdir()} == {
        p.name for p in (tmp_path / "sparse").iterdir()
    } - own
    actual, expected = (state["optimizer"] for state in states)
    assert actual["param_groups"] == expected["param_groups"]
    assert actual["state"].keys() == expected["state"].keys()
    for index, moments in expected["state"].items():
        for name, value in moments.items():
            other = actual["state"][index][name]
            assert (other.shape, other.dtype, other.stride(), other.device) == (
                value.shape, value.dtype, value.stride(), value.device,
            )  # fmt: skip
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-7)


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
