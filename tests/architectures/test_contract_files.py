"""What is saved is what SAELens saves, and opens as either architecture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE

from tests.support.architectures import ON_CPU, SPARSE, Subject, subjects
from tests.support.runs import names_in
from tests.support.saes import BFLOAT16, FLOAT32, Precision, forward_pass
from tests.support.trainers import make_trainer


@subjects(SPARSE, options="few")
def test_inference_model_is_stock_s(
    subject: Subject, options: dict[str, Any], tmp_path: Path
) -> None:
    stock, x = subject.case(n_rows=9, **options)
    sparse = subject.sparse(stock)
    for sae in (stock, sparse):
        forward_pass(sae, x)
    assert sparse.W_enc.T.is_contiguous(), "the test is about the transposed layout"
    for folder, sae in (("stock", stock), ("sparse", sparse)):
        sae.save_inference_model(tmp_path / folder)
    for name, value in stock.named_parameters():
        assert torch.equal(getattr(sparse, name), value), "saving changed a weight"
    assert sparse.implementation.name == subject.target.backend
    for name, value in options.items():
        assert getattr(sparse.cfg, name) == value
    loaded = [
        SAE.load_from_disk(tmp_path / folder, device=subject.target.device)
        for folder in ("stock", "sparse")
    ]
    assert type(loaded[0]) is type(loaded[1]) is subject.architecture.inference_sae
    assert type(loaded[1].cfg) is subject.architecture.inference_config
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(loaded[1].state_dict()[name], value), name
    configs = [json.loads((tmp_path / f / "cfg.json").read_text()) for f in ("stock", "sparse")]
    assert configs[0].pop("metadata").keys() == configs[1].pop("metadata").keys()
    assert configs[0] == configs[1]
    if subject.infers_as_it_trains:
        torch.testing.assert_close(loaded[1].encode(x), stock.encode(x))
        torch.testing.assert_close(loaded[1].encode(x), sparse.encode(x))
        torch.testing.assert_close(loaded[1](x), stock(x))


@subjects(ON_CPU, precisions=(FLOAT32, BFLOAT16))
def test_training_model_round_trip(subject: Subject, precision: Precision, tmp_path: Path) -> None:
    stock, x = subject.case(precision, n_rows=9)
    sparse = subject.sparse(stock)
    make_trainer(sparse).step(x)
    sparse.save_model(tmp_path)
    loaded: Any = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sparse)
    assert {**loaded.cfg.to_dict(), "metadata": None} == {
        **sparse.cfg.to_dict(),
        "metadata": None,
    }
    with torch.no_grad():
        for name, value in sparse.named_parameters():
            assert getattr(loaded, name).dtype == value.dtype
            # Stock's load_from_disk casts all, and back what it keeps in float32.
            value.copy_(value.to(sparse.dtype))
    for step in range(2):
        for name, value in sparse.named_parameters():
            assert torch.equal(getattr(loaded, name), value), (name, step)
        # And it goes on training, in the same layout.
        for sae in (sparse, loaded):
            make_trainer(sae).step(x)
        assert loaded.W_enc.T.is_contiguous()


@subjects(ON_CPU)
def test_state_dict_is_stock_s(subject: Subject, tmp_path: Path) -> None:
    stock, x = subject.case(n_rows=4)
    sparse = subject.sparse(stock)
    forward_pass(sparse, x)
    assert {n: v.shape for n, v in sparse.state_dict().items()} == {
        n: v.shape for n, v in stock.state_dict().items()
    }
    torch.save(sparse.state_dict(), tmp_path / "weights.pt")
    fresh = subject.stock()
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
    for name, value in sparse.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


@pytest.mark.parametrize("first", ["stock", "sparse"])
@subjects(ON_CPU)
def test_weights_of_one_architecture_load_as_the_other(
    subject: Subject, first: str, tmp_path: Path
) -> None:
    stock, x = subject.case(n_rows=8)
    saes = [stock, subject.sparse(stock)]
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


@subjects(ON_CPU)
def test_trainer_state_file_is_as_stock_writes_it(subject: Subject, tmp_path: Path) -> None:
    stock, x = subject.case(n_rows=8)
    states = []
    for name, sae in {"sparse": subject.sparse(stock), "stock": stock}.items():
        trainer = make_trainer(sae)
        trainer.step(x)
        trainer.save_checkpoint(name, base_path=tmp_path)
        states.append(torch.load(tmp_path / name / "trainer_state.pt"))
    assert names_in(tmp_path / "sparse") - names_in(tmp_path / "stock") == subject.traits.own_files
    assert names_in(tmp_path / "stock") <= names_in(tmp_path / "sparse")
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
