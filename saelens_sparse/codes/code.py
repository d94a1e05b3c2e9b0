"""What encoding a batch leaves for later parts of the step: its active latents and their uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from typing_extensions import override

from saelens_sparse.ops import (
    FiringCounts,
    GatePattern,
    LatentOrder,
    RowBlock,
    RowGradient,
    Selection,
    at_latents,
    decode_densely,
    decode_selected,
    segment_totals,
)
from saelens_sparse.ops.common.backend import Backend


def version_of(tensor: torch.Tensor) -> int:
    """Autograd's count of in-place changes; tensors made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version


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


@dataclass(kw_only=True)
class Code(ABC):
    """The code of a batch of `n_rows` inputs.

    Attributes:
        x: `[n_rows, d_in]`, the centred encoder input.
        input_bias: `[d_in]`, `b_dec` if it was subtracted to give `x` outside of the graph.
        acts: activations, on the graph, in the layout of the subclass.
        decoder_version: `version_of(W_dec)` when the code was made.
        backend: what computes with it.
        dead: the dead latents if a training step asked for them.
        is_decoded: whether a sparse decode has read it, which gives no dense gradient.
        has_graph: whether the code was made with gradients enabled.
    """

    x: torch.Tensor
    input_bias: torch.Tensor | None
    acts: torch.Tensor
    decoder_version: int
    backend: Backend
    dead: DeadLatents | None = None
    is_decoded: bool = False
    has_graph: bool = field(default_factory=torch.is_grad_enabled)

    def __post_init__(self) -> None:
        self._acts_version = version_of(self.acts)

    def is_made_with(self, W_dec: torch.Tensor) -> bool:
        """Whether a decoder is what it was when the code was made."""
        return version_of(W_dec) == self.decoder_version

    def require_current(self) -> None:
        """Raise if the tensors of this code have been overwritten by those of a later step."""
        if version_of(self.acts) != self._acts_version:
            raise RuntimeError(
                "feature_acts and hidden_pre of this training step were not kept: a later step has "
                "reused their memory. Read them before it, or set cuda_graph=False."
            )

    @property
    @abstractmethod
    def d_sae(self) -> int:
        """Number of latents."""

    @property
    def reported_dtype(self) -> torch.dtype:
        """Dtype of the activations as SAELens reports them."""
        return self.acts.dtype

    @property
    def metrics(self) -> dict[str, float]:
        """What to log of the encoding itself."""
        return {}

    @abstractmethod
    def dense_acts(self) -> torch.Tensor:
        """Activations as SAELens reports them, `[n_rows, d_sae]`, on the graph."""

    @abstractmethod
    def firing(self) -> torch.Tensor:
        """Where latents are active, `[n_rows, d_sae]` bool."""

    @abstractmethod
    def row_counts(self) -> torch.Tensor:
        """Number of active latents of each row, `[n_rows]` integer."""

    @abstractmethod
    def latent_counts(self) -> torch.Tensor:
        """Number of rows on which each latent is active, `[d_sae]` integer."""

    @abstractmethod
    def decode(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        block: RowBlock | None,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`acts @ W_dec + b_dec`, `[n_rows, d_in]`, and a block of rows of `W_dec` or None.

        `sink` gets the gradient of `W_dec` where it is a sum over active pairs.
        """


@dataclass(kw_only=True)
class SelectedCode(Code):
    """k latents of each row, activations `[n_rows, k]`.

    Attributes:
        selection: the latents.
        order: the active pairs by latent.
        norms: `[d_sae]` decoder norms if the reported activations are scaled by them; else None.
        W_dec: whose norms they are.
        norms_have_graph: whether scaling by the norms is on the graph of the decoder.
    """

    selection: Selection
    order: LatentOrder
    norms: torch.Tensor | None
    W_dec: torch.Tensor

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.norms_have_graph = self.has_graph and self.W_dec.requires_grad

    @override
    def is_made_with(self, W_dec: torch.Tensor) -> bool:
        # The reported activations are scaled by the norms of one decoder.
        return super().is_made_with(W_dec) and (self.norms is None or W_dec is self.W_dec)

    @property
    @override
    def d_sae(self) -> int:
        return self.order.d_sae

    @property
    @override
    def reported_dtype(self) -> torch.dtype:
        if self.norms is None:
            return self.acts.dtype
        return torch.promote_types(self.acts.dtype, self.norms.dtype)

    @property
    @override
    def metrics(self) -> dict[str, float]:
        return {"rows_recomputed": self.selection.rows_recomputed}

    @override
    def dense_acts(self) -> torch.Tensor:
        latents = self.selection.latents
        values = self.acts
        if self.norms is not None:
            norms = self.norms
            if self.norms_have_graph and version_of(self.W_dec) == self.decoder_version:
                norms = self.W_dec.norm(dim=-1)  # on the graph
            values = values * norms[latents]
        return values.new_zeros(values.shape[0], self.d_sae).scatter(1, latents, values)

    @override
    def firing(self) -> torch.Tensor:
        # Inactive pairs have the key d_sae: they land in a column of their own.
        keys = self.selection.keys
        dense = torch.zeros(keys.shape[0], self.d_sae + 1, dtype=torch.bool, device=keys.device)
        return dense.scatter_(1, keys.long(), True)[:, :-1]

    @override
    def row_counts(self) -> torch.Tensor:
        return (self.selection.keys < self.d_sae).sum(-1)

    @override
    def latent_counts(self) -> torch.Tensor:
        return self.order.counts

    @override
    def decode(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        block: RowBlock | None,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        latents, acts = self.selection.latents, self.acts
        norms_vary = torch.is_grad_enabled() and W_dec.requires_grad and not self.norms_have_graph
        if self.norms is not None and norms_vary:
            # One in value. Decoding divides by the norms, and nothing cancels their gradient.
            scale = self.norms / W_dec.norm(dim=-1)
            acts = acts * at_latents(scale, latents, self.order, self.backend)
        return decode_selected(acts, W_dec, latents, self.order, block, self.backend, sink, b_dec)


@dataclass(kw_only=True)
class GatedCode(Code):
    """The pairs of a JumpReLU's pattern, activations `[n_pairs]`.

    Attributes:
        pattern: the pairs.
        order: the same by latent.
        l0: `[n_rows]`, number of active latents, on the graph of the thresholds.
    """

    pattern: GatePattern
    order: LatentOrder
    l0: torch.Tensor

    @property
    @override
    def d_sae(self) -> int:
        return self.order.d_sae

    @override
    def dense_acts(self) -> torch.Tensor:
        n_rows = self.pattern.ragged.n_rows
        dense = self.acts.new_zeros(n_rows, self.d_sae + 1)
        # Pairs that are not of the pattern have the key d_sae, a column of their own.
        place = (self.pattern.ragged.rows.long(), self.pattern.keys.long())
        return dense.index_put(place, self.acts)[:, :-1].contiguous()

    @override
    def firing(self) -> torch.Tensor:
        return self.dense_acts().bool()

    @override
    def row_counts(self) -> torch.Tensor:
        return self.pattern.row_counts

    @override
    def latent_counts(self) -> torch.Tensor:
        return self._latent_counts

    @cached_property
    def _latent_counts(self) -> torch.Tensor:
        fired = self.acts.detach().bool().float()
        return segment_totals(self.order, fired, self.backend).to(torch.int32)

    @override
    def decode(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        block: RowBlock | None,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        latents = self.pattern.latents
        return decode_selected(
            self.acts, W_dec, latents, self.order, block, self.backend, sink, b_dec
        )


@dataclass(kw_only=True)
class DenselyGatedCode(Code):
    """All latents of each row, activations `[n_rows, d_sae]`.

    Attributes:
        counts: what fired.
        l0: `[n_rows]`, number of active latents, on the graph of the thresholds.
        pre_acts_dtype: dtype that the dense encoder would give, and thus the activations.
    """

    counts: FiringCounts
    l0: torch.Tensor
    pre_acts_dtype: torch.dtype

    @property
    @override
    def d_sae(self) -> int:
        return self.acts.shape[1]

    @property
    @override
    def reported_dtype(self) -> torch.dtype:
        return self.pre_acts_dtype

    @override
    def dense_acts(self) -> torch.Tensor:
        return self.acts.to(self.pre_acts_dtype)

    @override
    def firing(self) -> torch.Tensor:
        return self.acts.bool()

    @override
    def row_counts(self) -> torch.Tensor:
        return self.counts.rows

    @override
    def latent_counts(self) -> torch.Tensor:
        return self.counts.latents

    @override
    def decode(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        block: RowBlock | None,
        sink: list[RowGradient] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        product, rows = decode_densely(self.acts, W_dec, block, self.backend)
        return product + b_dec, rows
