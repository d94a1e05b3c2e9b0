"""What an optimizer has to know of the parameters of a sparse SAE."""

from torch import nn

FUSED_ADAM = "_saelens_sparse_fused_adam"
MOMENTS_SALT = "_saelens_sparse_moments_salt"
# Weights whose moments can be in bfloat16, and what tells their random bits apart: the fraction of
# pi in hexadecimal, its first and third 32 bits.
SALTS = {"W_enc": 0x243F6A88, "W_dec": 0x13198A2E}


def mark_parameter(
    parameter: nn.Parameter, fused_adam: bool, moments_salt: int | None = None
) -> None:
    """
    Declare a parameter of a sparse SAE.

    Args:
        parameter: the parameter.
        fused_adam: whether the Adam that updates it may be fused.
        moments_salt: of the stochastic rounding of its moments, which are in bfloat16 then.
    """
    setattr(parameter, FUSED_ADAM, fused_adam)
    setattr(parameter, MOMENTS_SALT, moments_salt)


def moments_salt(parameter: nn.Parameter) -> int | None:
    """The salt for a parameter whose moments are in bfloat16; None for others."""
    return getattr(parameter, MOMENTS_SALT, None)
