"""Results files of compare and profile: whole on the disk, and never over another's."""

import os
from pathlib import Path

import pytest

from saelens_sparse import cli
from saelens_sparse.whole_files import write_whole
from tests.support.compare import contents

PROFILE = ["profile", "--shape", "32,256,4,64", "--device", "cpu", "--steps", "1"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "file"
    write_whole(path, "old")
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        assert path.read_text() == ("old" if len(synced) == 1 else "new")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_whole(path, "new")
    assert synced == ["file.partial", "new folder"]


def test_a_file_that_cannot_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "file", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, f"No space left on device, {descriptor}")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", "new")
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(
    "found",
    [
        {"results.json": "of weeks"},
        {"results.json": '{"accuracy": 0.9}'},
        {"results.json": '{"settings": {}, "environment": {}, "arms": []}'},
        {"results.json": ""},
        {"report.html": "of weeks"},
        {"breakdown.png": "of weeks"},
        {"results.json/inside": "of weeks"},
    ],
)
def test_a_profile_leaves_results_of_others_alone(
    found: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in found.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    assert cli.main([*PROFILE, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--output: " in error
    assert "name another folder" in error
    assert contents(tmp_path) == before


def test_a_profile_needs_a_folder_that_can_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for output in ("", str(tmp_path / "file"), str(tmp_path / "file" / "output")):
        assert cli.main([*PROFILE, "--output", output]) == 2
        assert "--output: " in capsys.readouterr().err
