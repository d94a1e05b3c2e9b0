"""What encoding a batch leaves for later parts of the step: its active latents and their uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property

import torch
from typing_extensions import override

from saelens_sparse.codes.dead import DeadLatents
from saelens_sparse.codes.step import StepContext
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.versions import version_of
from saelens_sparse.ops.decode import Decoded, can_compare, decode_pairs
from saelens_sparse.ops.dense import FiringCounts, decode_densely
from saelens_sparse.ops.pairs import ActivePairs, LatentOrder
from saelens_sparse.ops.rows.at_latents import at_latents
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import segment_totals


@dataclass(kw_only=True)
class Code(ABC):
    """The code of a batch of `n_rows` inputs.

    Attributes:
        x: `[n_rows, d_in]`, the centred encoder input.
        input_bias: `[d_in]`, `b_dec` if it was subtracted to give `x` outside of the graph.
        acts: activations, on the graph, in the layout of the subclass.
        l0: `[n_rows]`, number of active latents, on the graph of the thresholds; None without.
        step: the step that it is of.
        decoder_version: `version_of(W_dec)` when the code was made.
        dead: the dead latents if a training step asked for them.
        is_decoded: whether a sparse decode has read it, which gives no dense gradient.
        has_graph: whether the code was made with gradients enabled.
    """

    x: torch.Tensor
    input_bias: torch.Tensor | None
    acts: torch.Tensor
    l0: torch.Tensor | None
    step: StepContext
    decoder_version: int
    dead: DeadLatents | None = None
    is_decoded: bool = False
    has_graph: bool = field(default_factory=torch.is_grad_enabled)

    def __post_init__(self) -> None:
        self._acts_version = version_of(self.acts)

    @property
    def backend(self) -> Backend:
        """What computes with it."""
        return self.step.choice.backend

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
    def active(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row, latent and activation as SAELens reports it, wherever that is not zero.

        Each is `[nnz]`, by row and within a row by latent; rows and latents are int64. The
        activations are on the graph. Waits for their number.
        """

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
        target: torch.Tensor | None = None,
        *,
        to_step: bool,
    ) -> Decoded:
        """`acts @ W_dec + b_dec`, and the dead latents' rows of `W_dec` or None.

        Args:
            W_dec: `[d_sae, d_in]`.
            b_dec: `[d_in]`.
            target: `[n_rows, d_in]`, contiguous, what is compared with the reconstruction if that
                is cheaper than a comparison after it; or None.
            to_step: whether the gradient of `W_dec` may go to the step instead of to its `.grad`,
                if `W_dec` is of the SAE that encoded.
        """

    @property
    def block(self) -> RowBlock | None:
        """The dead latents, if there are any and a loss asks for them."""
        return None if self.dead is None else self.dead.block


@dataclass(kw_only=True)
class PairCode(Code):
    """Pairs, activations `[n_pairs]`.

    Attributes:
        pairs: the pairs.
        order: the same by latent.
        norms: `[d_sae]` decoder norms if the reported activations are scaled by them; else None.
        W_dec: of the SAE that encoded, whose norms they are.
        norms_have_graph: whether scaling by the norms is on the graph of the decoder.
    """

    pairs: ActivePairs
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
        return {} if self.pairs.rows.k is None else {"rows_recomputed": self.pairs.rows_recomputed}

    def reported_acts(self) -> torch.Tensor:
        """Activations as SAELens reports them, `[n_pairs]`, on the graph."""
        if self.norms is None:
            return self.acts
        norms, is_current = self.norms, version_of(self.W_dec) == self.decoder_version
        if torch.is_grad_enabled() and self.norms_have_graph and is_current:
            norms = self.W_dec.norm(dim=-1)  # on the graph
        return self.acts * norms[self.pairs.latents]

    @override
    def dense_acts(self) -> torch.Tensor:
        values = self.reported_acts()
        rows, latents = self.pairs.rows, self.pairs.latents
        if rows.k is not None:
            by_row = (rows.n_rows, rows.k)
            dense = values.new_zeros(rows.n_rows, self.d_sae)
            return dense.scatter(1, latents.view(by_row), values.view(by_row))
        return self._with_a_column_for_no_sum(values)

    @override
    def active(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        values, keys = self.reported_acts(), self.pairs.keys
        places = ((values != 0) & (keys < self.d_sae)).nonzero().squeeze(1)
        rows, latents = self.pairs.rows.of(places), self.pairs.latents[places]
        order = (rows * self.d_sae + latents).argsort()
        return rows[order], latents[order], values[places[order]]

    @override
    def firing(self) -> torch.Tensor:
        active = (
            self.acts.detach().bool() if self._counts_rows else torch.ones_like(self.pairs.keys)
        )
        return self._with_a_column_for_no_sum(active.bool())

    def _with_a_column_for_no_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Values at their pairs, `[n_rows, d_sae]`, zero elsewhere."""
        rows, keys = self.pairs.rows, self.pairs.keys.long()
        # Pairs that take part in no sum have the key d_sae, a column of their own.
        dense = values.new_zeros(rows.n_rows, self.d_sae + 1)
        places = torch.arange(keys.numel(), device=keys.device)
        return dense.index_put((rows.of(places), keys), values)[:, :-1].contiguous()

    @property
    def _counts_rows(self) -> bool:
        return self.pairs.row_counts is not None

    @override
    def row_counts(self) -> torch.Tensor:
        if self.pairs.row_counts is not None:
            return self.pairs.row_counts
        rows, takes_part = self.pairs.rows, self.pairs.keys < self.d_sae
        if rows.k is not None:
            return takes_part.view(rows.n_rows, rows.k).sum(-1)
        before = torch.nn.functional.pad(takes_part.cumsum(0), (1, 0))
        return before[rows.starts(before.device)].diff()

    @override
    def latent_counts(self) -> torch.Tensor:
        return self._latent_counts if self._counts_rows else self.order.counts

    @cached_property
    def _latent_counts(self) -> torch.Tensor:
        fired = self.acts.detach().bool().float()
        return segment_totals(self.order, fired, self.backend).to(torch.int32)

    @override
    def decode(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        to_step: bool,
    ) -> Decoded:
        return self.decode_rows(W_dec, b_dec, self.pairs, self.order, target, to_step=to_step)

    def decode_rows(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor | None,
        pairs: ActivePairs,
        order: LatentOrder,
        target: torch.Tensor | None = None,
        *,
        to_step: bool,
    ) -> Decoded:
        """As `decode`, of its pairs on rows that may be others than those of the batch."""
        acts = self.acts
        norms_vary = torch.is_grad_enabled() and W_dec.requires_grad and not self.norms_have_graph
        if self.norms is not None and norms_vary:
            # One in value. Decoding divides by the norms, and nothing cancels their gradient.
            scale = self.norms / W_dec.norm(dim=-1)
            acts = acts * at_latents(scale, pairs.latents, order, self.backend)
        to_step = to_step and W_dec is self.W_dec
        row_gradients = self.step.row_gradients_of("W_dec", order) if to_step else None
        if target is not None and not can_compare(W_dec, target, self.backend):
            target = None
        return decode_pairs(
            acts, W_dec, b_dec, pairs, order, self.block, self.backend, row_gradients, target
        )


@dataclass(kw_only=True)
class DenseCode(Code):
    """All latents of each row, activations `[n_rows, d_sae]`.

    Attributes:
        counts: what fired.
        pre_acts_dtype: dtype that the dense encoder would give, and thus the activations.
    """

    counts: FiringCounts
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
    def active(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, latents = self.acts.nonzero().unbind(1)
        return rows, latents, self.acts[rows, latents].to(self.pre_acts_dtype)

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
        target: torch.Tensor | None = None,
        *,
        to_step: bool,
    ) -> Decoded:
        product, rows = decode_densely(self.acts, W_dec, self.block, self.backend)
        return Decoded(product + b_dec, rows, None)
