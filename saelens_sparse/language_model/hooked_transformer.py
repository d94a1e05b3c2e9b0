"""Reads TransformerLens's `HookedTransformer` into a `Decoder`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.components.attention import Attention
from transformer_lens.components.embed import Embed
from transformer_lens.components.grouped_query_attention import GroupedQueryAttention
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.layer_norm_pre import LayerNormPre
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.components.pos_embed import PosEmbed
from transformer_lens.components.rms_norm import RMSNorm
from transformer_lens.components.rms_norm_pre import RMSNormPre
from transformer_lens.components.transformer_block import TransformerBlock
from transformer_lens.components.unembed import Unembed
from transformer_lens.hook_points import HookPoint
from transformer_lens.utils import get_attention_mask

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

KNOWN_MODULES = (
    Attention, Embed, GatedMLP, GroupedQueryAttention, HookPoint, HookedTransformer, LayerNorm,
    LayerNormPre, MLP, PosEmbed, RMSNorm, RMSNormPre, TransformerBlock, Unembed,
)  # fmt: skip
"""Exactly these classes, not subclasses of them, compute what `Decoder` computes."""

POINTS = {
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k",
    "attn.hook_z", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post",
}  # fmt: skip
NORM_POINTS = {
    f"{norm}.{hook}"
    for norm in ("ln1", "ln1_post", "ln2", "ln2_post")
    for hook in ("hook_scale", "hook_normalized")
}
FLAGGED_POINTS = {"hook_attn_in": "use_attn_in", "hook_mlp_in": "use_hook_mlp_in"}
"""Hook points of a block that fire only with a flag of the config."""

OTHER_ORDERS = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM")
"""Architectures whose norms TransformerLens places elsewhere, by their name alone."""

KNOWN_VALUES = {
    "attention_dir": ("causal",),
    "attn_only": (False,),
    "clip_qkv": (None,),
    "load_in_4bit": (False,),
    "n_devices": (1,),
    "normalization_type": ("LN", "LNPre", "RMS", "RMSPre"),
    "num_experts": (None, 0),
    "positional_embedding_type": ("standard", "rotary"),
    "post_embedding_ln": (False,),
    "ungroup_grouped_query_attention": (False,),
    "use_attention_sinks": (False,),
    "use_dynamic_ntk_rope": (False,),
    "use_logn_attn": (False,),
    "act_fn": tuple(ACTIVATIONS),
}
"""Fields of a config, and their values that `Decoder` computes."""


def point_of(model: HookedTransformer, hook_name: str) -> Point | None:
    """Where a hook point's value is in the `Decoder`; None if it is nowhere."""
    point = _point(hook_name)
    return point if hook_name in model.hook_dict and _is_known(point, model.cfg) else None


def _point(hook_name: str) -> Point:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    return Point(None, hook_name) if match is None else Point(int(match[1]), match[2])


def modules_of(model: HookedTransformer) -> list[nn.Module]:
    """All modules and hook points that say what the model computes."""
    return list(model.modules())


def why_not(model: HookedTransformer, hook_names: Sequence[str]) -> str | None:
    """Why a `Decoder` cannot compute these hook points of the model; None if it can."""
    config: Any = model.cfg
    for field, known in KNOWN_VALUES.items():
        value = getattr(config, field, known[0])
        if value not in known:
            return f"its config has {field}={value!r}"
    if config.original_architecture in OTHER_ORDERS:
        return f"its architecture is {config.original_architecture}"
    for name in hook_names:
        if point_of(model, name) is None:
            return f"the hook point {name!r} is not among those that it knows"
    for name, module in model.named_modules():
        if type(module) not in KNOWN_MODULES and not isinstance(module, nn.ModuleList):
            return f"its module {name!r} is a {type(module).__qualname__}"
    return edits(model)


def _is_known(point: Point, config: Any) -> bool:
    if point.layer is None:
        return point.name in ("hook_embed", "hook_pos_embed")
    if point.name in FLAGGED_POINTS:
        return getattr(config, FLAGGED_POINTS[point.name])
    # With one input a head, norms see `[B, S, H, M]`.
    splits_heads = config.use_attn_in or config.use_split_qkv_input
    return point.name in POINTS or (
        point.name in NORM_POINTS and not (splits_heads and point.name.startswith("ln1."))
    )


def padding_of(model: HookedTransformer, tokens: Tensor) -> Padding | None:
    """
    Where a batch has leading pads that TransformerLens masks; None where there are none.

    Waits for the device if the tokens are on one. See `HookedTransformer.input_to_embed`.
    """
    tokenizer: Any = model.tokenizer
    if tokenizer is None or tokenizer.padding_side != "left":
        return None
    if not bool((tokens[:, 0] == tokenizer.pad_token_id).any()):
        return None
    is_token = get_attention_mask(tokenizer, tokens, prepend_bos=False)
    return Padding(is_token.bool(), (is_token.cumsum(1) - 1).clamp(min=0))


def read(model: HookedTransformer, n_layers: int, n_positions: int) -> Decoder:
    """
    The first layers of a model as a `Decoder`, on the model's own memory.

    Queries', keys' and values' weights of a layer become views of one matrix, and keep their shapes
    and values. TransformerLens computes the same bits with them.

    Args:
        model: one that `why_not` has no objection to.
        n_layers: how many blocks are wanted.
        n_positions: the longest prompt.
    """
    config: Any = model.cfg
    has_positions = config.positional_embedding_type == "standard"
    blocks: list[Any] = list(model.blocks)[:n_layers]
    return Decoder(
        embedding=model.embed.W_E.data,
        position_embedding=model.pos_embed.W_pos.data if has_positions else None,
        embedding_scale=None,
        blocks=[(_weights(block, n_positions), _shape(block)) for block in blocks],
    )


def _shape(block: Any) -> BlockShape:
    config = block.cfg
    soft_cap = config.attn_scores_soft_cap
    return BlockShape(
        n_heads=config.n_heads,
        n_key_value_heads=config.n_key_value_heads or config.n_heads,
        d_head=config.d_head,
        centers=config.normalization_type.startswith("LN"),
        eps=block.ln1.eps,
        dtype=config.dtype,
        activation=config.act_fn,
        scale=float(block.attn.attn_scale),
        adds_up_bias_last=isinstance(block.mlp, GatedMLP),
        parallel=config.parallel_attn_mlp,
        soft_cap=soft_cap if soft_cap is not None and soft_cap > 0 else None,
        window=config.window_size if block.attn.attn_type == "local" else None,
        rotates_pairs=config.rotary_adjacent_pairs,
    )


def _weights(block: Any, n_positions: int) -> BlockWeights:
    attn: Any = block.attn
    mlp: Any = block.mlp
    # Grouped keys and values have one weight a group, under these names of the state dict.
    mark = "_" if isinstance(attn, GroupedQueryAttention) else ""
    names = ("{}_Q", mark + "{}_K", mark + "{}_V")
    parameters = dict(attn.named_parameters(recurse=False))
    d_model, d_head = attn.W_Q.shape[1:]
    qkv = adjoin(
        [parameters[name.format("W")] for name in names],
        as_rows=lambda weight: weight.transpose(1, 2).reshape(-1, d_model),
        as_stored=lambda rows: rows.view(-1, d_head, d_model).transpose(1, 2),
    )
    has_post_norms = block.cfg.use_normalization_before_and_after
    has_head_norms = attn.cfg.use_qk_norm
    return BlockWeights(
        ln1=_norm(block.ln1),
        qkv=qkv,
        qkv_bias=adjoin(
            [parameters[name.format("b")] for name in names],
            as_rows=lambda bias: bias.reshape(-1),
        ),
        out=adjoin([attn.W_O], as_rows=lambda weight: weight.reshape(-1, d_model)).mT,
        out_bias=attn.b_O.data,
        ln2=_norm(block.ln2),
        up=mlp.W_in.data.mT,
        up_bias=mlp.b_in.data,
        gate=mlp.W_gate.data.mT if isinstance(mlp, GatedMLP) else None,
        down=mlp.W_out.data.mT,
        down_bias=mlp.b_out.data,
        post_norms=(_norm(block.ln1_post), _norm(block.ln2_post)) if has_post_norms else None,
        head_norms=(_norm(attn.q_norm), _norm(attn.k_norm)) if has_head_norms else None,
        rotary=_rotary(attn, n_positions) if hasattr(attn, "rotary_cos") else None,
    )


def _norm(module: Any) -> Norm:
    weight, bias = getattr(module, "w", None), getattr(module, "b", None)
    return Norm(
        weight.data if isinstance(weight, Tensor) else None,
        bias.data if isinstance(bias, Tensor) else None,
    )


def _rotary(attn: Any, n_positions: int) -> tuple[Tensor, Tensor]:
    """The module's cosines and sines, which it extends itself for prompts longer than before."""
    n_positions = min(n_positions, attn.cfg.n_ctx)
    with torch.no_grad():
        attn.apply_rotary(attn.rotary_cos.new_zeros(1, n_positions, 1, attn.cfg.d_head))
    return attn.rotary_cos, attn.rotary_sin
