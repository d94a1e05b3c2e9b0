"""BatchTopK training SAE that computes only what is active. Counterpart of SAELens's
`batchtopk_sae.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from sae_lens.saes.batchtopk_sae import (
    BatchTopK,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainStepOutput
from torch import nn
from typing_extensions import override

from saelens_sparse.architectures.dead_losses import DEAD_LATENT_LOSSES, require_ghosts_work
from saelens_sparse.architectures.fields import SparseTrainingSAEConfigMixin
from saelens_sparse.architectures.registry import Architecture, add
from saelens_sparse.architectures.topk import SparseTopKTrainingSAE
from saelens_sparse.codes.code import PairCode
from saelens_sparse.codes.on_demand import SparseFeatureActs, materialize
from saelens_sparse.codes.step import StepContext, current_step
from saelens_sparse.config.require import require_bool, require_choice, require_int, require_number
from saelens_sparse.ops.search.batch_topk import search_batch_topk
from saelens_sparse.ops.search.found import FoundPairs

# Of `StepContext.seen`: the smallest positive activation, infinity if none is positive.
_LEAST_ACTIVE = "least_active"


@dataclass
class SparseBatchTopKTrainingSAEConfig(SparseTrainingSAEConfigMixin, BatchTopKTrainingSAEConfig):
    """
    Configuration class for training a SparseBatchTopKTrainingSAE.

    Every field of SAELens's BatchTopKTrainingSAEConfig has the same default and meaning. The SAE
    that is saved for inference is a stock `jumprelu` SAE.

    Args:
        implementation (Literal["auto", "triton", "torch", "dense"]): What computes the SAE.
            "triton" are the GPU kernels, "torch" is sparse PyTorch for any device, "dense" is
            SAELens's own arithmetic. "auto" takes the fastest that works.
        screen_buffer_mib (int): Bound on the size of the buffer that holds the pre-activations
            of one chunk of rows while the largest are found, in MiB.
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
        k (float): Number of latents that are active on a row, on average over the batch. Inherited
            from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Share by which the smallest activation of a batch moves the
            threshold that the saved SAE has. Inherited from BatchTopKTrainingSAEConfig.
        use_sparse_activations (bool): Has no effect, as in SAELens's BatchTopK.
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
        return "batchtopk_sparse"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig

    @override
    def __post_init__(self) -> None:
        require_number("k", self.k)
        require_int("d_sae", self.d_sae, 1)
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k must be above 0 and at most d_sae={self.d_sae}; got {self.k}")
        require_number("topk_threshold_lr", self.topk_threshold_lr)
        if not 0 <= self.topk_threshold_lr <= 1:
            raise ValueError(f"topk_threshold_lr must be in [0, 1]; got {self.topk_threshold_lr}")
        require_number("aux_loss_coefficient", self.aux_loss_coefficient)
        require_bool("rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm)
        require_choice("dead_latent_loss", self.dead_latent_loss, DEAD_LATENT_LOSSES)
        require_ghosts_work(self.dead_latent_loss, self.normalize_activations)
        super().__post_init__()


class SparseBatchTopKTrainingSAE(SparseTopKTrainingSAE, BatchTopKTrainingSAE):
    """
    BatchTopK SAE that trains the same model as SAELens's BatchTopKTrainingSAE, computing only what
    is active: the largest pre-activations of the whole batch, `k` a row on average.

    The threshold of the saved SAE moves once a step, when the step is known to be complete.
    """

    cfg: SparseBatchTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    stock_activation: type[nn.Module] = BatchTopK

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return BatchTopK(self.cfg.k)

    @override
    def search(self, x: torch.Tensor, norms: torch.Tensor | None, step: StepContext) -> FoundPairs:
        assert self._k is not None
        return self.search_sample(x, norms, step, int(self._k * x.shape[0]))

    @override
    def search_sample(
        self, x: torch.Tensor, norms: torch.Tensor | None, step: StepContext, n_found: int
    ) -> FoundPairs:
        return search_batch_topk(
            x,
            self.W_enc.T,
            self.b_enc,
            norms,
            n_found,
            step.choice.backend,
            self.cfg.screen_buffer_mib * 2**20,
            self.rounded_W_enc(step),
            step.screen_dtype,
        )

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        """
        Note the smallest positive activation, by which `commit` moves the threshold.

        Outside of a step, move the threshold at once, as SAELens does.

        Args:
            acts_topk: `[..., d_sae]`, the activations as reported.
        """
        step = current_step(self)
        if step is None:
            super().update_topk_threshold(materialize(acts_topk))
            return
        values = _reported_at_pairs(acts_topk)
        if values is None:
            values = materialize(acts_topk)
        if values.numel() > 0:
            step.seen[_LEAST_ACTIVE] = torch.where(values > 0, values, torch.inf).amin()

    @override
    @torch.no_grad()
    def commit(self, step: StepContext, output: TrainStepOutput | None = None) -> None:
        super().commit(step, output)
        least, lr = step.seen.get(_LEAST_ACTIVE), self.cfg.topk_threshold_lr
        if least is not None:
            threshold = self.topk_threshold
            moved = (1 - lr) * threshold + lr * least.to(threshold.dtype)
            self.topk_threshold = torch.where(least < torch.inf, moved, threshold)
        if output is not None:
            output.metrics["topk_threshold"] = self.topk_threshold


def _reported_at_pairs(acts: torch.Tensor) -> torch.Tensor | None:
    """Activations as reported, `[n_pairs]`; None if there are no pairs, or if somebody may have
    changed the activations.
    """
    if not isinstance(acts, SparseFeatureActs) or not acts.is_untouched:
        return None
    return acts.code.reported_acts() if isinstance(acts.code, PairCode) else None


BATCHTOPK = Architecture(
    sae=SparseBatchTopKTrainingSAE,
    config=SparseBatchTopKTrainingSAEConfig,
    stock_sae=BatchTopKTrainingSAE,
    stock_config=BatchTopKTrainingSAEConfig,
    inference_sae=JumpReLUSAE,
    inference_config=JumpReLUSAEConfig,
    sparsity_field="k",
    demo_config="smollm2_demo_batchtopk.json",
)
add(BATCHTOPK)
