"""A store that is loaded from a checkpoint goes on as the one that was saved."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from saelens_sparse import FastActivationsStore
from tests.support.activations import (
    CASES,
    TRAINING,
    WITH_EVALS,
    Event,
    Models,
    Player,
    PlayStock,
    assert_same_events,
    make_store,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
STATE = "activations_store_state.safetensors"
# Where a run stops. The first batches are number 1, 2, 3 and so on of `WITH_EVALS`' actions.
CUTS = [0, 2, 6, 17, 30]
RESUMED = (
    "int64", "rows of several lengths", "shuffled", "chunks on disk", "selected",
    "streaming", "streaming, shuffled", "streaming, generated", "streaming, tensors", "a list",
    "text, shuffled", "text", "text, streaming", "not concatenated", "no separator, no BOS", "chat",
    "special tokens of a text excluded", "positions with a step", "no mixing, text", "all is kept",
    "model batch larger than the buffer", "model batch of one", "bfloat16", "hooks, text",
    "hooks, bfloat16", "one of the hooks", "cached",
)  # fmt: skip


def play_in_parts(
    name: str, actions: Sequence[str], cuts: Sequence[int], models: Models, folder: Path
) -> list[Event]:
    """What stores give each of which goes on where the one before has saved a checkpoint."""
    case = CASES[name]
    events: list[Event] = []
    checkpoint: Path | None = None
    for part, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(actions)], strict=True)):
        torch.manual_seed(part)
        store = make_store(FastActivationsStore, case, models[case.model], folder / str(part))
        player = Player(store)
        if checkpoint is not None:
            store.load_from_checkpoint(checkpoint)
        events += player.play(actions[start:end])
        checkpoint = folder / f"checkpoint {part}"
        checkpoint.mkdir()
        store.save_to_checkpoint(checkpoint)
    return events


@pytest.mark.parametrize("name", RESUMED)
def test_batches_go_on(models: Models, play_stock: PlayStock, name: str, tmp_path: Path) -> None:
    _, stock = play_stock(name, WITH_EVALS)
    own = play_in_parts(name, WITH_EVALS, CUTS, models, tmp_path)
    assert_same_events(own, stock)


@pytest.mark.parametrize("name", ["int64", "text", "hooks"])
def test_batches_go_on_from_any_of_them(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    actions = TRAINING[:16]
    _, stock = play_stock(name, actions)
    own = play_in_parts(name, actions, range(1, len(actions)), models, tmp_path)
    assert_same_events(own, stock)


def test_saving_changes_nothing(models: Models, play_stock: PlayStock, tmp_path: Path) -> None:
    case, model = CASES["int64"], models["float32"]
    _, stock = play_stock("int64", WITH_EVALS)
    torch.manual_seed(0)
    player = Player(make_store(FastActivationsStore, case, model, tmp_path / "own"))
    for action in WITH_EVALS:
        player.play([action])
        player.store.save_to_checkpoint(tmp_path)
        player.store.save(str(tmp_path / "a file"))
    assert_same_events(player.events, stock)


INTERCHANGED = [
    "int64", "streaming", "text", "not concatenated", "chat", "selected", "hooks", "cached"
]  # fmt: skip


def after_loading(
    store_class: type[ActivationsStore], name: str, checkpoint: Path, models: Models, folder: Path
) -> list[Event]:
    case = CASES[name]
    torch.manual_seed(0)
    player = Player(make_store(store_class, case, models[case.model], folder))
    player.store.load_from_checkpoint(checkpoint)
    return player.play(["tokens 2", *["batch"] * 12])


def checkpoint_of(
    store_class: type[ActivationsStore], name: str, models: Models, folder: Path
) -> Path:
    case, checkpoint = CASES[name], folder / "checkpoint"
    torch.manual_seed(0)
    player = Player(make_store(store_class, case, models[case.model], folder / "store"))
    player.play(WITH_EVALS[:34])
    checkpoint.mkdir()
    player.store.save_to_checkpoint(checkpoint)
    return checkpoint


@pytest.mark.parametrize("name", INTERCHANGED)
def test_a_checkpoint_of_stock_is_loaded_as_stock_loads_it(
    models: Models, name: str, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(ActivationsStore, name, models, tmp_path)
    stock = after_loading(ActivationsStore, name, checkpoint, models, tmp_path / "stock")
    own = after_loading(FastActivationsStore, name, checkpoint, models, tmp_path / "own")
    assert_same_events(own, stock)


@pytest.mark.parametrize("name", INTERCHANGED)
def test_stock_loads_a_checkpoint_as_its_own(models: Models, name: str, tmp_path: Path) -> None:
    checkpoints = [
        checkpoint_of(store_class, name, models, tmp_path / str(index))
        for index, store_class in enumerate((ActivationsStore, FastActivationsStore))
    ]
    key = "n_dataset_processed"
    stock_state, own_state = (load_file(checkpoint / STATE) for checkpoint in checkpoints)
    assert torch.equal(own_state[key], stock_state[key])
    stock, own = (
        after_loading(ActivationsStore, name, checkpoint, models, checkpoint / "store")
        for checkpoint in checkpoints
    )
    assert_same_events(own, stock)
