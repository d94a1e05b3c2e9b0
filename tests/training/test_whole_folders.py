"""Folders that are written whole, or not at all."""

import fcntl
from pathlib import Path

import pytest

from saelens_sparse.training.whole_folders import new_folder, save_somewhere

WEIGHTS = "sae_weights.safetensors"


def write(folder: Path) -> None:
    for name in (WEIGHTS, "cfg.json", "a/cfg.json", f"a/{WEIGHTS}"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("new")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fail_to_write(final: Path, error: BaseException) -> None:
    with new_folder(final) as folder:
        write(folder)
        raise error


WRITTEN = {WEIGHTS: "new", "cfg.json": "new", "a/cfg.json": "new", f"a/{WEIGHTS}": "new"}


class TestNewFolder:
    def test_is_there_when_it_is_whole(self, tmp_path: Path) -> None:
        final = tmp_path / "not yet there" / "640"
        with new_folder(final) as folder:
            assert folder.parent == final.parent
            write(folder)
            assert not final.exists()
        assert contents(final.parent) == {f"640/{name}": "new" for name in WRITTEN}

    def test_replaces_files_and_keeps_those_of_others(self, tmp_path: Path) -> None:
        final = tmp_path / "640"
        for name in ("cfg.json", "notes", "a/cfg.json", "a/notes", "b/notes"):
            (final / name).parent.mkdir(exist_ok=True, parents=True)
            (final / name).write_text("old")
        with new_folder(final) as folder:
            write(folder)
        assert contents(final) == WRITTEN | {"notes": "old", "a/notes": "old", "b/notes": "old"}
        assert [path.name for path in tmp_path.iterdir()] == ["640"]

    @pytest.mark.parametrize(
        "error",
        [
            OSError(),
            # What torch.save says of a full disk.
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_leaves_nothing_if_writing_fails(self, tmp_path: Path, error: BaseException) -> None:
        (tmp_path / "640").mkdir()
        (tmp_path / "640" / "cfg.json").write_text("old")
        with pytest.raises(type(error)):
            fail_to_write(tmp_path / "640", error)
        assert contents(tmp_path) == {"640/cfg.json": "old"}
        assert [path.name for path in tmp_path.iterdir()] == ["640"]

    def test_keeps_what_was_written_if_something_else_fails(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError) as raised:
            fail_to_write(tmp_path / "640", TypeError("no JSON"))
        (partial,) = tmp_path.iterdir()
        assert contents(partial) == WRITTEN
        assert str(partial) in raised.value.__notes__[0]
        with new_folder(tmp_path / "640") as folder:
            write(folder)
        assert contents(partial) == WRITTEN

    @pytest.mark.parametrize("link", [True, False], ids=["link", "file"])
    def test_is_not_put_in_the_place_of_what_is_no_folder(self, tmp_path: Path, link: bool) -> None:
        if link:
            (tmp_path / "640").symlink_to(tmp_path)
        else:
            (tmp_path / "640").write_text("mine")
        with pytest.raises(FileExistsError), new_folder(tmp_path / "640") as folder:
            write(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["640"]

    def test_what_a_living_process_writes_is_not_removed(self, tmp_path: Path) -> None:
        mark = ".saelens_sparse_is_writing"
        for name in ("living", "dead", "foreign"):
            (tmp_path / f"{name}.partial").mkdir()
        (tmp_path / "dead.partial" / mark).touch()
        with (tmp_path / "living.partial" / mark).open("w") as living:
            fcntl.flock(living, fcntl.LOCK_EX)
            with new_folder(tmp_path / "640") as folder:
                write(folder)
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"640", "living.partial", "foreign.partial"}


class TestSaveSomewhere:
    def test_replaces_what_an_earlier_run_left_there(self, tmp_path: Path) -> None:
        for name in (WEIGHTS, "notes", "a/cfg.json"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("old")
        assert save_somewhere(write, "it", str(tmp_path), []) == tmp_path
        assert contents(tmp_path) == WRITTEN | {"notes": "old"}

    def test_takes_the_next_place_and_says_so(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.warns(UserWarning, match=r"it could not be written to .*file.*Not a directory"):
            place = save_somewhere(write, "it", str(file / "output"), [file / "b", tmp_path / "c"])
        assert contents(place) == WRITTEN
        assert contents(tmp_path / "c") == WRITTEN

    @pytest.mark.parametrize("name", WRITTEN)
    def test_never_mixes_an_earlier_sae_with_the_new_one(self, tmp_path: Path, name: str) -> None:
        """Where a folder is in a file's place."""
        output, elsewhere = tmp_path / "output", tmp_path / "elsewhere"
        for path in {*WRITTEN} - {name} | {f"{name}/mine"}:
            (output / path).parent.mkdir(exist_ok=True, parents=True)
            (output / path).write_text("old")
        with pytest.warns(UserWarning, match="is a folder"):
            assert save_somewhere(write, "it", str(output), [elsewhere]) == elsewhere
        assert contents(elsewhere) == WRITTEN
        after = contents(output)
        assert after.pop(f"{name}/mine") == "old"
        for sae in ("", "a/"):
            of_sae = {after.get(f"{sae}{file}", "old") for file in (WEIGHTS, "cfg.json")}
            assert len(of_sae) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), RuntimeError("The size of tensor a (3) must")]
)
def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path: Path, error: Exception) -> None:
    calls: list[Path] = []

    def fail(folder: Path) -> None:
        calls.append(folder)
        raise error

    with pytest.raises(RuntimeError) as raised:
        save_somewhere(fail, "the SAE", str(tmp_path / "output"), [tmp_path / "spare"])
    assert raised.value is error
    assert len(calls) == 1


def test_the_last_failure_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fail(folder: Path) -> None:  # noqa: ARG001
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="the SAE could not be written") as raised:
        save_somewhere(fail, "the SAE", str(tmp_path / "output"), [])
    assert isinstance(raised.value.__cause__, OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["output"], "no empty folder is left"
