"""The dead latents of a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from saelens_sparse.measured import DEAD_ALIGNMENT
from saelens_sparse.ops.common.host_copy import HostCount
from saelens_sparse.ops.rows.block import RowBlock


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
