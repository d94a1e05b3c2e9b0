"""`saelens-sparse train`: its flags and files, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, TopKTrainingSAEConfig

from saelens_sparse import SparseTopKTrainingSAEConfig, cli
from tests.support.runs import (
    BATCH,
    CONTEXT,
    D_MODEL,
    D_SAE,
    N_TOKENS,
    K,
    runner_config,
    sae_config,
    what_libraries_say,
)

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = what_libraries_say


def test_command_line_flags() -> None:
    flags = "--architecture topk_sparse --d_in 24 --d_sae 96 --k 7 --lr 0.01"
    flags += " --implementation torch --rescale_acts_by_decoder_norm False"
    flags += " --normalize_activations layer_norm --hook_name blocks.1.hook_resid_post"
    flags += " --training_tokens 5000 --autocast True --log_to_wandb False"
    cfg: Any = cli.parse_train_args(flags.split())
    assert cfg.sae == SparseTopKTrainingSAEConfig(
        d_in=24, d_sae=96, k=7, implementation="torch", rescale_acts_by_decoder_norm=False,
        normalize_activations="layer_norm",
    )  # fmt: skip
    assert (cfg.lr, cfg.training_tokens, cfg.autocast) == (0.01, 5000, True)
    assert cfg.hook_name == "blocks.1.hook_resid_post"
    assert not cfg.logger.log_to_wandb


def test_command_line_flags_of_other_architectures() -> None:
    cfg: Any = cli.parse_train_args(["--architecture", "topk", "--k", "5"])
    assert type(cfg.sae) is TopKTrainingSAEConfig


@pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]], ids=" ".join)
def test_command_line_config_file(form: list[str], tmp_path: Path) -> None:
    cfg = runner_config(sae_config(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cfg.to_dict()))
    loaded: Any = cli.parse_train_args([part.format(path) for part in form])
    assert loaded.sae == cfg.sae
    assert json.dumps(loaded.to_dict()) == json.dumps(cfg.to_dict())


def test_command_line_runs(hf_folder: Path, tmp_path: Path) -> None:
    """Both forms in processes of their own; they train the same SAE."""
    flags = {
        "architecture": "topk_sparse", "d_in": D_MODEL, "d_sae": D_SAE, "k": K,
        "model_class_name": "AutoModelForCausalLM", "model_name": hf_folder / "model",
        "hook_name": "transformer.h.0", "dataset_path": hf_folder / "data",
        "is_dataset_tokenized": False, "streaming": False, "context_size": CONTEXT,
        "training_tokens": N_TOKENS, "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 8, "n_batches_in_buffer": 16, "log_to_wandb": False,
        "activations_mixing_fraction": 0, "checkpoint_path": tmp_path / "checkpoints",
        "output_path": tmp_path / "flags",
    }  # fmt: skip
    args = ["train", *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    first = subprocess.Popen(
        [sys.executable, "-m", "saelens_sparse.cli", *args],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    log, _ = first.communicate(timeout=300)
    assert first.returncode == 0, log

    cfg_dict = json.loads((tmp_path / "flags" / "runner_cfg.json").read_text())
    cfg_dict["output_path"] = str(tmp_path / "file")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(cfg_dict))
    assert cli.main(["train", "--config", str(path)]) == 0
    trained = [SAE.load_from_disk(tmp_path / name) for name in ("flags", "file")]
    assert trained[0].cfg.architecture() == "topk"
    assert trained[0].cfg.metadata.training_architecture == "topk_sparse"
    # Their initialisations differ; their shapes and their data do not.
    assert trained[0].W_enc.shape == trained[1].W_enc.shape == (D_MODEL, D_SAE)
    assert all(torch.isfinite(p).all() for sae in trained for p in sae.parameters())


def test_training_does_without_what_compares_and_measures(tmp_path: Path) -> None:
    """In a process of its own, where a bad config is the one line that there is on a terminal."""
    values = runner_config(sae_config(), tmp_path, device="abacus").to_dict()
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**values, "verbose": True}))
    script = (
        "import sys; from saelens_sparse import cli; status = cli.main(sys.argv[1:]);"
        "reports = ('saelens_sparse.compare', 'saelens_sparse.profile');"
        "assert not [name for name in sys.modules if name.startswith(reports)];"
        "sys.exit(status)"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "train", "--config", path],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.startswith("saelens-sparse: device: 'abacus' cannot be used here: ")
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]], ids=str)
def test_command_line_help(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 0
    assert "usage: saelens-sparse train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit"], "unknown command 'fit'"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--config", "missing.json"], "cannot read the config file missing.json"),
        (["train", "--config", "bad.json"], "bad.json is not valid JSON"),
        (["train", "--config", "list.json"], "list.json"),
        (["train", "--config", "empty.json"], "sae: missing"),
        (["train", "--config", "unknown.json"], "sae.architecture: 'tokp' cannot be used"),
        (["train", "--config", "k.json"], "k must be at most d_sae"),
        (["train", "--config", "field.json"], "no_such_field"),
        (["train", "--config", "empty.json", "--k", "3"], "remove --k 3"),
        (["train", "--k", "3", "--config", "empty.json"], "give it first"),
        (["train", "--architecture", "topk_sparse", "--k", "0"], "k must be at least 1"),
        (["train", "--architecture", "topk_sparse", "--k", "few"], "--k"),
        (
            ["train", "--architecture", "topk_sparse", "--implementation", "cuda"],
            "--implementation",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_command_line_errors(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = runner_config(sae_config(), tmp_path).to_dict()
    files = {
        "bad.json": "{",
        "list.json": "[1, 2]",
        "empty.json": "{}",
        "unknown.json": json.dumps({**good, "sae": {**good["sae"], "architecture": "tokp"}}),
        "k.json": json.dumps({**good, "sae": {**good["sae"], "k": 10_000}}),
        "field.json": json.dumps({**good, "no_such_field": 1}),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
