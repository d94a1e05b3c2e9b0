"""Outputs of a training that have no place to go are refused before it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, MultiSAETrainingRunnerConfig

from saelens_sparse import SparseTopKTrainingSAEConfig
from saelens_sparse.config.outputs import (
    check_multi_runner_outputs,
    check_runner_outputs,
    check_writable,
)

D_IN, D_SAE = 64, 1024
WEIGHT_BYTES = 2 * D_IN * D_SAE * 4


def sae(**options: Any) -> SparseTopKTrainingSAEConfig:
    return SparseTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=8, **options)


def config(**options: Any) -> LanguageModelSAERunnerConfig[Any]:
    return LanguageModelSAERunnerConfig(
        sae=options.pop("sae", sae()),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
        **options,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free space of every disk, in bytes."""
    real = shutil.disk_usage
    return lambda n_bytes: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: real(path)._replace(free=n_bytes)
    )


def link_to_nothing(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


@pytest.mark.parametrize(
    ("path_in", "reason"),
    [
        (file, "it is not a folder"),
        (lambda folder: file(folder) / "below" / "it", "Not a directory"),
        (link_to_nothing, "it is not a folder"),
        (lambda folder: link_to_nothing(folder) / "below", "link is no folder"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
        (lambda folder: folder / "/".join(["deep"] * 1000), "File name too long"),
        (lambda folder: folder / "a\0b", "embedded null"),
        (lambda folder: folder / "a\ud800b", "surrogates not allowed"),
        (lambda _: Path("/proc/self/attempt"), "No such file or directory"),
    ],
    ids=["file", "below file", "link", "below link", "name", "path", "null", "surrogate", "system"],
)
def test_a_path_that_cannot_be_written_to_is_named(
    path_in: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    path = path_in(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^output_path: .* cannot be written to: .*{reason}"
    ) as e:
        check_writable("output_path", path, 1)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("name", ["output_path", "checkpoint_path"])
def test_both_paths_of_a_run_are_checked(name: str) -> None:
    paths = {"output_path": None, "checkpoint_path": None, name: __file__}
    with pytest.raises(ValueError, match=f"^{name}: .* cannot be written to: "):
        check_runner_outputs(config(**paths))


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    before = (tmp_path / "there").stat()
    check_writable("output_path", tmp_path / "there", 1)
    check_writable("output_path", tmp_path / "new" / "er", 1)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    assert (tmp_path / "there").stat().st_ino == before.st_ino


def test_nothing_is_asked_of_paths_that_are_not_written_to() -> None:
    check_runner_outputs(config(output_path=None, checkpoint_path=None))


@pytest.mark.parametrize(
    ("options", "n_weights"),
    [
        ({"checkpoint_path": None}, 1),
        ({"output_path": None}, 3),
        ({"output_path": None, "n_checkpoints": 4, "save_final_checkpoint": True}, 15),
        ({"n_checkpoints": 2}, 7),
        ({"checkpoint_path": None, "sae": sae(dtype="bfloat16")}, 0.5),
    ],
    ids=["output", "an interruption", "all checkpoints", "both", "bfloat16"],
)
def test_room_is_asked_for_all_that_is_written(
    options: dict[str, Any], n_weights: float, tmp_path: Path, free: Callable[[int], None]
) -> None:
    paths = {"output_path": str(tmp_path / "out"), "checkpoint_path": str(tmp_path / "points")}
    cfg = config(**{**paths, **options})
    needed = int(n_weights * WEIGHT_BYTES)
    free(needed)
    check_runner_outputs(cfg)
    free(needed - 1)
    with pytest.raises(ValueError, match=r"_path: '.*' has room for \d+ MB; this training needs"):
        check_runner_outputs(cfg)


def test_several_saes_need_the_room_of_all(tmp_path: Path, free: Callable[[int], None]) -> None:
    cfg = MultiSAETrainingRunnerConfig(
        saes={"a": sae(), "b": sae(dtype="bfloat16")},
        hook_names="blocks.0.hook_mlp_out",
        output_path=str(tmp_path / "out"),
        checkpoint_path=str(tmp_path / "points"),
        n_checkpoints=1,
    )
    needed = 4 * (WEIGHT_BYTES + WEIGHT_BYTES // 2)
    free(needed)
    check_multi_runner_outputs(cfg)
    free(needed - 1)
    with pytest.raises(ValueError, match=r"^checkpoint_path: "):
        check_multi_runner_outputs(cfg)
    cfg.output_path = __file__
    with pytest.raises(ValueError, match=r"^output_path: .* it is not a folder"):
        check_multi_runner_outputs(cfg)
