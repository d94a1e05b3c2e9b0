"""The folder of a comparison: what is another's is left alone, and one run at a time is in it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from saelens_sparse import cli
from saelens_sparse.compare import command, embedded_inputs
from saelens_sparse.compare.command import ComparisonError, prepare_inputs
from saelens_sparse.compare.options import parse_comparison
from saelens_sparse.compare.state import State, open_output
from saelens_sparse.config.files import UsageError
from tests.support.compare import contents, make_config

SIDES = ("topk", "topk_sparse")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_config(tmp_path_factory.mktemp("inputs")))


def settle(output: Path, config: str, *options: str) -> tuple[State, str]:
    return open_output(parse_comparison([config, f"--output={output}", *options]))


def refusal(capsys: pytest.CaptureFixture[str], config: str, output: Path, *options: str) -> str:
    """The one line with which the command refuses the folder."""
    assert cli.main(["compare", config, f"--output={output}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(("saelens-sparse: --output: ", "saelens-sparse: output_path: "))
    assert len(error.splitlines()) == 1
    return error


def work_of_someone(folder: Path) -> None:
    """Files whose names are those that a comparison gives to its own."""
    for name in ("results.json", "report.html", "topk/steps.jsonl", "topk/sae/cfg.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of weeks")
    checkpoint = folder / "topk_sparse" / "checkpoints" / "512"
    checkpoint.mkdir(parents=True)
    (checkpoint / "sae_weights.safetensors").write_bytes(b"of weeks")


NO_STATE_OF_OURS: dict[str, Callable[[str], str | bytes | None]] = {
    "none": lambda _: None,
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda _: "",
    "zeros": lambda text: bytes(len(text)),
    "no text": lambda _: b"\xff\xfe\x00\x80",
    "another program's": lambda _: '{"window": [10, 20]}',
    "a list": lambda _: "[1, 2, 3]",
    "nested beyond all bounds": lambda _: "[" * 100_000,
    "a newer version's": lambda text: text.replace('"format": 1', '"format": 2'),
    "another command's": lambda text: text.replace("saelens-sparse compare", "someone"),
    "of other types": lambda text: text.replace('"checkpoint_step": 0', '"checkpoint_step": "0"'),
    "without arms": lambda text: text.replace('"arms"', '"legs"'),
}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize("state", NO_STATE_OF_OURS)
def test_what_no_state_of_this_command_vouches_for_is_left_alone(
    state: str,
    overwrite: tuple[str, ...],
    tmp_path: Path,
    config: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settle(tmp_path / "of ours", config)
    text = (tmp_path / "of ours" / "state.json").read_text()
    folder = tmp_path / "theirs"
    work_of_someone(folder)
    if (content := NO_STATE_OF_OURS[state](text)) is not None:
        assert content != text
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / "state.json").write_bytes(raw)
    before = contents(folder)
    assert "name another folder" in refusal(capsys, config, folder, *overwrite)
    assert contents(folder) == before


def test_a_folder_in_place_of_the_state_is_refused(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state.json").mkdir()
    assert "state.json" in refusal(capsys, config, tmp_path)


@pytest.mark.parametrize(
    "side", ["{victim}", "../victim", ".", "..", "topk/../../victim", "victim"]
)
def test_sides_of_a_state_are_architectures_and_nothing_else(
    side: str, tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work_of_someone(tmp_path / "victim")
    for name in ("sae", "checkpoints"):
        (tmp_path / "victim" / name).mkdir()
        (tmp_path / "victim" / name / "cfg.json").write_text("of weeks")
    output = tmp_path / "output"
    settle(output, config)
    state = json.loads((output / "state.json").read_text())
    state["settings"]["arms"][side.format(victim=tmp_path / "victim")] = {}
    (output / "state.json").write_text(json.dumps(state))
    before = contents(tmp_path)
    assert "not an architecture" in refusal(capsys, config, output, "--overwrite", "--k=3")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("link", ["topk", "topk/checkpoints", "topk_sparse/steps.jsonl", "figures"])
def test_links_that_lead_elsewhere_are_not_followed(
    link: str, tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work_of_someone(tmp_path / "victim")
    output = tmp_path / "output"
    settle(output, config)
    path = output / link
    if link == "topk":
        (path / "config.json").unlink()
        path.rmdir()
    path.symlink_to(tmp_path / "victim")
    before = contents(tmp_path / "victim")
    assert f"{path} is a link" in refusal(capsys, config, output, "--overwrite", "--k=3")
    assert contents(tmp_path / "victim") == before


def test_overwriting_removes_what_the_command_made_and_nothing_beside(
    tmp_path: Path, config: str
) -> None:
    state, _ = settle(tmp_path, config)
    state.trained = True
    state.save(tmp_path)
    work_of_someone(tmp_path)
    mine = [
        tmp_path / name
        for name in ("notes.txt", "topk/plan.md", "topk/sae/card.md", "topk_sparse/checkpoints/why")
    ]
    for path in mine:
        path.write_text("mine")
    settle(tmp_path, config, "--architecture=jumprelu", "--overwrite")
    assert all(path.read_text() == "mine" for path in mine)
    left = {path for path in tmp_path.rglob("*") if path.is_file() and path.name[0] != "."}
    made = {"state.json", "jumprelu/config.json", "jumprelu_sparse/config.json"}
    assert left == {*mine, *(tmp_path / name for name in made)}


def test_the_folder_of_a_side_that_the_state_does_not_name_is_another_s(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(tmp_path, config, "--architecture=jumprelu")
    work_of_someone(tmp_path)
    before = contents(tmp_path)
    assert f"{tmp_path / 'topk'} " in refusal(capsys, config, tmp_path, "--overwrite")
    assert {name: contents(tmp_path)[name] for name in before} == before


@pytest.mark.parametrize("left", ["sae", "checkpoint_step", "trained"])
def test_results_of_other_settings_count_though_no_step_can_be_read(
    left: str, tmp_path: Path, config: str
) -> None:
    state, _ = settle(tmp_path, config)
    if left == "sae":
        (tmp_path / "topk" / "sae").mkdir()
        (tmp_path / "topk" / "sae" / "cfg.json").write_text("{}")
    else:
        setattr(state, left, 4)
    state.trained = bool(state.trained)
    state.save(tmp_path)
    with pytest.raises(UsageError, match="holds a comparison with other settings"):
        settle(tmp_path, config, "--k=3")


def test_a_state_of_an_earlier_version_opens_and_is_marked(tmp_path: Path, config: str) -> None:
    before, _ = settle(tmp_path, config)
    values = json.loads((tmp_path / "state.json").read_text())
    for name in ("made_by", "format"):
        del values[name]
    values |= {"checkpoints": {}, "checkpoint_step": 0}
    (tmp_path / "state.json").write_text(json.dumps(values))
    pretend_step(tmp_path)
    with pytest.raises(UsageError, match=r"k is 4 there and 3 here"):
        settle(tmp_path, config, "--k=3")
    after, _ = settle(tmp_path, config)
    assert after.settings == before.settings
    assert "made_by" in json.loads((tmp_path / "state.json").read_text())


def pretend_step(output: Path) -> None:
    for name in SIDES:
        (output / name / "steps.jsonl").write_text("{}\n")


@pytest.mark.parametrize("place", ["the current directory", "the home directory", "nothing"])
def test_a_place_where_people_keep_other_things_is_refused(
    place: str,
    tmp_path: Path,
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work_of_someone(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = contents(tmp_path)
    path = {"nothing": "", "the current directory": ".", "the home directory": str(Path.home())}
    assert cli.main(["compare", config, "--output", path[place]]) == 2
    assert "--output: " in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_empty_name_does_not_mean_the_current_directory(
    tmp_path: Path,
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for option in ("--output", "--cache"):
        assert cli.main(["compare", config, option, ""]) == 2
        assert f"{option}: '' names no folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("blocked", ["topk", "topk/config.json"])
def test_a_path_of_the_wrong_kind_is_named(
    blocked: str, tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settle(tmp_path, config)
    (tmp_path / "topk" / "config.json").unlink()
    if blocked == "topk":
        (tmp_path / blocked).rmdir()
        (tmp_path / blocked).write_text("a file")
    else:
        (tmp_path / blocked).mkdir()
        (tmp_path / blocked / "mine").touch()
    assert str(tmp_path / blocked) in refusal(capsys, config, tmp_path)


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("a file")
    output = tmp_path / "file" / "output"
    assert str(output) in refusal(capsys, config, output)


@contextmanager
def another_process_in(folder: Path) -> Generator[subprocess.Popen[str]]:
    """A process that holds the folder, as a comparison does."""
    script = (
        "import os, pathlib, sys; from filelock import FileLock\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "with FileLock(folder / '.lock').acquire(timeout=0):\n"
        "    (folder / '.lock-holder').write_text(f'process {os.getpid()} on this machine')\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        yield process
        process.kill()


def test_a_second_comparison_in_the_folder_is_refused_until_the_first_has_ended(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with another_process_in(output) as process:
        before = contents(output)
        for _ in range(2):
            error = refusal(capsys, config, output)
            assert f"in use by process {process.pid} " in error
        assert contents(output) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        with another_process_in(output):
            pass


def test_a_side_that_outlives_its_comparison_keeps_another_out(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which shows, too, how a side that fails is reported."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settle(tmp_path, config)
    handler = signal.getsignal(signal.SIGTERM)
    with another_process_in(tmp_path / "topk") as process:
        assert cli.main(["compare", config, f"--output={tmp_path}"]) == 1
        signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err
    assert "compare: training topk failed: UsageError: " in error
    assert f"in use by process {process.pid} " in error
    assert str(tmp_path / "topk" / "log.txt") in error
    assert json.loads((tmp_path / "results.json").read_text())["status"] == "failed"


# The embedded inputs.


def test_two_runs_make_the_inputs_once(tmp_path: Path) -> None:
    made: list[str] = []

    def make(folder: Path) -> None:
        (folder / "half").touch()
        time.sleep(0.3)
        (folder / "whole").touch()
        made.append(folder.name)

    with ThreadPoolExecutor() as runs:
        list(runs.map(embedded_inputs.make_once, [tmp_path / "inputs"] * 2, [make] * 2))
    assert len(made) == 1
    assert {path.name for path in (tmp_path / "inputs").iterdir()} == {"half", "whole"}


def test_making_the_inputs_leaves_a_folder_of_the_users_alone(tmp_path: Path) -> None:
    (tmp_path / "inputs.partial").mkdir()
    (tmp_path / "inputs.partial" / "mine").touch()
    embedded_inputs.make_once(tmp_path / "inputs", lambda folder: (folder / "made").touch())
    assert (tmp_path / "inputs.partial" / "mine").exists()


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_inputs_that_are_not_whole_are_named(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "PROCESSES", None)  # nothing is to be made
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = tmp_path / "smollm2-135m" / "model.safetensors"
    files = (
        model,
        tmp_path / "python-docs" / "train.jsonl",
        tmp_path / "activations" / "state.json",
    )
    for path in files:
        path.parent.mkdir()
        path.write_text("{}")
    save_file({"weight": torch.ones(3)}, model)
    comparison = parse_comparison(["--device=cpu", f"--cache={tmp_path}"])
    prepare_inputs(comparison)
    if damage == "cut":
        model.write_bytes(model.read_bytes()[:-1])
    else:
        files[2].unlink()
    folder = files[0 if damage == "cut" else 2].parent
    with pytest.raises(
        ComparisonError, match=f"{folder}.* remove {folder}, or name another --cache"
    ):
        prepare_inputs(comparison)


def test_a_training_that_ended_without_a_report_is_not_discarded(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both SAEs are saved, and what follows has failed."""
    settle(tmp_path, config)
    for side in SIDES:
        (tmp_path / side / "sae").mkdir()
        (tmp_path / side / "sae" / "sae_weights.safetensors").write_bytes(b"of weeks")
    assert "--overwrite" in refusal(capsys, config, tmp_path)
    assert (tmp_path / "topk" / "sae" / "sae_weights.safetensors").exists()
    settle(tmp_path, config, "--overwrite")
    assert not (tmp_path / "topk" / "sae").exists()


def test_overwriting_spares_saes_that_were_put_beside_those_of_the_command(
    tmp_path: Path, config: str
) -> None:
    settle(tmp_path, config)
    mine = [tmp_path / "topk" / "checkpoints" / "my best", tmp_path / "topk" / "sae" / "my best"]
    own = [tmp_path / "topk" / "checkpoints" / "512", tmp_path / "topk" / "sae"]
    for folder in (*mine, *own):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sae_weights.safetensors").write_bytes(b"of weeks")
    settle(tmp_path, config, "--overwrite")
    assert all((folder / "sae_weights.safetensors").exists() for folder in mine)
    assert not any((folder / "sae_weights.safetensors").exists() for folder in own)
