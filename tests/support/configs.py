"""A config that can be trained, changes of it, and the one line that a bad one gets."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sae_lens.llm_sae_training_runner
import torch
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file

from saelens_sparse import cli

WEIGHTS = SAE_WEIGHTS_FILENAME
GONE = object()


def make_checkpoint(folder: Path) -> None:
    """A whole checkpoint of the good config's SAE, in which nothing has been trained."""
    values = {**config({})["sae"], "implementation": "torch"}
    TrainingSAE.from_dict(values).save_model(folder)
    torch.save({}, folder / TRAINER_STATE_FILENAME)
    (folder / ACTIVATION_SCALER_CFG_FILENAME).write_text('{"scaling_factor": null}')
    save_file({"n_dataset_processed": torch.tensor(0)}, folder / ACTIVATIONS_STORE_STATE_FILENAME)


class ModelIsLoaded(Exception):
    """The config got as far as that."""


def work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what the local names in a config name, a disk with room, and no model to load."""
    for name in ("model", "text", "activations"):
        (tmp_path / name).mkdir()
    for name in ("runs/512", "runs/1024", "cut/1"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "runs" / "1024" / ACTIVATION_SCALER_CFG_FILENAME).unlink()
    (tmp_path / "cut" / "1" / WEIGHTS).unlink()
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=10**12))

    def load_model(*_: Any, **__: Any) -> None:
        raise ModelIsLoaded

    monkeypatch.setattr(sae_lens.llm_sae_training_runner, "load_model", load_model)


def config(changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config that can be trained, with other fields: "lr", "sae.k", "logger.run_name"."""
    values: dict[str, Any] = {
        "sae": {"architecture": "topk_sparse", "d_in": 16, "d_sae": 64, "k": 4},
        "model_name": "./model",
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": "model.layers.0",
        "dataset_path": "./text",
        "training_tokens": 100_000,
        "train_batch_size_tokens": 1000,
        "verbose": False,
        "logger": {"log_to_wandb": False},
    }
    for field, value in changes.items():
        *groups, name = field.split(".")
        group = values
        for part in groups:
            group = group[part]
        if value is GONE:
            del group[name]
        else:
            group[name] = value
    return values


def train(values: Any) -> int:
    Path("config.json").write_text(json.dumps(values))
    return cli.main(["train", "--config", "config.json"])


def assert_one_line(status: int, capsys: pytest.CaptureFixture[str], message: str) -> None:
    """The command has failed with one line on standard error, which says this."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("saelens-sparse: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert len(captured.err) < 1100
    assert "Traceback" not in captured.err
    assert message in captured.err
