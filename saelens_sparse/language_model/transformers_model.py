"""
Reads a transformers model in SAELens's `HookedProxyLM` (`AutoModelForCausalLM`) into a `Decoder`.

`HookedProxyLM` hooks the outputs of modules, so a hook point's name is the name of a module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from sae_lens.load_model import HookedProxyLM, get_hook_fn
from torch import Tensor, nn

from saelens_sparse.language_model.decoder import (
    ACTIVATIONS,
    BlockShape,
    BlockWeights,
    Decoder,
    Norm,
    Padding,
    Point,
)
from saelens_sparse.language_model.storage import adjoin
from saelens_sparse.language_model.watch import edits

Rotary = tuple[Tensor, Tensor]
Block = tuple[BlockWeights, BlockShape]

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of a prompt."""
KNOWN_PACKAGES = ("sae_lens", "torch", "transformers")
"""Modules of other packages (adapters, quantised layers) compute something else."""
SAELENS_HOOK = f"{get_hook_fn.__qualname__}.<locals>.hook_fn"
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


def _norm(module: Any) -> Norm:
    bias = getattr(module, "bias", None)
    return Norm(module.weight.data, None if bias is None else bias.data)


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.data


def _shape(config: Any, **others: Any) -> BlockShape:
    n_heads = config.num_attention_heads
    return BlockShape(
        n_heads=n_heads,
        n_key_value_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        dtype=torch.float32,  # every norm has weights
        **others,
    )


def _llama(layer: Any, config: Any, rotary: Rotary | None) -> Block:
    """Llama, Mistral, Qwen2, Qwen3, and what Gemma-2 shares with them."""
    attn, mlp = layer.self_attn, layer.mlp
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    has_bias = attn.q_proj.bias is not None
    has_head_norms = hasattr(attn, "q_norm")
    weights = BlockWeights(
        ln1=_norm(layer.input_layernorm),
        qkv=adjoin([projection.weight for projection in projections]),
        qkv_bias=adjoin([projection.bias for projection in projections]) if has_bias else None,
        out=attn.o_proj.weight.data,
        out_bias=_bias(attn.o_proj),
        ln2=_norm(layer.post_attention_layernorm),
        up=mlp.up_proj.weight.data,
        up_bias=_bias(mlp.up_proj),
        gate=mlp.gate_proj.weight.data,
        gate_bias=_bias(mlp.gate_proj),
        down=mlp.down_proj.weight.data,
        down_bias=_bias(mlp.down_proj),
        head_norms=(_norm(attn.q_norm), _norm(attn.k_norm)) if has_head_norms else None,
        rotary=rotary,
    )
    has_one_window = isinstance(config, transformers.MistralConfig)
    shape = _shape(
        config,
        d_head=attn.head_dim,
        centers=False,
        eps=config.rms_norm_eps,
        activation=_activation(config),
        scale=1 / attn.scaling,
        window=config.sliding_window if has_one_window else getattr(attn, "sliding_window", None),
    )
    return weights, shape


def _gemma2(layer: Any, config: Any, rotary: Rotary | None) -> Block:
    weights, shape = _llama(layer, config, rotary)
    weights = weights._replace(
        ln2=_norm(layer.pre_feedforward_layernorm),
        post_norms=(
            _norm(layer.post_attention_layernorm),
            _norm(layer.post_feedforward_layernorm),
        ),
    )
    return weights, replace(shape, norm_offset=1.0, soft_cap=config.attn_logit_softcapping)


def _gpt2(layer: Any, config: Any, _: Rotary | None) -> Block:
    attn, mlp = layer.attn, layer.mlp
    weights = BlockWeights(
        ln1=_norm(layer.ln_1),
        qkv=attn.c_attn.weight.data.mT,
        qkv_bias=attn.c_attn.bias.data,
        out=attn.c_proj.weight.data.mT,
        out_bias=attn.c_proj.bias.data,
        ln2=_norm(layer.ln_2),
        up=mlp.c_fc.weight.data.mT,
        up_bias=mlp.c_fc.bias.data,
        gate=None,
        down=mlp.c_proj.weight.data.mT,
        down_bias=mlp.c_proj.bias.data,
    )
    shape = _shape(
        config,
        d_head=attn.head_dim,
        centers=True,
        eps=config.layer_norm_epsilon,
        activation=_activation(config),
        scale=1 / attn.scaling,
    )
    return weights, shape


def _gpt_neox(layer: Any, config: Any, rotary: Rotary | None) -> Block:
    attn, mlp = layer.attention, layer.mlp
    weights = BlockWeights(
        ln1=_norm(layer.input_layernorm),
        qkv=attn.query_key_value.weight.data,
        qkv_bias=_bias(attn.query_key_value),
        out=attn.dense.weight.data,
        out_bias=_bias(attn.dense),
        ln2=_norm(layer.post_attention_layernorm),
        up=mlp.dense_h_to_4h.weight.data,
        up_bias=_bias(mlp.dense_h_to_4h),
        gate=None,
        down=mlp.dense_4h_to_h.weight.data,
        down_bias=_bias(mlp.dense_4h_to_h),
        rotary=rotary,
    )
    shape = _shape(
        config,
        d_head=attn.head_size,
        centers=True,
        eps=config.layer_norm_eps,
        activation=_activation(config),
        scale=1 / attn.scaling,
        parallel=config.use_parallel_residual,
        heads_first=True,
    )
    return weights, shape


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or getattr(
        config, "activation_function", getattr(config, "hidden_act", "")
    )


GATED_POINTS = {
    "": "hook_resid_post",
    "input_layernorm": "ln1.out",
    "self_attn": "attn.out",
    "self_attn.o_proj": "attn.out",
    "mlp.gate_proj": "mlp.hook_pre",
    "mlp.up_proj": "mlp.hook_pre_linear",
    "mlp.down_proj": "mlp.out",
    "mlp": "mlp.out",
}


@dataclass(frozen=True)
class Family:
    """
    Models whose layers are read alike.

    Attributes:
        read_layer: from a layer, the config and rotary tables to weights and shape.
        layers: name of the list of layers.
        embedding: name of the embedding of tokens.
        points: by a module's name within a layer, the value that is its output.
        position_embedding: name of the embedding of positions, if there is one.
    """

    read_layer: Callable[[Any, Any, Rotary | None], Block]
    layers: str
    embedding: str
    points: dict[str, str]
    position_embedding: str | None = None


LLAMA = Family(
    _llama,
    "model.layers",
    "model.embed_tokens",
    GATED_POINTS | {"post_attention_layernorm": "ln2.out"},
)
FAMILIES: dict[type[nn.Module], Family] = {
    transformers.LlamaForCausalLM: LLAMA,
    transformers.MistralForCausalLM: LLAMA,
    transformers.Qwen2ForCausalLM: LLAMA,
    transformers.Qwen3ForCausalLM: LLAMA,
    transformers.Gemma2ForCausalLM: Family(
        _gemma2,
        "model.layers",
        "model.embed_tokens",
        GATED_POINTS
        | {
            "post_attention_layernorm": "ln1_post.out",
            "pre_feedforward_layernorm": "ln2.out",
            "post_feedforward_layernorm": "ln2_post.out",
        },
    ),
    transformers.GPT2LMHeadModel: Family(
        _gpt2,
        "transformer.h",
        "transformer.wte",
        {
            "": "hook_resid_post",
            "ln_1": "ln1.out",
            "attn": "attn.out",
            "attn.c_proj": "attn.out",
            "ln_2": "ln2.out",
            "mlp.c_fc": "mlp.hook_pre",
            "mlp.act": "mlp.hook_post",
            "mlp.c_proj": "mlp.out",
            "mlp": "mlp.out",
        },
        position_embedding="transformer.wpe",
    ),
    transformers.GPTNeoXForCausalLM: Family(
        _gpt_neox,
        "gpt_neox.layers",
        "gpt_neox.embed_in",
        {
            "": "hook_resid_post",
            "input_layernorm": "ln1.out",
            "attention": "attn.out",
            "attention.dense": "attn.out",
            "post_attention_layernorm": "ln2.out",
            "mlp.dense_h_to_4h": "mlp.hook_pre",
            "mlp.act": "mlp.hook_post",
            "mlp.dense_4h_to_h": "mlp.out",
            "mlp": "mlp.out",
        },
    ),
}
"""By exactly these classes, not subclasses of them."""


def point_of(model: HookedProxyLM, hook_name: str) -> Point | None:
    """Where the output of a module is in the `Decoder`; None if it is nowhere."""
    family = FAMILIES[type(model.model)]
    if hook_name == family.embedding:
        return Point(None, "hook_embed")
    match = re.fullmatch(rf"{re.escape(family.layers)}\.(\d+)(?:\.(.+))?", hook_name)
    name = None if match is None else family.points.get(match[2] or "")
    return None if match is None or name is None else Point(int(match[1]), name)


def modules_of(model: HookedProxyLM) -> list[nn.Module]:
    """All modules and hook points that say what the model computes."""
    return [*model.modules(), *model.hook_dict.values()]


def why_not(model: HookedProxyLM, hook_names: Sequence[str]) -> str | None:
    """Why a `Decoder` cannot compute these modules' outputs; None if it can."""
    inner: Any = model.model
    config = inner.config
    if type(inner) not in FAMILIES:
        return f"transformers' {type(inner).__name__} is not among the models that it knows"
    rope = getattr(config, "rope_parameters", None) or {}
    for value, known, what in (
        (_activation(config), tuple(ACTIVATIONS), "its activation function"),
        (rope.get("rope_type", "default"), ROPE_TYPES, "its type of rotary embeddings"),
        (config._attn_implementation, ATTENTIONS, "its attention implementation"),
        (getattr(config, "use_bidirectional_attention", None) or False, (False,), "bidirectional"),
        (getattr(config, "add_cross_attention", False), (False,), "add_cross_attention"),
        (inner.training, (False,), "training mode"),
    ):
        if value not in known:
            return f"{what} is {value!r}"
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        return "transformers' scaled-dot-product attention knows no soft cap"
    for name in hook_names:
        if name not in model.hook_dict or point_of(model, name) is None:
            return f"the hook point {name!r} is not among those that it knows"
    return _edits(model)


def _edits(model: HookedProxyLM) -> str | None:
    for name, hook_point in model.hook_dict.items():
        if hook_point.has_hooks():
            return f"its hook point {name!r} has a hook"
    for name, module in model.named_modules():
        if type(module).__module__.split(".")[0] not in KNOWN_PACKAGES:
            return f"its module {name!r} is a {type(module).__qualname__}"
    return edits(model, lambda hook: getattr(hook, "__qualname__", "") == SAELENS_HOOK)


def padding_of(model: HookedProxyLM, tokens: Tensor) -> Padding | None:  # noqa: ARG001
    """None: without a mask, which SAELens does not give it, transformers masks no pads."""
    return None


def read(model: HookedProxyLM, n_layers: int, n_positions: int) -> Decoder:
    """
    The first layers of a model as a `Decoder`, on the model's own memory.

    Queries', keys' and values' weights of a layer become views of one matrix, where they are
    matrices of their own. They keep their shapes and values.

    Args:
        model: one that `why_not` has no objection to.
        n_layers: how many layers are wanted.
        n_positions: the longest prompt.
    """
    inner: Any = model.model
    family = FAMILIES[type(inner)]
    embedding: Any = inner.get_submodule(family.embedding)
    layers: Any = inner.get_submodule(family.layers)
    rotary = _rotary(inner, n_positions)
    position_embedding = None
    if family.position_embedding is not None:
        position_embedding = inner.get_submodule(family.position_embedding).weight.data
    return Decoder(
        embedding=embedding.weight.data,
        position_embedding=position_embedding,
        embedding_scale=getattr(embedding, "embed_scale", None),
        blocks=[family.read_layer(layer, inner.config, rotary) for layer in layers[:n_layers]],
    )


def _rotary(inner: Any, n_positions: int) -> Rotary | None:
    """Cosines and sines, each `[S, R]`, in float32; in float64 for a model of that."""
    module = getattr(inner.base_model, "rotary_emb", None)
    if module is None:
        return None
    dtype = torch.promote_types(inner.dtype, torch.float32)
    positions = torch.arange(n_positions, device=inner.device)[None]
    with torch.no_grad():
        cos, sin = module(torch.zeros(1, dtype=dtype, device=inner.device), positions)
    return cos[0], sin[0]
