"""The benchmark of activation stores alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore
from typing_extensions import override

from benchmarks import store
from benchmarks.__main__ import main
from benchmarks.random_data import cached_activations, token_dataset
from benchmarks.rows import DisagreementError, Row, load_rows
from benchmarks.store import CASES, HOOK, FreeModel, StoreCase, require_same_batches


def run_store(out: Path, *options: str) -> tuple[int, list[Row]]:
    common = ["--device=cpu", "--rounds=2", "--commit=abc", f"--out={out}"]
    return main(["store", *common, *options]), load_rows([out])


@pytest.mark.parametrize("name", ["tiny", "tiny_cached"])
def test_both_stores_are_checked_and_timed(
    name: str, out: Path, capsys: pytest.CaptureFixture[str]
):
    status, rows = run_store(out, f"--cases={name}")
    assert status == 0
    assert [row["contender"] for row in rows] == ["stock", "fast"]
    for row in rows:
        assert (row["operation"], row["case"], row["commit"]) == ("store", name, "abc")
        assert row["cached"] == (name == "tiny_cached")
        assert row["checked_batches"] == 2.5 * CASES[name].refill_batches
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
    said = capsys.readouterr().out
    assert f"{rows[0]['ms'] / rows[1]['ms']:.2f}x" in said
    assert main(["report", str(out)]) == 0
    assert f"{rows[1]['ms']:.3f}" in capsys.readouterr().out


class OtherOrder(ActivationsStore):
    """Swaps rows of its eighth batch, which is past the first refill."""

    given = 0

    @override
    def __next__(self) -> torch.Tensor:
        batch = super().__next__()
        self.given += 1
        return batch.flip(0) if self.given == 8 else batch


def test_a_store_with_other_batches_is_not_timed(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(store.STORES, "fast", OtherOrder)
    status, (row,) = run_store(out, "--cases=tiny")
    assert (status, row["status"], row.get("ms")) == (1, "disagrees", None)
    assert row["message"] == "batch 8: 64 rows are not SAELens's"
    assert row["message"] in capsys.readouterr().out


def test_an_epoch_that_ends_is_a_failure(out: Path, monkeypatch: pytest.MonkeyPatch):
    def one_buffer(case: StoreCase, _refills: float) -> int:
        return case.buffer_prompts

    monkeypatch.setattr(StoreCase, "prompts", one_buffer)
    status, (row,) = run_store(out, "--cases=tiny")
    assert (status, row["status"]) == (1, "failed")
    assert "beginning new epoch" in row["message"]


def test_batches_are_compared_by_bits_and_kind():
    batch = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    require_same_batches([batch], [batch.clone()])
    other = batch.clone()
    other[1, 1] += 1e-6
    with pytest.raises(DisagreementError, match="batch 2: 1 rows"):
        require_same_batches([batch, batch], [batch, other])
    for changed in (batch.double(), batch[:1]):
        with pytest.raises(DisagreementError, match="batch 1 is"):
            require_same_batches([batch], [changed])
    with pytest.raises(ValueError, match="zip"):
        require_same_batches([batch, batch], iter([batch]))


def activations(model: FreeModel, tokens: torch.Tensor) -> torch.Tensor:
    return model.run_with_cache(tokens, names_filter=[HOOK], stop_at_layer=1)[1][HOOK]


def test_the_model_gives_ready_activations_in_turn_or_those_of_the_tokens():
    case = CASES["tiny"]
    tokens = torch.arange(case.model_prompts * case.context).view(case.model_prompts, -1)
    ready = FreeModel(case, "cpu", by_token=False)
    first, second = activations(ready, tokens), activations(ready, tokens)
    assert first.shape == second.shape == (case.model_prompts, case.context, case.d_in)
    assert not torch.equal(first, second)
    assert first.untyped_storage().data_ptr() == ready.activations.untyped_storage().data_ptr()

    by_token = FreeModel(case, "cpu", by_token=True)
    found = activations(by_token, tokens)
    assert torch.equal(activations(by_token, tokens.flip(0)), found.flip(0))
    assert len(found.flatten(0, 1).unique(dim=0)) == tokens.numel()


def files(folder: Path) -> Iterator[tuple[Path, int]]:
    return ((path, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")))


def test_data_sets_are_written_once(tmp_path: Path):
    (tmp_path / "tokens_6_x_4_of_50.part").mkdir()  # left by a run that was killed
    tokens = token_dataset(tmp_path, 6, 4, 50)
    assert {len(row) for row in tokens["input_ids"]} == {4}
    assert len(tokens) == 6
    folder = cached_activations(tmp_path, 6, 4, 2, 50, HOOK)
    before = list(files(tmp_path))
    assert not list(tmp_path.glob("*.part"))
    assert token_dataset(tmp_path, 6, 4, 50)["input_ids"][:] == tokens["input_ids"][:]
    assert cached_activations(tmp_path, 6, 4, 2, 50, HOOK) == folder
    assert list(files(tmp_path)) == before


@pytest.mark.parametrize("name", CASES)
def test_a_turn_is_whole_refills(name: str):
    case = CASES[name]
    served = case.buffer_prompts * case.context // 2
    assert served == case.refill_batches * case.batch
    assert served % (case.model_prompts * case.context) == 0


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["store", "--cases", "gpt3"], "gpt3"),
        (["store", "--refills", "0"], "--refills"),
        (["store", "--cache", ""], "--cache"),
        (["run", "--contenders", "stoc"], "stoc"),
        (["run", "--windows", "0"], "--windows"),
        (["run", "--cases", "gemma2b"], "gemma2b"),
    ],
)
def test_bad_options_are_named(
    args: list[str], named: str, out: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([*args, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not out.exists()
