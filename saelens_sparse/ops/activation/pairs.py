"""Activation functions at pairs: what differs from one to another in `encode_pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.pairs import ActivePairs


class PairActivation(Protocol):
    """An activation function of pre-activations at pairs.

    Attributes:
        threshold: `[d_sae]`, a parameter of the function that gets a gradient; or None.
    """

    @property
    def threshold(self) -> torch.Tensor | None: ...

    def values(self, pairs: ActivePairs, backend: Backend) -> torch.Tensor:
        """Activations `[n_pairs]`, in the dtype of the pre-activations."""
        ...

    def gradients(
        self,
        pairs: ActivePairs,
        grad_acts: torch.Tensor | None,
        grad_l0: torch.Tensor | None,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Gradients of the pre-activations, and of the threshold at each pair; `[n_pairs]`.

        Pairs that take part in no sum may get any.

        Args:
            pairs: the pairs.
            grad_acts: gradient of the activations, `[n_pairs]`, or None.
            grad_l0: gradient of each row's number of active latents, `[n_rows]`, or None.
            backend: `"triton"` or `"torch"`.
        """
        ...


@dataclass(frozen=True)
class ReLU:
    """Zero for what is not positive. A NaN stays one, and passes its gradient on.

    Pairs that it clips take part in no sum: the search says so.
    """

    threshold: torch.Tensor | None = None

    def values(self, pairs: ActivePairs, backend: Backend) -> torch.Tensor:  # noqa: ARG002
        return pairs.pre_acts.relu()

    def gradients(
        self,
        pairs: ActivePairs,
        grad_acts: torch.Tensor | None,
        grad_l0: torch.Tensor | None,  # noqa: ARG002
        backend: Backend,  # noqa: ARG002
    ) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(pairs.pre_acts) if grad_acts is None else grad_acts, None


@dataclass(frozen=True)
class JumpReLU:
    """
    JumpReLU with straight-through gradients, as SAELens's `JumpReLU` and `Step`.

    Formula: Rajamanoharan et al. 2024 (arXiv:2407.14435), section 4. With H = h - threshold and K
    the rectangle that is `1 / bandwidth` for |H| < bandwidth / 2 and else 0,

        acts = h * (H > 0)      d acts / d threshold = -threshold * K(H)
        l0 = sum of (H > 0)     d l0   / d threshold = -K(H)

    Attributes:
        threshold: `[d_sae]`.
        bandwidth: width of the straight-through window.
        ste_to_input: whether the pre-activation gets the negative of the threshold's gradient too
            (Conerly et al. 2025, transformer-circuits.pub/2025/january-update).
    """

    threshold: torch.Tensor
    bandwidth: float
    ste_to_input: bool

    def values(self, pairs: ActivePairs, backend: Backend) -> torch.Tensor:
        if backend == "triton":
            from saelens_sparse.ops.activation import pairs_kernels

            return pairs_kernels.jumprelu(self.threshold, pairs)
        # As SAELens: a product, so that a NaN stays one.
        return pairs.pre_acts * (pairs.pre_acts > self._thresholds(pairs))

    def gradients(
        self,
        pairs: ActivePairs,
        grad_acts: torch.Tensor | None,
        grad_l0: torch.Tensor | None,
        backend: Backend,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if backend == "triton":
            from saelens_sparse.ops.activation import pairs_kernels

            return pairs_kernels.jumprelu_gradients(
                self.threshold, pairs, self.bandwidth, self.ste_to_input, grad_acts, grad_l0
            )
        pre_acts, thresholds = pairs.pre_acts, self._thresholds(pairs)
        sum_dtype = torch.promote_types(pre_acts.dtype, torch.float32)
        grad_act = pre_acts.new_zeros((), dtype=sum_dtype)
        if grad_acts is not None:
            grad_act = grad_acts.to(sum_dtype)
        distance = (pre_acts - thresholds).to(sum_dtype) / self.bandwidth
        straight_through = thresholds * grad_act
        if grad_l0 is not None:
            assert pairs.rows.of_pairs is not None
            straight_through = straight_through + grad_l0.to(sum_dtype)[pairs.rows.of_pairs]
        inside = (distance > -0.5) & (distance < 0.5)
        straight_through = torch.where(inside, straight_through / self.bandwidth, 0.0)
        grad_pre_acts = (distance > 0) * grad_act
        if self.ste_to_input:
            grad_pre_acts = grad_pre_acts + straight_through
        return grad_pre_acts, -straight_through

    def _thresholds(self, pairs: ActivePairs) -> torch.Tensor:
        """The threshold of each pair, as compared with its pre-activation."""
        return self.threshold.to(pairs.pre_acts.dtype)[pairs.latents]
