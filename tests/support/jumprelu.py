"""Stock and sparse JumpReLU SAEs, and inputs that decide every gate and every window edge."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

from saelens_sparse import SparseJumpReLUTrainingSAE
from tests.conftest import TARGETS, Target, marks
from tests.support.saes import (
    FLOAT32,
    FLOAT64,
    Precision,
    compare_steps,
    forward_pass,
    randomize,
    sparse_like,
    stock_like,
    superposed_rows,
)

# How far a pre-activation must be from an edge for a float32 and for a bfloat16 encoder.
FLOAT32_MARGIN, BFLOAT16_MARGIN = 1e-4, 0.03

# On a GPU with the kernels, as `auto` would go on.
FUSED = {
    f"fused-{name}": Target("fused", name, TARGETS[f"{backend}-{name}"].dtypes)
    for name, backend in {"cpu": "torch", "cuda": "triton"}.items()
}
# Each way to compute a step: sparse with either backend, and the fused dense path.
PATHS = {**TARGETS, **FUSED}

MODES: dict[str, dict[str, Any]] = {
    "step": {"jumprelu_sparsity_loss_mode": "step"},
    "tanh": {"jumprelu_sparsity_loss_mode": "tanh"},
    "quadratic": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.5},
}
OPTIONS: dict[str, dict[str, Any]] = {
    f"{mode}-{'ste-to-input' if ste else 'ste-to-threshold'}-"
    f"{'centred' if centre else 'uncentred'}": {
        **MODES[mode],
        "jumprelu_ste_to_input": ste,
        "apply_b_dec_to_input": centre,
    }
    for mode, ste, centre in itertools.product(MODES, (True, False), (True, False))
}
# Each mode once, and each mode twice; every option takes both of its values.
THREE_OPTIONS, SIX_OPTIONS = (
    dict(list(OPTIONS.items())[i] for i in chosen) for chosen in ((0, 7, 9), (0, 3, 5, 6, 8, 11))
)
D_IN, D_SAE = 13, 64


def parameters_of(targets: Mapping[str, Target]) -> list[Any]:
    return [
        pytest.param(target, id=name, marks=marks(target))
        for name, target in targets.items()
        if target.runs_here
    ]


# A step in Triton's interpreter takes seconds: what has to do with the kernels runs there too.
FAST_PATHS = {name: target for name, target in PATHS.items() if not target.interpreted}
every_path = pytest.mark.parametrize("target", parameters_of(PATHS))
every_fast_path = pytest.mark.parametrize("target", parameters_of(FAST_PATHS))
every_mode = pytest.mark.parametrize("mode", MODES)


def make_jumprelu(
    *, dtype: torch.dtype = torch.float32, device: str = "cpu", **cfg: Any
) -> JumpReLUTrainingSAE:
    """A stock SAE with random weights and thresholds from the global generator."""
    cfg = {"d_in": D_IN, "d_sae": D_SAE, **cfg}
    stock = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(**cfg, dtype=str(dtype).removeprefix("torch."), device=device)
    )
    randomize(stock)
    with torch.no_grad():
        stock.b_enc.sub_(0.5)
        # Exact in bfloat16, to which stock rounds them at use.
        stock.threshold.copy_((0.6 * torch.rand(stock.cfg.d_sae)).bfloat16())
    return stock


def sparse_jumprelu(
    stock: JumpReLUTrainingSAE, implementation: str = "torch", **changes: Any
) -> SparseJumpReLUTrainingSAE:
    """As `sparse_like`."""
    return sparse_like(stock, implementation, **changes)


def margin_of(precision: Precision) -> float:
    return FLOAT32_MARGIN if precision.eps < 1e-3 else BFLOAT16_MARGIN


def pre_acts(sae: JumpReLUTrainingSAE, x: torch.Tensor) -> torch.Tensor:
    """Pre-activations `[n_rows, d_sae]` in float64."""
    with torch.no_grad():
        return stock_like(sae).encode_with_hidden_pre(x.double())[1].flatten(end_dim=-2)


def edge_distances(sae: JumpReLUTrainingSAE, hidden_pre: torch.Tensor) -> torch.Tensor:
    """`[..., d_sae]`: distance to the gate or the nearer edge of the straight-through window."""
    from_gate = (hidden_pre - sae.threshold.detach().double()).abs()
    return torch.minimum(from_gate, (from_gate - sae.cfg.jumprelu_bandwidth / 2).abs())


def in_window(sae: JumpReLUTrainingSAE, hidden_pre: torch.Tensor) -> torch.Tensor:
    from_gate = (hidden_pre - sae.threshold.detach().double()).abs()
    return from_gate < sae.cfg.jumprelu_bandwidth / 2


def decide(sae: JumpReLUTrainingSAE, x: torch.Tensor, margin: float, n_shifts: int = 80) -> None:
    """Shift `b_enc` a little, so that no pre-activation is nearer than `margin` to an edge.

    Every other latent takes the shift that puts the most pre-activations into its window.
    """
    hidden_pre = pre_acts(sae, x)
    b_enc = sae.b_enc.detach()
    spread = torch.linspace(0, 1, n_shifts).repeat_interleave(2)
    spread[1::2].neg_()
    # Exact in bfloat16, so that every precision sees the same bias.
    candidates = (b_enc + spread.to(b_enc).unsqueeze(1)).bfloat16()
    shifts = candidates.double() - b_enc.double()
    shifted = hidden_pre + shifts.unsqueeze(1)
    decided = (edge_distances(sae, shifted) > margin).all(1)
    assert decided.any(0).all(), "some latent cannot be decided by a shift of its bias"
    rank = torch.arange(len(shifts), device=x.device).unsqueeze(1)
    n_in_window = in_window(sae, shifted).sum(1)
    n_in_window[:, 1::2] = 0
    score = torch.where(decided, n_in_window * len(shifts) - rank, -(10**9))
    with torch.no_grad():
        sae.b_enc.copy_(candidates.gather(0, score.argmax(0, keepdim=True))[0])


def decided_inputs(
    sae: JumpReLUTrainingSAE, n_rows: int, precision: Precision, shape: tuple[int, ...] = ()
) -> torch.Tensor:
    """Superposed rows for which `sae`, whose biases it shifts, decides every gate and edge."""
    x = superposed_rows(sae, n_rows)
    if shape:
        x = x.view(n_rows, *shape)
    decide(sae, x, margin_of(precision))
    return x


def compare_jumprelu_steps(
    stock: JumpReLUTrainingSAE,
    target: Target,
    x: torch.Tensor,
    dead: torch.Tensor | None,
    precision: Precision,
    **options: Any,
) -> None:
    """One step on `target`'s path, held against stock in float64; see `compare_steps`."""
    oracle = stock_like(stock)
    yardstick = stock_like(stock, torch.float32) if precision == FLOAT64 else stock
    with torch.no_grad():
        patterns = [
            forward_pass(sae, x.to(sae.dtype), autocast=autocast).feature_acts > 0
            for sae, autocast in ((oracle, False), (yardstick, precision.autocast))
        ]
    assert torch.equal(*patterns), "stock's own rounding moves gates: the input decides nothing"
    sparse = sparse_jumprelu(stock, target.backend)
    assert sparse.implementation.name == target.backend
    compare_steps(stock, sparse, x, dead, precision, **options)


def bandwidth_of(precision: Precision) -> float:
    """One that holds decided pre-activations."""
    return 0.0625 if margin_of(precision) < 0.01 else 0.5


def make_case(
    target: Target, precision: Precision = FLOAT32, n_rows: int = 40, **cfg: Any
) -> tuple[JumpReLUTrainingSAE, torch.Tensor]:
    """A stock SAE in a given precision, and inputs that it decides."""
    d_sae = 20 if target.interpreted else D_SAE
    cfg = {"d_sae": d_sae, "jumprelu_bandwidth": bandwidth_of(precision), **cfg}
    stock = make_jumprelu(dtype=precision.dtype, device=target.device, **cfg)
    return stock, decided_inputs(stock, target.few_rows(n_rows), precision)
