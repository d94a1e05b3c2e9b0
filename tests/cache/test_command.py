"""`saelens-sparse cache`."""

import json
from pathlib import Path
from typing import Any

import pytest

from saelens_sparse import cli
from saelens_sparse.activations.shards.manifest import read_manifest
from saelens_sparse.cache import runner as runner_module
from tests.support.cache import Caches
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say


@pytest.fixture
def config(caches: Caches, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a config, whose model and dataset are tiny ones."""
    data = caches.folder / "data"
    caches.data("text with evals").to_json(data / "train.jsonl")
    monkeypatch.setattr(runner_module, "load_model", lambda *_, **__: caches.models["float32"])
    cfg = caches.config("text with evals", dataset_path=str(data), training_tokens=96)
    path = caches.folder / "config.json"
    path.write_text(json.dumps(cfg.to_dict()))
    return path


def test_a_cache_is_written_once(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.with_name("out")
    args = ["cache", str(config), "--out", str(folder), "--dtype=bfloat16", "--tokens", "60"]
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "64 tokens at blocks.1.hook_resid_pre, bfloat16, 0.0 GB go to" in said
    assert f"{folder} is complete" in said
    manifest = read_manifest(folder)
    assert (manifest.rows, manifest.dtype) == (64, "bfloat16")
    assert manifest.config["training_tokens"] == 96
    assert cli.main(args) == 0
    assert "Nothing is to be done" in capsys.readouterr().out
    assert cli.main(["cache", "--verify", str(folder)]) == 0
    assert f"{folder} is unchanged" in capsys.readouterr().out


def test_the_config_names_the_folder_the_dtype_and_the_tokens(config: Path) -> None:
    assert cli.main(["cache", str(config)]) == 0
    manifest = read_manifest(config.with_name("cache"))
    assert (manifest.rows, manifest.dtype) == (96, "float32")


def test_a_failure_while_writing_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saelens_sparse.activations.shards.writer.OpenFile.write", full)
    assert cli.main(["cache", str(config)]) == 1
    assert "saelens-sparse: [Errno 28] No space left on device\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ([], "name a config file"),
        (["CONFIG", "--lr=3"], "remove --lr=3"),
        (["CONFIG", "--dtype=int8"], "--dtype"),
        (["CONFIG", "--tokens=0"], "--tokens"),
        (["CONFIG", "--language-model=fast"], "--language-model"),
        (["CONFIG", "--out=/proc/no"], "/proc/no"),
        (["nothing.json"], "nothing.json"),
        (["--verify", "nothing"], "nothing"),
        (["--verify", "nothing", "CONFIG"], "--verify"),
        (["--architecture=topk_spars"], "topk_spars"),
    ],
)
def test_what_cannot_be_used_is_named(
    args: list[str], named: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(config) if arg == "CONFIG" else arg for arg in args]
    assert cli.main(["cache", *args]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
