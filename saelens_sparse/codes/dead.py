"""The dead latents of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch

from saelens_sparse.measured import DEAD_ALIGNMENT
from saelens_sparse.ops.common.host_copy import HostCount
from saelens_sparse.ops.rows.block import RowBlock


class DeadRows(NamedTuple):
    """Dead latents and their rows of the weights, on the graphs of the encoder and the decoder.

    Attributes:
        block: the latents, and the number of rows.
        W_enc: `[block.width, d_in]`, zero beyond the latents.
        W_dec: `[block.width, d_in]`, zero beyond the latents.
    """

    block: RowBlock
    W_enc: torch.Tensor
    W_dec: torch.Tensor


@dataclass
class DeadLatents:
    """The dead latents of a training step and their weights.

    Attributes:
        mask: `[d_sae]` bool, as the trainer gave it.
        block: the latents, and their number rounded up; None if there are none.
        W_enc: `[width, d_in]`, on the graph of the encoder.
        W_dec: `[width, d_in]`, on the graph of the decoder, once it has run.
    """

    mask: torch.Tensor
    block: RowBlock | None
    W_enc: torch.Tensor | None = None
    W_dec: torch.Tensor | None = None

    @classmethod
    def of(cls, count: HostCount) -> Self:
        """Those of a mask whose number is on its way to the host. Waits for it."""
        mask, n_dead = count.mask, count.wait()
        if n_dead == 0:
            return cls(mask, None)
        latents = torch.nonzero_static(mask, size=n_dead).squeeze(1)
        return cls(mask, RowBlock(latents, -(-n_dead // DEAD_ALIGNMENT) * DEAD_ALIGNMENT))


def dead_rows(dead: DeadLatents | None, mask: torch.Tensor | None) -> list[DeadRows] | None:
    """
    What a loss of dead latents is computed from.

    Args:
        dead: what the step has made for such a loss, if anything.
        mask: `[d_sae]` bool, the latents that the loss is of; None for no latents.

    Returns:
        The latents and their rows, one element; none if no latent is dead. None if the step has not
        made what it takes.
    """
    if mask is None:
        return []
    if dead is None or dead.mask is not mask:
        return None
    if dead.block is None:
        return []
    if dead.W_enc is None or dead.W_dec is None:
        return None
    return [DeadRows(dead.block, dead.W_enc, dead.W_dec)]
