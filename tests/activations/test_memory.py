"""What the store allocates and copies when its buffer has been filled once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from saelens_sparse import FastActivationsStore
from tests.support.activation_data import CONTEXT, PROMPTS
from tests.support.activations import (
    BATCH,
    D_MODEL,
    HOOK,
    POST,
    Models,
    Player,
    case,
    make_store,
)
from tests.support.runs import what_libraries_say

pytestmark = what_libraries_say
PROMPTS_IN_BUFFER = 64
ROWS = PROMPTS_IN_BUFFER * CONTEXT


class Written(TorchDispatchMode):
    """Counts elements that operations write: of each, and of all."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.total = 0, 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            name, is_in_place = func.__name__, func._schema.is_mutable
            # Of what writes to some rows of a tensor, their values are the last argument.
            writes_rows = is_in_place and name.startswith("index_")
            leaves = tree_leaves(args) if writes_rows else tree_leaves(result)
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            tensors = tensors[-1:] if writes_rows else tensors
            sizes = [tensor.numel() for tensor in tensors]
            self.largest = max([self.largest, *sizes])
            self.total += sum(sizes)
        return result


def written_while_serving(
    store_class: type[ActivationsStore], hooks: tuple[str, ...], models: Models,
    monkeypatch: pytest.MonkeyPatch, folder: Path,
) -> tuple[Written, int]:  # fmt: skip
    """What a store writes that is given activations, and how many elements it serves meanwhile."""
    model = models["float32"]
    store = make_store(
        store_class,
        case("many rows", hooks=hooks, n_batches_in_buffer=PROMPTS_IN_BUFFER),
        model,
        folder,
    )
    acts = {HOOK: torch.randn(PROMPTS, CONTEXT, D_MODEL), POST: torch.randn(PROMPTS, CONTEXT, 32)}
    monkeypatch.setattr(model, "run_with_cache", lambda *_, **__: (None, acts))
    player = Player(store)
    player.play(["batch"] * 40)
    with Written() as written:
        events = player.play(["batch"] * 160)[40:]
    n_served = sum(
        batch.numel()
        for event in events
        for batch in (event.result.values() if hooks else [event.result])
    )
    width = sum(acts[hook].shape[-1] for hook in hooks or (HOOK,))
    assert n_served == 160 * BATCH * width
    return written, n_served


@pytest.mark.parametrize("hooks", [(), (HOOK, POST)], ids=["a hook", "hooks"])
def test_nothing_of_the_buffers_size_is_written(
    models: Models, hooks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written, _ = written_while_serving(
        FastActivationsStore, hooks, models, monkeypatch, tmp_path / "own"
    )
    assert written.largest < ROWS * D_MODEL
    stock, _ = written_while_serving(
        ActivationsStore, hooks, models, monkeypatch, tmp_path / "stock"
    )
    assert stock.largest >= ROWS * D_MODEL, "the count misses what stock allocates"


@pytest.mark.parametrize("hooks", [(), (HOOK, POST)], ids=["a hook", "hooks"])
def test_a_row_is_copied_a_few_times(
    models: Models, hooks: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the model, into the buffer, and out of it; not with each batch of the model."""
    written, n_served = written_while_serving(
        FastActivationsStore, hooks, models, monkeypatch, tmp_path / "own"
    )
    assert written.total < 4 * n_served
    stock, _ = written_while_serving(
        ActivationsStore, hooks, models, monkeypatch, tmp_path / "stock"
    )
    assert stock.total > 12 * n_served, "the count misses what stock copies"
