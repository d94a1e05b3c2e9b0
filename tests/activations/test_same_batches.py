"""Batches, tokens, warnings and random states of the store are those of SAELens's, bit for bit."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse import FastActivationsStore
from saelens_sparse.activations.packing import ConcatenatedRows, Packer, SeparateRows
from tests.support.activation_data import CONTEXT, DATA
from tests.support.activations import (
    CASES,
    TRAINING,
    WITH_EVALS,
    Models,
    Player,
    PlayStock,
    assert_same_events,
    case,
    make_store,
    play,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say


def assert_stock_gives_the_same(
    models: Models, play_stock: PlayStock, name: str, actions: list[str], tmp_path: Path
) -> None:
    case = CASES[name]
    model = models[case.model]
    said, stock = play_stock(name, actions)
    own_said, own = play(FastActivationsStore, case, actions, model, tmp_path / "own")
    assert own_said == said
    n_batches = sum(isinstance(event.result, torch.Tensor | dict) for event in stock)
    assert n_batches >= 30
    assert_same_events(own, stock)


@pytest.mark.parametrize("name", CASES)
def test_stock_gives_the_same(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    assert_stock_gives_the_same(models, play_stock, name, WITH_EVALS, tmp_path)


@pytest.mark.parametrize("name", ["int64", "streaming", "text", "chat", "hooks", "cached"])
def test_stock_gives_the_same_to_training_alone(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    assert_stock_gives_the_same(models, play_stock, name, TRAINING, tmp_path)


@pytest.mark.parametrize("name", ["int64", "text", "hooks", "special tokens excluded"])
def test_others_may_draw_from_the_generator(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    """As an evaluator may that draws a sample."""
    actions = ["batch", "draw", *["batch"] * 3, "draw", *["batch"] * 5, "draw", "draw", "batch"] * 2
    _, stock = play_stock(name, actions)
    case = CASES[name]
    _, own = play(FastActivationsStore, case, actions, models[case.model], tmp_path / "own")
    assert_same_events(own, stock)


@pytest.mark.parametrize("name", ["int64", "streaming", "text", "text, streaming"])
@pytest.mark.parametrize("before", [[], ["tokens 5"], ["batch"] * 3, ["tokens 23"]])
def test_stock_shuffles_the_same(
    models: Models, play_stock: PlayStock, name: str, before: list[str], tmp_path: Path
) -> None:
    actions = [*before, "shuffle", *["tokens 5"] * 7, *["batch"] * 9]
    case, model = CASES[name], models["float32"]
    _, stock = play_stock(name, actions)
    _, own = play(FastActivationsStore, case, actions, model, tmp_path / "own")
    assert_same_events(own, stock)


# With fewer positions, all tokens may be excluded, and stock looks for others forever.
FEWEST_POSITIONS = 4
OPTIONS = st.fixed_dictionaries(
    {
        "activations_mixing_fraction": st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]),
        "train_batch_size_tokens": st.integers(1, 20),
        "store_batch_size_prompts": st.integers(1, 9),
        "context_size": st.integers(FEWEST_POSITIONS, CONTEXT),
        "seqpos_slice": st.sampled_from([(None,), (1, None), (None, -1), (0, None, 2)]),
        "exclude_special_tokens": st.sampled_from([False, True, [8, 9, 10]]),
        "disable_concat_sequences": st.booleans(),
        "prepend_bos": st.booleans(),
        "sequence_separator_token": st.sampled_from(["bos", "eos", "sep", None, 7]),
    }
)
HOOKS = ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_z")
ACTIONS = st.lists(
    st.sampled_from(
        ["batch", "batch", "batch", "tokens", "tokens 1", "tokens 7", "epoch's tokens", "draw"]
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=50, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    data=st.sampled_from([*sorted(set(DATA) - {"text in a folder", "one row", "a row too short"})]),
    options=OPTIONS,
    prompts_to_spare=st.integers(0, 2),
    hooks=st.sampled_from([(), HOOKS]),
    actions=ACTIONS,
)
def test_stock_gives_the_same_for_any_options(
    models: Models,
    data: str,
    options: dict[str, Any],
    prompts_to_spare: int,
    hooks: tuple[str, ...],
    actions: list[str],
) -> None:
    positions = len(range(options["context_size"])[slice(*options["seqpos_slice"])])
    least = -(-options["train_batch_size_tokens"] // positions)
    options = options | {"n_batches_in_buffer": least + prompts_to_spare}
    if data in ("chat", "conversations, streaming"):
        options = options | {"use_chat_formatting": True}
    any_case = case(data, hooks=hooks, **options)
    model = models["float32"]
    with tempfile.TemporaryDirectory() as folder:
        stock_folder, own_folder = Path(folder, "stock"), Path(folder, "own")
        said, stock = play(ActivationsStore, any_case, actions, model, stock_folder)
        own_said, own = play(FastActivationsStore, any_case, actions, model, own_folder)
    assert own_said == said
    assert_same_events(own, stock)


@pytest.mark.parametrize("name", ["int64", "no mixing", "hooks", "all is kept"])
def test_a_batch_belongs_to_the_caller(
    models: Models, play_stock: PlayStock, name: str, tmp_path: Path
) -> None:
    """What is done to it in place changes no other batch."""
    case = CASES[name]
    _, stock = play_stock(name, TRAINING)
    torch.manual_seed(0)
    player = Player(make_store(FastActivationsStore, case, models[case.model], tmp_path / "own"))
    for expected in stock:
        (event,) = player.play(["batch"])[-1:]
        assert_same_events([event], [expected])
        for batch in [event.result] if case.hooks == () else event.result.values():
            batch.fill_(torch.nan)


def test_two_data_loaders_share_tokens_and_nothing_else(models: Models, tmp_path: Path) -> None:
    taken: list[list[torch.Tensor]] = []
    for store_class in (ActivationsStore, FastActivationsStore):
        torch.manual_seed(0)
        folder = tmp_path / store_class.__qualname__ / str(len(taken))
        store = make_store(store_class, case(), models["float32"], folder)
        loader = store.get_data_loader()
        batches = [next(source) for _ in range(20) for source in (store, loader)]
        taken.append([*batches, store.next_batch()])
    for own, stock in zip(taken[1], taken[0], strict=True):
        assert torch.equal(own, stock)


@pytest.mark.parametrize("name", ["int64", "text", "hooks"])
@pytest.mark.parametrize("call", [1, 2, 5, 7])
def test_what_fails_once_loses_nothing(
    models: Models,
    play_stock: PlayStock,
    name: str,
    call: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As where a device has had no memory left."""
    case, model = CASES[name], models["float32"]
    actions = ["batch"] * 20
    _, stock = play_stock(name, actions)
    original, n_calls = model.run_with_cache, 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "run_with_cache", failing)
    _, own = play(FastActivationsStore, case, [*actions, "batch"], model, tmp_path / "own")
    assert sum(isinstance(event.result, str) for event in own) == 1
    assert_same_events([event for event in own if not isinstance(event.result, str)], stock)


@pytest.mark.parametrize("data", ["int64", "rows of several lengths", "streaming"])
def test_tokens_are_on_the_host_whatever_the_default_device(
    models: Models, tmp_path: Path, data: str
) -> None:
    stores = [
        make_store(FastActivationsStore, case(data), models["float32"], tmp_path / str(i))
        for i in range(2)
    ]
    expected = stores[0].get_batch_tokens(5)
    with torch.device("meta"):
        assert torch.equal(stores[1].get_batch_tokens(5), expected)


@pytest.mark.parametrize("packer", [ConcatenatedRows(4, 1, 2), SeparateRows(4, 1)])
def test_sequences_are_on_the_host_whatever_the_default_device(packer: Packer) -> None:
    row = torch.tensor([5, 6, 7])
    with torch.device("meta"):
        packer.feed(row)
        sequence = packer.next()
    assert sequence is not None
    assert sequence.tolist() == [1, 5, 6, 7]
