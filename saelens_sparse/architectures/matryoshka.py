"""Matryoshka BatchTopK training SAE that computes only what is active. Counterpart of SAELens's
`matryoshka_batchtopk_sae.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_sparse.architectures.batchtopk import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
)
from saelens_sparse.architectures.registry import Architecture, add
from saelens_sparse.codes.code import Code, PairCode
from saelens_sparse.codes.dead import DeadRows, dead_rows
from saelens_sparse.codes.on_demand import SparseFeatureActs, code_of, materialize
from saelens_sparse.codes.step import StepContext
from saelens_sparse.config.require import require_bool, require_ints
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.ops.decode import Decoded
from saelens_sparse.ops.pairs import ActivePairs, Rows
from saelens_sparse.ops.rows.block import RowBlock


@dataclass
class SparseMatryoshkaBatchTopKTrainingSAEConfig(
    SparseBatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig
):
    """
    Configuration class for training a SparseMatryoshkaBatchTopKTrainingSAE.

    Every field of SAELens's MatryoshkaBatchTopKTrainingSAEConfig has the same default and meaning.
    The SAE that is saved for inference is a stock `jumprelu` SAE.

    Args:
        matryoshka_widths (list[int]): Number of latents of each level, ascending. Making an SAE
            adds a last level of d_sae latents if there is none, with SAELens's warning.
        use_matryoshka_aux_loss (bool): Let the dead latents of each level reconstruct the error of
            that level, instead of all of them the error of the whole SAE.
        implementation (Literal["auto", "triton", "torch", "dense"]): As in
            SparseBatchTopKTrainingSAEConfig, as all that follow.
        screen_buffer_mib (int): Bound on the size of the buffer of the search, in MiB.
        screen_dtype (Literal["auto", "float8"]): In what training steps screen pre-activations.
        fused_adam (bool): Let SAELens's Adam run as PyTorch's fused kernel.
        gradient_buffers (bool): Hold the gradients of W_enc and W_dec as tensors under
            SparseTrainingRunner too.
        cuda_graph (bool): Let SparseTrainingRunner replay steps as CUDA graphs where that is
            shorter.
        moments (Literal["bfloat16"] | None): Dtype in which SparseTrainingRunner keeps Adam's
            moments of W_enc and W_dec, rounded stochastically. None is SAELens's: the dtype of
            the weights. Moments of biases stay in float32. With "bfloat16", the SAE
            must be in float32, and SAELens's own trainers refuse it.
        k (float): Number of latents that are active on a row, on average over the batch.
        topk_threshold_lr (float): Share by which the smallest activation of a batch moves the
            threshold that the saved SAE has.
        dead_latent_loss (Literal["auxk", "ghost"]): What trains dead latents, SAELens's AuxK or
            ghost gradients; for each level with use_matryoshka_aux_loss.
        aux_loss_coefficient (float): Coefficient for the auxiliary loss that revives dead latents.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already normalized.

    Raises:
        TypeError: a field has a value of a wrong type; the message names it.
        ValueError: a field has a value out of range; the message names it. SAELens checks the
            widths when an SAE is made.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_batchtopk_sparse"

    @override
    def __post_init__(self) -> None:
        require_ints("matryoshka_widths", self.matryoshka_widths)
        require_bool("use_matryoshka_aux_loss", self.use_matryoshka_aux_loss)
        super().__post_init__()


@dataclass(kw_only=True)
class LeveledCode(PairCode):
    """Pairs that are decoded level by level, in one pass over them.

    Attributes:
        widths: number of latents of each level, ascending; the last is d_sae.
        recons: reconstructions `[n_rows, d_in]` of the levels while a training step needs them,
            before run-time normalization is undone.
        dead_before: `[n_levels]`, number of dead latents up to each level's width; None if no loss
            asks for it.
    """

    widths: Sequence[int]
    recons: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    dead_before: HostCopy | None = None

    @override
    def decode(
        self,
        W_dec: torch.Tensor,
        b_dec: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        to_step: bool,
    ) -> Decoded:
        if self.step.n_training_steps is None:
            return super().decode(W_dec, b_dec, target, to_step=to_step)
        rows = rows_by_level(self.pairs, self.widths)
        pairs, order = replace(self.pairs, rows=rows), replace(self.order, rows=rows)
        # Backward, errors add up from the widest level on: a pair's row is the sum of the errors of
        # its own level and of all that contain it. So the weight gets one gradient.
        sums, dead_W_dec, _ = self.decode_rows(W_dec, None, pairs, order, to_step=to_step)
        recons = b_dec
        self.recons.clear()
        for of_level in sums.view(-1, len(self.widths), W_dec.shape[1]).unbind(1):
            recons = of_level + recons
            self.recons.append(recons)
        return Decoded(recons, dead_W_dec, None)

    def dead_levels(self, mask: torch.Tensor | None) -> list[DeadRows] | None:
        """The dead latents of `mask` by level, no level if there are none; None if the step has not
        made what they need. Waits for their numbers.
        """
        rows = dead_rows(self.dead, mask)
        if not rows:
            return rows
        if self.dead_before is None:
            return None
        (dead,) = rows
        before = [0, *self.dead_before.values().tolist()]
        sizes = [end - first for first, end in pairwise(before)]
        padding = dead.block.width - before[-1]
        parts = zip(
            dead.block.latents.split(sizes),
            dead.W_enc.split([*sizes, padding])[:-1],
            dead.W_dec.split([*sizes, padding])[:-1],
            strict=True,
        )
        return [
            DeadRows(RowBlock(latents, latents.numel()), W_enc, W_dec)
            for latents, W_enc, W_dec in parts
        ]


def rows_by_level(pairs: ActivePairs, widths: Sequence[int]) -> Rows:
    """
    Rows of pairs apart by level: those of row n and level i are on row `n * n_levels + i`.

    Args:
        pairs: those of a row ascend by latent, and all of them take part in sums.
        widths: number of latents of each level, ascending; the last is d_sae.
    """
    rows, latents, n_levels = pairs.rows, pairs.latents, len(widths)
    levels = torch.zeros_like(latents)
    for width in widths[:-1]:
        levels += latents >= width
    places = torch.arange(latents.numel(), device=latents.device)
    is_on_row = places < rows.starts(latents.device)[-1]
    by_level = rows.of(places) * n_levels + levels
    n_rows = rows.n_rows * n_levels
    offsets = torch.searchsorted(
        by_level.where(is_on_row, n_rows), torch.arange(n_rows + 1, device=latents.device)
    )
    return Rows.ragged(offsets, by_level.where(is_on_row, 0).to(torch.int32))


class SparseMatryoshkaBatchTopKTrainingSAE(
    SparseBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
):
    """
    Matryoshka BatchTopK SAE that trains the same model as SAELens's
    MatryoshkaBatchTopKTrainingSAE, computing only what is active: one pass over the active latents
    gives the reconstructions of all levels, and each weight has one gradient for all of them.

    A step holds a reconstruction and its gradient, `[n_rows, d_in]` each, for every level. As in
    SAELens, a step fails with an AttributeError where `normalize_activations` is "layer_norm" or
    "constant_norm_rescale", unless there is one level: what undoes them does so once a batch.
    """

    cfg: SparseMatryoshkaBatchTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def graph_key(self) -> object | None:
        key = super().graph_key()
        return None if key is None else (key, tuple(self.cfg.matryoshka_widths))

    @override
    def make_code(
        self, x: torch.Tensor, input_bias: torch.Tensor | None, step: StepContext
    ) -> Code:
        code = super().make_code(x, input_bias, step)
        assert isinstance(code, PairCode)
        widths = tuple(self.cfg.matryoshka_widths)
        dead_before = None
        if code.dead is not None and code.block is not None and self.cfg.use_matryoshka_aux_loss:
            mask = code.dead.mask
            dead_before = HostCopy(torch.stack([mask[:width].sum() for width in widths]))
        of_code = {field.name: getattr(code, field.name) for field in fields(code)}
        return LeveledCode(**of_code, widths=widths, dead_before=dead_before)

    @override
    def propose(self, step_input: TrainStepInput, step: StepContext) -> TrainStepOutput:
        output = super().propose(step_input, step)
        code = code_of(output.feature_acts)
        if isinstance(code, LeveledCode):
            code.recons.clear()  # outputs may live long
        return output

    @override
    def _iterable_decode(
        self, feature_acts: torch.Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, torch.Tensor], None, None]:
        """Each level's width and reconstruction `[..., d_in]`, those that `decode` has left."""
        code = None
        if isinstance(feature_acts, SparseFeatureActs) and feature_acts.is_untouched:
            code = feature_acts.code
        if not isinstance(code, LeveledCode) or not code.recons:
            yield from super()._iterable_decode(materialize(feature_acts), include_outer_loss)
            return
        widths = code.widths if include_outer_loss else code.widths[:-1]
        for width, recons in zip(widths, code.recons, strict=False):
            by_row = recons.view(*feature_acts.shape[:-1], self.cfg.d_in)
            yield width, self.run_time_activation_norm_fn_out(by_row)

    @override
    def calculate_matryoshka_aux_loss(
        self,
        sae_in: torch.Tensor,
        sae_out: torch.Tensor,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        dead_neuron_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Loss of each level's dead latents for the error of that level, computed on their rows of the
        weights alone: AuxK's as SAELens's, or that of ghost gradients.
        """
        code = code_of(hidden_pre)
        levels = code.dead_levels(dead_neuron_mask) if isinstance(code, LeveledCode) else None
        if dead_neuron_mask is None or levels == []:
            return sae_out.new_zeros(())
        if levels is None and not self.trains_ghosts:
            return super().calculate_matryoshka_aux_loss(
                sae_in, sae_out, feature_acts, hidden_pre, dead_neuron_mask
            )
        recons = self._iterable_decode(feature_acts, include_outer_loss=True)
        if not isinstance(code, LeveledCode) or levels is None:
            masks = self._by_level(dead_neuron_mask)
            losses = [
                self.dense_ghost_loss(hidden_pre, dead, (sae_in - of_level).detach())
                for dead, (_, of_level) in zip(masks, recons, strict=True)
            ]
            return torch.stack(losses).sum()
        losses = [
            self.dead_latent_loss(code, dead, (sae_in - of_level).detach())
            for dead, (_, of_level) in zip(levels, recons, strict=True)
            if dead.block.latents.numel() > 0
        ]
        return self.cfg.aux_loss_coefficient * torch.stack(losses).sum()

    def _by_level(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """A mask of latents `[d_sae]` for each level: those of the level alone."""
        latents = torch.arange(mask.numel(), device=mask.device)
        return [
            mask & (latents >= first) & (latents < width)
            for first, width in pairwise([0, *self.cfg.matryoshka_widths])
        ]


def _four_levels(d_sae: int) -> dict[str, list[int]]:
    """A 32nd, an eighth, half and all of the latents."""
    return {"matryoshka_widths": sorted({max(1, d_sae // part) for part in (32, 8, 2, 1)})}


MATRYOSHKA = Architecture(
    sae=SparseMatryoshkaBatchTopKTrainingSAE,
    config=SparseMatryoshkaBatchTopKTrainingSAEConfig,
    stock_sae=MatryoshkaBatchTopKTrainingSAE,
    stock_config=MatryoshkaBatchTopKTrainingSAEConfig,
    inference_sae=JumpReLUSAE,
    inference_config=JumpReLUSAEConfig,
    sparsity_field="k",
    demo_config="smollm2_demo_matryoshka_batchtopk.json",
    needed_fields=_four_levels,
)
add(MATRYOSHKA)
