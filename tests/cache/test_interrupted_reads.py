"""A signal while a chunk of a cache is awaited loses no rows, whichever the format."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from saelens_sparse import FastActivationsStore
from saelens_sparse.activations.read_ahead import ReadAhead
from tests.support.activations import CASES, Models, make_store
from tests.support.cache import Caches, batches_of
from tests.support.runs import what_libraries_say

pytestmark = [*what_libraries_say, pytest.mark.filterwarnings("ignore:All samples")]
N_BATCHES = 14


@pytest.fixture(params=["shards", "SAELens's format"])
def new_store(
    request: pytest.FixtureRequest, caches: Caches, models: Models, tmp_path: Path
) -> Callable[[], FastActivationsStore]:
    if request.param == "shards":
        caches.runner("tokens", tokens=160).run()
        return lambda: caches.store("tokens")
    numbers = iter(range(100))

    def new_store() -> FastActivationsStore:
        folder = tmp_path / f"store {next(numbers)}"
        return make_store(FastActivationsStore, CASES["cached"], models["float32"], folder)

    return new_store


@pytest.mark.parametrize("is_read", [False, True])
def test_an_interrupted_read_loses_nothing(
    new_store: Callable[[], FastActivationsStore], is_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    expected = batches_of(new_store(), N_BATCHES)
    read_next = ReadAhead.next
    for call in range(10):
        calls = 0

        def interrupted(ahead: ReadAhead, call: int = call) -> Any:
            nonlocal calls
            calls += 1
            if calls != call + 1:
                return read_next(ahead)
            if is_read:
                read_next(ahead)
            raise KeyboardInterrupt

        torch.manual_seed(1)
        store = new_store()
        found: list[torch.Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(ReadAhead, "next", interrupted)
            with pytest.raises(KeyboardInterrupt):
                found.extend(batch.clone() for batch in islice(iter(store), N_BATCHES))
        found += batches_of(store, N_BATCHES - len(found))
        for batch, wanted in zip(found, expected, strict=True):
            assert torch.equal(batch, wanted)
