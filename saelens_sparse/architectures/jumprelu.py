"""JumpReLU training SAE that computes only what is active. Counterpart of SAELens's
`jumprelu_sae.py`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.architectures.dead_losses import GHOST_LOSS, require_ghosts_work
from saelens_sparse.architectures.fields import SparseTrainingSAEConfigMixin
from saelens_sparse.architectures.registry import Architecture, add
from saelens_sparse.choice.availability import Choice
from saelens_sparse.choice.policy import STATE_FILENAME, DensityPolicy, PairTotals
from saelens_sparse.codes.code import Code, DenseCode, PairCode
from saelens_sparse.codes.dead import DeadRows, dead_rows
from saelens_sparse.codes.on_demand import SparseFeatureActs, code_of, materialize
from saelens_sparse.codes.step import StepContext
from saelens_sparse.config.require import require_bool, require_choice, require_int, require_number
from saelens_sparse.measured import FLOAT8_HYSTERESIS, HYSTERESIS, MAX_MEASURED_DENSITY
from saelens_sparse.ops.activation.ghost import dense_ghost_grad_loss, ghost_grad_loss
from saelens_sparse.ops.activation.pairs import JumpReLU
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.ops.common.precision import matmul_dtype
from saelens_sparse.ops.common.versions import version_of
from saelens_sparse.ops.dense import encode_densely
from saelens_sparse.ops.rows.at_latents import at_latents
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.search.threshold import search_above_threshold
from saelens_sparse.warn import warn_caller

LOSS_MODES = ("step", "tanh", "quadratic")

# Room in the list of pairs, over what the last batch needed.
_ROOM = 1.25

# L0 is looked at once so many steps after its warm-up, when it should have settled.
L0_CHECK_STEPS = 2000


@dataclass
class SparseJumpReLUTrainingSAEConfig(SparseTrainingSAEConfigMixin, JumpReLUTrainingSAEConfig):
    """
    Configuration class for training a SparseJumpReLUTrainingSAE.

    Every field of SAELens's JumpReLUTrainingSAEConfig has the same default and meaning. The SAE
    that is saved for inference is a stock `jumprelu` SAE.

    Args:
        implementation (Literal["auto", "triton", "torch", "dense"]): What computes the SAE.
            "triton" are the GPU kernels, "torch" is sparse PyTorch for any device, "dense" is
            SAELens's own arithmetic. "auto" takes the fastest that works: dense products as long
            as many latents are active, sparse ones from then on.
        screen_buffer_mib (int): Bound on the size of the buffer that holds the pre-activations
            of one chunk of rows while the active latents are found, in MiB.
        screen_dtype (Literal["auto", "float8"]): In what training steps screen pre-activations.
            "auto" misses no latent. "float8" is faster from compute capability 8.9 on, and may miss
            a few: `screen_recall` among the metrics says how many.
        fused_adam (bool): Let SAELens's Adam run as PyTorch's fused kernel: the same update up to
            rounding, in less time and memory. Checkpoints are the same either way.
        gradient_buffers (bool): Hold the gradients of W_enc and W_dec as tensors under
            SparseTrainingRunner too. Without, its update sums them from the active latents where it
            needs them, in less time and memory, and their `.grad` stays None; unless so many
            latents are active that buffers are faster.
        cuda_graph (bool): Has no effect. Steps of other sparse architectures are replayed as CUDA
            graphs.
        dead_latent_loss (Literal["ghost"] | None): "ghost" trains dead latents by ghost gradients,
            reported as `ghost_grad_loss` beside the other losses. SAELens's JumpReLU has no such
            loss.
        aux_loss_coefficient (float): Coefficient of ghost gradients. SAELens's JumpReLU has no such
            field.
        moments (Literal["bfloat16"] | None): Dtype in which SparseTrainingRunner keeps Adam's
            moments of W_enc and W_dec, rounded stochastically. None is SAELens's: the dtype of
            the weights. Moments of biases and thresholds stay in float32. With "bfloat16", the SAE
            must be in float32, and SAELens's own trainers refuse it.
        jumprelu_init_threshold (float): Initial threshold for the JumpReLU activation.
            Inherited from JumpReLUTrainingSAEConfig, as all that follow.
        jumprelu_bandwidth (float): Width of the window in which a threshold gets a gradient.
        jumprelu_sparsity_loss_mode (Literal["step", "tanh", "quadratic"]): "step" is Google
            DeepMind's L0 loss, "tanh" Anthropic's sparsity loss, "quadratic" Gemma Scope 2's.
        l0_coefficient (float): Coefficient of the sparsity loss.
        l0_warm_up_steps (int): Number of warm-up steps of the sparsity loss.
        pre_act_loss_coefficient (float | None): Coefficient of the pre-activation loss on dead
            latents; None turns it off.
        jumprelu_tanh_scale (float): Scale of the tanh sparsity loss.
        jumprelu_ste_to_input (bool): Whether the straight-through gradient also goes to the
            pre-activations.
        target_l0 (float | None): Target of the quadratic sparsity loss.
    """

    dead_latent_loss: Literal["ghost"] | None = None
    aux_loss_coefficient: float = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "jumprelu_sparse"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig

    @override
    def __post_init__(self) -> None:
        require_choice("jumprelu_sparsity_loss_mode", self.jumprelu_sparsity_loss_mode, LOSS_MODES)
        for name in (
            "jumprelu_init_threshold",
            "jumprelu_bandwidth",
            "l0_coefficient",
            "jumprelu_tanh_scale",
            "aux_loss_coefficient",
        ):
            require_number(name, getattr(self, name))
        for name in ("pre_act_loss_coefficient", "target_l0"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if self.jumprelu_bandwidth <= 0:
            raise ValueError(f"jumprelu_bandwidth must be positive; got {self.jumprelu_bandwidth}")
        require_int("l0_warm_up_steps", self.l0_warm_up_steps, 0)
        require_bool("jumprelu_ste_to_input", self.jumprelu_ste_to_input)
        if self.dead_latent_loss not in ("ghost", None):
            raise ValueError(
                f"dead_latent_loss must be 'ghost' or None; got {self.dead_latent_loss!r}"
            )
        require_ghosts_work(self.dead_latent_loss, self.normalize_activations)
        super().__post_init__()
        if self.jumprelu_sparsity_loss_mode == "quadratic":
            target_l0 = self.target_l0
            if target_l0 is None or not 0 < target_l0 <= self.d_sae:
                raise ValueError(
                    "target_l0 must be above 0 and at most d_sae="
                    f"{self.d_sae} with jumprelu_sparsity_loss_mode='quadratic'; got {target_l0}"
                )


class SparseJumpReLUTrainingSAE(SparseTrainingSAEMixin, JumpReLUTrainingSAE):
    """
    JumpReLU SAE that trains the same model as SAELens's JumpReLUTrainingSAE, computing only what
    is active: latents above their threshold, and those inside its straight-through window.

    Thousands of latents are active in the first steps of a training. As long as that is so, and
    in the first call of all, dense products are faster: those of stock, with everything between
    them in one pass each way.
    """

    cfg: SparseJumpReLUTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, cfg: SparseJumpReLUTrainingSAEConfig, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._training_policy, self._evaluation_policy = DensityPolicy(), DensityPolicy()
        self._l0_was_checked = False

    @property
    def _policy(self) -> DensityPolicy:
        """Evaluations in between do not disturb the training: each measures for itself."""
        is_training = self.training and torch.is_grad_enabled()
        return self._training_policy if is_training else self._evaluation_policy

    @property
    @override
    def implementation(self) -> Choice:
        choice = self.choose(density=0.0)
        if choice.name == "dense" or self.cfg.implementation != "auto":
            return choice
        limit = self._max_density(choice.backend)
        hysteresis = FLOAT8_HYSTERESIS if self.cfg.screen_dtype == "float8" else HYSTERESIS
        if self._policy.prefers_sparse(limit, hysteresis):
            return choice
        density = self._policy.density
        seen = "how many latents are active is not known yet"
        if density is not None:
            seen = f"{density:.2%} of the latents are active or near their threshold"
        return Choice("fused", f"{seen}; dense products are faster above {limit:.1%}",
                      choice.backend)  # fmt: skip

    def _max_density(self, backend: Backend) -> float:
        """The density up to which sparse products are faster, here and now."""
        key = "cpu" if self.W_enc.device.type == "cpu" else backend
        return MAX_MEASURED_DENSITY[key, self.computes_in_full_precision]

    @override
    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """As SAELens's, with what `auto` has measured, so that a resumed training goes on alike."""
        written = super().save_model(path)
        state = {
            "density": self._training_policy.state_dict(),
            "l0_was_checked": self._l0_was_checked,
        }
        (Path(path) / STATE_FILENAME).write_text(json.dumps(state), encoding="utf-8")
        return written

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        super().load_weights_from_checkpoint(checkpoint_path)
        file = Path(checkpoint_path) / STATE_FILENAME
        if file.exists():  # a stock checkpoint has none
            state = json.loads(file.read_text(encoding="utf-8"))
            self._training_policy.load_state_dict(state["density"])
            self._l0_was_checked = bool(state["l0_was_checked"])

    @property
    @override
    def uses_dead_latents(self) -> bool:
        return self.cfg.pre_act_loss_coefficient is not None or self._trains_ghosts

    @property
    def _trains_ghosts(self) -> bool:
        return self.cfg.dead_latent_loss == "ghost"

    @override
    def commit(self, step: StepContext, output: TrainStepOutput | None = None) -> None:
        super().commit(step, output)
        if step.n_training_steps is not None:
            self._check_l0(step.n_training_steps)
        if self.cfg.implementation == "auto" and step.choice.name != "dense":
            self._policy.settle(step.choice.name != "fused")
        if step.pair_totals is not None:
            self._policy.expect(step.pair_totals)

    def _check_l0(self, n_training_steps: int) -> None:
        settled = self.cfg.l0_warm_up_steps + L0_CHECK_STEPS
        if self._l0_was_checked or n_training_steps < settled:
            return
        if (mean_l0 := self._policy.mean_l0) is not None:
            self._l0_was_checked = True
            warn_of_l0(mean_l0, n_training_steps, self.cfg)

    @property
    @override
    def activation(self) -> JumpReLU:
        return JumpReLU(self.threshold, self.bandwidth, self.cfg.jumprelu_ste_to_input)

    @override
    def search(self, x: torch.Tensor, norms: torch.Tensor | None, step: StepContext) -> FoundPairs:
        return search_above_threshold(
            x,
            self.W_enc.T,
            self.b_enc,
            self.threshold,
            self.bandwidth,
            self._capacity(x.shape[0], step.needed),
            step.choice.backend,
            self.cfg.screen_buffer_mib * 2**20,
            self.rounded_W_enc(step),
            step.screen_dtype,
        )

    @override
    def make_code(
        self, x: torch.Tensor, input_bias: torch.Tensor | None, step: StepContext
    ) -> Code:
        if step.choice.name != "fused":
            return super().make_code(x, input_bias, step)
        dead = step.dead_latents()
        pre_acts_dtype = torch.promote_types(matmul_dtype(x), self.b_enc.dtype)
        # Where nothing but the decoder reads the activations, they are rounded as it does.
        is_training_step = step.n_training_steps is not None
        is_read = not is_training_step or self.cfg.jumprelu_sparsity_loss_mode == "tanh"
        acts, l0, dead_W_enc, counts = encode_densely(
            x,
            self.W_enc,
            self.b_enc,
            input_bias,
            self.activation,
            None if dead is None else dead.block,
            step.choice.backend,
            pre_acts_dtype if is_read else None,
        )
        if dead is not None:
            dead.W_enc = dead_W_enc
        step.count_pairs(PairTotals(HostCopy(counts.totals), x.shape[0], self.cfg.d_sae))
        return DenseCode(
            x=x,
            input_bias=input_bias,
            acts=acts,
            l0=l0,
            step=step,
            decoder_version=version_of(self.W_dec),
            dead=dead,
            counts=counts,
            pre_acts_dtype=pre_acts_dtype,
        )

    def _capacity(self, n_rows: int, needed: PairTotals | None) -> int:
        """Room for the pairs of a batch, in coarse steps: what the last one needed and more, or
        what the step needed that was dropped for want of room.
        """
        density = self._policy.density if needed is None else needed.density
        expected = 64 * n_rows if density is None else _ROOM * density * n_rows * self.cfg.d_sae
        step = max(1024, 2 ** max(0, math.ceil(math.log2(max(expected, 1))) - 3))
        return min(math.ceil((expected + 1) / step) * step, n_rows * self.cfg.d_sae)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """SAELens's sparsity and pre-activation losses and ghost gradients, from what is active and
        what is dead.
        """
        code = code_of(hidden_pre)
        mode, target_l0 = self.cfg.jumprelu_sparsity_loss_mode, self.cfg.target_l0
        rows = dead_rows(None if code is None else code.dead, step_input.dead_neuron_mask)
        if (
            code is None
            or code.l0 is None
            or not isinstance(feature_acts, SparseFeatureActs)
            or not feature_acts.is_untouched
            # Made without a graph, L0 has none of the thresholds.
            or (torch.is_grad_enabled() and not code.has_graph)
            or (self.uses_dead_latents and rows is None)
            or mode not in LOSS_MODES
            or (mode == "quadratic" and target_l0 is None)
        ):
            # SAELens's autograd functions do not see through tensors that are made on demand.
            feature_acts, hidden_pre = materialize(feature_acts), materialize(hidden_pre)
            losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
            if self._trains_ghosts:
                losses[GHOST_LOSS] = self._dense_ghost_loss(step_input, hidden_pre, sae_out)
            return losses
        if mode == "tanh":
            mean = self._mean_tanh(code)
        elif mode == "quadratic" and target_l0 is not None:
            mean = (2 / target_l0 * (code.l0 - target_l0) ** 2).mean()
        else:
            mean = code.l0.mean()
        losses = {"l0_loss": step_input.coefficients["l0"] * mean}
        dead = rows[0] if rows else None
        if self.cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self._pre_act_loss(code, dead)
        if self._trains_ghosts:
            residual = (step_input.sae_in - sae_out).detach()
            losses[GHOST_LOSS] = self._ghost_loss(code, dead, residual)
        return losses

    def _ghost_loss(
        self, code: Code, dead: DeadRows | None, residual: torch.Tensor
    ) -> torch.Tensor:
        """Loss of ghost gradients, on the dead latents' rows of the weights alone."""
        if dead is None:
            return residual.new_zeros(())
        products, bias = self.dead_products(code, dead.block, dead.W_enc)
        loss = ghost_grad_loss(products, bias, dead.W_dec, residual, code.backend)
        return self.cfg.aux_loss_coefficient * loss

    def _dense_ghost_loss(
        self, step_input: TrainStepInput, hidden_pre: torch.Tensor, sae_out: torch.Tensor
    ) -> torch.Tensor:
        """Loss of ghost gradients, from the pre-activations `[..., d_sae]` of all latents."""
        mask = step_input.dead_neuron_mask
        if mask is None:
            return sae_out.new_zeros(())
        residual = (step_input.sae_in - sae_out).detach()
        loss = dense_ghost_grad_loss(hidden_pre, mask, self.W_dec, residual, is_rescaled=False)
        return self.cfg.aux_loss_coefficient * loss

    def _mean_tanh(self, code: Code) -> torch.Tensor:
        """Mean over rows of the sum over latents of `tanh(scale * acts * norms)`."""
        scale, norms = self.cfg.jumprelu_tanh_scale, self.W_dec.norm(dim=1)
        if not isinstance(code, PairCode):
            return torch.tanh(scale * code.acts * norms).sum(dim=-1).mean()
        norms = at_latents(norms, code.pairs.latents, code.order, code.backend)
        values = torch.tanh(scale * code.acts * norms)
        sum_dtype = torch.promote_types(values.dtype, torch.float32)
        return (values.sum(dtype=sum_dtype) / code.pairs.rows.n_rows).to(values.dtype)

    def _pre_act_loss(self, code: Code, dead: DeadRows | None) -> torch.Tensor:
        """
        Anthropic's pre-activation loss of the dead latents, on their rows of the weights alone.

        Formula: Conerly et al. 2025 (transformer-circuits.pub/2025/january-update), as in SAELens.
        """
        coefficient = self.cfg.pre_act_loss_coefficient
        if coefficient is None or dead is None:
            return code.acts.new_zeros((), dtype=code.reported_dtype)
        n_dead = dead.block.latents.numel()
        products, bias = self.dead_products(code, dead.block, dead.W_enc)
        hidden_pre = products[:, :n_dead] + bias
        threshold = self.threshold.index_select(0, dead.block.latents).to(hidden_pre.dtype)
        norms = dead.W_dec[:n_dead].norm(dim=1)
        per_item = ((threshold - hidden_pre).relu() * norms).sum(dim=-1)
        return coefficient * per_item.mean()


def warn_of_l0(l0: float, n_training_steps: int, cfg: JumpReLUTrainingSAEConfig) -> None:
    """Warn if the mean L0 of a settled run is where training makes no sense."""
    advice = None
    if cfg.jumprelu_sparsity_loss_mode == "quadratic" and cfg.target_l0 is not None:
        if not cfg.target_l0 / 4 <= l0 <= 4 * cfg.target_l0:
            advice = (
                f"far from target_l0={cfg.target_l0:g}. If it does not come closer, raise "
                "l0_coefficient, or jumprelu_bandwidth so that thresholds get gradients"
            )
    elif l0 > cfg.d_in / 2:
        advice = (
            f"more than half of d_in={cfg.d_in}, which is no sparse code. If it does not fall, "
            "raise l0_coefficient, or jumprelu_bandwidth so that thresholds get gradients"
        )
    elif l0 < 1:
        advice = "less than one latent on a row. Lower l0_coefficient, or lengthen its warm-up"
    if advice is not None:
        warn_caller(
            f"L0 of the SAE on {cfg.metadata.hook_name or 'its inputs'} is {l0:.3g} after "
            f"{n_training_steps:,} steps, {advice} (now l0_coefficient={cfg.l0_coefficient:g}, "
            f"jumprelu_bandwidth={cfg.jumprelu_bandwidth:g})."
        )


JUMPRELU = Architecture(
    sae=SparseJumpReLUTrainingSAE,
    config=SparseJumpReLUTrainingSAEConfig,
    stock_sae=JumpReLUTrainingSAE,
    stock_config=JumpReLUTrainingSAEConfig,
    inference_sae=JumpReLUSAE,
    inference_config=JumpReLUSAEConfig,
    sparsity_field=None,
    demo_config="smollm2_demo_jumprelu.json",
)
add(JUMPRELU)
