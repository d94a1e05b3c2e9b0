"""Resuming from checkpoints that are damaged: never silently, and from the newest whole one."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, LanguageModelSAETrainingRunner, MultiSAETrainingRunner

from saelens_sparse import SparseMultiSAETrainingRunner, SparseTrainingRunner
from saelens_sparse.training.checkpoints import problem_of
from tests.support.runs import (
    BATCH,
    N_TOKENS,
    RUN_FILES,
    SAE_FILES,
    config_of,
    multi_config,
    names_in,
    runner_config,
    sae_config,
    what_libraries_say,
)
from tests.support.saes import assert_same_training

pytestmark = what_libraries_say
SAES = ("a", "b")
WHITENING = "activation_whitening.safetensors"
OLD, NEW = str(7 * BATCH), str(14 * BATCH)


def drop(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def fill_with_zeros(path: Path) -> None:
    """As a power loss leaves it."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = [drop, empty, cut, cut_last_byte, fill_with_zeros]


@pytest.fixture(scope="module")
def stock_run(
    model: HookedSAETransformer, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Checkpoints of SAELens's own runner, with whitened activations."""
    folder = tmp_path_factory.mktemp("stock")
    cfg = runner_config(config_of("topk"), folder, n_checkpoints=2, save_final_checkpoint=True)
    cfg.sae.normalize_activations = "covariance_whitening"
    cfg.checkpoint_path = str(folder / "one")
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
    torch.manual_seed(0)
    LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()
    multi = multi_config({name: config_of("topk") for name in SAES}, folder, n_checkpoints=2)
    multi.checkpoint_path = str(folder / "several")
    MultiSAETrainingRunner(multi, override_model=model, override_dataset=dataset).run()
    return folder


@pytest.fixture
def checkpoints(stock_run: Path, tmp_path: Path) -> Path:
    """Copies of the folders of checkpoints, to be damaged."""
    return Path(shutil.copytree(stock_run, tmp_path / "stock"))


Make = Callable[..., Any]


@pytest.fixture
def make(model: HookedSAETransformer, dataset: Dataset, tmp_path: Path) -> Make:
    """A runner of a sparse SAE that resumes; of several, if the checkpoint's folder says so."""

    def make(checkpoint: Path, **options: Any) -> Any:
        options["resume_from_checkpoint"] = str(checkpoint)
        if "several" in checkpoint.parts:
            multi = multi_config({name: sae_config() for name in SAES}, tmp_path, **options)
            return SparseMultiSAETrainingRunner(
                multi, override_model=model, override_dataset=dataset
            )
        sae = sae_config(normalize_activations="covariance_whitening")
        cfg = runner_config(sae, tmp_path, **options)
        return SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)

    return make


def resumed_from(runner: Any) -> Path:
    return Path(runner.cfg.resume_from_checkpoint)


@pytest.mark.parametrize("kind", ["one", "several"])
def test_whole_checkpoints_of_stock_are_taken_as_they_are(
    stock_run: Path, make: Make, kind: str
) -> None:
    checkpoint = stock_run / kind / OLD
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resume_from_checkpoint")
        runner = make(checkpoint)
    assert resumed_from(runner) == checkpoint


def test_a_run_that_falls_back_is_one_that_resumes_there(checkpoints: Path, make: Make) -> None:
    drop(checkpoints / "one" / NEW / WHITENING)
    with pytest.warns(UserWarning, match="resume_from_checkpoint"):
        fallen_back = make(checkpoints / "one" / NEW)
    saes = []
    for runner in (fallen_back, make(checkpoints / "one" / OLD)):
        torch.manual_seed(1)
        saes.append(runner.run())
    assert_same_training(saes[0], saes[1], tolerance=0)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(
    "name", sorted(SAE_FILES | RUN_FILES | {"activation_whitening.safetensors"})
)
def test_a_damaged_file_is_found(
    checkpoints: Path, make: Make, name: str, damage: Callable[[Path], None]
) -> None:
    checkpoint = checkpoints / "one" / NEW
    assert problem_of(checkpoint) is None
    damage(checkpoint / name)
    not_read = ("cfg.json", "sparsity.safetensors", "runner_cfg.json")
    if damage is drop and name in not_read:
        assert problem_of(checkpoint) is None
        return
    with pytest.warns(UserWarning, match="resume_from_checkpoint") as caught:
        runner = make(checkpoint)
    assert resumed_from(runner) == checkpoint.with_name(OLD)
    (warning,) = [w for w in caught if "resume_from_checkpoint" in str(w.message)]
    for part in (name, str(checkpoint), OLD):
        assert part in str(warning.message)


@pytest.mark.parametrize(
    "name", ["a/sae_weights.safetensors", "b/trainer_state.pt", "runner_cfg.json"]
)
def test_a_damaged_file_of_several_saes_is_found(checkpoints: Path, make: Make, name: str) -> None:
    checkpoint = checkpoints / "several" / NEW
    cut(checkpoint / name)
    with pytest.warns(UserWarning, match=Path(name).name):
        runner = make(checkpoint)
    assert resumed_from(runner) == checkpoint.with_name(OLD)
    shutil.rmtree(checkpoint.with_name(OLD) / "a")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        make(checkpoint)


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_folder_of_checkpoints_stands_for_the_newest(
    checkpoints: Path, make: Make, kind: str
) -> None:
    folder = checkpoints / kind
    shutil.copytree(folder / OLD, folder / "9")
    shutil.copytree(folder / NEW, folder / f"{N_TOKENS}.0a1b2c3d.partial")
    with pytest.warns(UserWarning, match=NEW):
        runner = make(folder)
    assert resumed_from(runner) == folder / NEW


def test_only_regular_checkpoints_are_fallen_back_to(checkpoints: Path, make: Make) -> None:
    """The final one has the whitening in its weights; others may be of another training."""
    folder = checkpoints / "one"
    assert f"final_{N_TOKENS}" in names_in(folder)
    cut(folder / NEW / "trainer_state.pt")
    (folder / OLD).rename(folder / "my best")
    with pytest.raises(ValueError, match=r"trainer_state\.pt"):
        make(folder / NEW)
    assert resumed_from(make(folder / "my best")) == folder / "my best"


@pytest.mark.parametrize("exists", [True, False], ids=["damaged", "missing"])
def test_nothing_to_resume_from_is_said_before_anything_is_loaded(
    exists: bool, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    if exists:
        checkpoint.mkdir()
    cfg = runner_config(
        sae_config(), tmp_path, model_name="none", resume_from_checkpoint=str(checkpoint)
    )
    with pytest.raises(ValueError, match="resume_from_checkpoint") as raised:
        SparseTrainingRunner(cfg)
    assert str(checkpoint) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_config_that_was_given_stays_as_it_is(
    checkpoints: Path, model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    folder = str(checkpoints / "one")
    sae = sae_config(normalize_activations="covariance_whitening")
    cfg = runner_config(sae, tmp_path, resume_from_checkpoint=folder)
    with pytest.warns(UserWarning, match="resume_from_checkpoint"):
        runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
    assert resumed_from(runner) == checkpoints / "one" / NEW
    assert cfg.resume_from_checkpoint == folder


def test_a_fall_back_never_leads_forward(checkpoints: Path, make: Make) -> None:
    """Who names an early checkpoint goes back on purpose."""
    folder = checkpoints / "one"
    cut(folder / OLD / "trainer_state.pt")
    with pytest.raises(ValueError, match="no earlier one"):
        make(folder / OLD)
