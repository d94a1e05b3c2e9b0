"""Training from a cache: which rows a run gets, in which order, and how it resumes."""

import gc
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse import FastActivationsStore, SparseTrainingRunner
from saelens_sparse.activations.shards import reader
from saelens_sparse.activations.shards.reader import BlockOrder
from tests.support.activation_runs import N_STEPS, Scenario, make_config
from tests.support.activations import BATCH, make_store
from tests.support.activations import case as store_case
from tests.support.cache import HOOKS, Caches, batches_of, contents, rows_of, write_shards
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
NEW_EPOCH = "All samples in the training dataset have been exhausted"


def shards_store(
    folder: Path, n_rows: int, per_shard: int, *, dtype: str = "float32", **options: Any
) -> FastActivationsStore:
    """Of a cache of rows that begin with their number."""
    if not (folder / "shards").exists():
        write_shards(folder / "shards", n_rows, per_shard, dtype=dtype)
    settings: dict[str, Any] = {
        "hook_name": "a", "hook_head_index": None, "d_in": 8, "context_size": 8,
        "n_batches_in_buffer": 32, "store_batch_size_prompts": 4, "train_batch_size_tokens": 64,
        "device": torch.device("cpu"), "dtype": "float32", "streaming": False,
        "total_training_tokens": 1, "prepend_bos": False, "normalize_activations": "none",
        "cached_activations_path": str(folder / "shards"), "dataset": None,
    }  # fmt: skip
    store = FastActivationsStore(torch.nn.Identity(), **{**settings, **options})  # pyright: ignore[reportArgumentType]
    assert store.cached_activation_dataset is None
    return store


def numbers(batch: torch.Tensor) -> list[int]:
    return batch[:, 0].long().tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batches_are_the_rows_of_the_cache(tmp_path: Path, dtype: str) -> None:
    n_rows = 1024 if dtype != "bfloat16" else 256
    store = shards_store(tmp_path, n_rows, 176, dtype=dtype)
    batches = batches_of(store, n_rows // 64)
    assert {batch.dtype for batch in batches} == {torch.float32}
    rows = rows_of(HOOKS[0], n_rows).to(getattr(torch, dtype)).float()
    for batch in batches:
        assert torch.equal(batch, rows[numbers(batch)])


def test_an_epoch_gives_each_row_once_and_the_next_another_order(tmp_path: Path) -> None:
    store = shards_store(tmp_path, 1024, 176, activations_mixing_fraction=0.0)
    with pytest.warns(UserWarning, match=NEW_EPOCH):
        served = [number for batch in batches_of(store, 3 * 16) for number in numbers(batch)]
    epochs = [served[start : start + 1024] for start in range(0, 3 * 1024, 1024)]
    assert all(sorted(epoch) == list(range(1024)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_each_epoch_reads_all_blocks_in_an_order_of_its_own() -> None:
    order = BlockOrder([100, 7, 64, 1], batch_size=4096, seed=5)
    assert (order.block_rows, order.chunk_rows) == (64, 4096)
    order = BlockOrder([100, 7, 64, 1], batch_size=130, seed=5)
    assert (order.block_rows, order.blocks_per_chunk, order.chunks_per_epoch) == (2, 65, 2)
    epochs = [
        [block for i in range(2) for block in order.chunk(2 * epoch + i)] for epoch in range(3)
    ]
    for blocks in epochs:
        rows = [(shard, first + i) for shard, first, n in blocks for i in range(n)]
        assert sorted(rows) == [
            (shard, row) for shard, n in enumerate([100, 7, 64, 1]) for row in range(n)
        ]
    assert epochs[0] != epochs[1] != epochs[2]
    again = BlockOrder([100, 7, 64, 1], batch_size=130, seed=5)
    assert again.chunk(3) == order.chunk(3)
    assert BlockOrder([100, 7, 64, 1], batch_size=130, seed=6).chunk(3) != order.chunk(3)


def test_a_batch_comes_from_all_shards(tmp_path: Path) -> None:
    n_rows, per_shard = 8192, 512
    store = shards_store(
        tmp_path, n_rows, per_shard, n_batches_in_buffer=256, train_batch_size_tokens=256
    )
    for batch in batches_of(store, 12):
        shards = torch.tensor(numbers(batch)).div(per_shard, rounding_mode="floor")
        counts = shards.bincount(minlength=16)
        # A draw of 256 from 16 shards: 16 of each, standard deviation 3.9 for rows and 7.7 for
        # blocks of 4 rows.
        assert counts.min() >= 1
        assert counts.max() < 16 + 5 * 8
        neighbours = torch.tensor(numbers(batch)).diff().abs() == 1
        assert neighbours.sum() < 16


def test_a_cache_may_have_more_files_than_a_process_may_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_KEPT_OPEN", 8)
    store = shards_store(tmp_path, 1024, 16, activations_mixing_fraction=0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len([*Path("/dev/fd").iterdir()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 40, hard))  # there are 64 files
    try:
        served = [number for batch in batches_of(store, 16) for number in numbers(batch)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sorted(served) == list(range(1024))


def test_the_seed_decides_the_batches(tmp_path: Path) -> None:
    def batches(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack(batches_of(shards_store(tmp_path, 1024, 176), 10))

    assert torch.equal(batches(1), batches(1))
    assert not torch.equal(batches(1), batches(2))


def test_excluded_tokens_are_left_out(tmp_path: Path) -> None:
    excluded = torch.arange(100, 900)
    store = shards_store(tmp_path, 1024, 176, exclude_special_tokens=excluded)
    with pytest.warns(UserWarning, match=NEW_EPOCH):
        served = {number for batch in batches_of(store, 8) for number in numbers(batch)}
    assert served.isdisjoint(range(100, 900))
    assert len(served) > 150


def test_several_hooks_give_rows_of_the_same_tokens(tmp_path: Path) -> None:
    store = shards_store(tmp_path, 1024, 176)
    store._hook_names, store._hook_d_ins = ["b", "a"], {"a": 8, "b": 3}
    store._hook_head_indices = {"b": 1}
    a, b = rows_of(HOOKS[0], 1024), rows_of(HOOKS[1], 1024)
    batches = store.hook_batches()
    for _ in range(10):
        batch = next(batches)
        assert list(batch) == ["b", "a"]
        assert torch.equal(batch["a"], a[numbers(batch["b"])])
        assert torch.equal(batch["b"], b[numbers(batch["b"])])


@pytest.mark.parametrize("n_before", [0, 1, 9, 23, 40])
@pytest.mark.parametrize("saves_buffer", [True, False])
def test_a_store_goes_on_where_its_state_was_taken(
    tmp_path: Path, n_before: int, saves_buffer: bool
) -> None:
    torch.manual_seed(3)
    store = shards_store(tmp_path, 1024, 176)
    store.saves_buffer = saves_buffer
    batches_of(store, n_before)
    store.save_to_checkpoint(tmp_path)
    expected = batches_of(store, 25)
    torch.manual_seed(4)
    other = shards_store(tmp_path, 1024, 176)
    if saves_buffer:
        other.load_from_checkpoint(tmp_path)
        for found, wanted in zip(batches_of(other, 25), expected, strict=True):
            assert torch.equal(found, wanted)
    else:
        with pytest.warns(UserWarning, match="holds no activations: the buffer starts empty"):
            other.load_from_checkpoint(tmp_path)
        batches_of(other, 5)


def test_a_state_of_another_cache_starts_anew(tmp_path: Path) -> None:
    store = shards_store(tmp_path, 1024, 176)
    batches_of(store, 5)
    store.save_to_checkpoint(tmp_path)
    (tmp_path / "other").mkdir()
    other = shards_store(tmp_path / "other", 1024, 160)
    with pytest.warns(UserWarning, match="has another cache"):
        other.load_from_checkpoint(tmp_path)
    served = [number for batch in batches_of(other, 8) for number in numbers(batch)]
    assert len(set(served)) == len(served)


def test_the_threads_end_with_the_store(tmp_path: Path) -> None:
    def n_readers() -> int:
        return sum(thread.name == "cache reader" for thread in threading.enumerate())

    gc.collect()
    time.sleep(0.1)
    before = n_readers()
    store = shards_store(tmp_path, 1024, 176)
    next(store)
    assert n_readers() > before
    del store
    gc.collect()
    deadline = time.monotonic() + 10
    while n_readers() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert n_readers() <= before


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(tmp_path: Path) -> None:
    store = shards_store(tmp_path, 1024, 176)
    next(store)
    for path in (tmp_path / "shards").glob("*.hook_0.*"):
        with path.open("r+b") as file:
            file.truncate(5000)
    with pytest.raises(ValueError, match=r"hook_0.*was cut off while it was read"):
        batches_of(store, 30)


def test_the_set_of_rows_is_that_of_an_uncached_run(caches: Caches) -> None:
    caches.runner("tokens", tokens=160).run()
    uncached = make_store(
        ActivationsStore, store_case("int64", activations_mixing_fraction=0.0),
        caches.models["float32"], caches.folder / "uncached",
    )  # fmt: skip
    expected = torch.cat(batches_of(uncached, 160 // BATCH))
    store = caches.store("tokens", activations_mixing_fraction=0.0)
    found = torch.cat(batches_of(store, 160 // BATCH))
    assert not torch.equal(found, expected)
    assert torch.equal(found.sort(0).values, expected.sort(0).values)
    assert torch.equal(contents(caches.folder / "cache")[1], expected)


@pytest.fixture
def train(caches: Caches, tmp_path: Path) -> Callable[..., Any]:
    """Trains from the cache; gives the runner and the SAE's weights."""
    caches.runner("tokens", tokens=160).run()
    cache = str(caches.folder / "cache")

    def train(number: int, **options: Any) -> tuple[SparseTrainingRunner, dict[str, Any]]:
        folder = tmp_path / f"run {number}"
        options = {"use_cached_activations": True, "cached_activations_path": cache, **options}
        cfg = make_config(Scenario("int64"), folder, **options)
        torch.manual_seed(7 if "resume_from_checkpoint" not in options else 100)
        runner = SparseTrainingRunner(
            cfg, override_dataset=caches.data("tokens"), override_model=caches.models["float32"]
        )
        return runner, runner.run().state_dict()

    return train


@pytest.mark.filterwarnings("ignore:All samples")
def test_a_run_from_a_cache_resumes_bit_for_bit(train: Callable[..., Any]) -> None:
    runner, expected = train(0, n_checkpoints=3)
    assert runner.cfg.use_cached_activations
    folder = Path(runner.cfg.checkpoint_path)
    written = sorted(folder.iterdir(), key=lambda path: int(path.name))
    assert len(written) == 3
    for number, checkpoint in enumerate(written, start=1):
        assert int(checkpoint.name) < N_STEPS * BATCH
        _, weights = train(number, resume_from_checkpoint=str(checkpoint))
        for name, weight in expected.items():
            assert torch.equal(weights[name], weight), name


@pytest.mark.filterwarnings("ignore:All samples")
@pytest.mark.parametrize("n_before", range(8))
def test_evals_take_tokens_of_the_dataset_and_no_rows(caches: Caches, n_before: int) -> None:
    actions = ["batch", "batch", 3, "batch", 1, 2, "batch", "batch", 5, "batch", 4, "batch"]

    def act(store: FastActivationsStore, part: list[Any]) -> list[torch.Tensor]:
        return [
            next(store).clone() if action == "batch" else store.get_batch_tokens(action)
            for action in part
        ]

    caches.runner("tokens", tokens=160).run()
    torch.manual_seed(1)
    store = caches.store("tokens")
    act(store, actions[:n_before])
    store.save_to_checkpoint(caches.folder)
    expected = act(store, actions[n_before:])
    torch.manual_seed(2)
    other = caches.store("tokens")
    other.load_from_checkpoint(caches.folder)
    for found, wanted in zip(act(other, actions[n_before:]), expected, strict=True):
        assert torch.equal(found, wanted)
    torch.manual_seed(1)
    undisturbed = batches_of(caches.store("tokens"), 7)
    torch.manual_seed(1)
    disturbed = [part for part in act(caches.store("tokens"), actions) if part.is_floating_point()]
    for found, wanted in zip(disturbed, undisturbed, strict=True):
        assert torch.equal(found, wanted)
