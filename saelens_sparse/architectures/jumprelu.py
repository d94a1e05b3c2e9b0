"""JumpReLU training SAE that computes only what is active. Counterpart of SAELens's
`jumprelu_sae.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from typing_extensions import override

from saelens_sparse.architectures.base import (
    STATE_FILENAME,
    Pending,
    SparseTrainingSAEConfigMixin,
    SparseTrainingSAEMixin,
    require_bool,
    require_choice,
    require_int,
    require_number,
)
from saelens_sparse.architectures.registry import Architecture, add
from saelens_sparse.choice.availability import Backend, Choice
from saelens_sparse.codes.code import Code, DeadLatents, DenselyGatedCode, GatedCode, version_of
from saelens_sparse.codes.on_demand import DeferredPreActs, SparseFeatureActs, ordinary
from saelens_sparse.ops import (
    Gate,
    HostCopy,
    LatentOrder,
    at_latents,
    encode_gated,
    encode_gated_densely,
    matmul_dtype,
    start_find_pattern,
)
from saelens_sparse.ops.common.ranges import profiler_range
from saelens_sparse.warn import warn_caller

LOSS_MODES = ("step", "tanh", "quadratic")

# Shares of pairs in the pattern above which dense products are faster, by backend ("cpu" for
# PyTorch on a CPU) and by whether the products run in full precision.
MAX_SPARSE_SHARE = {
    ("triton", True): 0.09,
    ("triton", False): 0.0038,
    ("torch", True): 0.03,
    ("torch", False): 0.03,
    ("cpu", True): 0.12,
    ("cpu", False): 0.03,
}
# A path is left for the other only when that one is faster by this much.
HYSTERESIS = 0.8
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
        fused_adam (bool): Let SAELens's Adam run as PyTorch's fused kernel: the same update up to
            rounding, in less time and memory. Checkpoints are the same either way.
        gradient_buffers (bool): Hold the gradients of W_enc and W_dec as tensors under
            SparseTrainingRunner too. Without, its update sums them from the active latents where it
            needs them, in less time and memory, and their `.grad` stays None; unless so many
            latents are active that buffers are faster.
        cuda_graph (bool): Let SparseTrainingRunner replay the forward and backward pass of a small
            SAE as a CUDA graph, where launching its kernels would take longer than running them.
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
        ):
            require_number(name, getattr(self, name))
        for name in ("pre_act_loss_coefficient", "target_l0"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name))
        if self.jumprelu_bandwidth <= 0:
            raise ValueError(f"jumprelu_bandwidth must be positive; got {self.jumprelu_bandwidth}")
        require_int("l0_warm_up_steps", self.l0_warm_up_steps, 0)
        require_bool("jumprelu_ste_to_input", self.jumprelu_ste_to_input)
        super().__post_init__()
        if self.jumprelu_sparsity_loss_mode == "quadratic":
            target_l0 = self.target_l0
            if target_l0 is None or not 0 < target_l0 <= self.d_sae:
                raise ValueError(
                    "target_l0 must be above 0 and at most d_sae="
                    f"{self.d_sae} with jumprelu_sparsity_loss_mode='quadratic'; got {target_l0}"
                )


class DensityPolicy:
    """How many pairs recent batches had, and whether a step computes sparsely for that.

    Numbers that are still on their way from the device are read when they are asked for. A step
    `settle`s what it runs on; asking what the next one would run on changes nothing.
    """

    def __init__(self) -> None:
        self._goes_sparse = False
        self._mean_l0: float | None = None
        self._share: float | None = None
        self._coming: tuple[HostCopy, int, int] | None = None

    def __deepcopy__(self, _: dict[int, Any]) -> DensityPolicy:
        return DensityPolicy()

    __copy__ = __deepcopy__

    def expect(self, totals: HostCopy, n_rows: int, d_sae: int) -> None:
        """The number of pairs of a batch and of active ones, when they arrive."""
        if n_rows > 0:
            self._coming = (totals, n_rows, d_sae)

    @property
    def share(self) -> float | None:
        """Share of all pairs that the last batch's pattern had; None before the first batch."""
        self._read()
        return self._share

    @property
    def mean_l0(self) -> float | None:
        """Mean number of active latents of the last batch's rows; None before the first batch."""
        self._read()
        return self._mean_l0

    def prefers_sparse(self, limit: float) -> bool:
        """Whether the next step computes sparsely where that is faster up to a share of `limit`."""
        share = self.share
        return share is not None and share < (limit if self._goes_sparse else HYSTERESIS * limit)

    def settle(self, limit: float) -> None:
        """Take the next step as `prefers_sparse` says."""
        self._goes_sparse = self.prefers_sparse(limit)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to go on with the same choices, for JSON."""
        return {"goes_sparse": self._goes_sparse, "share": self.share, "mean_l0": self.mean_l0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._goes_sparse, self._coming = bool(state["goes_sparse"]), None
        self._share, self._mean_l0 = state["share"], state["mean_l0"]

    def _read(self) -> None:
        coming, self._coming = self._coming, None
        if coming is not None:
            totals, n_rows, d_sae = coming
            n_pairs, n_active = (int(total) for total in totals.values())
            self._share, self._mean_l0 = n_pairs / (n_rows * d_sae), n_active / n_rows


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
        limit = self._max_sparse_share(choice.backend)
        if self._policy.prefers_sparse(limit):
            return choice
        share = self._policy.share
        seen = "how many latents are active is not known yet"
        if share is not None:
            seen = f"{share:.2%} of the latents are active or near their threshold"
        return Choice("fused", f"{seen}; dense products are faster above {limit:.1%}",
                      choice.backend)  # fmt: skip

    def _max_sparse_share(self, backend: Backend) -> float:
        """The share of pairs up to which sparse products are faster, here and now."""
        key = "cpu" if self.W_enc.device.type == "cpu" else backend
        return MAX_SPARSE_SHARE[key, self.computes_in_full_precision]

    @override
    def settle_implementation(self) -> Choice:
        choice = self.implementation
        if choice.name != "dense" and self.cfg.implementation == "auto":
            self._policy.settle(self._max_sparse_share(choice.backend))
        return choice

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
        return self.cfg.pre_act_loss_coefficient is not None

    @override
    def _take_forward_pass(
        self, step_input: TrainStepInput, unchecked: list[Pending] | None
    ) -> tuple[TrainStepOutput, bool]:
        self._check_l0(step_input.n_training_steps)
        return super()._take_forward_pass(step_input, unchecked)

    def _check_l0(self, n_training_steps: int) -> None:
        settled = self.cfg.l0_warm_up_steps + L0_CHECK_STEPS
        if self._l0_was_checked or n_training_steps < settled:
            return
        if (mean_l0 := self._policy.mean_l0) is not None:
            self._l0_was_checked = True
            warn_of_l0(mean_l0, n_training_steps, self.cfg)

    @override
    def make_code(
        self,
        x: torch.Tensor,
        input_bias: torch.Tensor | None,
        find_dead: Callable[[], DeadLatents | None],
        choice: Choice,
    ) -> Code:
        gate = Gate(self.bandwidth, self.cfg.jumprelu_ste_to_input)
        make = self._make_dense_code if choice.name == "fused" else self._make_sparse_code
        return make(x, input_bias, find_dead, gate, choice)

    def _make_dense_code(
        self,
        x: torch.Tensor,
        input_bias: torch.Tensor | None,
        find_dead: Callable[[], DeadLatents | None],
        gate: Gate,
        choice: Choice,
    ) -> DenselyGatedCode:
        dead = find_dead()
        pre_acts_dtype = torch.promote_types(matmul_dtype(x), self.b_enc.dtype)
        # Where nothing but the decoder reads the activations, they are rounded as it does.
        is_read = self.training_pass is None or self.cfg.jumprelu_sparsity_loss_mode == "tanh"
        acts, l0, dead_W_enc, counts = encode_gated_densely(
            x,
            self.W_enc,
            self.b_enc,
            self.threshold,
            input_bias,
            gate,
            None if dead is None else dead.block,
            choice.backend,
            pre_acts_dtype if is_read else None,
        )
        if dead is not None:
            dead.W_enc = dead_W_enc
        self._policy.expect(HostCopy(counts.totals), x.shape[0], self.cfg.d_sae)
        return DenselyGatedCode(
            x=x,
            input_bias=input_bias,
            acts=acts,
            decoder_version=version_of(self.W_dec),
            backend=choice.backend,
            dead=dead,
            counts=counts,
            l0=l0,
            pre_acts_dtype=pre_acts_dtype,
        )

    def _make_sparse_code(
        self,
        x: torch.Tensor,
        input_bias: torch.Tensor | None,
        find_dead: Callable[[], DeadLatents | None],
        gate: Gate,
        choice: Choice,
    ) -> GatedCode:
        d_sae = self.cfg.d_sae
        with profiler_range("saelens_sparse::search"):
            pending = start_find_pattern(
                x,
                self.W_enc.T,
                self.b_enc,
                self.threshold,
                gate.bandwidth,
                self._capacity(x.shape[0]),
                choice.backend,
                self.cfg.screen_buffer_mib * 2**20,
                self.rounded_W_enc(),
            )
        pattern = pending.pattern
        # Sorting keeps the device busy if the host waits for the number of pairs.
        order = LatentOrder.of_keys(pattern.keys, d_sae, pattern.ragged)
        if not self.is_complete(pending):
            pattern = pending.result()
            order = LatentOrder.of_keys(pattern.keys, d_sae, pattern.ragged)
        self._policy.expect(pending.totals, x.shape[0], d_sae)
        dead = find_dead()
        acts, l0, dead_W_enc = encode_gated(
            x,
            self.W_enc,
            self.b_enc,
            self.threshold,
            input_bias,
            pattern,
            order,
            gate,
            None if dead is None else dead.block,
            choice.backend,
            self.sink_of("W_enc", pattern.latents.numel(), choice.backend),
        )
        if dead is not None:
            dead.W_enc = dead_W_enc
        return GatedCode(
            x=x,
            input_bias=input_bias,
            acts=acts,
            decoder_version=version_of(self.W_dec),
            backend=choice.backend,
            dead=dead,
            pattern=pattern,
            order=order,
            l0=l0,
        )

    def _capacity(self, n_rows: int) -> int:
        """Room for the pairs of a batch: what the last one needed and more, in coarse steps."""
        share = self._policy.share
        expected = 64 * n_rows if share is None else _ROOM * share * n_rows * self.cfg.d_sae
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
        """SAELens's sparsity and pre-activation losses, from what is active and what is dead."""
        code = hidden_pre.code if isinstance(hidden_pre, DeferredPreActs) else None
        mode, target_l0 = self.cfg.jumprelu_sparsity_loss_mode, self.cfg.target_l0
        if (
            not isinstance(code, GatedCode | DenselyGatedCode)
            or not isinstance(feature_acts, SparseFeatureActs)
            or not feature_acts.is_untouched
            # Made without a graph, L0 has none of the thresholds.
            or (torch.is_grad_enabled() and not code.has_graph)
            or not self._has_dead_latents(code, step_input.dead_neuron_mask)
            or mode not in LOSS_MODES
            or (mode == "quadratic" and target_l0 is None)
        ):
            # SAELens's autograd functions do not see through tensors that are made on demand.
            feature_acts, hidden_pre = ordinary(feature_acts), ordinary(hidden_pre)
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        if mode == "tanh":
            mean = self._mean_tanh(code)
        elif mode == "quadratic" and target_l0 is not None:
            mean = (2 / target_l0 * (code.l0 - target_l0) ** 2).mean()
        else:
            mean = code.l0.mean()
        losses = {"l0_loss": step_input.coefficients["l0"] * mean}
        if self.cfg.pre_act_loss_coefficient is not None:
            losses["pre_act_loss"] = self._pre_act_loss(code)
        return losses

    def _has_dead_latents(self, code: Code, mask: torch.Tensor | None) -> bool:
        """Whether the code has what the pre-activation loss, if it is on, needs of these."""
        if mask is None or self.cfg.pre_act_loss_coefficient is None:
            return True
        dead = code.dead
        return (
            dead is not None
            and dead.mask is mask
            and (dead.block is None or dead.W_dec is not None)
        )

    def _mean_tanh(self, code: GatedCode | DenselyGatedCode) -> torch.Tensor:
        """Mean over rows of the sum over latents of `tanh(scale * acts * norms)`."""
        scale, norms = self.cfg.jumprelu_tanh_scale, self.W_dec.norm(dim=1)
        if isinstance(code, DenselyGatedCode):
            return torch.tanh(scale * code.acts * norms).sum(dim=-1).mean()
        norms = at_latents(norms, code.pattern.latents, code.order, code.backend)
        values = torch.tanh(scale * code.acts * norms)
        sum_dtype = torch.promote_types(values.dtype, torch.float32)
        return (values.sum(dtype=sum_dtype) / code.pattern.ragged.n_rows).to(values.dtype)

    def _pre_act_loss(self, code: Code) -> torch.Tensor:
        """
        Anthropic's pre-activation loss of the dead latents, on their rows of the weights alone.

        Formula: Conerly et al. 2025 (transformer-circuits.pub/2025/january-update), as in SAELens.
        """
        coefficient, dead = self.cfg.pre_act_loss_coefficient, code.dead
        if coefficient is None or dead is None or dead.block is None:
            return code.acts.new_zeros((), dtype=code.reported_dtype)
        assert dead.W_enc is not None and dead.W_dec is not None
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
