"""Signals at any moment: what a stopped training leaves is whole, and goes on bit for bit."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import (
    BATCH,
    N_TOKENS,
    RUN_FILES,
    SAE_FILES,
    Train,
    assert_same_output,
    log_of,
    names_in,
    read_all,
)

N_STEPS = N_TOKENS // BATCH
# Of the three regular checkpoints.
FIRST, SECOND = 6 * BATCH, 11 * BATCH


def whole_checkpoints(folder: Path, saes: tuple[str, ...] = ()) -> set[str]:
    """The names of all checkpoints, each of which must be whole."""
    names = names_in(folder / "checkpoints")
    for name in names:
        checkpoint = folder / "checkpoints" / name
        found = names_in(checkpoint) - {"saelens_sparse_state.json"}  # of JumpReLU alone
        assert found == (set(saes) or SAE_FILES) | RUN_FILES, name
        for sae in saes:
            assert names_in(checkpoint / sae) == SAE_FILES, (name, sae)
        read_all(checkpoint)
        for part in [checkpoint / sae for sae in saes] or [checkpoint]:
            state = torch.load(part / "trainer_state.pt")
            assert state["n_training_samples"] == int(name)
            steps = {float(moments["step"]) for moments in state["optimizer"]["state"].values()}
            assert (steps or {0}) == {int(name) / BATCH}, (
                "of each parameter, as many updates as batches"
            )
    return names


# Where a signal strikes, and how many steps are taken then. A step updates four parameters.
MOMENTS = {
    "before the first batch": ("topk_sparse", "batch", 1, 0),
    "while a batch is awaited": ("topk_sparse", "batch", 8, 7),
    "while the buffer is filled the first time": ("topk_sparse", "model", 2, 0),
    "while the buffer is filled again": ("topk_sparse", "model", 4, 4),
    "with gradients": ("topk_sparse", "gradients", 8, 8),
    "within an update": ("topk_sparse", "parameter", 4 * 8 - 2, 8),
    "between two steps": ("topk_sparse", "between steps", 8, 8),
    "with gradients of JumpReLU": ("jumprelu_sparse", "gradients", 8, 8),
    "while stock awaits a batch": ("topk", "batch", 8, 7),
    "between two steps of stock": ("topk", "between steps", 8, 8),
}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_training_goes_on_as_if_it_had_not_been(
    train: Train, uninterrupted: Callable[..., Path], tmp_path: Path, moment: str, name: str
) -> None:
    architecture, occasion, at, n_steps = MOMENTS[moment]
    start = time.monotonic()
    status = train(tmp_path, (occasion, at, name), architecture=architecture)
    assert time.monotonic() - start < 30, "a batch that is awaited must not delay it"
    checkpoints = whole_checkpoints(tmp_path)
    assert str(n_steps * BATCH) in checkpoints
    assert status == 130
    assert name in log_of(tmp_path)
    assert not (tmp_path / "output").exists()
    resumed = tmp_path / "resumed"
    checkpoint = str(tmp_path / "checkpoints" / str(n_steps * BATCH))
    options: dict[str, Any] = {"architecture": architecture, "resume_from_checkpoint": checkpoint}
    assert train(resumed, **options) == 0, log_of(resumed)
    assert_same_output(resumed / "output", uninterrupted(architecture=architecture))


def test_a_signal_is_answered_at_once_by_one_line(train: Train, tmp_path: Path) -> None:
    train(tmp_path, ("gradients", 3, "SIGINT"))
    (line,) = [line for line in log_of(tmp_path).splitlines() if "SIGINT" in line]
    assert "after this step" in line


def test_a_window_of_statistics_begins_where_a_training_is_stopped(
    train: Train, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    assert train(tmp_path, ("batch", 8, "SIGINT"), feature_sampling_window=7) == 130
    assert whole_checkpoints(tmp_path) == {str(FIRST), str(7 * BATCH)}
    resumed, checkpoint = tmp_path / "resumed", str(tmp_path / "checkpoints" / str(7 * BATCH))
    status = train(resumed, resume_from_checkpoint=checkpoint, feature_sampling_window=7)
    assert status == 0, log_of(resumed)
    assert_same_output(resumed / "output", uninterrupted(feature_sampling_window=7))


@pytest.mark.parametrize("hits", [1, 3], ids=["once", "three times"])
@pytest.mark.parametrize("file", sorted(SAE_FILES | RUN_FILES))
def test_a_checkpoint_is_written_to_its_end(
    train: Train, tmp_path: Path, file: str, hits: int
) -> None:
    status = train(tmp_path, *[(file, 1, "SIGINT")] * hits)
    assert whole_checkpoints(tmp_path) == {str(FIRST)}
    assert status == 130


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("file", sorted(SAE_FILES | RUN_FILES))
def test_so_is_the_checkpoint_of_an_interruption(
    train: Train, tmp_path: Path, file: str, second: str
) -> None:
    status = train(tmp_path, ("batch", 4, "SIGTERM"), (file, 1, second))
    assert whole_checkpoints(tmp_path) == {str(3 * BATCH)}
    assert status == 130


def test_a_second_interrupt_within_a_step_stops_without_a_checkpoint(
    train: Train, tmp_path: Path
) -> None:
    hits = [("parameter", 4 * 8 - 2, "SIGINT")] * 2
    assert train(tmp_path, *hits) == 130
    assert whole_checkpoints(tmp_path) == {str(FIRST)}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_termination_within_a_step_changes_nothing(
    train: Train, tmp_path: Path, name: str
) -> None:
    assert train(tmp_path, ("gradients", 8, name), ("parameter", 4 * 8 - 2, "SIGTERM")) == 130
    assert whole_checkpoints(tmp_path) == {str(FIRST), str(8 * BATCH)}


def test_an_evaluation_is_stopped_at_once(train: Train, tmp_path: Path) -> None:
    start = time.monotonic()
    assert train(tmp_path, ("evaluation", 2, "SIGTERM"), evaluates=True) == 130
    assert time.monotonic() - start < 30
    assert str(10 * BATCH) in whole_checkpoints(tmp_path)


def test_a_training_that_is_over_is_saved_first(
    train: Train, uninterrupted: Callable[..., Path], tmp_path: Path
) -> None:
    for moment in (("parameter", 4 * N_STEPS - 2), ("sae_weights.safetensors", 4)):
        folder = tmp_path / moment[0]
        status = train(folder, (*moment, "SIGTERM"))
        assert_same_output(folder / "output", uninterrupted())
        assert status == 130


@pytest.mark.parametrize("file", sorted(SAE_FILES | RUN_FILES))
def test_a_killed_process_leaves_no_checkpoint_that_is_half_written(
    train: Train, uninterrupted: Callable[..., Path], tmp_path: Path, file: str
) -> None:
    assert train(tmp_path, (file, 2, "SIGKILL")) == -9
    folder = tmp_path / "checkpoints"
    (partial,) = names_in(folder) - {str(FIRST)}
    assert partial.endswith(".partial")
    mine = folder / "mine.partial"
    mine.mkdir()
    # A folder of checkpoints stands for the newest whole one in it.
    status = train(tmp_path, resume_from_checkpoint=str(folder))
    assert status == 0, log_of(tmp_path)
    assert not (folder / partial).exists(), "what nobody can use any more is removed"
    mine.rmdir()
    assert_same_output(tmp_path / "output", uninterrupted())


@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"])
def test_a_killed_process_leaves_an_earlier_output_as_it_was(
    train: Train, tmp_path: Path, file: str
) -> None:
    assert train(tmp_path, training_tokens=5 * BATCH, n_checkpoints=0) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "output").rglob("*.*")}
    assert train(tmp_path, (file, 1, "SIGKILL"), n_checkpoints=0) == -9
    assert {path: path.read_bytes() for path in before} == before
    assert train(tmp_path, n_checkpoints=0) == 0
    assert names_in(tmp_path / "output") == {path.name for path in before}
    read_all(tmp_path / "output")


class TestSeveralSAEs:
    saes = ("a", "b")

    @pytest.mark.parametrize(
        "moment", [("batch", 8, 7), ("gradients", 15, 8), ("gradients", 16, 8)], ids=str
    )
    def test_go_on_as_if_they_had_not_been_stopped(
        self,
        train: Train,
        uninterrupted: Callable[..., Path],
        tmp_path: Path,
        moment: tuple[str, int, int],
    ) -> None:
        occasion, at, n_steps = moment
        status = train(tmp_path, (occasion, at, "SIGTERM"), saes=self.saes)
        assert str(n_steps * BATCH) in whole_checkpoints(tmp_path, self.saes)
        assert status == 130
        resumed, checkpoint = tmp_path / "resumed", tmp_path / "checkpoints" / str(n_steps * BATCH)
        options = {"saes": self.saes, "resume_from_checkpoint": str(checkpoint)}
        assert train(resumed, **options) == 0, log_of(resumed)
        assert_same_output(resumed / "output", uninterrupted(saes=self.saes))

    @pytest.mark.parametrize("at", [1, 2], ids=["of the first", "of the second"])
    @pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
    def test_have_whole_checkpoints(self, train: Train, tmp_path: Path, at: int, name: str) -> None:
        status = train(tmp_path, ("trainer_state.pt", at, name), saes=self.saes)
        if name == "SIGINT":
            assert whole_checkpoints(tmp_path, self.saes) == {str(FIRST)}
            assert status == 130
        else:
            (partial,) = names_in(tmp_path / "checkpoints")
            assert partial.endswith(".partial")
            assert status == -9
