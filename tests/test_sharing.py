"""What a sparse training saves opens as an inference SAE, and where the plugin is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.sae import SAEConfig

import saelens_sparse
from saelens_sparse.sharing import in_stock_form
from tests.support.architectures import SUBJECTS, Subject, architectures
from tests.support.trainers import make_trainer

OPEN_WITHOUT_PLUGIN = """
import sys, torch
sys.modules["saelens_sparse"] = None
from sae_lens import SAE
for folder in sys.argv[1:]:
    x, expected = torch.load(folder + "/values.pt")
    torch.testing.assert_close(SAE.load_from_disk(folder)(x), expected)
"""


def trained(subject: Subject) -> tuple[Any, torch.Tensor]:
    stock, x = subject.case(n_rows=16)
    sparse = subject.sparse(stock)
    trainer = make_trainer(sparse)
    trainer.step(x)
    return trainer, x


@architectures
def test_a_checkpoint_opens_as_an_inference_sae(subject: Subject, tmp_path: Path) -> None:
    trainer, x = trained(subject)
    trainer.save_checkpoint("16", base_path=tmp_path)
    assert type(TrainingSAE.load_from_disk(tmp_path / "16")) is type(trainer.sae)
    if not subject.infers_as_it_trains:
        with pytest.raises(KeyError, match=subject.name):  # as SAELens for its own
            SAE.load_from_disk(tmp_path / "16")
        return
    sae = SAE.load_from_disk(tmp_path / "16")
    assert sae.cfg.architecture() == subject.architecture.stock
    torch.testing.assert_close(sae(x), trainer.sae(x))


@pytest.mark.parametrize("name", [n for n, one in SUBJECTS.items() if one.infers_as_it_trains])
def test_a_training_config_describes_an_inference_sae(name: str) -> None:
    subject = SUBJECTS[name]
    cfg = trained(subject)[0].sae.cfg.to_dict()
    assert SAE.from_dict(cfg).cfg.architecture() == subject.architecture.stock
    assert SAEConfig.from_dict(cfg).architecture() == subject.architecture.stock


def test_what_is_shared_opens_without_the_plugin(tmp_path: Path) -> None:
    folders: list[str] = []
    for name, subject in SUBJECTS.items():
        trainer, x = trained(subject)
        trainer.save_checkpoint(name, base_path=tmp_path)
        sources = {"sae": trainer.sae, "checkpoint": str(tmp_path / name)}
        form = in_stock_form(sources, tmp_path / f"{name} form")
        assert (Path(str(form["checkpoint"])) / "sparsity.safetensors").exists()
        for source in sources:
            folder = Path(str(form[source]))
            cfg = json.loads((folder / "cfg.json").read_text())
            assert cfg["architecture"] == subject.architecture.inference_config.architecture()
            sae = trainer.sae if subject.infers_as_it_trains else SAE.load_from_disk(folder)
            torch.save((x, sae(x).detach()), folder / "values.pt")
            folders.append(str(folder))
    subprocess.run([sys.executable, "-c", OPEN_WITHOUT_PLUGIN, *folders], check=True)


@architectures
def test_stock_saes_are_shared_as_they_are(subject: Subject, tmp_path: Path) -> None:
    stock = subject.stock()
    stock.save_model(tmp_path / "stock")
    saes = {"object": stock, "folder": tmp_path / "stock"}
    assert in_stock_form(saes, tmp_path / "form") == saes
    assert not (tmp_path / "form").exists()


def test_a_path_without_an_sae_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saes_dict\['layer'\].* has no cfg.json"):
        in_stock_form({"layer": tmp_path / "nothing"}, tmp_path / "form")
    assert not (tmp_path / "form").exists()


def test_registering_again_changes_nothing() -> None:
    saelens_sparse.register()
    saelens_sparse.register()
