"""Whether somebody has changed a tensor in place."""

import torch


def version_of(tensor: torch.Tensor) -> int:
    """Autograd's count of in-place changes; tensors made in inference mode have none."""
    return 0 if tensor.is_inference() else tensor._version
