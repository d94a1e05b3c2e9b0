"""The configuration that every sparse architecture has besides its stock one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from sae_lens.util import str_to_dtype

from saelens_sparse.choice.availability import IMPLEMENTATIONS, Implementation
from saelens_sparse.config.require import require_bool, require_choice, require_int, require_number
from saelens_sparse.ops.common.precision import FLOAT8_MULTIPLE, SCREEN_DTYPES, ScreenDtype

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAEConfig

    _ConfigBase = TrainingSAEConfig
else:
    _ConfigBase = object


@dataclass
class SparseTrainingSAEConfigMixin(_ConfigBase):
    """The fields that every sparse architecture adds to its stock configuration.

    Raises:
        TypeError: a field has a value of a wrong type; the message names it.
        ValueError: a field has a value out of range; the message names it.
    """

    implementation: Implementation = "auto"
    screen_buffer_mib: int = 1024
    screen_dtype: ScreenDtype = "auto"
    fused_adam: bool = True
    gradient_buffers: bool = False
    cuda_graph: bool = True
    moments: Literal["bfloat16"] | None = None

    def __post_init__(self) -> None:
        require_int("d_in", self.d_in, 1)
        require_int("d_sae", self.d_sae, 1)
        require_int("screen_buffer_mib", self.screen_buffer_mib, 1)
        if self.decoder_init_norm is not None:
            require_number("decoder_init_norm", self.decoder_init_norm)
            if self.decoder_init_norm <= 0:
                raise ValueError(
                    f"decoder_init_norm must be positive or None; got {self.decoder_init_norm}"
                )
        require_bool("fused_adam", self.fused_adam)
        require_bool("gradient_buffers", self.gradient_buffers)
        require_bool("cuda_graph", self.cuda_graph)
        require_bool("apply_b_dec_to_input", self.apply_b_dec_to_input)
        if not str_to_dtype(self.dtype).is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype; got {self.dtype!r}")
        require_choice("implementation", self.implementation, IMPLEMENTATIONS)
        require_choice("screen_dtype", self.screen_dtype, SCREEN_DTYPES)
        if self.screen_dtype == "float8":
            self._check_float8()
        self._check_moments()
        super().__post_init__()

    def _check_float8(self) -> None:
        for name, size in (("d_in", self.d_in), ("d_sae", self.d_sae)):
            if size % FLOAT8_MULTIPLE != 0:
                raise ValueError(
                    f"{name} must be a multiple of {FLOAT8_MULTIPLE} with screen_dtype='float8'; "
                    f"got {size}"
                )
        if str_to_dtype(self.dtype) != torch.float32:
            raise ValueError(
                "dtype must be 'float32' with screen_dtype='float8' (autocast may be on); "
                f"got {self.dtype!r}"
            )
        if self.implementation not in ("auto", "triton"):
            raise ValueError(
                "implementation must be 'auto' or 'triton' with screen_dtype='float8'; "
                f"got {self.implementation!r}"
            )

    def _check_moments(self) -> None:
        if self.moments is None:
            return
        if self.moments != "bfloat16":
            raise ValueError(f"moments must be 'bfloat16' or None; got {self.moments!r}")
        dtype = str_to_dtype(self.dtype)
        if dtype != torch.float32:
            raise ValueError(moments_need_float32(dtype))
        if not self.fused_adam:
            raise ValueError(
                "moments='bfloat16' needs fused_adam=True: the update that rounds moments "
                "stochastically is a fused one; got fused_adam=False"
            )


def moments_need_float32(dtype: torch.dtype) -> str:
    """Why the moments of an SAE in another dtype are not rounded stochastically."""
    reason = (
        "Moments of a bfloat16 SAE are bfloat16 already, rounded to nearest"
        if dtype == torch.bfloat16
        else "Moments of other SAEs have the dtype of their weights"
    )
    name = str(dtype).removeprefix("torch.")
    return f"moments='bfloat16' needs an SAE in float32; its dtype is {name}. {reason}."
