"""Which loss trains the dead latents: what the configurations allow, and what a step reports."""

from __future__ import annotations

DEAD_LATENT_LOSSES = ("auxk", "ghost")
"""Of the architectures whose stock counterparts have AuxK."""

GHOST_LOSS = "ghost_grad_loss"
"""Its name among the losses of a step, in place of SAELens's `auxiliary_reconstruction_loss`."""

_NORMALIZATIONS = ("none", "expected_average_only_in", "covariance_whitening")


def require_ghosts_work(dead_latent_loss: object, normalize_activations: str) -> None:
    """
    Refuse ghost gradients where activations are normalized row by row at run time.

    Dead latents would reconstruct in normalized space what is missing in the original one.

    Raises:
        ValueError: both are asked for.
    """
    if dead_latent_loss == "ghost" and normalize_activations not in _NORMALIZATIONS:
        raise ValueError(
            f"normalize_activations must be one of {', '.join(_NORMALIZATIONS)} with "
            f"dead_latent_loss='ghost'; got {normalize_activations!r}"
        )
