"""Top-K training SAE that computes only what is active. Counterpart of SAELens's `topk_sae.py`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import (
    SAEConfig,
    TrainStepInput,
    TrainStepOutput,
    _disable_hooks,  # pyright: ignore[reportPrivateUsage]
)
from sae_lens.saes.topk_sae import TopK, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.util import str_to_dtype
from typing_extensions import override

from saelens_sparse.implementation import IMPLEMENTATIONS, Choice, Implementation
from saelens_sparse.lazy import (
    DeadLatents,
    DeferredPreActs,
    SparseCode,
    SparseFeatureActs,
    version_of,
)
from saelens_sparse.ops import (
    HostCount,
    LatentOrder,
    RowBlock,
    decode_selected,
    encode_selected,
    keep_topk,
    start_select_topk,
)
from saelens_sparse.saes.base import SparseTrainingSAEMixin

# GEMMs over the dead latents are padded to a multiple of this: with an odd width they lose
# Hopper's instructions and take 2.4 times as long.
_DEAD_ALIGNMENT = 64


_F = TypeVar("_F", bound=Callable[..., Any])


def _not_compiled(function: _F) -> _F:
    """`torch.compiler.disable` with its type kept."""
    return cast(_F, torch.compiler.disable(function))


@dataclass
class SparseTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """
    Configuration class for training a SparseTopKTrainingSAE.

    Every field of SAELens's TopKTrainingSAEConfig has the same default and meaning. The SAE
    that is saved for inference is a stock `topk` SAE.

    Args:
        implementation (Literal["auto", "triton", "torch", "dense"]): What computes the SAE.
            "triton" are the GPU kernels, "torch" is sparse PyTorch for any device, "dense" is
            SAELens's own arithmetic. "auto" takes the fastest that works.
        screen_buffer_mib (int): Bound on the size of the buffer that holds the pre-activations
            of one chunk of rows while their top k are selected, in MiB.
        fused_adam (bool): Let SAELens's Adam run as PyTorch's fused kernel: the same update up to
            rounding, in less time and memory. Checkpoints are the same either way.
        use_sparse_activations (bool): Accepted for compatibility. The plugin never holds dense
            activations, so that there is nothing left for it to do.
        k (int): Number of top latents to keep active. Inherited from TopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient for the auxiliary loss (AuxK) that revives
            dead latents. Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already normalized.
            Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder weights to.
            Inherited from TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): Number of latents. Inherited from SAEConfig.
        dtype (str): Data type of the SAE's parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input
            before encoding. Inherited from SAEConfig.
        normalize_activations (Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm", "covariance_whitening"]):
            Normalization of the input activations. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations.
            Inherited from SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training. Inherited from SAEConfig.
    """  # noqa: E501

    implementation: Implementation = "auto"
    screen_buffer_mib: int = 1024
    fused_adam: bool = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_sparse"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    @override
    def __post_init__(self) -> None:
        _require_int("d_in", self.d_in, 1)
        _require_int("d_sae", self.d_sae, 1)
        _require_int("k", self.k, 1)
        if self.k > self.d_sae:
            raise ValueError(f"k must be at most d_sae={self.d_sae}; got {self.k}")
        _require_int("screen_buffer_mib", self.screen_buffer_mib, 1)
        _require_number("aux_loss_coefficient", self.aux_loss_coefficient)
        if self.decoder_init_norm is not None:
            _require_number("decoder_init_norm", self.decoder_init_norm)
            if self.decoder_init_norm <= 0:
                raise ValueError(
                    f"decoder_init_norm must be positive or None; got {self.decoder_init_norm}"
                )
        if not isinstance(self.fused_adam, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"fused_adam must be a bool; got {self.fused_adam!r}")
        if not str_to_dtype(self.dtype).is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype; got {self.dtype!r}")
        if self.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; "
                f"got {self.implementation!r}"
            )
        if self.use_sparse_activations:
            _say_sparse_activations_are_moot()
        super().__post_init__()


class SparseTopKTrainingSAE(SparseTrainingSAEMixin, TopKTrainingSAE):
    """
    Top-K SAE that trains the same model as SAELens's TopKTrainingSAE, computing only what is
    active: the top k are selected from a screen instead of a dense hidden state, decode and
    every gradient touch the active latents alone, and AuxK costs what the dead latents cost.

    In a training step `feature_acts` and `hidden_pre` are `OnDemandTensor`s; everything else
    that SAELens's public methods return are ordinary tensors. A hook on the pre-activations,
    the activations or the reconstruction makes that call dense, as in stock.
    """

    cfg: SparseTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _dead_count: HostCount | None = None

    @property
    def implementation(self) -> Choice:
        """What the next call runs on, and why."""
        if self._topk is None:
            return Choice("dense", "activation_fn was replaced by another than SAELens's TopK")
        return self.choose(self._topk.k / self.cfg.d_sae)

    @property
    def _topk(self) -> TopK | None:
        """The activation function, whose k stock obeys too; None if it was replaced."""
        return self.activation_fn if isinstance(self.activation_fn, TopK) else None

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return TopK(self.cfg.k, use_sparse_activations=False)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self.implementation.name == "dense":
            return super().training_forward_pass(step_input)
        return self._sparse_training_forward_pass(step_input)

    # The kernels leave nothing for a compiler to fuse, and the lazy tensors are not for it.
    @_not_compiled
    def _sparse_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        mask = step_input.dead_neuron_mask
        # Queued first, the count has reached the host by the time that the encoder asks for it.
        self._dead_count = None if mask is None else HostCount(mask)
        try:
            output = super().training_forward_pass(step_input)
        finally:
            self._dead_count = None
        if isinstance(output.feature_acts, SparseFeatureActs):
            code = output.feature_acts.code
            output.metrics["rows_recomputed"] = code.rows_recomputed
        return output

    @override
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations `[..., d_sae]` as an ordinary tensor, for any leading shape."""
        feature_acts, _ = self.encode_with_hidden_pre(x)
        if isinstance(feature_acts, SparseFeatureActs):
            return feature_acts.materialized()
        return feature_acts

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Feature activations and pre-activations, both `[..., d_sae]`, computed on demand.

        Args:
            x: `[..., d_in]` floating point, on the SAE's device.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x has another width than d_in or is on another device.
        """
        self.check_input(x)
        choice = self.implementation
        if choice.name == "dense" or self._topk is None:
            return super().encode_with_hidden_pre(x)
        self.prepare_weights()
        W_enc = self.W_enc

        # As process_sae_in, keeping the input and the bias apart: b_dec's gradient through a
        # constant input needs no gradient of the input.
        normed = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        normed = self.run_time_activation_norm_fn_in(normed)
        leading_shape = normed.shape[:-1]
        centred = normed.reshape(-1, self.cfg.d_in)
        input_bias = None
        if self.cfg.apply_b_dec_to_input:
            input_bias = None if normed.requires_grad else self.b_dec
            with torch.set_grad_enabled(torch.is_grad_enabled() and input_bias is None):
                centred = centred - self.b_dec

        norms = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        pending = start_select_topk(
            centred,
            W_enc.T,
            self.b_enc,
            norms,
            self._topk.k,
            choice.backend,
            self.cfg.screen_buffer_mib * 2**20,
        )
        # Sorting keeps the device busy while the host waits for the selection's check.
        order = LatentOrder.of_keys(pending.selection.keys, self.cfg.d_sae)
        selection = pending.result()
        if selection is not pending.selection:
            order = LatentOrder.of_keys(selection.keys, self.cfg.d_sae)
        dead = self._dead_latents()
        acts, dead_W_enc = encode_selected(
            centred,
            W_enc,
            self.b_enc,
            input_bias,
            selection,
            order,
            None if dead is None else dead.block,
            choice.backend,
        )
        if dead is not None:
            dead.W_enc = dead_W_enc
        code = SparseCode(
            x=centred,
            latents=selection.latents,
            acts=acts,
            norms=norms,
            order=order,
            decoder_version=version_of(self.W_dec),
            rows_recomputed=selection.rows_recomputed,
            backend=choice.backend,
            dead=dead,
        )
        hidden_pre = DeferredPreActs(
            code, leading_shape, self._dense_pre_acts, (self.W_enc, self.b_enc, self.W_dec)
        )
        return SparseFeatureActs(code, leading_shape), hidden_pre

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """
        Reconstruction `[..., d_in]` from feature activations `[..., d_sae]`: sparse for the
        activations of `encode_with_hidden_pre`, dense for ordinary tensors.
        """
        if not isinstance(feature_acts, SparseFeatureActs):
            return super().decode(feature_acts)
        code = feature_acts.code
        weights_changed = code.decoder_version != version_of(self.W_dec)
        if self.implementation.name == "dense" or weights_changed or not feature_acts.is_untouched:
            return super().decode(feature_acts.materialized())
        dead = code.dead
        recons, dead_W_dec = decode_selected(
            code.acts,
            self.W_dec,
            code.latents,
            code.order,
            None if dead is None else dead.block,
            code.backend,
        )
        if dead is not None:
            dead.W_dec = dead_W_dec
        sae_out_pre = (recons + self.b_dec).view(*feature_acts.shape[:-1], self.cfg.d_in)
        sae_out_pre = self.hook_sae_recons(sae_out_pre)
        sae_out_pre = self.run_time_activation_norm_fn_out(sae_out_pre)
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through the SAE, as stock's; nothing dense unless a hook asks for it."""
        sae_out = self.decode(self.encode_with_hidden_pre(x)[0])
        if self.use_error_term:
            with torch.no_grad():
                with _disable_hooks(self):
                    clean = self.decode(self.encode_with_hidden_pre(x)[0])
                sae_error = self.hook_sae_error(x - clean)
            sae_out = sae_out + sae_error
        return self.hook_sae_output(sae_out)

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: torch.Tensor,
        sae_out: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead_neuron_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        AuxK loss of the dead latents, computed on their rows of the weights alone.

        Formula: Gao et al. 2024 (arXiv:2406.04093), appendix A.2 and B.1, as in SAELens.
        """
        code = hidden_pre.code if isinstance(hidden_pre, DeferredPreActs) else None
        if code is None or code.dead is None or code.dead.mask is not dead_neuron_mask:
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)
        dead = code.dead
        if dead.block is None:
            return sae_out.new_zeros(())
        if (
            dead.W_enc is None
            or dead.W_dec is None
            or self.cfg.normalize_activations
            in (
                "constant_norm_rescale",
                "layer_norm",
            )
        ):
            # Not decoded sparsely; or refused by stock, in its own words.
            return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)

        n_dead = dead.block.latents.numel()
        k_aux = sae_in.shape[-1] // 2
        scale = min(n_dead / k_aux, 1.0)
        values = self._dead_acts(code, dead.block, dead.W_enc, k_aux)
        residual = (sae_in - sae_out).detach()
        recons = self.reshape_fn_out((values @ dead.W_dec).view_as(residual), self.d_head)
        auxk_loss = (recons - residual).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * scale * auxk_loss

    def _dead_latents(self) -> DeadLatents | None:
        """The dead latents of the training step in progress, if one is."""
        if self._dead_count is None:
            return None
        mask, n_dead = self._dead_count.mask, self._dead_count.wait()
        if n_dead == 0:
            return DeadLatents(mask, None)
        latents = torch.nonzero_static(mask, size=n_dead).squeeze(1)
        width = -(-n_dead // _DEAD_ALIGNMENT) * _DEAD_ALIGNMENT
        return DeadLatents(mask, RowBlock(latents, width))

    def _dead_acts(
        self, code: SparseCode, block: RowBlock, W_enc: torch.Tensor, k_aux: int
    ) -> torch.Tensor:
        """Values `[n_rows, width]` of the dead latents, without a ReLU, zero for all but the top
        `k_aux` of a row.
        """
        n_dead = block.latents.numel()
        bias = self.b_enc.index_select(0, block.latents)
        if self._input_bias_is_cut_off(code):
            # Zero in value: gives b_dec its gradient by one matrix-vector product.
            bias = bias - W_enc.detach()[:n_dead] @ (self.b_dec - self.b_dec.detach())
        products = code.x @ W_enc.T
        if k_aux >= n_dead:
            return products + F.pad(bias, (0, block.width - n_dead))
        # The decoder norms steer the selection; in the reconstruction they cancel.
        norms = None if code.norms is None else code.norms.detach()[block.latents]
        return keep_topk(products, bias, norms, k_aux, code.backend)

    def _input_bias_is_cut_off(self, code: SparseCode) -> bool:
        """Whether b_dec was subtracted from the encoder's input outside of the graph."""
        return self.cfg.apply_b_dec_to_input and not code.x.requires_grad

    def _dense_pre_acts(self, code: SparseCode) -> torch.Tensor:
        x = code.x
        if self._input_bias_is_cut_off(code):
            x = x - (self.b_dec - self.b_dec.detach())  # zero in value
        hidden_pre = x @ self.W_enc + self.b_enc
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        return hidden_pre


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")


def _require_int(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


@cache
def _say_sparse_activations_are_moot() -> None:
    warnings.warn(
        "use_sparse_activations=True has nothing left to do in topk_sparse: activations are "
        "never dense.",
        stacklevel=4,
    )
