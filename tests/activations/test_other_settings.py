"""A state that is loaded under other settings: what still holds is kept, the rest begins anew."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

from saelens_sparse import FastActivationsStore
from tests.support.activation_data import CONTEXT
from tests.support.activation_runs import N_STEPS, SCENARIOS, Run, n_steps
from tests.support.activations import (
    BATCH,
    CASES,
    D_MODEL,
    HOOK,
    POST,
    Case,
    Event,
    Models,
    Player,
    Z,
    assert_same_events,
    case,
    make_store,
    play,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
STATE = "activations_store_state.safetensors"
OTHER = "blocks.0.hook_resid_pre"
FIRST = ["batch"] * 5  # in the middle of what the second shuffle serves
THEN = ["tokens 3", *["batch"] * 12]


def saved(store_class: type[ActivationsStore], case: Case, models: Models, folder: Path) -> Path:
    torch.manual_seed(0)
    player = Player(make_store(store_class, case, models[case.model], folder / "store"))
    player.play(FIRST)
    player.store.save(str(folder / "state"))
    return folder / "state"


def loaded(
    store_class: type[ActivationsStore], case: Case, state: Path, models: Models, folder: Path
) -> list[Event]:
    store = make_store(store_class, case, models[case.model], folder)
    player = Player(store)
    store.load(str(state))
    torch.manual_seed(7)
    return player.play(THEN)


ANEW = {
    "another buffer": (case(), case(n_batches_in_buffer=10)),
    "another batch": (case("text"), case("text", train_batch_size_tokens=17)),
    "another mixing": (case("streaming"), case("streaming", activations_mixing_fraction=0.25)),
    "other positions": (case(), case(seqpos_slice=(1, None))),
    "positions from elsewhere": (case(seqpos_slice=(0, -1)), case(seqpos_slice=(1, None))),
    "another head": (
        case(hook_name=Z, hook_head_index=0, d_in=8),
        case(hook_name=Z, hook_head_index=1, d_in=8),
    ),
    "another head of hooks": (
        case(hooks=(Z, HOOK), hook_head_indices={Z: 0}),
        case(hooks=(Z, HOOK), hook_head_indices={Z: 1}),
    ),
    "other tokens excluded": (case(), case(exclude_special_tokens=[5, 6, 7, 8, 9])),
    "another hook": (case(), case(hook_name=OTHER)),
    "another width": (case(), case(hook_name=POST, d_in=32)),
    "a hook more": (case(hooks=(HOOK,)), case(hooks=(HOOK, OTHER))),
    "hooks in another order": (case(hooks=(HOOK, OTHER)), case(hooks=(OTHER, HOOK))),
}


@pytest.mark.parametrize("name", ANEW)
def test_a_buffer_of_other_settings_begins_empty(models: Models, name: str, tmp_path: Path) -> None:
    """At the same place, as SAELens's does."""
    before, after = ANEW[name]
    stock_state = saved(ActivationsStore, before, models, tmp_path / "stock")
    stock = loaded(ActivationsStore, after, stock_state, models, tmp_path / "stock after")
    state = saved(FastActivationsStore, before, models, tmp_path / "own")
    with pytest.warns(UserWarning, match="the buffer starts empty"):
        own = loaded(FastActivationsStore, after, state, models, tmp_path / "own after")
    assert_same_events(own, stock)


def batches_of(event: Event) -> list[torch.Tensor]:
    return [*event.result.values()] if isinstance(event.result, dict) else [event.result]


@pytest.mark.parametrize("hooks", [(), (HOOK, OTHER)], ids=["a hook", "hooks"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_model_of_another_dtype_fills_the_same_buffer(
    models: Models, hooks: tuple[str, ...], dtypes: tuple[str, str], tmp_path: Path
) -> None:
    before, after = (case(hooks=hooks, model=dtype) for dtype in dtypes)
    state = saved(FastActivationsStore, before, models, tmp_path)
    _, whole = play(
        FastActivationsStore, before, [*FIRST, *THEN], models[dtypes[0]], tmp_path / "b"
    )
    events = loaded(FastActivationsStore, after, state, models, tmp_path / "a")
    assert not any(isinstance(event.result, str) for event in events)
    assert torch.equal(events[0].result, whole[len(FIRST)].result)
    for own, other in zip(events[1:3], whole[len(FIRST) + 1 :], strict=False):
        for one, batch in zip(*map(batches_of, (own, other)), strict=True):
            assert torch.equal(one.to(batch.dtype), batch)


OTHER_TOKENS = {
    "concatenated": (case("text", disable_concat_sequences=True), case("text")),
    "not concatenated": (case("text"), case("text", disable_concat_sequences=True)),
    "another separator": (case("text"), case("text", sequence_separator_token="eos")),
    "no BOS": (case("text"), case("text", prepend_bos=False)),
    "another context": (case("text"), case("text", context_size=6)),
    "a map of a stream": (case("streaming"), case("int64")),
    "a stream of a map": (case("int64"), case("streaming")),
}


@pytest.mark.parametrize("name", OTHER_TOKENS)
def test_tokens_of_other_settings_begin_at_the_same_row(
    models: Models, name: str, tmp_path: Path
) -> None:
    before, after = OTHER_TOKENS[name]
    stock_state = saved(ActivationsStore, before, models, tmp_path / "stock")
    state = saved(FastActivationsStore, before, models, tmp_path / "own")
    stores = [
        (ActivationsStore, stock_state, tmp_path / "stock after"),
        (FastActivationsStore, state, tmp_path / "own after"),
    ]
    taken = []
    for store_class, path, folder in stores:
        store = make_store(store_class, after, models[after.model], folder)
        store.load(str(path))
        taken.append([store.get_batch_tokens(3) for _ in range(9)])
    for stock, own in zip(*taken, strict=True):
        assert torch.equal(own, stock)


@pytest.mark.parametrize("name", ["int64", "text", "hooks"])
def test_a_buffer_that_is_left_out(models: Models, name: str, tmp_path: Path) -> None:
    """The tokens that follow are the same."""
    case, model = CASES[name], models["float32"]
    torch.manual_seed(0)
    store = make_store(FastActivationsStore, case, model, tmp_path / "store")
    Player(store).play(FIRST)
    whole, without = tmp_path / "whole", tmp_path / "without"
    store.save(str(whole))
    store.saves_buffer = False
    store.save(str(without))
    n_rows = store.n_batches_in_buffer * CONTEXT - 2 * BATCH
    assert whole.stat().st_size - without.stat().st_size > n_rows * D_MODEL * 4
    assert not any("buffer.rows" in key for key in load_file(without))
    other = make_store(FastActivationsStore, case, model, tmp_path / "other")
    with pytest.warns(UserWarning, match="the buffer starts empty"):
        other.load(str(without))
    assert torch.equal(other.get_batch_tokens(9), store.get_batch_tokens(9))
    Player(other).play(["batch"])


@pytest.mark.parametrize("name", ["tokens", "hooks"])
def test_a_run_that_leaves_out_its_buffer(train: Callable[..., Run], name: str) -> None:
    scenario = SCENARIOS[name]
    run = train(scenario, n_checkpoints=1, save_buffer=False)
    (checkpoint,) = run.checkpoints
    assert not any("buffer.rows" in key for key in load_file(checkpoint / STATE))
    with pytest.warns(UserWarning, match="the buffer starts empty"):
        resumed = train(scenario, resume_from_checkpoint=str(checkpoint))
    n_saes = max(1, len(scenario.hooks))
    assert len(resumed.batches) == n_saes * (N_STEPS - n_steps(checkpoint))
