"""A comparison with damaged files: it goes on without them, or names them and stops."""

import json
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest

from saelens_sparse import cli
from saelens_sparse.compare import command, report
from saelens_sparse.compare.options import parse_comparison
from saelens_sparse.compare.state import State, open_output
from saelens_sparse.compare.steps import load_steps
from saelens_sparse.config.files import UsageError
from tests.support.compare import contents, make_config

N_STEPS = 8
BATCH = 128


@dataclass(frozen=True)
class Finished:
    """A comparison that is complete, with checkpoints of both sides after steps 3 and 6."""

    args: list[str]
    output: Path

    def open(self, *options: str) -> tuple[State, str]:
        return open_output(parse_comparison([*self.args, *options]))

    def unfinish(self) -> None:
        """As if it had been interrupted after step 7."""
        path = self.output / "state.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps({**state, "trained": False}))
        for name in ("jumprelu", "jumprelu_sparse"):
            steps = self.output / name / "steps.jsonl"
            steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:7]))

    def checkpoint(self, architecture: str, step: int) -> Path:
        return self.output / architecture / "checkpoints" / str(step * BATCH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("compare")
    output = folder / "output"
    options = [f"--steps={N_STEPS}", "--checkpoints=2", f"--output={output}", "--eval-batches=0"]
    options.append("--windows=0")
    sae = {"architecture": "jumprelu_sparse", "d_in": 16, "d_sae": 64}
    sae["normalize_activations"] = "expected_average_only_in"
    args = [str(make_config(folder, sae=sae)), *options]
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setattr(report, "can_draw", lambda: False)
        assert command.main(args) == 0
    signal.signal(signal.SIGTERM, handler)
    state = json.loads((output / "state.json").read_text())
    assert (state["trained"], state["checkpoint_step"]) == (True, 0)
    return Finished(args, output)


@pytest.fixture
def finished(trained: Finished) -> Iterator[Finished]:
    """The same, which is whole again after the test."""
    before = contents(trained.output)
    yield trained
    for name in set(contents(trained.output)) - set(before):
        path = trained.output / name
        if path.is_file():
            path.unlink()
    for name, content in before.items():
        path = trained.output / name
        if content is not None and not (path.is_file() and path.read_bytes() == content):
            if path.is_dir():
                path.rmdir()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "of another kind": lambda path: path.write_text("[1, 2, 3]"),
    "a folder": replace_by_a_folder,
}


def each_with_several(files: Sequence[str]) -> list[tuple[str, str]]:
    """Each file with three kinds of damage, and all kinds among them."""
    kinds = cycle(DAMAGES)
    return [(file, next(kinds)) for file in files for _ in range(3)]


NEEDED = (
    "jumprelu/steps.jsonl",
    "jumprelu_sparse/steps.jsonl",
    "jumprelu_sparse/evaluation.json",
    "jumprelu/sae/sae_weights.safetensors",
    "jumprelu_sparse/sae/cfg.json",
    "jumprelu_sparse/sae/sae_weights.safetensors",
    "jumprelu/sae/sparsity.safetensors",
    "jumprelu/initial_decoder.safetensors",
    "jumprelu_sparse/final.safetensors",
)


@pytest.mark.parametrize(("name", "damage"), each_with_several(NEEDED))
def test_a_damaged_result_is_named_and_everything_is_kept(
    name: str, damage: str, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished.output / name
    DAMAGES[damage](path)
    before = contents(finished.output)
    assert cli.main(["compare", *finished.args]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "restore it, name another folder, or give --overwrite to train anew" in error
    assert len(error.splitlines()) == 1
    for lock in (".lock", ".lock-holder"):
        before.pop(lock, None)
    after = contents(finished.output)
    assert {kept: after[kept] for kept in before} == before


def test_what_can_be_computed_again_is(
    finished: Finished, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "can_draw", lambda: False)
    output = finished.output
    expected = json.loads((output / "results.json").read_text())
    config = (output / "jumprelu" / "config.json").read_text()
    (output / "results.json").write_text('{"headline": ')
    (output / "report.html").unlink()
    (output / "dictionaries.json").write_text("{")
    (output / "jumprelu" / "config.json").write_text(config[:100])
    (finished.checkpoint("jumprelu", 6) / "trainer_state.pt").write_bytes(b"")
    handler = signal.getsignal(signal.SIGTERM)
    assert cli.main(["compare", *finished.args]) == 0
    signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    assert f"Written again: {output / 'jumprelu' / 'config.json'}" in said.out
    results = json.loads((output / "results.json").read_text())
    for part in ("headline", "status", "arms", "mse_deviation", "evaluations", "shared_latents"):
        assert results[part] == expected[part]
    assert (output / "jumprelu" / "config.json").read_text() == config
    assert "After" not in results["headline"]


def test_a_report_that_fails_leaves_the_one_before(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished.output)
    cfg = finished.output / "jumprelu_sparse" / "sae" / "cfg.json"
    cfg.write_text('{"architecture": "nothing that can be opened"}')
    handler = signal.getsignal(signal.SIGTERM)
    assert cli.main(["compare", *finished.args]) == 1
    signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err
    assert f"compare: stock SAELens could not open {cfg.parent}: " in error
    assert len(error.splitlines()) == 1
    for name in ("results.json", "report.html"):
        assert contents(finished.output)[name] == before[name]


@pytest.mark.parametrize(
    "name", ["state.json", "jumprelu/evaluation.json", "jumprelu_sparse/steps.jsonl"]
)
def test_no_damage_of_a_text_file_ends_in_a_traceback(name: str, finished: Finished) -> None:
    """Bytes changed at random places: what was read is what was written, or the file is refused."""
    path = finished.output / name
    whole = path.read_bytes()
    draw = random.Random(name)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 20])):
            damaged[draw.randrange(len(damaged))] = draw.choice(b'\x00\xff"{}[],:5ae')
        path.write_bytes(damaged)
        try:
            state, _ = finished.open()
        except UsageError:
            refused += 1
        else:
            assert state.trained
            for folder in parse_comparison(finished.args).folders:
                steps = load_steps(folder / "steps.jsonl")
                assert [step.step for step in steps] == list(range(1, N_STEPS + 1))
                assert all(isinstance(step.losses["mse_loss"], float) for step in steps)
    assert refused > 20


def test_overwriting_a_damaged_comparison_trains_it_anew(finished: Finished) -> None:
    DAMAGES["cut"](finished.output / "jumprelu" / "steps.jsonl")
    state, message = finished.open("--overwrite")
    assert message.startswith("Starting anew: ")
    assert str(finished.output / "jumprelu" / "steps.jsonl") in message
    assert not state.trained
    assert not (finished.output / "jumprelu_sparse" / "sae" / "cfg.json").exists()


def test_a_whole_comparison_is_not_trained_again_by_overwriting(finished: Finished) -> None:
    state, message = finished.open("--overwrite")
    assert state.trained
    assert message.startswith("Both sides are already trained")


def test_whole_checkpoints_are_resumed_from(finished: Finished) -> None:
    finished.unfinish()
    run = json.loads((finished.output / "state.json").read_text())["run"]
    state, message = finished.open()
    assert message == (
        "Resuming both sides from their checkpoints after step 6 of the 7 that they had taken"
    )
    assert (state.run, state.resumed_at) == (run, [6])


CHECKPOINT_FILES = (
    "sae_weights.safetensors",
    "trainer_state.pt",
    "activations_store_state.safetensors",
    "activation_scaler.json",
)


@pytest.mark.parametrize(("name", "damage"), each_with_several(CHECKPOINT_FILES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    name: str, damage: str, finished: Finished
) -> None:
    finished.unfinish()
    path = finished.checkpoint("jumprelu_sparse", 6) / name
    DAMAGES[damage](path)
    state, message = finished.open()
    assert (state.checkpoint_step, state.resumed_at) == (3, [3])
    assert str(path) in message
    assert message.endswith("Resuming both sides from their checkpoints after step 3 of the 7 that "
                            "they had taken")  # fmt: skip


def test_a_checkpoint_that_one_side_lacks_is_passed_over(finished: Finished) -> None:
    finished.unfinish()
    path = finished.checkpoint("jumprelu", 6)
    path.rename(path.with_name("moved"))
    state, message = finished.open()
    path.with_name("moved").rename(path)
    assert state.checkpoint_step == 3
    assert str(path) in message


def test_without_a_whole_checkpoint_nothing_is_discarded(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.unfinish()
    for architecture, step in (("jumprelu", 6), ("jumprelu_sparse", 3)):
        DAMAGES["cut"](finished.checkpoint(architecture, step) / "trainer_state.pt")
    before = contents(finished.output)
    assert cli.main(["compare", *finished.args]) == 2
    error = capsys.readouterr().err
    assert str(finished.checkpoint("jumprelu", 6) / "trainer_state.pt") in error
    assert "--overwrite to train anew" in error
    after = contents(finished.output)
    assert {name: after[name] for name in before} == before
    state, message = finished.open("--overwrite")
    assert (state.checkpoint_step, state.resumed_at) == (0, [])
    assert message.startswith("Starting anew: ")


def test_steps_that_a_checkpoint_counts_must_be_there(finished: Finished) -> None:
    """A resumed training would else end complete, with fewer steps than were trained."""
    finished.unfinish()
    steps = finished.output / "jumprelu" / "steps.jsonl"
    lines = steps.read_text().splitlines(keepends=True)
    steps.write_text("".join([*lines[:4], lines[4][:30]]))
    state, message = finished.open()
    assert state.checkpoint_step == 3
    assert str(steps) in message
    steps.write_text("".join([*lines[:1], *lines[2:]]))
    with pytest.raises(UsageError, match=r"steps\.jsonl has 1 of the 6 steps"):
        finished.open()
