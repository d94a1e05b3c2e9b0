"""Top-K training SAE that computes only what is active. Counterpart of SAELens's `topk_sae.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from sae_lens.saes.sae import SAEConfig, TrainStepInput
from sae_lens.saes.topk_sae import (
    TopK,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from torch import nn
from typing_extensions import override

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.architectures.dead_losses import (
    DEAD_LATENT_LOSSES,
    GHOST_LOSS,
    require_ghosts_work,
)
from saelens_sparse.architectures.fields import SparseTrainingSAEConfigMixin
from saelens_sparse.architectures.hooks import has_hooks
from saelens_sparse.architectures.registry import Architecture, add
from saelens_sparse.choice.availability import Choice
from saelens_sparse.codes.code import Code, PairCode
from saelens_sparse.codes.dead import DeadRows, dead_rows
from saelens_sparse.codes.on_demand import code_of, materialize
from saelens_sparse.codes.step import StepContext
from saelens_sparse.config.require import require_choice, require_int, require_number
from saelens_sparse.ops.activation.ghost import dense_ghost_grad_loss, ghost_grad_loss
from saelens_sparse.ops.activation.pairs import ReLU
from saelens_sparse.ops.activation.topk import keep_topk
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.search.topk import search_topk
from saelens_sparse.ops.update.weight_cache import WeightView
from saelens_sparse.warn import warn_caller


@dataclass
class SparseTopKTrainingSAEConfig(SparseTrainingSAEConfigMixin, TopKTrainingSAEConfig):
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
        screen_dtype (Literal["auto", "float8"]): In what training steps screen pre-activations.
            "auto" misses no latent. "float8" is faster from compute capability 8.9 on, and may miss
            a few: `screen_recall` among the metrics says how many.
        fused_adam (bool): Let SAELens's Adam run as PyTorch's fused kernel: the same update up to
            rounding, in less time and memory. Checkpoints are the same either way.
        gradient_buffers (bool): Hold the gradients of W_enc and W_dec as tensors under
            SparseTrainingRunner too. Without, its update sums them from the active latents where it
            needs them, in less time and memory, and their `.grad` stays None; unless so many
            latents are active that buffers are faster.
        cuda_graph (bool): Let SparseTrainingRunner replay steps as CUDA graphs where that is
            shorter: with up to 2^30 parameters in W_enc, and no dead latents.
        moments (Literal["bfloat16"] | None): Dtype in which SparseTrainingRunner keeps Adam's
            moments of W_enc and W_dec, rounded stochastically. None is SAELens's: the dtype of
            the weights. Moments of biases stay in float32. With "bfloat16", the SAE
            must be in float32, and SAELens's own trainers refuse it.
        use_sparse_activations (bool): Accepted for compatibility. The plugin never holds dense
            activations, so that there is nothing left for it to do.
        k (int): Number of top latents to keep active. Inherited from TopKTrainingSAEConfig.
        dead_latent_loss (Literal["auxk", "ghost"]): What trains dead latents. "auxk" is SAELens's
            AuxK. "ghost" are ghost gradients, reported as `ghost_grad_loss`.
        aux_loss_coefficient (float): Coefficient for the auxiliary loss that revives dead latents,
            AuxK or ghost gradients. Inherited from TopKTrainingSAEConfig.
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

    dead_latent_loss: Literal["auxk", "ghost"] = "auxk"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "topk_sparse"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    @override
    def __post_init__(self) -> None:
        require_int("k", self.k, 1)
        require_int("d_sae", self.d_sae, 1)
        if self.k > self.d_sae:
            raise ValueError(f"k must be at most d_sae={self.d_sae}; got {self.k}")
        require_number("aux_loss_coefficient", self.aux_loss_coefficient)
        require_choice("dead_latent_loss", self.dead_latent_loss, DEAD_LATENT_LOSSES)
        require_ghosts_work(self.dead_latent_loss, self.normalize_activations)
        if self.use_sparse_activations:
            _say_sparse_activations_are_moot()
        super().__post_init__()


class SparseTopKTrainingSAE(SparseTrainingSAEMixin, TopKTrainingSAE):
    """
    Top-K SAE that trains the same model as SAELens's TopKTrainingSAE, computing only what is
    active: the top k are selected from a screen instead of a dense hidden state, decode and
    every gradient touch the active latents alone, and AuxK or ghost gradients cost what the dead
    latents cost.
    """

    cfg: SparseTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    # What SAELens's own activation function is, if nobody has replaced it.
    stock_activation: type[nn.Module] = TopK

    @property
    @override
    def implementation(self) -> Choice:
        if self._k is None:
            name = self.stock_activation.__name__
            return Choice("dense", f"activation_fn is not SAELens's {name}, or has hooks")
        return self.choose(self._k / self.cfg.d_sae)

    @property
    def _k(self) -> float | None:
        """The k of the activation function, which stock obeys too; None if that is not SAELens's
        own, or does more.
        """
        function, stock = self.activation_fn, self.stock_activation
        if not isinstance(function, stock) or type(function).forward is not stock.forward:
            return None
        if "forward" in vars(function) or has_hooks(function):
            return None
        return cast(Any, function).k

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return TopK(self.cfg.k, use_sparse_activations=False)

    @property
    @override
    def activation(self) -> ReLU:
        return ReLU()

    @override
    def reported_norms(self, step: StepContext) -> torch.Tensor | None:
        return self.decoder_norms(step) if self.cfg.rescale_acts_by_decoder_norm else None

    @override
    def search(self, x: torch.Tensor, norms: torch.Tensor | None, step: StepContext) -> FoundPairs:
        assert self._k is not None
        return search_topk(
            x,
            self.W_enc.T,
            self.b_enc,
            norms,
            int(self._k),
            step.choice.backend,
            self.cfg.screen_buffer_mib * 2**20,
            self.rounded_W_enc(step),
            step.screen_dtype,
        )

    @property
    @override
    def weight_views(self) -> Mapping[str, WeightView]:
        scaled: dict[str, WeightView] = {"W_dec": "norms"}
        return {**super().weight_views, **(scaled if self.cfg.rescale_acts_by_decoder_norm else {})}

    @override
    def graph_key(self) -> object | None:
        cfg = self.cfg
        settings = (cfg.rescale_acts_by_decoder_norm, cfg.dead_latent_loss)
        return None if self._k is None else (self._k, *settings)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The loss of the dead latents, under the name of its kind."""
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        if not self.trains_ghosts:
            return losses
        (loss,) = losses.values()
        return {GHOST_LOSS: loss}

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: torch.Tensor,
        sae_out: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead_neuron_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Loss of the dead latents for the error of the SAE, computed on their rows of the weights
        alone: AuxK's, or that of ghost gradients.

        Formula of AuxK: Gao et al. 2024 (arXiv:2406.04093), appendix A.2 and B.1, as in SAELens.
        """
        code = code_of(hidden_pre)
        rows = dead_rows(None if code is None else code.dead, dead_neuron_mask)
        if dead_neuron_mask is None or rows == []:
            return sae_out.new_zeros(())
        residual = (sae_in - sae_out).detach()
        is_normalized = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        if isinstance(code, PairCode) and rows is not None and not is_normalized:
            return self.cfg.aux_loss_coefficient * self.dead_latent_loss(code, rows[0], residual)
        # Not decoded sparsely; or refused by stock, in its own words.
        if self.trains_ghosts:
            return self.dense_ghost_loss(hidden_pre, dead_neuron_mask, residual)
        return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre, dead_neuron_mask)

    def dead_latent_loss(
        self, code: PairCode, dead: DeadRows, residual: torch.Tensor
    ) -> torch.Tensor:
        """
        How far dead latents are from a residual, by the configured loss, without its coefficient.

        Args:
            code: of the batch.
            dead: the latents.
            residual: `[..., d_in]`, or `[..., n_heads, d_head]`; without a graph.
        """
        if self.trains_ghosts:
            products, bias = self.dead_products(code, dead.block, dead.W_enc)
            return ghost_grad_loss(products, bias, dead.W_dec, residual, code.backend)
        n_dead, k_aux = dead.block.latents.numel(), residual.shape[-1] // 2
        values = self._dead_acts(code, dead.block, dead.W_enc, k_aux)
        error = (values @ dead.W_dec).view_as(residual) - residual
        return min(n_dead / k_aux, 1.0) * error.pow(2).sum(dim=-1).mean()

    def dense_ghost_loss(
        self, hidden_pre: torch.Tensor, dead: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Loss of ghost gradients from pre-activations `[..., d_sae]` of all latents.

        Args:
            hidden_pre: the pre-activations as SAELens reports them.
            dead: `[d_sae]` bool, the dead latents.
            residual: as for `dead_latent_loss`.
        """
        return self.cfg.aux_loss_coefficient * dense_ghost_grad_loss(
            materialize(hidden_pre),
            dead,
            self.W_dec,
            residual,
            is_rescaled=self.cfg.rescale_acts_by_decoder_norm,
        )

    @property
    def trains_ghosts(self) -> bool:
        """Whether ghost gradients train the dead latents, instead of AuxK."""
        return self.cfg.dead_latent_loss == "ghost"

    def _dead_acts(
        self, code: PairCode, block: RowBlock, W_enc: torch.Tensor, k_aux: int
    ) -> torch.Tensor:
        """Values `[n_rows, width]` of the dead latents, without a ReLU, zero for all but the top
        `k_aux` of a row.
        """
        n_dead = block.latents.numel()
        products, bias = self.dead_products(code, block, W_enc)
        if k_aux >= n_dead:
            return products + F.pad(bias, (0, block.width - n_dead))
        # The decoder norms steer the selection; in the reconstruction they cancel.
        norms = None if code.norms is None else code.norms[block.latents]
        return keep_topk(products, bias, norms, k_aux, code.backend)

    @override
    def dense_pre_acts(self, code: Code) -> torch.Tensor:
        hidden_pre = super().dense_pre_acts(code)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        return hidden_pre


@cache
def _say_sparse_activations_are_moot() -> None:
    warn_caller(
        "use_sparse_activations=True has nothing left to do in topk_sparse: activations are "
        "never dense."
    )


TOPK = Architecture(
    sae=SparseTopKTrainingSAE,
    config=SparseTopKTrainingSAEConfig,
    stock_sae=TopKTrainingSAE,
    stock_config=TopKTrainingSAEConfig,
    inference_sae=TopKSAE,
    inference_config=TopKSAEConfig,
    sparsity_field="k",
    demo_config="smollm2_demo_topk.json",
)
add(TOPK)
