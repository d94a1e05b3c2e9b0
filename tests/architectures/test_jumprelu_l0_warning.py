"""A JumpReLU whose L0 settles where training makes no sense is warned about, once."""

import warnings
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput

from saelens_sparse.architectures.jumprelu import L0_CHECK_STEPS, SparseJumpReLUTrainingSAE
from tests.support.jumprelu import make_jumprelu, sparse_jumprelu

WARM_UP = 100


def make_sae(threshold: float, **cfg: Any) -> SparseJumpReLUTrainingSAE:
    sae = sparse_jumprelu(make_jumprelu(l0_warm_up_steps=WARM_UP, **cfg))
    with torch.no_grad():
        sae.threshold.fill_(threshold)
    return sae


def messages_of_steps(sae: SparseJumpReLUTrainingSAE, first_step: int) -> list[str]:
    """What three steps from the given one warn about."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(first_step, first_step + 3):
            sae.training_forward_pass(
                TrainStepInput(
                    sae_in=torch.randn(16, sae.cfg.d_in),
                    coefficients={"l0": 1.0},
                    dead_neuron_mask=None,
                    n_training_steps=step,
                    is_logging_step=False,
                )
            )
    return [str(warning.message) for warning in caught if "L0 of the SAE" in str(warning.message)]


@pytest.mark.parametrize(
    ("threshold", "cfg", "advice"),
    [
        (0.0, {}, "more than half of d_in=13"),
        (1e3, {}, "less than one latent on a row"),
        (
            0.0,
            {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 1.0},
            "far from target_l0=1",
        ),
    ],
)
def test_an_l0_that_makes_no_sense_is_warned_about_once(
    threshold: float, cfg: dict[str, Any], advice: str
) -> None:
    sae = make_sae(threshold, **cfg)
    (message,) = messages_of_steps(sae, WARM_UP + L0_CHECK_STEPS)
    assert advice in message
    assert not messages_of_steps(sae, 2 * (WARM_UP + L0_CHECK_STEPS))


def test_before_it_has_settled_any_l0_is_fine() -> None:
    assert not messages_of_steps(make_sae(0.0), WARM_UP + L0_CHECK_STEPS - 3)


def test_an_l0_as_asked_for_is_fine() -> None:
    sae = make_sae(0.0, jumprelu_sparsity_loss_mode="quadratic", target_l0=20.0)
    assert not messages_of_steps(sae, WARM_UP + L0_CHECK_STEPS)
