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
from tests.conftest import TARGETS
from tests.support.architectures import ON_CPU, Arm, arms
from tests.support.saes import make_trainer

both_on_cpu = arms(topk=ON_CPU, jumprelu=ON_CPU)

OPEN_WITHOUT_PLUGIN = """
import sys, torch
sys.modules["saelens_sparse"] = None
from sae_lens import SAE
for folder in sys.argv[1:]:
    x, expected = torch.load(folder + "/values.pt")
    torch.testing.assert_close(SAE.load_from_disk(folder)(x), expected)
"""


def trained(arm: Arm) -> tuple[Any, torch.Tensor]:
    stock, x = arm.case(n_rows=16)
    sparse = arm.sparse(stock)
    trainer = make_trainer(sparse)
    trainer.step(x)
    return trainer, x


@both_on_cpu
def test_a_checkpoint_opens_as_an_inference_sae(arm: Arm, tmp_path: Path) -> None:
    trainer, x = trained(arm)
    trainer.save_checkpoint("16", base_path=tmp_path)
    sae = SAE.load_from_disk(tmp_path / "16")
    assert sae.cfg.architecture() == arm.architecture
    torch.testing.assert_close(sae(x), trainer.sae(x))
    assert type(TrainingSAE.load_from_disk(tmp_path / "16")) is type(trainer.sae)


@both_on_cpu
def test_a_training_config_describes_an_inference_sae(arm: Arm) -> None:
    cfg = trained(arm)[0].sae.cfg.to_dict()
    assert SAE.from_dict(cfg).cfg.architecture() == arm.architecture
    assert SAEConfig.from_dict(cfg).architecture() == arm.architecture


def test_what_is_shared_opens_without_the_plugin(tmp_path: Path) -> None:
    folders: list[str] = []
    for architecture in ("topk", "jumprelu"):
        trainer, x = trained(Arm(architecture, TARGETS["torch-cpu"]))
        trainer.save_checkpoint(architecture, base_path=tmp_path)
        sources = {"sae": trainer.sae, "checkpoint": str(tmp_path / architecture)}
        form = in_stock_form(sources, tmp_path / f"{architecture} form")
        assert (Path(str(form["checkpoint"])) / "sparsity.safetensors").exists()
        for source in sources:
            folder = Path(str(form[source]))
            cfg = json.loads((folder / "cfg.json").read_text())
            assert cfg["architecture"] == architecture
            torch.save((x, trainer.sae(x).detach()), folder / "values.pt")
            folders.append(str(folder))
    subprocess.run([sys.executable, "-c", OPEN_WITHOUT_PLUGIN, *folders], check=True)


@both_on_cpu
def test_stock_saes_are_shared_as_they_are(arm: Arm, tmp_path: Path) -> None:
    stock = arm.stock()
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
