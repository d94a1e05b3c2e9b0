"""The configs that runs write are configs to train, compare and profile from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, MultiSAETrainingRunner
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse import SparseTrainingRunner, cli
from saelens_sparse.architectures import ARCHITECTURES
from saelens_sparse.compare.options import parse_comparison
from saelens_sparse.config.checks import check_training
from saelens_sparse.config.files import load_config
from tests.support.architectures import TRAITS
from tests.support.runs import (
    D_MODEL,
    D_SAE,
    Run,
    checkpoints,
    multi_config,
    runner_config,
    sae_config,
    what_libraries_say,
)

pytestmark = [*what_libraries_say, pytest.mark.filterwarnings("ignore:.*use_sparse_activations.*")]

SETTINGS: dict[str, dict[str, Any]] = {
    "matryoshka_batchtopk": {"matryoshka_widths": [16, D_SAE]},
    "matching_pursuit": {"decoder_init_norm": 1.0, "max_iterations": 4},
}
RUN_SETTINGS: dict[str, Any] = {
    "training_tokens": 256,
    "n_checkpoints": 1,
    "n_batches_for_norm_estimate": 1,
}


def config_of(architecture: str, **options: Any) -> Any:
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    options |= {"k": 4} if "k" in config_class.__dataclass_fields__ else {}
    options |= SETTINGS.get(architecture.removesuffix("_sparse"), {})
    return config_class(d_in=D_MODEL, d_sae=D_SAE, **options)


def assert_taken(path: Path, architecture: str) -> None:
    """The file is a config for every command that takes one, and none changes it."""
    written = json.loads(path.read_text())
    assert "metadata" in written["sae"]
    loaded = cli.parse_train_args(["--config", str(path)])
    check_training(loaded)
    assert json.loads(json.dumps(loaded.to_dict())) == written
    other = "topk" if architecture != "topk" else "gated"
    comparison = parse_comparison([str(path), f"--architectures={architecture},{other}"])
    arm = comparison.settings.arms[architecture]
    for values in (written, arm):
        for name in ("output_path", "checkpoint_path"):
            values.pop(name)
        values["logger"].pop("run_name")
    del written["sae"]["metadata"]
    assert json.loads(json.dumps(arm)) == written
    assert load_config(path).sae.architecture() == architecture  # all that profile asks


@pytest.mark.parametrize("architecture", SAE_TRAINING_CLASS_REGISTRY)
def test_what_a_run_of_stock_writes_is_taken(run: Run, architecture: str) -> None:
    cfg = run(config_of(architecture), **RUN_SETTINGS).cfg
    assert_taken(Path(str(cfg.output_path)) / "runner_cfg.json", architecture)
    assert_taken(checkpoints(cfg)[0] / "runner_cfg.json", architecture)


@pytest.mark.parametrize(
    ("architecture", "normalize"),
    [
        (name, normalize)
        for name in ARCHITECTURES
        for normalize in ("expected_average_only_in", "layer_norm")
        if normalize != "layer_norm" or not TRAITS[name].takes_plain_rows_only
    ],
)
def test_what_our_runner_writes_is_taken(
    architecture: str,
    normalize: str,
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    sae = config_of(architecture, normalize_activations=normalize)
    cfg = runner_config(sae, tmp_path, **RUN_SETTINGS)
    SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset).run()
    assert_taken(tmp_path / "output" / "runner_cfg.json", architecture)
    assert_taken(checkpoints(cfg)[0] / "runner_cfg.json", architecture)


def test_what_a_resumed_run_writes_is_taken(run: Run, tmp_path: Path) -> None:
    sae = sae_config(normalize_activations="expected_average_only_in")
    first = run(sae, **RUN_SETTINGS).cfg
    sae = sae_config(normalize_activations="expected_average_only_in")
    resumed = runner_config(
        sae,
        tmp_path / "resumed",
        resume_from_checkpoint=str(checkpoints(first)[0]),
        seqpos_slice=(1, -1),
        exclude_special_tokens=[0],
        **RUN_SETTINGS,
    )
    run(resumed)
    path = tmp_path / "resumed" / "output" / "runner_cfg.json"
    assert_taken(path, "topk_sparse")


def test_a_config_as_python_writes_it_is_taken(tmp_path: Path) -> None:
    cfg = runner_config(sae_config(), tmp_path, hook_head_index=None, prefetch_llm_batches=2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**cfg.to_dict(), "prefetch_llm_batches": False}))
    assert_taken(path, "topk_sparse")


@pytest.mark.parametrize("command", [["train", "--config"], ["compare"], ["profile"]], ids=str)
def test_the_config_of_an_sae_is_refused_with_a_word_on_the_right_file(
    command: list[str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = run(sae_config(), **RUN_SETTINGS).cfg
    capsys.readouterr()
    for folder in (Path(str(cfg.output_path)), checkpoints(cfg)[0]):
        assert cli.main([*command, str(folder / "cfg.json")]) == 2
        message = capsys.readouterr().err
        assert "the config of an SAE, not of a runner" in message
        assert "runner_cfg.json" in message
        assert (folder / "runner_cfg.json").exists()


def test_the_config_of_several_saes_is_refused(
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cfg = multi_config({"a": sae_config(), "b": sae_config()}, tmp_path, training_tokens=128)
    torch.manual_seed(0)
    MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()
    capsys.readouterr()
    paths = list((tmp_path / "output").rglob("runner_cfg.json"))
    assert paths
    for path in paths:
        copy = shutil.copy(path, tmp_path / "copy.json")
        for command in (["compare"], ["profile"]):  # `train` takes it
            assert cli.main([*command, str(copy)]) == 2
            assert "the config of a run of several SAEs" in capsys.readouterr().err
