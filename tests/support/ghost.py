"""Ghost gradients as their formula says, by plain autograd, and stock SAEs that are trained so."""

from types import MethodType
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput

from tests.support.saes import (
    FLOAT32,
    FLOAT64,
    Precision,
    error,
    require_within_budget,
    shrunk_to_float64,
    step_values,
    stock_like,
)

GHOST_LOSS = "ghost_grad_loss"
EPS = 1e-6


def formula(
    products: torch.Tensor, bias: torch.Tensor, W_dec: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Mean over rows of `sg(MSE / (l + eps)) l`, with `l = |s g - r|^2`.

    Args:
        products: `[n_rows, width]`; columns beyond the length of `bias` are padding.
        bias: `[n]`.
        W_dec: `[width, d_in]`.
        residual: `[n_rows, d_in]`.
    """
    n, r = bias.numel(), residual.detach()
    h = products[:, :n] + bias
    g = torch.exp(h - h.amax(1, keepdim=True).detach()) @ W_dec[:n]
    s = (r.norm(dim=1) / (2 * g.norm(dim=1) + EPS)).detach()
    loss = (s[:, None] * g - r).pow(2).sum(1)
    weight = (r.pow(2).sum(1) / (loss + EPS)).detach()
    return (weight * loss).mean()


def with_ghosts(stock: Any, coefficient: float = 1.0) -> Any:
    """A stock SAE, changed to train its dead latents by the formula. It takes rows of inputs."""
    original = stock.calculate_aux_loss

    def calculate_aux_loss(
        self: Any,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        losses = {}
        if not hasattr(self, "calculate_topk_aux_loss"):
            losses = original(step_input, feature_acts, hidden_pre, sae_out)
        x, mask = step_input.sae_in, step_input.dead_neuron_mask
        levels = [(mask.numel(), sae_out)] if mask is not None else []
        if mask is not None and getattr(self.cfg, "use_matryoshka_aux_loss", False):
            levels = list(self._iterable_decode(feature_acts, include_outer_loss=True))
        total, first = x.new_zeros(()), 0
        for width, recons in levels:
            assert mask is not None
            dead = mask[first:width].nonzero().squeeze(1) + first
            first = width
            if len(dead) > 0:
                products = self.process_sae_in(x) @ self.W_enc[:, dead]
                total = total + formula(
                    products, self.b_enc[dead], self.W_dec[dead], (x - recons).detach()
                )
        return {**losses, GHOST_LOSS: coefficient * total}

    stock.calculate_aux_loss = MethodType(calculate_aux_loss, stock)
    return stock


def compare_ghost_steps(
    stock: Any,
    sparse: Any,
    x: torch.Tensor,
    dead: torch.Tensor | None,
    precision: Precision,
    **options: Any,
) -> None:
    """One step of a sparse SAE with ghost gradients, held against the formula in float64.

    As `compare_steps`: it may be twice as far from it as the formula in the same dtype is.
    """
    narrow, coefficient = precision == FLOAT64, sparse.cfg.aux_loss_coefficient
    yardstick = stock_like(stock, torch.float32 if narrow else stock.dtype)
    oracle = step_values(with_ghosts(stock_like(stock), coefficient), x, dead, **options)
    options["autocast"] = precision.autocast
    stock_values = step_values(with_ghosts(yardstick, coefficient), x, dead, **options)
    if narrow:
        stock_values = shrunk_to_float64(stock_values, oracle)
    floors = {
        f"gradient of {name}": FLOAT32.eps
        for name, parameter in sparse.named_parameters()
        if narrow and parameter.dtype == torch.float32
    }
    values = step_values(sparse, x, dead, **options)
    factor = 3.0 if narrow else 2.0
    require_within_budget(values, stock_values, oracle, precision.eps, factor, floors)


def require_formula(stock: Any, sae: Any, x: torch.Tensor, dead: torch.Tensor) -> None:
    """One step of an SAE in float64 is that of the formula.

    Dividing by the norms that SAELens has multiplied by, as the dense implementation does, rounds
    twice more than the formula.
    """
    expected = step_values(with_ghosts(stock_like(stock), sae.cfg.aux_loss_coefficient), x, dead)
    actual = step_values(sae, x, dead)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Thresholds are float32.
        assert error(actual[name], value) <= 1e-7 * value.norm() + 1e-12, name
