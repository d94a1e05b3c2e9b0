"""What every sparse training SAE shares: configuration, weight layout, the course of a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput
from sae_lens.util import str_to_dtype
from torch import nn
from typing_extensions import override

from saelens_sparse.architectures.parameters import mark_parameter
from saelens_sparse.choice.availability import (
    IMPLEMENTATIONS,
    Backend,
    Choice,
    Implementation,
    choose_implementation,
)
from saelens_sparse.codes.code import Code, DeadLatents
from saelens_sparse.codes.on_demand import DeferredPreActs, SparseFeatureActs
from saelens_sparse.ops import (
    HostCount,
    PendingPattern,
    PendingSelection,
    RowBlock,
    RowGradient,
    WeightCopy,
    matmul_dtype,
    row_norms,
)
from saelens_sparse.ops.common.ranges import profiler_range
from saelens_sparse.private_names import MODULE_HOOKS, TENSOR_HOOKS
from saelens_sparse.warn import warn_caller

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

    _Base = TrainingSAE[Any]
    _ConfigBase = TrainingSAEConfig
else:
    _Base = _ConfigBase = object

DENSE_HOOKS = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
# Beside the weights in a checkpoint: what `auto` has measured, where it measures.
STATE_FILENAME = "saelens_sparse_state.json"
# GEMMs over the dead latents are padded to a multiple of this: with an odd width they lose
# Hopper's instructions and take 2.4 times as long.
_DEAD_ALIGNMENT = 64

# Without gradient buffers pairs are summed twice, for the norm and for the update. At
# 2304 -> 65,536, batch 4096, float32 (H200) a step of SparseTrainingRunner then takes 2.0 ms less
# than one of SAELens's runner with 4 pairs a latent, 0.75 less with 17 and 0.6 more with 84; with
# buffers, which clip inside the update too, it takes 1.05 less.
MAX_PAIRS_PER_LATENT = 12

Pending = PendingSelection | PendingPattern

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class _TrainingPass:
    """A training forward pass in progress.

    Attributes:
        sae: whose it is.
        dead_count: the dead latents that its losses ask for, and their number.
        unchecked: what it relies on and nobody has asked yet; None if that is asked at once.
        was_complete: whether all that was asked at once had found all that is active.
    """

    sae: SparseTrainingSAEMixin
    dead_count: HostCount | None = None
    unchecked: list[Pending] | None = None
    was_complete: bool = True


# Each thread has its own, so that passes of one SAE may run at once.
_pass_in_progress: ContextVar[_TrainingPass | None] = ContextVar("pass_in_progress", default=None)


def _not_compiled(function: _F) -> _F:
    """`torch.compiler.disable` with its type kept."""
    return cast(_F, torch.compiler.disable(function))


@dataclass
class SparseTrainingSAEConfigMixin(_ConfigBase):
    """The fields that every sparse architecture adds to its stock configuration.

    Raises:
        TypeError: a field has a value of a wrong type; the message names it.
        ValueError: a field has a value out of range; the message names it.
    """

    implementation: Implementation = "auto"
    screen_buffer_mib: int = 1024
    fused_adam: bool = True
    gradient_buffers: bool = False
    cuda_graph: bool = True

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
        super().__post_init__()


class SparseTrainingSAEMixin(_Base):
    """Mixed into a stock `TrainingSAE` whose forward pass it replaces by a sparse one.

    In a training step `feature_acts` and `hidden_pre` are `OnDemandTensor`s; everything else
    that SAELens's public methods return are ordinary tensors. A hook on the pre-activations,
    the activations or the reconstruction makes that call dense, as in stock.

    `W_enc` keeps SAELens's shape `[d_in, d_sae]` and lies in memory as contiguous
    `[d_sae, d_in]` rows, so that each latent's encoder vector is one contiguous read. What flattens
    it by `view(-1)` fails. With `implementation="dense"` it lies as in stock.
    """

    b_enc: nn.Parameter
    # Whether a training forward pass asks at once if it found all that is active.
    asks_at_once = False
    # Set by a trainer during its step: where gradients go as sums over active pairs, and what its
    # last update has written for this step, both by name of the parameter.
    row_gradients: dict[str, list[RowGradient]] | None = None
    copies: Mapping[str, WeightCopy] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_lay_out_after_loading)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.lay_out_W_enc()

    def lay_out_W_enc(self) -> bool:
        """Bring `W_enc` into latent-major layout; returns whether it had to be moved for that.

        The parameter object, and with it the optimizer's state, stays the same.
        """
        W_enc = self.W_enc
        if self.cfg.implementation == "dense" or W_enc.T.is_contiguous():
            return False
        with torch.inference_mode(W_enc.is_inference()), torch.no_grad():
            W_enc.data = W_enc.data.T.contiguous().T
            if W_enc.grad is not None:
                W_enc.grad = torch.empty_like(W_enc).copy_(W_enc.grad)
        return True

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        # Stock's layout, which is what others expect; safetensors takes no other.
        for name, value in state_dict.items():
            state_dict[name] = value.contiguous()

    @property
    @abstractmethod
    def implementation(self) -> Choice:
        """What the next call runs on, and why. Reading it changes nothing."""

    def settle_implementation(self) -> Choice:
        """What the call in progress runs on, for later choices to take into account."""
        return self.implementation

    @abstractmethod
    def make_code(
        self,
        x: torch.Tensor,
        input_bias: torch.Tensor | None,
        find_dead: Callable[[], DeadLatents | None],
        choice: Choice,
    ) -> Code:
        """
        Encode a batch.

        Args:
            x: `[n_rows, d_in]`, the centred encoder input.
            input_bias: `[d_in]`, `b_dec` if it was subtracted to give `x` outside of the graph.
            find_dead: gives the dead latents that the step asks for. It may wait for the device,
                so that work should be queued before.
            choice: what to run on.
        """

    def choose(self, density: float) -> Choice:
        """What runs for the next call if this share of the latents is active, and why."""
        for name in DENSE_HOOKS:
            if has_hooks(getattr(self, name)):
                return Choice("dense", f"a hook on {name} needs a dense tensor")
        return choose_implementation(
            self.cfg.implementation,
            self.W_enc.device,
            self.W_enc.dtype,
            density,
            self.computes_in_full_precision,
        )

    @property
    def computes_in_full_precision(self) -> bool:
        """Whether dense products would run in float32 or float64 where this is asked."""
        return matmul_dtype(self.W_enc).itemsize >= 4

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self.implementation.name == "dense":
            return super().training_forward_pass(step_input)
        return self._sparse_training_forward_pass(step_input)

    # The kernels leave nothing for a compiler to fuse, and the lazy tensors are not for it.
    @_not_compiled
    def _sparse_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self.asks_at_once:
            output, pending = self.start_training_forward_pass(step_input)
            if all(part.holds() for part in pending):
                return output
        return self.checked_training_forward_pass(step_input)

    def start_training_forward_pass(
        self, step_input: TrainStepInput
    ) -> tuple[TrainStepOutput, Sequence[Pending]]:
        """
        A training forward pass that does not wait for the device to say whether it found all that
        is active.

        Work queued before that is asked hides the wait.

        Returns:
            The output, and what it relies on. If one of these does not hold, which is rare, the
            output and whatever followed from it must be dropped, and
            `checked_training_forward_pass` called instead.
        """
        unchecked: list[Pending] = []
        return self._take_forward_pass(step_input, unchecked)[0], unchecked

    def checked_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """A training forward pass that waits for the device, and finds again what was missing.

        As long as something is, the next ones are of this kind too (`asks_at_once`): with a NaN
        in every batch, each would otherwise be taken twice.
        """
        output, self.asks_at_once = self._take_forward_pass(step_input, unchecked=None)
        return output

    def _take_forward_pass(
        self, step_input: TrainStepInput, unchecked: list[Pending] | None
    ) -> tuple[TrainStepOutput, bool]:
        """SAELens's training forward pass. What it relies on is left in `unchecked`, or without
        one asked at once.

        Returns:
            The output, and whether something that was asked at once had to be found again.
        """
        mask = step_input.dead_neuron_mask
        # Queued first, the count has reached the host by the time that the encoder asks for it.
        dead_count = None
        if mask is not None and self.uses_dead_latents:
            dead_count = HostCount(mask)
        training_pass = _TrainingPass(self, dead_count, unchecked)
        with _in_progress(training_pass):
            output = super().training_forward_pass(step_input)
        if isinstance(output.feature_acts, SparseFeatureActs):
            output.metrics.update(output.feature_acts.code.metrics)
        return output, not training_pass.was_complete

    @property
    def training_pass(self) -> _TrainingPass | None:
        """The training forward pass of this SAE that the present thread is in."""
        training_pass = _pass_in_progress.get()
        return training_pass if training_pass is not None and training_pass.sae is self else None

    def is_complete(self, pending: Pending) -> bool:
        """Whether a search has found all that is active, so that its result can be used as it is.

        A step that asks this later goes on as if it were so.
        """
        training_pass = self.training_pass
        if training_pass is not None and training_pass.unchecked is not None:
            training_pass.unchecked.append(pending)
            return True
        holds = pending.holds()
        if training_pass is not None and not holds:
            training_pass.was_complete = False
        return holds

    @property
    def uses_dead_latents(self) -> bool:
        """Whether a loss of the training step needs the dead latents."""
        return True

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Feature activations `[..., d_sae]` as an ordinary tensor, for any leading shape."""
        feature_acts, _ = self.encode_with_hidden_pre(x)
        if isinstance(feature_acts, SparseFeatureActs):
            return feature_acts.materialized()
        return feature_acts

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
        choice = self.settle_implementation()
        if choice.name == "dense":
            return super().encode_with_hidden_pre(x)  # pyright: ignore[reportAbstractUsage]
        with profiler_range("saelens_sparse::encode"):
            return self._encode_sparsely(x, choice)

    @_not_compiled
    def _encode_sparsely(
        self, x: torch.Tensor, choice: Choice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.prepare_weights()
        sae_in, input_bias = self._sae_in_and_bias(x)
        leading_shape = sae_in.shape[:-1]
        rows = sae_in.reshape(-1, self.cfg.d_in)
        if rows.data_ptr() == x.data_ptr():
            # Later uses must not see what the caller puts into its buffer next.
            rows = rows.clone()
        code = self.make_code(rows, input_bias, self._find_dead_latents, choice)
        weights = (self.W_enc, self.b_enc, self.W_dec)
        hidden_pre = DeferredPreActs(code, leading_shape, self.dense_pre_acts, weights)
        return SparseFeatureActs(code, leading_shape), hidden_pre

    def _sae_in_and_bias(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`process_sae_in(x)`, and `b_dec` if that was subtracted outside of the graph.

        `b_dec`'s gradient through a constant input needs no gradient of the input.
        """
        is_own = "process_sae_in" in vars(self)
        if is_own or type(self).process_sae_in is not SAE.process_sae_in:
            return self.process_sae_in(x), None
        normed = self.hook_sae_input(self.reshape_fn_in(x.to(self.dtype)))
        normed = self.run_time_activation_norm_fn_in(normed)
        if not self.cfg.apply_b_dec_to_input:
            return normed, None
        if normed.requires_grad:
            return normed - self.b_dec, None
        with torch.no_grad():
            return normed - self.b_dec, self.b_dec

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """
        Reconstruction `[..., d_in]` from feature activations `[..., d_sae]`: sparse for the
        activations of `encode_with_hidden_pre`, dense for ordinary tensors.
        """
        if not isinstance(feature_acts, SparseFeatureActs):
            return super().decode(feature_acts)
        code = feature_acts.code
        weights_changed = not code.is_made_with(self.W_dec)
        has_dense_hook = any(has_hooks(getattr(self, name)) for name in DENSE_HOOKS)
        if has_dense_hook or weights_changed or not feature_acts.is_untouched:
            return super().decode(feature_acts.materialized())
        dead = code.dead
        block = None if dead is None else dead.block
        sink = self.sink_of("W_dec", code.acts.numel(), code.backend)
        with profiler_range("saelens_sparse::decode"):
            recons, dead_W_dec = code.decode(self.W_dec, self.b_dec, block, sink)
        code.is_decoded = True
        if dead is not None:
            dead.W_dec = dead_W_dec
        sae_out_pre = recons.view(*feature_acts.shape[:-1], self.cfg.d_in)
        sae_out_pre = self.hook_sae_recons(sae_out_pre)
        sae_out_pre = self.run_time_activation_norm_fn_out(sae_out_pre)
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through the SAE, as stock's; nothing dense unless a hook asks for it."""
        if self.use_error_term or self.implementation.name == "dense":
            return super().forward(x)
        return self.hook_sae_output(self.decode(self.encode_with_hidden_pre(x)[0]))

    def sink_of(self, name: str, n_pairs: int, backend: Backend) -> list[RowGradient] | None:
        """Where the step's gradient of a weight goes instead of its `.grad`; None if it does not.

        Hooks on a parameter expect a gradient that is a tensor.
        """
        if self.row_gradients is None or backend != "triton":
            return None
        if n_pairs > MAX_PAIRS_PER_LATENT * self.cfg.d_sae:
            return None
        parameter = getattr(self, name)
        if any(getattr(parameter, hooks) for hooks in TENSOR_HOOKS):
            return None
        return self.row_gradients.setdefault(name, [])

    def rounded_W_enc(self) -> WeightCopy | None:
        """The low-precision `W_enc` that the last update has written, if it still is that."""
        copy = (self.copies or {}).get("W_enc")
        return copy if copy is not None and copy.is_of(self.W_enc.T) else None

    def decoder_norms(self, backend: Backend) -> torch.Tensor:
        """Norms of the rows of `W_dec`, `[d_sae]`, without a graph."""
        if self.copies is None or backend != "triton":
            return self.W_dec.detach().norm(dim=-1)
        copy = self.copies.get("W_dec")
        if copy is not None and copy.is_of(self.W_dec):
            return copy.values.to(self.W_dec.dtype, copy=True)  # the update writes it anew
        # Slower, but what an update would have written, so that a resumed run goes on as it was.
        return row_norms(self.W_dec, backend).to(self.W_dec.dtype)

    def _find_dead_latents(self) -> DeadLatents | None:
        """The dead latents of the training step in progress, if one asks for them."""
        training_pass = self.training_pass
        if training_pass is None or training_pass.dead_count is None:
            return None
        mask, n_dead = training_pass.dead_count.mask, training_pass.dead_count.wait()
        if n_dead == 0:
            return DeadLatents(mask, None)
        latents = torch.nonzero_static(mask, size=n_dead).squeeze(1)
        width = -(-n_dead // _DEAD_ALIGNMENT) * _DEAD_ALIGNMENT
        return DeadLatents(mask, RowBlock(latents, width))

    def dead_products(
        self, code: Code, dead: RowBlock, W_enc: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`x @ W_enc` of the dead latents, `[n_rows, width]`, and their biases `[n_dead]`."""
        bias = self.b_enc.index_select(0, dead.latents)
        if code.input_bias is not None:
            # Zero in value: gives b_dec its gradient by one matrix-vector product.
            rows = W_enc.detach()[: dead.latents.numel()]
            bias = bias - rows @ (code.input_bias - code.input_bias.detach())
        return code.x @ W_enc.T, bias

    def dense_pre_acts(self, code: Code) -> torch.Tensor:
        """`hidden_pre`, `[n_rows, d_sae]`, on the graph."""
        x = code.x
        if code.input_bias is not None:
            x = x - (code.input_bias - code.input_bias.detach())  # zero in value
        return x @ self.W_enc + self.b_enc

    def prepare_weights(self) -> None:
        """Bring `W_enc` into latent-major layout if something replaced its storage, and say to
        the optimizer whose parameters these are.
        """
        if self.lay_out_W_enc():
            warn_caller(
                "W_enc was given memory of another layout than this SAE computes with, and has "
                "been moved. Whatever held on to that memory no longer follows the weight: "
                "DistributedDataParallel, shared memory, views. Set weights in place or by "
                "load_state_dict."
            )
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


@contextmanager
def _in_progress(training_pass: _TrainingPass) -> Generator[None]:
    token = _pass_in_progress.set(training_pass)
    try:
        yield
    finally:
        _pass_in_progress.reset(token)


def _lay_out_after_loading(sae: SparseTrainingSAEMixin, *_: Any) -> None:
    """A state dict may be assigned, in any layout."""
    sae.lay_out_W_enc()


def has_hooks(hook_point: nn.Module) -> bool:
    """Whether any hook is attached to a hook point, or to what stands in for it.

    `HookPoint.has_hooks()` does not see hooks that were registered past it.
    """
    return any(getattr(hook_point, hooks) for hooks in MODULE_HOOKS)


def any_hooks(sae: nn.Module) -> bool:
    """Whether any hook is attached to a module or a parameter of an SAE."""
    return any(has_hooks(module) for module in sae.modules()) or any(
        getattr(parameter, hooks) for parameter in sae.parameters() for hooks in TENSOR_HOOKS
    )


def require_number(name: str, value: object) -> None:
    """Raise unless a configuration value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise unless a configuration value is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def require_bool(name: str, value: object) -> None:
    """Raise unless a configuration value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless a configuration value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
