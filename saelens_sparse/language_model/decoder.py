"""
The forward pass of a decoder-only transformer up to the last hook point, in plain PyTorch.

Knows neither TransformerLens nor transformers: `hooked_transformer` and `transformers_model` read
their modules into `Decoder`. The weights are the modules' own tensors or views of them.

Dimension letters: B prompts, S positions, M d_model, H query heads, G key and value heads, D
d_head, R rotary dimensions, F d_mlp, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from saelens_sparse.language_model.attention import attend, rotate
from saelens_sparse.language_model.recorder import Recorder, Wanted


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as in GPT-2 and Gemma."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """The square of ReLU."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": tanh_gelu,
    "gelu_fast": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
    "silu": F.silu,
}
"""By their names in the configs of TransformerLens and transformers."""


class Norm(NamedTuple):
    """Weights of a normalisation; None where it has none."""

    weight: Tensor | None  # [M], or [D] for queries and keys
    bias: Tensor | None  # [M]


class BlockWeights(NamedTuple):
    """Weights of one block, each the module's own memory."""

    ln1: Norm
    qkv: Tensor  # [(H + 2 G) * D, M]
    qkv_bias: Tensor | None  # [(H + 2 G) * D]
    out: Tensor  # [M, H * D]
    out_bias: Tensor | None  # [M]
    ln2: Norm
    up: Tensor  # [F, M]
    up_bias: Tensor | None  # [F]
    gate: Tensor | None  # [F, M]
    down: Tensor  # [M, F]
    down_bias: Tensor | None  # [M]
    gate_bias: Tensor | None = None  # [F]
    post_norms: tuple[Norm, Norm] | None = None  # after attention, after the MLP
    head_norms: tuple[Norm, Norm] | None = None  # of queries, of keys
    rotary: tuple[Tensor, Tensor] | None = None  # cosines and sines, each [S or more, R]


@dataclass(frozen=True)
class BlockShape:
    """
    What a block computes with its weights.

    Attributes:
        n_heads, n_key_value_heads, d_head: H, G, D.
        centers: whether norms subtract the mean (LayerNorm) or do not (RMSNorm).
        eps: added to the variance in norms.
        norm_offset: added to the weights of norms; 1 for Gemma in transformers.
        dtype: of the output of a norm without weights.
        activation: name in `ACTIVATIONS`.
        adds_up_bias_last: whether `up_bias` is added to the product with the gate, as in
            TransformerLens.
        parallel: whether attention and MLP read the same residual stream, as in GPT-NeoX.
        scale: what attention scores are divided by.
        soft_cap: limit of attention scores, `cap * tanh(score / cap)`; None for no limit.
        window: how many positions a query sees, itself included; None for all before it.
        heads_first: whether the rows of `qkv` go by head, each with its query, key and value.
        rotates_pairs: whether rotary embeddings rotate neighbours instead of halves.
    """

    n_heads: int
    n_key_value_heads: int
    d_head: int
    centers: bool
    eps: float
    dtype: torch.dtype
    activation: str
    scale: float
    norm_offset: float = 0.0
    adds_up_bias_last: bool = False
    parallel: bool = False
    soft_cap: float | None = None
    window: int | None = None
    heads_first: bool = False
    rotates_pairs: bool = False


class Padding(NamedTuple):
    """Where prompts have leading pads."""

    is_token: Tensor  # [B, S] bool
    positions: Tensor  # [B, S] int64, positions counted from the first token


def normalize(
    x: Tensor,  # [..., M]
    norm: Norm,
    shape: BlockShape,
    recorder: Recorder,
    name: str,
) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, in float32 or better."""
    width, weight, bias = (x.shape[-1],), norm.weight, norm.bias
    dtype = torch.promote_types(x.dtype, torch.float32)
    if recorder.wants(f"{name}.hook_scale"):
        wide = x.to(dtype)
        wide = wide - wide.mean(-1, keepdim=True) if shape.centers else wide
        recorder.offer(f"{name}.hook_scale", (wide.square().mean(-1, True) + shape.eps).sqrt())
    if weight is None or recorder.wants(f"{name}.hook_normalized"):
        x = _standardize(x.to(dtype), width, None, None, shape)
        recorder.offer(f"{name}.hook_normalized", x)
        x = x.to(shape.dtype)
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
    elif shape.norm_offset:
        # In bfloat16, the sum of offset and weight would lose what the weight is.
        kept, weight = weight.dtype, weight.to(dtype) + shape.norm_offset
        x = _standardize(x.to(dtype), width, weight, bias, shape).to(kept)
    else:
        x = _standardize(x.to(weight.dtype), width, weight, bias, shape)
    recorder.offer(f"{name}.out", x)
    return x


def _standardize(
    x: Tensor, width: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, shape: BlockShape
) -> Tensor:
    if shape.centers:
        return F.layer_norm(x, width, weight, bias, shape.eps)
    return F.rms_norm(x, width, weight, shape.eps)


def split_heads(
    qkv: Tensor,  # [B, S, (H + 2 G) * D]
    shape: BlockShape,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, S, H, D]`, keys and values `[B, S, G, D]`."""
    if shape.heads_first:
        q, k, v = qkv.unflatten(-1, (shape.n_heads, 3, shape.d_head)).unbind(-2)
        return q, k, v
    heads = qkv.unflatten(-1, (-1, shape.d_head))
    q, k, v = heads.split([shape.n_heads, shape.n_key_value_heads, shape.n_key_value_heads], dim=2)
    return q, k, v


def attention(
    x: Tensor,  # [B, S, M], after the norm
    weights: BlockWeights,
    shape: BlockShape,
    padding: Padding | None,
    recorder: Recorder,
) -> Tensor | None:
    """What attention adds to the residual stream, `[B, S, M]`; None if no one needs it."""
    q, k, v = split_heads(F.linear(x, weights.qkv, weights.qkv_bias), shape)
    for name, value in (("attn.hook_q", q), ("attn.hook_k", k), ("attn.hook_v", v)):
        recorder.offer(name, value)
    if weights.head_norms is not None:
        q = normalize(q, weights.head_norms[0], shape, recorder, "attn.q_norm")
        k = normalize(k, weights.head_norms[1], shape, recorder, "attn.k_norm")
    if weights.rotary is not None:
        cos, sin = (
            table[: x.shape[1]] if padding is None else table[padding.positions]
            for table in weights.rotary
        )
        q = rotate(q, cos, sin, shape.rotates_pairs)
        k = rotate(k, cos, sin, shape.rotates_pairs)
        recorder.offer("attn.hook_rot_q", q)
        recorder.offer("attn.hook_rot_k", k)
    if recorder.is_done:
        return None
    z = attend(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        scale=shape.scale,
        soft_cap=shape.soft_cap,
        window=shape.window,
        is_token=None if padding is None else padding.is_token,
    )
    recorder.offer("attn.hook_z", z)
    if recorder.is_done:
        return None
    out = F.linear(z.flatten(2), weights.out, weights.out_bias)
    recorder.offer("attn.out", out)
    if weights.post_norms is not None:
        out = normalize(out, weights.post_norms[0], shape, recorder, "ln1_post")
    recorder.offer("hook_attn_out", out)
    return out


def mlp(
    x: Tensor,  # [B, S, M], after the norm
    weights: BlockWeights,
    shape: BlockShape,
    recorder: Recorder,
) -> Tensor:
    """What the MLP adds to the residual stream, `[B, S, M]`."""
    activation = ACTIVATIONS[shape.activation]
    up_bias = None if shape.adds_up_bias_last else weights.up_bias
    pre = F.linear(x, weights.up, up_bias)
    if weights.gate is None:
        recorder.offer("mlp.hook_pre", pre)
        post = activation(pre.to(recorder.dtype("mlp.hook_post", pre.dtype)))
    else:
        gate = F.linear(x, weights.gate, weights.gate_bias)
        recorder.offer("mlp.hook_pre", gate)
        recorder.offer("mlp.hook_pre_linear", pre)
        post = activation(gate) * pre
        if shape.adds_up_bias_last and weights.up_bias is not None:
            post = post + weights.up_bias
    recorder.offer("mlp.hook_post", post)
    out = F.linear(post, weights.down, weights.down_bias)
    recorder.offer("mlp.out", out)
    if weights.post_norms is not None:
        out = normalize(out, weights.post_norms[1], shape, recorder, "ln2_post")
    recorder.offer("hook_mlp_out", out)
    return out


def block(
    resid: Tensor,  # [B, S, M]
    weights: BlockWeights,
    shape: BlockShape,
    padding: Padding | None,
    wanted: Wanted,
    stops: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    One block.

    Args:
        resid: the residual stream before the block.
        weights: the block's weights.
        shape: what is computed with them.
        padding: where prompts have leading pads; None where they have none.
        wanted: names of values within the block, as in `Recorder`.
        stops: whether the residual stream after the block is not needed.

    Returns:
        The residual stream after the block (before it, if the block stops early), and the wanted
        values.
    """
    recorder = Recorder(wanted, stops)
    recorder.offer("hook_resid_pre", resid)
    recorder.offer("hook_attn_in", resid.unsqueeze(2).expand(-1, -1, shape.n_heads, -1))
    if recorder.is_done:
        return resid, recorder.found
    x = normalize(resid, weights.ln1, shape, recorder, "ln1")
    if recorder.is_done:
        return resid, recorder.found
    attn_out = attention(x, weights, shape, padding, recorder)
    if attn_out is None:
        return resid, recorder.found
    mid = resid + attn_out
    recorder.offer("hook_resid_mid", mid)
    mlp_in = resid if shape.parallel else mid
    recorder.offer("hook_mlp_in", mlp_in)
    if recorder.is_done:
        return resid, recorder.found
    x = normalize(mlp_in, weights.ln2, shape, recorder, "ln2")
    if recorder.is_done:
        return resid, recorder.found
    resid = mid + mlp(x, weights, shape, recorder)
    recorder.offer("hook_resid_post", resid)
    return resid, recorder.found


def tensors_of(weights: Any) -> Iterator[Tensor]:
    """The tensors of weights, in their order."""
    if isinstance(weights, Tensor):
        yield weights
    elif weights is not None:
        for part in weights:
            yield from tensors_of(part)


def precise_block(
    resid: Tensor,
    weights: BlockWeights,
    shape: BlockShape,
    padding: Padding | None,
    wanted: Wanted,
    stops: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`block` in the next wider dtype than its weights': a reference for what rounding does."""
    dtype = wider(weights.qkv.dtype)

    def widened(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.to(dtype)
        if isinstance(part, tuple):
            parts = [widened(each) for each in part]
            return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)
        return part

    shape = replace(shape, dtype=dtype)
    return block(resid.to(dtype), widened(weights), shape, padding, wanted, stops)


def wider(dtype: torch.dtype) -> torch.dtype:
    """float64 for what has 32 bits or more, else float32."""
    return torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32


class Block(Protocol):
    """`block`, or what a compiler has made of it."""

    def __call__(
        self,
        resid: Tensor,
        weights: BlockWeights,
        shape: BlockShape,
        padding: Padding | None,
        wanted: Wanted,
        stops: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Point:
    """
    A place in the model whose value is wanted.

    Attributes:
        layer: index of its block; None for what comes before the first block.
        name: the value's name within the block or before it.
    """

    layer: int | None
    name: str


@dataclass(frozen=True)
class Decoder:
    """
    A model up to some block.

    Attributes:
        embedding: `[V, M]`.
        position_embedding: `[S or more, M]`, or None.
        embedding_scale: `[]`, what embeddings are multiplied by in their dtype; None for 1.
        blocks: weights and shape of each block.
    """

    embedding: Tensor
    position_embedding: Tensor | None
    embedding_scale: Tensor | None
    blocks: Sequence[tuple[BlockWeights, BlockShape]]

    @property
    def n_parameters(self) -> int:
        """Number of weights of the blocks."""
        return sum(weight.numel() for weights, _ in self.blocks for weight in tensors_of(weights))

    def embed(self, tokens: Tensor, padding: Padding | None, recorder: Recorder) -> Tensor:
        """The residual stream before the first block, `[B, S, M]`; `tokens` is `[B, S]` int64."""
        resid = F.embedding(tokens, self.embedding)
        if self.embedding_scale is not None:
            resid = resid * self.embedding_scale.to(resid.dtype)
        recorder.offer("hook_embed", resid)
        if self.position_embedding is None:
            return resid
        if padding is None:
            position = self.position_embedding[: tokens.shape[1]].expand_as(resid)
        else:
            position = F.embedding(padding.positions, self.position_embedding)
            position = position * padding.is_token.unsqueeze(-1)
        recorder.offer("hook_pos_embed", position)
        return resid + position

    def run(
        self,
        tokens: Tensor,  # [B, S] int64
        padding: Padding | None,
        wanted: dict[Point, torch.dtype],
        block: Block,
    ) -> dict[Point, Tensor]:
        """The values at some points, in the dtypes that are asked for."""

        def at(layer: int | None) -> Wanted:
            return tuple((point.name, wanted[point]) for point in wanted if point.layer == layer)

        last = max((point.layer for point in wanted if point.layer is not None), default=-1)
        recorder = Recorder(at(None), stops=False)
        resid = self.embed(tokens, padding, recorder)
        found = {Point(None, name): value for name, value in recorder.found.items()}
        for layer, (weights, shape) in enumerate(self.blocks[: last + 1]):
            resid, values = block(resid, weights, shape, padding, at(layer), stops=layer == last)
            found |= {Point(layer, name): value for name, value in values.items()}
        return found
