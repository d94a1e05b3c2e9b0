"""
Causal attention with what decoder-only transformers add to it: rotary embeddings, grouped keys and
values, soft-capped scores, sliding windows, leading pads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(
    x: Tensor,  # [B, S, heads, D]
    cos: Tensor,  # [S, R] or [B, S, R]
    sin: Tensor,  # [S, R] or [B, S, R]
    rotates_pairs: bool,
) -> Tensor:
    """Rotary embedding of the first R of D dimensions; `rotates_pairs` rotates neighbours."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    width = cos.shape[-1]
    turned, passed = x[..., :width], x[..., width:]
    if rotates_pairs:
        flipped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        flipped = torch.cat((-second, first), dim=-1)
    turned = turned * cos + flipped * sin
    return turned if passed.shape[-1] == 0 else torch.cat((turned, passed.to(turned.dtype)), -1)


def visible(
    n_positions: int,
    window: int | None,
    is_token: Tensor | None,  # [B, S] bool
    device: torch.device,
) -> Tensor:
    """
    Which keys a query may see, `[1 or B, 1, S, S]` bool.

    Every query may see itself, so that no row of a softmax is empty. What a leading pad sees has no
    meaning.
    """
    positions = torch.arange(n_positions, device=device)
    distance = positions[:, None] - positions[None, :]
    mask = distance >= 0
    if window is not None and window < n_positions:
        mask = mask & (distance < window)
    mask = mask[None, None]
    if is_token is not None:
        mask = (mask & is_token[:, None, None, :]) | (distance == 0)
    return mask


def attend(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, S, G, D]
    v: Tensor,  # [B, S, G, D]
    *,
    scale: float,
    soft_cap: float | None,
    window: int | None,
    is_token: Tensor | None,  # [B, S] bool
) -> Tensor:
    """
    Each head's weighted values, `[B, S, H, D]`; zeros at leading pads, as in TransformerLens.

    Scaled-dot-product attention computes all but soft-capped scores (Gemma-2, arXiv:2408.00118),
    which it does not know: `[B, H, S, S]` scores are made for these, in float32.
    """
    n_positions, n_groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    is_plain = is_token is None and (window is None or window >= n_positions)
    fused_groups = is_plain and soft_cap is None and v.dtype in (torch.bfloat16, torch.float16)
    if n_groups > 1 and not fused_groups:
        k, v = k.repeat_interleave(n_groups, 1), v.repeat_interleave(n_groups, 1)
    mask = None
    if not is_plain or soft_cap is not None:
        mask = visible(n_positions, window, is_token, q.device)
    if soft_cap is None:
        z = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=1 / scale,
            enable_gqa=n_groups > 1 and fused_groups,
        )
    else:
        scores = q @ k.transpose(-1, -2)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        scores = soft_cap * torch.tanh(scores / (scale * soft_cap))
        assert mask is not None
        pattern = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        z = pattern.to(v.dtype) @ v
    z = z.transpose(1, 2)
    return z if is_token is None else z * is_token[:, :, None, None]
