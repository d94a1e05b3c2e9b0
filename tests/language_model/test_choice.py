"""What has no exact equivalent runs on SAELens's path, and says so once."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformer_lens import HookedTransformer
from transformer_lens.components.rms_norm import RMSNorm

from saelens_sparse.language_model import ModelPath, choose_model_path
from tests.support.language_models import (
    N_POSITIONS,
    distance,
    hooked_transformer,
    prompts,
    proxy,
    stock_activations,
)

RESID = "blocks.2.hook_resid_post"


def choose(model: nn.Module, hook_name: str = RESID, **options: Any) -> tuple[ModelPath, list[str]]:
    """The path, and what choosing it and using it twice warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = choose_model_path(model, [hook_name], n_positions=N_POSITIONS, **options)
        for _ in range(2):
            path.activations(prompts())
    return path, [str(warning.message) for warning in caught if warning.category is UserWarning]


def check_stock(model: nn.Module, reason: str, hook_name: str = RESID, **options: Any) -> None:
    """The values are SAELens's bits, and one warning gives the reason."""
    path, messages = choose(model, hook_name, **options)
    assert path.choice.path == "saelens" and re.search(reason, path.choice.reason)
    (message,) = messages
    assert path.choice.reason in message
    with warnings.catch_warnings(record=True):
        options.pop("compiled", None)
        stock = choose_model_path(
            model, [hook_name], option="saelens", n_positions=N_POSITIONS, **options
        ).activations(prompts())
        found = path.activations(prompts())
    assert torch.equal(found[hook_name], stock[hook_name])


def test_auto_is_fast_and_silent() -> None:
    path, messages = choose(hooked_transformer("gpt2"))
    assert path.choice.path == "fast" and not messages
    assert path.choice.reason == "HookedTransformer has an exact equivalent"


def test_saelens_by_name_is_silent() -> None:
    path, messages = choose(hooked_transformer("gpt2"), option="saelens")
    assert path.choice.path == "saelens" and not messages


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="option must be 'auto' or 'saelens', got 'quick'"):
        choose(hooked_transformer("gpt2"), option="quick")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type='alibi'"),
        ({"attn_only": True}, "attn_only=True"),
        ({"act_fn": "solu_ln"}, "act_fn='solu_ln'"),
        ({"clip_qkv": 1.0}, r"clip_qkv=1\.0"),
        ({"attention_dir": "bidirectional"}, "attention_dir='bidirectional'"),
        ({"normalization_type": None}, "normalization_type=None"),
        ({"post_embedding_ln": True}, "post_embedding_ln=True"),
        ({"use_attention_sinks": True}, "use_attention_sinks=True"),
        ({"original_architecture": "Olmo2ForCausalLM"}, "Olmo2ForCausalLM"),
    ],
    ids=str,
)
def test_settings_of_the_model(config: dict[str, Any], reason: str) -> None:
    check_stock(hooked_transformer("gpt2", **config), reason)


@pytest.mark.parametrize(
    ("family", "hook_name", "config"),
    [
        ("gpt2", "blocks.2.attn.hook_pattern", {}),
        ("gpt2", "blocks.2.attn.hook_attn_scores", {}),
        ("gpt2", "blocks.2.attn.hook_result", {"use_attn_result": True}),
        ("gpt2", "blocks.2.hook_q_input", {"use_split_qkv_input": True}),
        ("gpt2", "blocks.2.ln1.hook_normalized", {"use_attn_in": True}),
        ("gpt2", "ln_final.hook_normalized", {}),
    ],
)
def test_hook_points(family: str, hook_name: str, config: dict[str, Any]) -> None:
    check_stock(hooked_transformer(family, **config), f"{hook_name!r}", hook_name)


def test_model_kwargs() -> None:
    check_stock(hooked_transformer("gpt2"), "model_kwargs", model_kwargs={"return_type": None})


class Subclass(HookedTransformer):
    """Could compute anything."""


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def replace_class(model: HookedTransformer) -> None:
    model.__class__ = Subclass


def replace_forward(model: HookedTransformer) -> None:
    forward = model.blocks[1].mlp.forward
    model.blocks[1].mlp.forward = lambda x: 2 * forward(x)


def replace_module(model: HookedTransformer) -> None:
    model.blocks[1].ln1 = nn.Identity()


def parametrize_weight(model: HookedTransformer) -> None:
    parametrize.register_parametrization(model.blocks[1].mlp, "W_in", Doubled())


def attach_hook(model: HookedTransformer) -> None:
    model.add_hook("blocks.1.hook_attn_out", lambda tensor, hook: 2 * tensor)  # noqa: ARG005


def attach_pytorch_hook(model: HookedTransformer) -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        return 2 * output

    model.blocks[1].register_forward_hook(double)


def widen_one_weight(model: HookedTransformer) -> None:
    model.blocks[1].mlp.double()


EDITS: dict[Callable[[HookedTransformer], None], str] = {
    replace_class: "the model is a Subclass",
    replace_forward: r"'blocks\.1\.mlp' has a forward of its own",
    replace_module: r"'blocks\.1\.ln1' is a Identity",
    parametrize_weight: r"'blocks\.1\.mlp' is a ParametrizedMLP",
    attach_hook: r"'blocks\.1\.hook_attn_out' has a hook",
    attach_pytorch_hook: r"'blocks\.1' has a hook",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_model(edit: Callable[[HookedTransformer], None]) -> None:
    model = hooked_transformer("gpt2")
    edit(model)
    check_stock(model, EDITS[edit])


@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit is not replace_class])
def test_a_model_that_is_edited_later(edit: Callable[[HookedTransformer], None]) -> None:
    model = hooked_transformer("gpt2")
    path, _ = choose(model)
    assert path.choice.path == "fast"
    edit(model)
    with pytest.warns(UserWarning, match=EDITS[edit]):
        found = path.activations(prompts())[RESID]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.activations(prompts())
    assert path.choice.path == "saelens"
    assert torch.equal(found, stock_activations(model, [RESID], prompts())[RESID])


def test_weights_of_several_dtypes() -> None:
    model = hooked_transformer("gpt2")
    model.unembed.double()
    check_stock(model, "several devices or dtypes")


def test_a_model_without_its_hook_is_fast_again() -> None:
    model = hooked_transformer("gpt2")
    attach_hook(model)
    path, _ = choose(model)
    assert path.choice.path == "saelens"
    model.reset_hooks()
    found = path.activations(prompts())[RESID]
    assert path.choice.path == "fast"
    stock = stock_activations(model, [RESID], prompts())[RESID]
    assert distance(found, stock.double()) < 1e-6


def test_a_model_that_moves_is_read_again() -> None:
    model = hooked_transformer("llama")
    path, _ = choose(model)
    for parameter in model.parameters():
        parameter.data = 0.9 * parameter.data
    found = path.activations(prompts())[RESID]
    assert path.choice.path == "fast"
    stock = stock_activations(model, [RESID], prompts())[RESID]
    assert distance(found, stock.double()) < 1e-6


def test_what_no_rule_knows_shows_on_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    forward: Any = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: 1.01 * forward(self, x))
    check_stock(hooked_transformer("llama"), "differs from SAELens's by")


def test_a_longer_prompt_than_expected() -> None:
    model = hooked_transformer("llama")
    path = choose_model_path(model, [RESID], n_positions=8)
    found = path.activations(prompts())[RESID]
    assert path.choice.path == "fast"
    stock = stock_activations(model, [RESID], prompts())[RESID]
    assert distance(found, stock.double()) < 1e-6


def train(model: Any) -> None:
    model.model.train()


def adapt(model: Any) -> None:
    class Adapted(nn.Linear):
        pass

    model.model.model.layers[1].mlp.up_proj.__class__ = Adapted


def hook_a_point(model: Any) -> None:
    model.hook_dict["model.layers.1"].add_hook(lambda value, hook: 2 * value)  # noqa: ARG005


def hook_a_module(model: Any) -> None:
    model.model.model.layers[1].register_forward_hook(lambda *args: 2 * args[-1])


def grow_rope(model: Any) -> None:
    model.model.config.rope_parameters["rope_type"] = "dynamic"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (train, "training mode is True"),
        (adapt, r"'model\.model\.layers\.1\.mlp\.up_proj' is a adapt"),
        (hook_a_point, r"hook point 'model\.layers\.1' has a hook"),
        (hook_a_module, r"'model\.model\.layers\.1' has a hook"),
        (grow_rope, "rotary embeddings is 'dynamic'"),
    ],
)
def test_an_edited_transformers_model(edit: Callable[[Any], None], reason: str) -> None:
    model = proxy("llama")
    edit(model)
    check_stock(model, reason, "model.layers.2")


@pytest.mark.parametrize("hook_name", ["model.layers.2.self_attn.q_proj", "model.norm"])
def test_hook_points_of_transformers_models(hook_name: str) -> None:
    check_stock(proxy("llama"), f"{hook_name!r}", hook_name)


def test_another_transformers_model() -> None:
    model = proxy("opt")
    check_stock(model, "OPTForCausalLM", "model.decoder.layers.2")


def test_attention_that_knows_no_soft_cap() -> None:
    """transformers raises here, or computes without the cap."""
    model: Any = proxy("gemma2")
    model.model.config._attn_implementation = "sdpa"
    with pytest.warns(UserWarning, match="scaled-dot-product attention knows no soft cap"):
        path = choose_model_path(model, ["model.layers.2"], n_positions=N_POSITIONS)
    assert path.choice.path == "saelens"
