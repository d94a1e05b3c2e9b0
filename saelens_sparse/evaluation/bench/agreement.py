"""
The check made before anything is timed: do two arms train the same model?

Each arm takes the same few steps from the same weights and optimizer state. Its distance from a
reference (stock in a higher precision) may be at most twice that of stock in the measured
precision, plus a floor. The floor allows for a few rows in which two latents tie at the boundary
of the top k up to rounding, so that either may be selected, or in which one is that close to its
threshold: losses hardly move then, one latent's gradient may come or go, and Adam, which gives any
gradient the same step at first, may move that latent by a whole step.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch

from saelens_sparse.evaluation.cases import Case
from saelens_sparse.evaluation.training import Inputs, Trainer, hold_dead, train_step

CHECK_STEPS = 3
"""More than one, for a sparse SAE that has yet to measure its density takes a dense step first."""
CHECKED_LATENTS = 8192
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


class DisagreementError(Exception):
    """An arm does not train the same model as stock."""


def rehearse(trainer: Trainer, case: Case, inputs: Inputs) -> Trajectory:
    """
    Take the checked steps and record what they did, on the CPU: every loss term by step, the last
    reconstruction, how often each latent fired, each parameter's gradient by step and its change
    (see `sample_latents`).
    """

    def checked_part(value: torch.Tensor) -> torch.Tensor:
        return sample_latents(value, case.d_sae)

    parameters = dict(trainer.sae.named_parameters())
    before = {name: checked_part(parameter) for name, parameter in parameters.items()}
    gradients: dict[str, list[torch.Tensor]] = defaultdict(list)

    def record_gradient(name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            gradients[name].append(checked_part(parameter.grad))

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(record_gradient, name))
        for name, parameter in parameters.items()
    ]
    losses: dict[str, list[torch.Tensor]] = defaultdict(list)
    trajectory: Trajectory = {}
    for batch in inputs.batches[:CHECK_STEPS]:
        hold_dead(trainer, inputs.dead_latents)
        output = train_step(trainer, batch[: case.check_rows])
        for name, loss in {"loss": output.loss, **output.losses}.items():
            losses[name].append(loss.detach())
        trajectory["reconstruction"] = output.sae_out.detach()
    for hook in hooks:
        hook.remove()

    trajectory |= {name: torch.stack(values) for name, values in losses.items()}
    trajectory["firing counts"] = trainer.act_freq_scores
    for name, parameter in parameters.items():
        trajectory[f"gradient of {name}"] = torch.stack(gradients[name])
        trajectory[f"change of {name}"] = checked_part(parameter) - before[name]
    return {name: value.cpu() for name, value in trajectory.items()}


def sample_latents(value: torch.Tensor, d_sae: int) -> torch.Tensor:
    """A detached copy; of more than `CHECKED_LATENTS` latents only as many, drawn by seed."""
    value = value.detach()
    if d_sae <= CHECKED_LATENTS or d_sae not in value.shape:
        return value.clone()
    latents = torch.randperm(d_sae, generator=torch.Generator().manual_seed(0))[:CHECKED_LATENTS]
    return value.index_select(value.shape.index(d_sae), latents.to(value.device))


def differences(trajectory: Trajectory, reference: Trajectory) -> Differences:
    """By quantity, the norm of the difference over the norm of the reference."""
    if trajectory.keys() != reference.keys():
        raise DisagreementError(
            f"quantities differ: {sorted(trajectory)} against {sorted(reference)}"
        )
    return {name: _relative_error(trajectory[name], reference[name]) for name in reference}


def kind_of(name: str) -> str:
    """The kind of a quantity: "loss" of every loss term, "gradient" of "gradient of W_dec"."""
    return "loss" if name.endswith("loss") else name.split(" of ", maxsplit=1)[0]


def require_agreement(arm: Differences, stock: Differences) -> None:
    """
    Raises:
        DisagreementError: A quantity is farther from the reference than stock's own rounding
            explains, or is NaN.
    """
    excess = [
        f"{name} is off by {arm[name]:.1e} (stock by {stock[name]:.1e}, allowed {bound:.1e})"
        for name, bound in ((name, 2 * stock[name] + FLOORS[kind_of(name)]) for name in stock)
        if not arm[name] <= bound
    ]
    if excess:
        raise DisagreementError("; ".join(excess))


def _relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double()
    error = (value.double() - reference).norm().item()
    return error / reference.norm().item() if error else 0.0
