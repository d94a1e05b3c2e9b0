"""What an optimizer has to know of the parameters of a sparse SAE."""

from torch import nn

FUSED_ADAM = "_saelens_sparse_fused_adam"


def mark_parameter(parameter: nn.Parameter, fused_adam: bool) -> None:
    """Declare a parameter of a sparse SAE, and whether the Adam that updates it may be fused."""
    setattr(parameter, FUSED_ADAM, fused_adam)
