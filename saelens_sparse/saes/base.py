"""What every sparse training SAE shares: weight layout, hooks, choice of implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saelens_sparse.implementation import Choice, choose_implementation
from saelens_sparse.optim import mark_parameter

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object

# PyTorch's own registries: HookPoint.has_hooks() does not see hooks registered past it.
_HOOK_DICTS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DENSE_HOOKS = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")


class SparseTrainingSAEMixin(_Base):
    """Mixed into a stock `TrainingSAE` whose forward pass it replaces by a sparse one.

    `W_enc` keeps SAELens's shape `[d_in, d_sae]` and lies in memory as contiguous
    `[d_sae, d_in]` rows, so that each latent's encoder vector is one contiguous read.
    """

    def choose(self, density: float) -> Choice:
        """What runs for the next call, and why."""
        for name in DENSE_HOOKS:
            if has_hooks(getattr(self, name)):
                return Choice("dense", f"a hook on {name} needs a dense tensor")
        return choose_implementation(
            self.cfg.implementation, self.W_enc.device, self.W_enc.dtype, density
        )

    def prepare_weights(self) -> None:
        """Bring `W_enc` into latent-major layout if something replaced its storage, and say to
        the optimizer whose parameters these are.

        Loading, moving or folding weights may leave any layout behind; the parameter objects,
        and with them the optimizer's state, stay the same.
        """
        W_enc = self.W_enc
        if not W_enc.T.is_contiguous():
            with torch.inference_mode(False):
                W_enc.data = W_enc.data.T.contiguous().T
                if W_enc.grad is not None:
                    W_enc.grad = torch.empty_like(W_enc).copy_(W_enc.grad)
        for parameter in self.parameters():
            mark_parameter(parameter, self.cfg.fused_adam)

    def check_input(self, x: torch.Tensor) -> None:
        """Raise a named error for an input that the SAE cannot encode."""
        if not isinstance(x, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"x must be a torch.Tensor; got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a floating-point dtype; got {x.dtype}")
        if x.device != self.W_enc.device:
            raise ValueError(f"x must be on the SAE's device {self.W_enc.device}; got {x.device}")
        hook_z = self.hook_z_reshaping_mode
        width = x.shape[-2 if hook_z else -1 :].numel()
        if x.ndim < (2 if hook_z else 1) or width != self.cfg.d_in:
            raise ValueError(
                f"x must have d_in={self.cfg.d_in} as its width; got shape {list(x.shape)}"
            )

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # safetensors takes contiguous tensors only, and stock's layout is what others expect.
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()


def has_hooks(hook_point: nn.Module) -> bool:
    """Whether any hook is attached to a hook point (or to what stands in for it)."""
    return any(getattr(hook_point, hooks) for hooks in _HOOK_DICTS)
