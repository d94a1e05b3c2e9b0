"""Language models of true architectures with random weights, made on their device without a hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.HookedRootModule import HookedRootModule

LIBRARIES = ("TL", "HF")
"""TransformerLens, and transformers in SAELens's `HookedProxyLM`."""


@dataclass(frozen=True)
class ModelShape:
    """
    A model's architecture and sizes.

    Attributes:
        family: "gpt2", "llama" or "gemma2".
        layer: index of the layer whose output is the hook point.
        n_positions: tokens of the longest prompt.
        n_layers: by default those up to the hook point.
    """

    family: str
    layer: int
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_mlp: int
    vocabulary: int
    n_positions: int
    n_layers: int | None = None

    @property
    def n_made(self) -> int:
        """How many layers the model has."""
        return self.n_layers or self.layer + 1

    @property
    def tiny(self) -> ModelShape:
        """A shape of the same kind for a CPU."""
        is_grouped = self.n_key_value_heads < self.n_heads
        return replace(
            self,
            layer=1,
            d_model=32,
            n_heads=4,
            n_key_value_heads=2 if is_grouped else 4,
            d_head=8,
            d_mlp=64,
            vocabulary=128,
            n_positions=16,
            n_layers=2,
        )

    def hook_name(self, library: str) -> str:
        """The residual stream after the layer."""
        if library == "TL":
            return f"blocks.{self.layer}.hook_resid_post"
        return f"{'transformer.h' if self.family == 'gpt2' else 'model.layers'}.{self.layer}"

    def make(self, library: str, dtype: torch.dtype, device: str) -> HookedRootModule:
        """The model of a library."""
        make = transformer_lens_model if library == "TL" else transformers_model
        return make(self, dtype, device)


GPT2 = ModelShape("gpt2", 8, 768, 12, 12, 64, 3072, 50_257, 128, n_layers=12)
GEMMA2 = ModelShape("gemma2", 12, 2304, 8, 4, 256, 9216, 256_000, 1024)
LLAMA_OF_GEMMA2_SHAPE = replace(GEMMA2, family="llama", vocabulary=32_000)
LLAMA_8B = ModelShape("llama", 16, 4096, 32, 8, 128, 14_336, 128_256, 1024)


def transformer_lens_model(
    shape: ModelShape, dtype: torch.dtype, device: str, *, unembeds: bool = True
) -> HookedTransformer:
    """
    TransformerLens's model, with the fields that its own configs of these models set.

    Args:
        shape: What is made.
        dtype: Of the weights.
        device: Where they are.
        unembeds: Whether it gives logits of the whole vocabulary. Activations do not need them.
    """
    config: dict[str, Any] = {
        "n_layers": shape.n_made,
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "d_head": shape.d_head,
        "d_mlp": shape.d_mlp,
        "d_vocab": shape.vocabulary,
        "d_vocab_out": shape.vocabulary if unembeds else 8,
        "n_ctx": shape.n_positions,
        "dtype": dtype,
        "device": device,
        "init_weights": False,
    }
    if shape.family == "gpt2":
        config |= {"act_fn": "gelu_new", "normalization_type": "LN"}
    else:
        config |= {
            "act_fn": "silu",
            "normalization_type": "RMS",
            "final_rms": True,
            "gated_mlp": True,
            "n_key_value_heads": shape.n_key_value_heads,
            "positional_embedding_type": "rotary",
            "rotary_dim": shape.d_head,
            "rotary_adjacent_pairs": False,
        }
    if shape.family == "gemma2":
        config |= {
            "act_fn": "gelu_pytorch_tanh",
            "use_normalization_before_and_after": True,
            "attn_scores_soft_cap": 50.0,
            "output_logits_soft_cap": 30.0,
            "use_local_attn": True,
            "window_size": 4096,
            "attn_types": (["global", "local"] * shape.n_made)[: shape.n_made],
        }
    with torch.device(device):
        model = HookedTransformer(HookedTransformerConfig(**config))
    randomize(model, shape)
    return model


def transformers_model(shape: ModelShape, dtype: torch.dtype, device: str) -> HookedProxyLM:
    """transformers' model in SAELens's wrapper, with a hook at the shape's layer only."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_made,
        "num_attention_heads": shape.n_heads,
        "max_position_embeddings": shape.n_positions,
        "tie_word_embeddings": True,
    }
    grouped = sizes | {
        "num_key_value_heads": shape.n_key_value_heads,
        "head_dim": shape.d_head,
        "intermediate_size": shape.d_mlp,
    }
    kinds: dict[str, Any] = {
        "gpt2": transformers.GPT2Config,
        "llama": transformers.LlamaConfig,
        "gemma2": transformers.Gemma2Config,
    }
    config = kinds[shape.family](**sizes if shape.family == "gpt2" else grouped)
    # Some versions of transformers would take an attention that knows no soft cap.
    exact = {"attn_implementation": "eager"} if shape.family == "gemma2" else {}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **exact).eval()
    randomize(model, shape)
    tokenizer: Any = None
    return HookedProxyLM(model, tokenizer, hook_names=[shape.hook_name("HF")])


def randomize(model: nn.Module, shape: ModelShape) -> None:
    """
    Draw weights on their device; biases and weights of norms keep their values.

    The standard deviation is d_model^-0.5. Logits are then of size one, and zeros in their place
    change the loss, which SAELens's evals divide by.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=shape.d_model**-0.5)
