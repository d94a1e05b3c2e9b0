"""`HookedTransformer`: the fast path's activations are SAELens's up to rounding."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from saelens_sparse.language_model import choose_model_path
from saelens_sparse.language_model import hooked_transformer as hooked_transformer_reader
from tests.support.language_models import (
    DEVICES,
    FAMILIES,
    N_LAYERS,
    N_POSITIONS,
    PARALLEL,
    distance,
    hooked_transformer,
    in_dtype,
    prompts,
    stock_activations,
)

PRECISIONS = {
    "float32": (torch.float32, False, 2.0),
    "autocast": (torch.float32, True, 1.2),
    "bfloat16": (torch.bfloat16, False, 1.2),
}
"""Dtype of the weights, autocast, and how far from float64 a value may be by stock's distance."""

IN_A_BLOCK = (
    "hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "ln1.hook_scale",
    "ln1.hook_normalized", "ln2.hook_scale", "ln2.hook_normalized", "attn.hook_q", "attn.hook_k",
    "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post",
)  # fmt: skip


def points(model: HookedTransformer) -> list[str]:
    """Every hook point of two blocks that the fast path has, and those before the first block."""
    optional = ("hook_resid_mid", "attn.hook_rot_q", "attn.hook_rot_k", "mlp.hook_pre_linear")
    names = [f"blocks.{layer}.{name}" for layer in (1, 2) for name in (*IN_A_BLOCK, *optional)]
    post_norms = [f"blocks.2.{norm}_post.hook_normalized" for norm in ("ln1", "ln2")]
    names = ["hook_embed", "hook_pos_embed", *names, *post_norms]
    return [name for name in names if name in model.hook_dict]


def fast_activations(
    model: HookedTransformer, names: list[str], tokens: Tensor, autocast: bool = False
) -> dict[str, Tensor]:
    path = choose_model_path(model, names, autocast=autocast, n_positions=N_POSITIONS)
    assert path.choice.path == "fast", path.choice.reason
    return path.activations(tokens)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pads", [False, True], ids=["full", "pads"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_as_exact_as_stock(
    family: str, precision: str, pads: bool, device: str
) -> None:
    dtype, autocast, factor = PRECISIONS[precision]
    model = hooked_transformer(family, dtype, pads_left=pads).to(device)
    names, tokens = points(model), prompts(pads)
    exact = stock_activations(in_dtype(model, torch.float64), names, tokens)
    stock = stock_activations(model, names, tokens, autocast)
    fast = fast_activations(model, names, tokens, autocast)
    assert list(fast) == names
    for name in names:
        assert fast[name].dtype == stock[name].dtype and fast[name].shape == stock[name].shape
        floor = 4 * torch.finfo(stock[name].dtype).eps * (precision == "float32")
        limit = factor * distance(stock[name], exact[name]) + floor
        assert distance(fast[name], exact[name]) <= limit, name


def test_leading_pads_matter() -> None:
    """So that the test above cannot pass by ignoring them."""
    names, tokens = ["blocks.2.hook_resid_post"], prompts(pads=True)
    masked = stock_activations(hooked_transformer("llama", pads_left=True), names, tokens)
    unmasked = stock_activations(hooked_transformer("llama"), names, tokens)
    assert distance(unmasked[names[0]], masked[names[0]].double()) > 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_attention_and_mlp(family: str) -> None:
    model = hooked_transformer(family)
    model.set_use_hook_mlp_in(True)
    names = ["blocks.2.hook_mlp_in"]
    if model.cfg.n_key_value_heads is None:  # TransformerLens fails with fewer of them
        model.set_use_attn_in(True)
        names.append("blocks.2.hook_attn_in")
    stock = stock_activations(model, names, prompts())
    fast = fast_activations(model, names, prompts())
    for name in names:
        assert fast[name].shape == stock[name].shape
        assert distance(fast[name], stock[name].double()) < 1e-6


# TransformerLens centers what writes to a LayerNorm model only.
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (family, {change: True})
        for family in ("gpt2", "llama", "gemma2", "pythia")
        for change in ("fold_ln", "center_writing_weights", "fold_value_biases")
        if change != "center_writing_weights" or family in ("gpt2", "pythia")
    ],
    ids=str,
)
def test_processed_weights_are_computed_as_they_are(family: str, changes: dict[str, bool]) -> None:
    model = hooked_transformer(family)
    none = dict.fromkeys(
        ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False
    )
    names = ["blocks.2.hook_resid_post", "blocks.1.attn.hook_z"]
    before = stock_activations(model, names, prompts())
    model.load_and_process_state_dict(copy.deepcopy(model.state_dict()), **none | changes)
    stock = stock_activations(model, names, prompts())
    fast = fast_activations(model, names, prompts())
    if changes == {"center_writing_weights": True}:
        assert distance(stock[names[0]], before[names[0]].double()) > 1e-3
    assert all(distance(fast[name], stock[name].double()) < 1e-6 for name in names)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors(part)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_held_once_and_stock_computes_the_same_bits(family: str) -> None:
    model = hooked_transformer(family)
    copied = copy.deepcopy(model)
    names = ["blocks.3.hook_resid_post"]
    fast_activations(model, names, prompts())
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in copied.state_dict().items())
    memory = {value.untyped_storage().data_ptr() for value in state.values()}
    decoder = hooked_transformer_reader.read(model, N_LAYERS, N_POSITIONS)
    weights = [weight for weights, _ in decoder.blocks for weight in tensors(weights)]
    assert len(weights) > 8 * N_LAYERS
    assert all(weight.untyped_storage().data_ptr() in memory for weight in weights)
    assert torch.equal(model(prompts()), copied(prompts()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_runs_to_the_end_give_the_same_bits(family: str, dtype: torch.dtype) -> None:
    """As SAELens's evals run the model; afterwards the path is still the fast one."""
    model = hooked_transformer(family, dtype)
    copied, name = copy.deepcopy(model), "blocks.2.hook_resid_post"
    path = choose_model_path(model, [name], n_positions=N_POSITIONS)

    def patch(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return 0.5 * tensor

    losses: list[Tensor] = [
        each.run_with_hooks(
            prompts(), return_type="loss", loss_per_token=True, fwd_hooks=[(name, patch)]
        )
        for each in (model, copied)
    ]
    assert torch.equal(*losses)
    path.activations(prompts())
    assert path.choice.path == "fast"


def test_new_values_in_the_same_memory_are_used() -> None:
    model = hooked_transformer("llama")
    names = ["blocks.2.hook_resid_post"]
    path = choose_model_path(model, names, n_positions=N_POSITIONS)
    before = path.activations(prompts())[names[0]]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    after = path.activations(prompts())[names[0]]
    assert path.choice.path == "fast"
    assert distance(after, stock_activations(model, names, prompts())[names[0]].double()) < 1e-6
    assert distance(after, before.double()) > 0.01


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_parallel_block_has_no_middle(parallel: str) -> None:
    assert "blocks.1.hook_resid_mid" not in points(hooked_transformer(parallel))
