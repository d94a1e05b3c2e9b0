"""Disks that are full and folders that cannot be written to: what was trained is not lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from sae_lens import HookedSAETransformer
from sae_lens.config import LoggingConfig
from safetensors.torch import load_file
from wandb.errors import CommError

from saelens_sparse import SparseMultiSAETrainingRunner, SparseTrainingRunner
from tests.support.runs import (
    BATCH,
    N_TOKENS,
    RUN_FILES,
    SAE_FILES,
    Train,
    assert_same_output,
    log_of,
    multi_config,
    names_in,
    read_all,
    runner_config,
    sae_config,
    what_libraries_say,
)

pytestmark = what_libraries_say
N_STEPS = N_TOKENS // BATCH
SEVERAL = pytest.mark.parametrize("saes", [(), ("a", "b")], ids=["one", "several"])


@SEVERAL
def test_a_checkpoint_that_does_not_fit_costs_a_warning(
    train: Train, uninterrupted: Callable[..., Path], tmp_path: Path, saes: tuple[str, ...]
) -> None:
    each = max(1, len(saes))
    hits = [("gradients", 3 * each, "full disk"), ("gradients", 9 * each, "room again")]
    assert train(tmp_path, *hits, saes=saes) == 0, log_of(tmp_path)
    failed = tmp_path / "checkpoints" / str(6 * BATCH)
    (warning,) = [line for line in log_of(tmp_path).splitlines() if str(failed) in line]
    assert "File too large" in warning
    assert names_in(failed.parent) == {str(11 * BATCH), str(16 * BATCH)}
    read_all(failed.parent)
    assert_same_output(tmp_path / "output", uninterrupted(saes=saes))


def test_the_checkpoint_of_an_interruption_that_does_not_fit_hides_nothing(
    train: Train, tmp_path: Path
) -> None:
    assert train(tmp_path, ("gradients", 3, "full disk"), ("gradients", 4, "SIGTERM")) == 130
    assert "could not be written" in log_of(tmp_path)
    assert names_in(tmp_path / "checkpoints") == set()


@SEVERAL
@pytest.mark.parametrize("blocked", [("output",), ("output", "checkpoints")], ids=" and ".join)
def test_a_trained_sae_goes_elsewhere_if_its_folder_cannot_be_made(
    train: Train,
    uninterrupted: Callable[..., Path],
    tmp_path: Path,
    blocked: tuple[str, ...],
    saes: tuple[str, ...],
) -> None:
    hits = [("gradients", 5, f"no {folder}") for folder in blocked]
    options: dict[str, Any] = {"saes": saes, "n_checkpoints": 0}
    assert train(tmp_path, *hits, **options) == 0, log_of(tmp_path)
    if "checkpoints" in blocked:
        (place,) = (tmp_path / "temporary").iterdir()
    else:
        place = tmp_path / "checkpoints" / "output"
    (warning,) = [line for line in log_of(tmp_path).splitlines() if str(place) in line]
    assert str(tmp_path / "output") in warning
    assert_same_output(place, uninterrupted(**options))
    names = {
        "runner_cfg.json",
        *(saes or SAE_FILES - {"trainer_state.pt", "activation_scaler.json"}),
    }
    assert names_in(place) == names


@SEVERAL
def test_a_full_disk_leaves_an_earlier_output_as_it_was(
    train: Train, tmp_path: Path, saes: tuple[str, ...]
) -> None:
    options: dict[str, Any] = {"saes": saes, "n_checkpoints": 0}
    assert train(tmp_path, training_tokens=5 * BATCH, **options) == 0, log_of(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "output").rglob("*.*")}
    assert train(tmp_path, ("gradients", N_STEPS, "full disk"), **options) == 1
    after = {path: path.read_bytes() for path in (tmp_path / "output").rglob("*.*")}
    assert after == before
    last = log_of(tmp_path).splitlines()[-1]
    assert "could not be written" in last
    for place in ("output", "checkpoints/output", "the temporary folder"):
        assert place in last
    assert "File too large" in last


def test_a_checkpoint_is_complete_for_those_who_override_its_saving(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    seen: list[tuple[Path | None, set[str]]] = []

    class Runner(SparseTrainingRunner):
        def save_checkpoint(self, checkpoint_path: Path | None) -> None:
            super().save_checkpoint(checkpoint_path)
            assert checkpoint_path is not None
            seen.append((checkpoint_path, names_in(checkpoint_path)))
            (checkpoint_path / "mine.txt").touch()

    cfg = runner_config(sae_config(), tmp_path, n_checkpoints=2, save_final_checkpoint=True)
    Runner(cfg, override_model=model, override_dataset=dataset).run()
    folder = Path(cfg.checkpoint_path or "")
    assert seen == [
        (folder / name, SAE_FILES | RUN_FILES)
        for name in (str(7 * BATCH), str(14 * BATCH), f"final_{N_TOKENS}")
    ]


def test_a_checkpoint_that_is_written_again_keeps_files_of_others(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    cfg = runner_config(sae_config(), tmp_path)
    runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
    runner.run()
    checkpoint = tmp_path / "mine"
    for _ in range(2):
        runner.save_checkpoint(checkpoint)
        assert names_in(checkpoint) - {"notes"} == SAE_FILES | RUN_FILES
        (checkpoint / "notes").write_text("mine")
        runner.save_checkpoint(tmp_path / "another")
    assert (checkpoint / "notes").read_text() == "mine"
    assert {"mine", "another"} <= names_in(tmp_path)
    assert not [name for name in names_in(tmp_path) if "." in name]


@pytest.mark.parametrize("name", ["checkpoint", "output"])
def test_what_fails_after_saving_does_not_undo_it(
    name: str,
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for function in ("init", "log", "finish"):
        monkeypatch.setattr(wandb, function, lambda *_, **__: None)
    logged: list[set[str]] = []

    def log(self: LoggingConfig, trainer: Any, *paths: Path, **_: Any) -> None:  # noqa: ARG001
        logged.append({path.name for path in paths if path.exists()})
        raise CommError("no network")

    monkeypatch.setattr(LoggingConfig, "log", log)
    options = {"n_checkpoints": 1} if name == "checkpoint" else {}
    cfg = runner_config(sae_config(), tmp_path, logger=LoggingConfig(), **options)
    runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
    with pytest.raises(CommError):
        runner.run()
    assert logged == [{"sae_weights.safetensors", "cfg.json"}]
    folder = tmp_path / "output"
    if name == "checkpoint":
        (folder,) = Path(cfg.checkpoint_path or "").iterdir()
    read_all(folder)
    assert "sae_weights.safetensors" in names_in(folder)


@pytest.mark.parametrize("field", ["output_path", "checkpoint_path"])
@SEVERAL
def test_outputs_are_checked_before_anything_is_loaded(
    field: str, saes: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options = {field: str(tmp_path / "file" / "folder")}
    with pytest.raises(ValueError, match=field):
        runner_without_model(saes, tmp_path, **options)


@SEVERAL
def test_a_config_that_cannot_be_saved_is_refused(saes: tuple[str, ...], tmp_path: Path) -> None:
    options = {"model_from_pretrained_kwargs": {"torch_dtype": torch.float16}}
    with pytest.raises(ValueError, match="dtype is not JSON serializable"):
        runner_without_model(saes, tmp_path, **options)


def runner_without_model(saes: tuple[str, ...], folder: Path, **options: Any) -> object:
    """A runner that cannot load its model, and so must raise another error first."""
    options["model_name"] = "there is no such model"
    if saes:
        cfg = multi_config({name: sae_config() for name in saes}, folder, **options)
        return SparseMultiSAETrainingRunner(cfg)
    return SparseTrainingRunner(runner_config(sae_config(), folder, **options))


class TestTheFinalSAE:
    """`save_final_sae` for those who call it themselves."""

    def test_can_be_saved_before_training(
        self, model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
    ) -> None:
        cfg = runner_config(sae_config(), tmp_path)
        runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
        sparsity = torch.randn(runner.sae.cfg.d_sae)
        runner.save_final_sae(runner.sae, str(tmp_path / "early"), sparsity)
        saved = load_file(tmp_path / "early" / "sparsity.safetensors")["sparsity"]
        assert torch.equal(saved, sparsity)
        runner.save_final_sae(runner.sae, str(tmp_path / "without"))
        assert "sparsity.safetensors" not in names_in(tmp_path / "without")

    def test_is_saved_with_the_statistics_that_are_given(
        self, model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
    ) -> None:
        cfg = runner_config(sae_config(), tmp_path)
        runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
        runner.run()
        assert runner.trainer is not None
        trained = load_file(tmp_path / "output" / "sparsity.safetensors")["sparsity"]
        assert torch.equal(trained, runner.trainer.log_feature_sparsity)
        assert trained.unique().numel() > 2
        runner.save_final_sae(runner.sae, str(tmp_path / "again"), trained + 1)
        saved = load_file(tmp_path / "again" / "sparsity.safetensors")["sparsity"]
        assert torch.equal(saved, trained + 1)
