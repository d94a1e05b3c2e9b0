"""What searches find."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saelens_sparse.ops.pairs.ragged import RaggedRows


@dataclass(frozen=True)
class Selection:
    """The top k latents of each row, in no particular order.

    Attributes:
        latents: `[n_rows, k]` int64.
        pre_acts: `[n_rows, k]`, their pre-activations `x @ W_enc + b_enc`, before any scaling
            by decoder norms; in the dtype that the dense encoder would give.
        scores: `[n_rows, k]`, what was compared: the pre-activations times `norms`.
        keys: `[n_rows, k]` int32, the latent where the score is positive or NaN, d_sae where
            the ReLU clips it.
        rows_recomputed: number of rows for which the screen could not vouch and that were
            computed again in full precision.
    """

    latents: torch.Tensor
    pre_acts: torch.Tensor
    scores: torch.Tensor
    keys: torch.Tensor
    rows_recomputed: int = 0


@dataclass(frozen=True)
class GatePattern:
    """The pairs at which a JumpReLU's value or straight-through gradient can differ from zero.

    These are the latents above their threshold, united with those inside its window: all with a
    pre-activation above `threshold - bandwidth / 2`. A few others may be among them, with the key
    d_sae. The list may have room to spare beyond the last row.

    Attributes:
        latents: `[n_pairs]` int64, ascending within a row.
        keys: `[n_pairs]` int32, the latent, or d_sae for a pair that is not of the pattern.
        pre_acts: `[n_pairs]`, `x @ W_enc + b_enc` in the dtype that the dense encoder would give.
        ragged: the rows.
        row_counts: `[n_rows]` int32, number of active latents.
        totals: number of pairs and of active ones, on the host.
    """

    latents: torch.Tensor
    keys: torch.Tensor
    pre_acts: torch.Tensor
    ragged: RaggedRows
    row_counts: torch.Tensor
    totals: tuple[int, int] = (0, 0)


def gate_and_edge(
    threshold: torch.Tensor, bandwidth: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Thresholds as compared with pre-activations of a dtype, and the window's lower edges.

    The edges err downwards by more than rounding, so that nothing inside falls below them.
    """
    gate = threshold.to(dtype)
    slack = 2 * torch.finfo(dtype).eps
    edge = gate - (bandwidth / 2 + slack * bandwidth)
    return gate, edge.sub_(gate.abs(), alpha=slack)
