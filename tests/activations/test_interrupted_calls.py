"""An exception at any line of a call, such as a signal's handler raises, loses nothing."""

import random
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest
import torch

import saelens_sparse.activations
from saelens_sparse import FastActivationsStore
from saelens_sparse.activations import permutations
from tests.support.activations import CASES, Models, Player, make_store
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
SOURCES = str(Path(saelens_sparse.activations.__file__).parent)
N_BATCHES, N_INTERRUPTIONS = 12, 20


class Tracer:
    """Raises KeyboardInterrupt at the `stop`-th line that the store runs to fill its buffer.

    CPython asks for signals when a function begins and when one returns from C. Neither happens
    between a shuffle's end and the mark that says so, nor is that line counted.
    """

    def __init__(self, batches: Any, stop: int | None = None) -> None:
        self.batches, self.stop, self.n_lines = batches, stop, 0

    def __enter__(self) -> Self:
        self.replaced = sys.gettrace()
        sys.settrace(self.on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.replaced)

    def on_call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        fills, above = False, frame
        while above is not None and not fills:
            fills = above.f_code.co_name in ("_fill_and_shuffle", "_read_ahead")
            above = above.f_back
        is_own = frame.f_code.co_filename.startswith(SOURCES)
        return self.on_event if fills and is_own else None

    def on_event(self, frame: FrameType, event: str, _arg: Any) -> Any:
        has_just_shuffled = (
            frame.f_code.co_name == "_fill_and_shuffle"
            and self.batches._buffer.n_to_serve > 0
            and self.batches._fill is not None
        )
        if event == "line" and not has_just_shuffled:
            self.n_lines += 1
            if self.n_lines == self.stop:
                sys.settrace(self.replaced)
                raise KeyboardInterrupt
        return self.on_event


@pytest.mark.parametrize("name", ["int64", "text", "hooks", "special tokens excluded"])
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_an_interruption_loses_nothing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reads_ahead: bool
) -> None:
    """Neither for the store itself, nor for one that loads its state."""
    monkeypatch.setattr(permutations, "_MIN_ELEMENTS", 1)

    def player(folder: str) -> Player:
        torch.manual_seed(0)
        store = make_store(FastActivationsStore, CASES[name], models["float32"], tmp_path / folder)
        store.reads_ahead = reads_ahead
        player = Player(store)
        if not store._hook_names:
            store._dataloader = store.get_data_loader()
        return player

    def batches_of(player: Player, n: int) -> list[Any]:
        return [event.result for event in player.play(["batch"] * n)]

    uninterrupted = player("uninterrupted")
    with Tracer(uninterrupted.store._batches) as tracer:
        expected = batches_of(uninterrupted, N_BATCHES)
    for stop in random.Random(0).sample(range(1, tracer.n_lines + 1), N_INTERRUPTIONS):
        interrupted = player(f"interrupted {stop}")
        with Tracer(interrupted.store._batches, stop), pytest.raises(KeyboardInterrupt):
            interrupted.play(["batch"] * N_BATCHES)
        n = len(interrupted.events)
        interrupted.store.save(str(tmp_path / "state"))
        interrupted.events.clear()
        assert_same(batches_of(interrupted, N_BATCHES - n), expected[n:])
        resumed = player(f"resumed {stop}")
        torch.manual_seed(1)
        resumed.store.load(str(tmp_path / "state"))
        assert_same(batches_of(resumed, N_BATCHES - n), expected[n:])


def assert_same(batches: list[Any], expected: list[Any]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
