"""What only a GPU shows: that nothing waits for it, and copies that are under way."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse import FastActivationsStore
from tests.support.activation_data import CONTEXT
from tests.support.activations import (
    BUFFER_PROMPTS,
    D_MODEL,
    WITH_EVALS,
    assert_same_events,
    case,
    make_store,
    play,
    tiny_model,
)
from tests.support.runs import what_libraries_say

pytestmark = [pytest.mark.gpu, *what_libraries_say]

HOOKS = ("blocks.1.hook_resid_pre", "blocks.0.mlp.hook_post")
# The store on the GPU, and on the host beside a model on the GPU.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens": ("int64", {}),
    "text": ("text", {}),
    "streaming": ("streaming", {"train_batch_size_tokens": 17}),
    "excluded tokens": ("special tokens", {"exclude_special_tokens": True}),
    "no mixing": ("int64", {"activations_mixing_fraction": 0.0}),
    "autocast": ("int64", {"autocast_lm": True}),
}
CASES = {
    f"{name} on {store}": case(
        data, device="cuda", llm_device="cuda", act_store_device=store, **options
    )
    for store in ("cuda", "cpu")
    for name, (data, options) in OPTIONS.items()
}


@pytest.mark.parametrize("name", CASES)
def test_stock_gives_the_same(name: str, tmp_path: Path) -> None:
    model = tiny_model(device="cuda")
    said, stock = play(ActivationsStore, CASES[name], WITH_EVALS, model, tmp_path / "stock")
    own_said, own = play(FastActivationsStore, CASES[name], WITH_EVALS, model, tmp_path / "own")
    assert own_said == said
    assert_same_events(own, stock)


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_stock_gives_the_same_of_several_hooks(tmp_path: Path, reads_ahead: bool) -> None:
    model = tiny_model(device="cuda")
    hooks = case(hooks=HOOKS, device="cuda")
    stock = make_store(ActivationsStore, hooks, model, tmp_path / "stock")
    own = make_store(FastActivationsStore, hooks, model, tmp_path / "own")
    assert isinstance(own, FastActivationsStore)
    own.reads_ahead = reads_ahead
    torch.manual_seed(0)
    expected = list(islice(stock.get_multi_hook_data_loader(), 30))
    torch.manual_seed(0)
    for batch, other in zip(expected, own.hook_batches(), strict=False):
        for hook in HOOKS:
            assert torch.equal(batch[hook], other[hook])


@pytest.mark.parametrize(
    "options",
    [{}, {"exclude_special_tokens": [5, 6, 7]}, {"activations_mixing_fraction": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_nothing_waits_for_the_gpu(
    tmp_path: Path, options: dict[str, Any], reads_ahead: bool
) -> None:
    """The model aside: its activations are on the GPU already."""
    settings = case("many rows", device="cuda", llm_device="cuda", **options)
    store = make_store(FastActivationsStore, settings, tiny_model(device="cuda"), tmp_path)
    assert isinstance(store, FastActivationsStore)
    store.reads_ahead = reads_ahead
    ready = torch.randn(store.store_batch_size_prompts, CONTEXT, D_MODEL, device="cuda")
    store._run_model = lambda tokens: [ready]  # noqa: ARG005
    batches = 2 * BUFFER_PROMPTS
    next(store)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(batches):
            next(store)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("act_store_device", ["cuda", "cpu"])
def test_a_store_goes_on_where_another_stood(tmp_path: Path, act_store_device: str) -> None:
    settings = case(device="cuda", llm_device="cuda", act_store_device=act_store_device)
    model = tiny_model(device="cuda")
    store, other = (
        make_store(FastActivationsStore, settings, model, tmp_path / name) for name in "ab"
    )
    for _ in range(8):
        next(store)
    store.save(str(tmp_path / "state"))
    expected = [next(store) for _ in range(20)]
    other.load(str(tmp_path / "state"))
    for batch in expected:
        assert torch.equal(next(other), batch)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_a_gpu_of_its_own(tmp_path: Path) -> None:
    model = tiny_model(device="cuda:1")
    settings = case(device="cuda:0", llm_device="cuda:1", act_store_device="cuda:0")
    said, stock = play(ActivationsStore, settings, WITH_EVALS, model, tmp_path / "stock")
    own_said, own = play(FastActivationsStore, settings, WITH_EVALS, model, tmp_path / "own")
    assert own_said == said
    assert_same_events(own, stock)
