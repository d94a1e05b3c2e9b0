"""
The check made before anything is timed: do two contenders train the same model?

Each contender takes the same few steps from the same weights and optimizer state. Its distance from
a reference (stock in a higher precision) may be at most twice that of stock in the measured
precision, plus a floor. The floor allows for a few rows in which two latents tie at the boundary
of the top k up to rounding, so that either may be selected, or in which one is that close to its
threshold: losses hardly move then, one latent's gradient may come or go, and Adam, which gives any
gradient the same step at first, may move that latent by a whole step.

Peers update their weights by recipes of their own. They are held to the same bounds in what their
first step computes before its update: loss, reconstruction and gradients.
"""

from __future__ import annotations

import torch

from benchmarks.rows import DisagreementError

CHECK_STEPS = 3
"""More than one, for a sparse SAE that has yet to measure its density takes a dense step first."""
CHECKED_LATENTS = 2048
FLOORS = {
    "loss": 1e-4,
    "decoded": 1e-2,
    "reconstruction": 1e-2,
    "firing counts": 1e-2,
    "gradient": 1e-2,
    "change": 5e-2,
}
"""By kind of quantity (see `kind_of`)."""

Trajectory = dict[str, torch.Tensor]
Differences = dict[str, float]


def sample_latents(value: torch.Tensor, d_sae: int) -> torch.Tensor:
    """A detached copy; of more than `CHECKED_LATENTS` latents only as many, drawn by seed."""
    value = value.detach()
    if d_sae <= CHECKED_LATENTS or d_sae not in value.shape:
        return value.clone()
    latents = torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))[:CHECKED_LATENTS]
    return value.index_select(value.shape.index(d_sae), latents.to(value.device))


def first_step(trajectory: Trajectory) -> Trajectory:
    """What of a trajectory is known before the first update: all that peers share with stock."""
    of_first_step = {
        name: value[:1] for name, value in trajectory.items() if kind_of(name) == "gradient"
    }
    of_first_step["mse_loss"] = trajectory["mse_loss"][:1]
    of_first_step["reconstruction"] = trajectory["reconstruction of the first step"]
    return of_first_step


def differences(trajectory: Trajectory, reference: Trajectory, device: str = "cpu") -> Differences:
    """
    By quantity, the norm of the difference over the norm of the reference.

    Args:
        trajectory: A contender's. Gradients that it lacks are passed over, nothing else is.
        reference: What it is compared with.
        device: Where to compute them.

    Raises:
        DisagreementError: The contender has other quantities than the reference.
    """
    lacking = {n for n in reference.keys() - trajectory.keys() if kind_of(n) != "gradient"}
    if lacking or trajectory.keys() - reference.keys():
        raise DisagreementError(
            f"quantities differ: {sorted(trajectory)} against {sorted(reference)}"
        )
    return {
        name: _relative_error(value.to(device), reference[name].to(device))
        for name, value in trajectory.items()
    }


def kind_of(name: str) -> str:
    """The kind of a quantity: "loss" of every loss term, "gradient" of "gradient of W_dec"."""
    return "loss" if "loss" in name else name.split(" of ", maxsplit=1)[0]


def require_agreement(found: Differences, stock: Differences) -> None:
    """
    Args:
        found: A contender's differences from the reference, of the quantities that it has.
        stock: Those of stock.

    Raises:
        DisagreementError: A quantity is farther from the reference than stock's own rounding
            explains, or is NaN.
    """
    excess = [
        f"{name} is off by {found[name]:.1e} (stock by {stock[name]:.1e}, allowed {bound:.1e})"
        for name, bound in ((name, 2 * stock[name] + FLOORS[kind_of(name)]) for name in found)
        if not found[name] <= bound
    ]
    if excess:
        raise DisagreementError("; ".join(excess))


def _relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double()
    error = (value.double() - reference).norm().item()
    return error / reference.norm().item() if error else 0.0
