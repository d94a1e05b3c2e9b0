"""Small language models of true architectures with random weights, and SAELens's activations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig

from saelens_sparse.language_model import choose_model_path

N_LAYERS, D_MODEL, N_HEADS, D_HEAD, D_MLP, VOCABULARY = 4, 64, 4, 16, 160, 211
N_POSITIONS = 48
PAD = 3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

ROTARY: dict[str, Any] = {
    "positional_embedding_type": "rotary",
    "rotary_dim": D_HEAD,
    "rotary_adjacent_pairs": False,
}
GATED: dict[str, Any] = ROTARY | {
    "act_fn": "silu",
    "normalization_type": "RMS",
    "final_rms": True,
    "gated_mlp": True,
    "n_key_value_heads": 2,
    "eps": 1e-6,
}
# What TransformerLens's own configs of these models set, at small sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5},
    "llama": GATED
    | {
        "rotary_base": 500000.0,
        "use_NTK_by_parts_rope": True,
        "NTK_by_parts_factor": 32.0,
        "NTK_original_ctx_len": 32,
    },
    "gemma2": GATED
    | {
        "act_fn": "gelu_pytorch_tanh",
        "use_normalization_before_and_after": True,
        "attn_scale": 6.0,
        "attn_scores_soft_cap": 2.0,
        "use_local_attn": True,
        "window_size": 10,
        "attn_types": ["global", "local"] * (N_LAYERS // 2),
    },
    "mistral": GATED
    | {"use_local_attn": True, "window_size": 10, "attn_types": ["local"] * N_LAYERS},
    "qwen2": GATED | {"rotary_base": 1000000},
    "qwen3": GATED | {"use_qk_norm": True},
    "pythia": ROTARY
    | {
        "act_fn": "gelu",
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "rotary_dim": D_HEAD // 4,
    },
    "gptj": ROTARY
    | {
        "act_fn": "gelu_new",
        "normalization_type": "LN",
        "parallel_attn_mlp": True,
        "rotary_adjacent_pairs": True,
    },
}
PARALLEL = ("pythia", "gptj")

HF: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "intermediate_size": D_MLP,
    "max_position_embeddings": 64,
}
GROUPED: dict[str, Any] = HF | {"num_key_value_heads": 2, "head_dim": D_HEAD}
TRANSFORMERS: dict[str, transformers.PreTrainedConfig] = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=64
    ),
    "llama": transformers.LlamaConfig(
        **GROUPED,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=10),
    "qwen2": transformers.Qwen2Config(**HF, num_key_value_heads=2),
    "qwen3": transformers.Qwen3Config(**GROUPED),
    "gemma2": transformers.Gemma2Config(
        **GROUPED, query_pre_attn_scalar=36, attn_logit_softcapping=2.0, sliding_window=10
    ),
    "pythia": transformers.GPTNeoXConfig(**HF),
}
# A model that the fast path does not know.
UNKNOWN: dict[str, transformers.PreTrainedConfig] = {
    "opt": transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        ffn_dim=D_MLP,
        max_position_embeddings=64,
        word_embed_proj_dim=D_MODEL,
    )
}


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights as a trained model's: no zero biases, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-2] ** -0.5
            is_unit = parameter.ndim == 1 and bool((parameter == 1).all())
            scale = 0.5 if name.endswith(("W_E", "embed_tokens.weight", "wte.weight")) else scale
            parameter.copy_(is_unit + scale * noise)


def hooked_transformer(
    family: str, dtype: torch.dtype = torch.float32, pads_left: bool = False, **changes: Any
) -> HookedTransformer:
    """TransformerLens's model of a family."""
    config: dict[str, Any] = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_heads": N_HEADS,
        "d_head": D_HEAD,
        "d_mlp": D_MLP,
        "d_vocab": VOCABULARY,
        "n_ctx": 64,
        "device": "cpu",
        "dtype": torch.float32,
    }
    config |= FAMILIES[family] | changes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(HookedTransformerConfig(**config))
        randomize(model)
        if dtype != torch.float32:
            model = in_dtype(model, dtype)
    if pads_left:
        tokenizer: Any = SimpleNamespace(padding_side="left", pad_token_id=PAD, bos_token_id=0)
        model.tokenizer = tokenizer
    return model


def in_dtype(model: HookedTransformer, dtype: torch.dtype) -> HookedTransformer:
    """A model of the same weights in another dtype, whose rotary tables are made in that dtype."""
    config = copy.deepcopy(model.cfg)
    config.dtype = dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        other = HookedTransformer(config)
    other.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "rotary" not in name},
        strict=False,
    )
    other.tokenizer = model.tokenizer
    return other


def proxy(
    family: str, hook_names: list[str] | None = None, dtype: torch.dtype = torch.float32
) -> HookedProxyLM:
    """SAELens's `AutoModelForCausalLM` of a family."""
    config = copy.deepcopy((TRANSFORMERS | UNKNOWN)[family])
    # Some versions of transformers would take an attention that knows no soft cap.
    exact = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **exact).eval()
    randomize(model)
    tokenizer: Any = None
    return HookedProxyLM(model.to(dtype), tokenizer, hook_names=hook_names)


def prompts(pads: bool = False) -> Tensor:
    """`[5, N_POSITIONS]` token ids; with `pads`, all rows but one have leading pads."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(PAD + 1, VOCABULARY, (5, N_POSITIONS), generator=generator)
    tokens[:, 20] = PAD  # a pad inside a prompt is a token
    if pads:
        for row, n_pads in enumerate((0, 1, 7, 30, N_POSITIONS - 1)):
            tokens[row, :n_pads] = PAD
    return tokens


def stock_activations(
    model: nn.Module, hook_names: Iterable[str], tokens: Tensor, autocast: bool = False
) -> dict[str, Tensor]:
    """What SAELens computes."""
    path = choose_model_path(
        model, list(hook_names), option="saelens", autocast=autocast, n_positions=tokens.shape[1]
    )
    return path.activations(tokens)


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.double() - exact).norm() / exact.norm())
