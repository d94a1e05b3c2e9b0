"""What every sparse training SAE shares: weight layout, the course of a step, encode and decode."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput
from torch import nn
from typing_extensions import override

from saelens_sparse.architectures.hooks import has_gradient_hooks, has_hooks
from saelens_sparse.architectures.parameters import SALTS, mark_parameter
from saelens_sparse.architectures.screen_recall import (
    MEASURED_STEPS,
    measure_recall,
    report_recall,
    warns_of,
)
from saelens_sparse.choice.availability import Choice, choose_implementation, require_float8
from saelens_sparse.choice.policy import PairTotals
from saelens_sparse.codes.code import Code, PairCode
from saelens_sparse.codes.on_demand import (
    DeferredPreActs,
    SparseFeatureActs,
    code_of,
    squared_errors,
)
from saelens_sparse.codes.step import StepContext, current_step, in_progress, offer_to
from saelens_sparse.ops.activation.pairs import PairActivation
from saelens_sparse.ops.common.host_copy import HostCount
from saelens_sparse.ops.common.precision import matmul_dtype
from saelens_sparse.ops.common.ranges import profiler_range
from saelens_sparse.ops.common.versions import version_of
from saelens_sparse.ops.encode import encode_pairs
from saelens_sparse.ops.pairs import LatentOrder
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import row_norms
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.weight_cache import WeightCopy, WeightView
from saelens_sparse.warn import warn_caller

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object

DENSE_HOOKS = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")

_F = TypeVar("_F", bound=Callable[..., Any])


def _not_compiled(function: _F) -> _F:
    """`torch.compiler.disable` with its type kept."""
    return cast(_F, torch.compiler.disable(function))


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
    # Whether the last step found that it had missed something: then the next one asks at once.
    asks_at_once = False
    has_warned_of_recall = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mse_loss_fn = squared_errors
        self.register_load_state_dict_post_hook(_lay_out_after_loading)

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.lay_out_weights()

    def lay_out_weights(self) -> list[str]:
        """Bring weights into latent-major layout; returns the names of those that were moved.

        Parameter objects, and with them the optimizer's state, stay the same.
        """
        moved: list[str] = []
        if self.cfg.implementation == "dense":
            return moved
        for name in ("W_enc", "W_dec"):
            weight: nn.Parameter = getattr(self, name)
            if (weight.T if name == "W_enc" else weight).is_contiguous():
                continue
            with torch.inference_mode(weight.is_inference()), torch.no_grad():
                weight.data = _latent_major(weight.data, name)
                if weight.grad is not None:
                    weight.grad = torch.empty_like(weight).copy_(weight.grad)
            moved.append(name)
        return moved

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

    @property
    @abstractmethod
    def activation(self) -> PairActivation:
        """The activation function at pairs."""

    @abstractmethod
    def search(self, x: torch.Tensor, norms: torch.Tensor | None, step: StepContext) -> FoundPairs:
        """
        Find the pairs of a batch.

        Args:
            x: `[n_rows, d_in]`, the centred encoder input.
            norms: `[d_sae]`, what `reported_norms` gave.
            step: the step that this is part of.
        """

    def reported_norms(self, step: StepContext) -> torch.Tensor | None:  # noqa: ARG002
        """Decoder norms `[d_sae]` that scale the activations as they are reported, if they do."""
        return None

    @property
    def weight_views(self) -> Mapping[str, WeightView]:
        """What an update should write of a weight for the next step, by name of the parameter."""
        return {"W_enc": "scaled" if self.cfg.screen_dtype == "float8" else "rounded"}

    def graph_key(self) -> object | None:
        """What a recording of a step as a CUDA graph depends on besides shapes and weights; None
        if a step cannot be one.
        """
        return None

    def commit(
        self,
        step: StepContext,
        output: TrainStepOutput | None = None,
    ) -> None:
        """
        Change what a step, or an encoding outside of one, changes besides gradients.

        Called once, when the step is known to be complete.

        Args:
            step: the step.
            output: its output, whose metrics may report the change; None for an encoding.
        """
        if output is not None and (recall := report_recall(step, output)) is not None:
            self.has_warned_of_recall |= warns_of(recall, step, self.has_warned_of_recall)
        if step.n_training_steps is not None:
            # With a NaN in every batch, each pass would otherwise be taken twice.
            self.asks_at_once = not step.was_complete

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
            if self.cfg.moments is not None:
                self.mark_parameters()
            return super().training_forward_pass(step_input)
        return self._sparse_training_forward_pass(step_input)

    # The kernels leave nothing for a compiler to fuse, and the lazy tensors are not for it.
    @_not_compiled
    def _sparse_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = self.start_step(step_input)
        output = self.propose(step_input, step)
        if not step.is_complete():
            step = self.start_step(step_input, instead_of=step)
            output = self.propose(step_input, step)
        self.commit(step, output)
        return output

    def start_step(
        self, step_input: TrainStepInput, instead_of: StepContext | None = None
    ) -> StepContext:
        """A step to `propose`; one that is taken instead of another waits for the device, and is
        complete.
        """
        if self.cfg.screen_dtype == "float8":
            require_float8(self.W_enc.device)
        mask = step_input.dead_neuron_mask
        # Queued first, the count has reached the host by the time that the encoder asks for it.
        counts = mask is not None and self.uses_dead_latents
        return StepContext(
            self.implementation,
            asks_at_once=self.asks_at_once or instead_of is not None,
            offer=offer_to(self),
            dead_count=HostCount(mask) if mask is not None and counts else None,
            n_training_steps=step_input.n_training_steps,
            screen_dtype=self.cfg.screen_dtype,
            measures_recall=self.measures_recall(
                step_input.n_training_steps, step_input.is_logging_step
            ),
            needed=None if instead_of is None else instead_of.pair_totals,
            target=step_input.sae_in if self._compares_what_it_decodes else None,
        )

    @property
    def _compares_what_it_decodes(self) -> bool:
        """Whether SAELens's loss compares its input with what the decoder gives, row by row."""
        undoes_norm = self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm")
        is_by_row = not undoes_norm and not self.hook_z_reshaping_mode
        return is_by_row and self.mse_loss_fn is squared_errors

    def measures_recall(self, n_training_steps: int, is_logging_step: bool) -> bool:
        """Whether a step compares what its search has found with what there is."""
        is_due = n_training_steps % MEASURED_STEPS == 0 or is_logging_step
        return self.cfg.screen_dtype == "float8" and is_due

    def propose(self, step_input: TrainStepInput, step: StepContext) -> TrainStepOutput:
        """
        SAELens's training forward pass, which changes nothing.

        The output is right if `step.is_complete()`. Work that is queued before asking hides the
        wait. Either `commit(step)` follows, or the output and all that came of it must be dropped.
        """
        # What is not of a range within is of the losses.
        with in_progress(self, step), profiler_range("saelens_sparse::losses"):
            output = super().training_forward_pass(step_input)
        if (code := code_of(output.feature_acts)) is not None:
            output.metrics.update(code.metrics)
        return output

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
        # Asked again within a step: what needs a dense tensor may have been attached since.
        choice = self.implementation
        if choice.name == "dense":
            return super().encode_with_hidden_pre(x)  # pyright: ignore[reportAbstractUsage]
        return self._encode_sparsely(x, choice)

    @_not_compiled
    def _encode_sparsely(
        self, x: torch.Tensor, choice: Choice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = current_step(self)
        if step is None or step.choice.name == "dense":
            step = StepContext(choice, asks_at_once=True, offer=offer_to(self))
        self.prepare_weights()
        sae_in, input_bias = self._sae_in_and_bias(x)
        leading_shape = sae_in.shape[:-1]
        rows = sae_in.reshape(-1, self.cfg.d_in)
        if rows.data_ptr() == x.data_ptr():
            # Later uses must not see what the caller puts into its buffer next.
            rows = rows.clone()
        with profiler_range("saelens_sparse::encode"):
            code = self.make_code(rows, input_bias, step)
        if step.n_training_steps is None:
            self.commit(step)
        weights = (self.W_enc, self.b_enc, self.W_dec)
        hidden_pre = DeferredPreActs(code, leading_shape, self.dense_pre_acts, weights)
        return SparseFeatureActs(code, leading_shape), hidden_pre

    def make_code(
        self, x: torch.Tensor, input_bias: torch.Tensor | None, step: StepContext
    ) -> Code:
        """
        Encode a batch.

        Args:
            x: `[n_rows, d_in]`, the centred encoder input.
            input_bias: `[d_in]`, `b_dec` if it was subtracted to give `x` outside of the graph.
            step: the step that this is part of.
        """
        norms = self.reported_norms(step)
        with profiler_range("saelens_sparse::search"):
            found = self.search(x, norms, step)
        found, order = step.settled(found, self.cfg.d_sae)
        if step.measures_recall:
            measure_recall(self.search_sample, x, norms, found.pairs, step, self.cfg.d_sae)
        if found.totals is not None:
            step.count_pairs(PairTotals(found.totals, x.shape[0], self.cfg.d_sae))
        dead, rounded = step.dead_latents(), self.rounded_W_enc(step)
        acts, l0, dead_W_enc = encode_pairs(
            x,
            self.W_enc,
            self.b_enc,
            input_bias,
            found.pairs,
            order,
            self.activation,
            None if dead is None else dead.block,
            step.choice.backend,
            self._row_gradients("W_enc", order, step),
            None if rounded is None or rounded.errors is not None else rounded.values,
        )
        if dead is not None:
            dead.W_enc = dead_W_enc
        return PairCode(
            x=x,
            input_bias=input_bias,
            acts=acts,
            l0=l0,
            step=step,
            decoder_version=version_of(self.W_dec),
            dead=dead,
            pairs=found.pairs,
            order=order,
            norms=norms,
            W_dec=self.W_dec,
        )

    def search_sample(
        self,
        x: torch.Tensor,
        norms: torch.Tensor | None,
        step: StepContext,
        n_found: int,  # noqa: ARG002
    ) -> FoundPairs:
        """
        Search some rows of a batch as `search` does the whole.

        Args:
            x: `[n, d_in]`.
            norms: as for `search`.
            step: likewise.
            n_found: how many pairs of these rows were found before.
        """
        return self.search(x, norms, step)

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
        code, step = feature_acts.code, feature_acts.code.step
        weights_changed = not code.is_made_with(self.W_dec)
        has_dense_hook = any(has_hooks(getattr(self, name)) for name in DENSE_HOOKS)
        if has_dense_hook or weights_changed or not feature_acts.is_untouched:
            return super().decode(feature_acts.materialized())
        to_step = not has_gradient_hooks(self.W_dec)
        target = step.target if step is current_step(self) and torch.is_grad_enabled() else None
        if target is not None:
            target = target.reshape(-1, self.cfg.d_in).contiguous()
        with profiler_range("saelens_sparse::decode"):
            recons, dead_W_dec, step.comparison = code.decode(
                self.W_dec, self.b_dec, target, to_step=to_step
            )
        code.is_decoded = True
        if code.dead is not None:
            code.dead.W_dec = dead_W_dec
        sae_out_pre = recons.view(*feature_acts.shape[:-1], self.cfg.d_in)
        sae_out_pre = self.hook_sae_recons(sae_out_pre)
        sae_out_pre = self.run_time_activation_norm_fn_out(sae_out_pre)
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through the SAE, as stock's; nothing dense unless a hook asks for it."""
        if self.use_error_term or self.implementation.name == "dense":
            return super().forward(x)
        return self.hook_sae_output(self.decode(self.encode_with_hidden_pre(x)[0]))

    def _row_gradients(
        self, name: str, order: LatentOrder, step: StepContext
    ) -> list[RowGradient] | None:
        """Where the gradient of a weight over such pairs goes instead of to its `.grad`."""
        if has_gradient_hooks(getattr(self, name)):
            return None
        return step.row_gradients_of(name, order)

    def rounded_W_enc(self, step: StepContext) -> WeightCopy | None:
        """The low-precision `W_enc` that the last update has written, if it still is that."""
        weights = step.offer.weights
        return None if weights is None else weights.rounded(self.W_enc.T)

    def decoder_norms(self, step: StepContext) -> torch.Tensor:
        """Norms of the rows of `W_dec`, `[d_sae]`, without a graph."""
        backend, weights = step.choice.backend, step.offer.weights
        if weights is None or backend != "triton":
            return self.W_dec.detach().norm(dim=-1)
        if (copy := weights.norms(self.W_dec)) is not None:
            return copy.values.to(self.W_dec.dtype, copy=True)  # the update writes it anew
        # Slower, but what an update would have written, so that a resumed run goes on as it was.
        return row_norms(self.W_dec, backend).to(self.W_dec.dtype)

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
        """Bring weights into latent-major layout if something replaced their storage, and say to
        the optimizer whose parameters these are.
        """
        for name in self.lay_out_weights():
            warn_caller(
                f"{name} was given memory of another layout than this SAE computes with, and has "
                "been moved. Whatever held on to that memory no longer follows the weight: "
                "DistributedDataParallel, shared memory, views. Set weights in place or by "
                "load_state_dict."
            )
        self.mark_parameters()

    @_not_compiled
    def mark_parameters(self) -> None:
        """Say to the optimizer whose parameters these are, and how they are to be updated."""
        salts = {} if self.cfg.moments is None else SALTS
        for name, parameter in self.named_parameters():
            mark_parameter(parameter, self.cfg.fused_adam, salts.get(name))

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


def _latent_major(weight: torch.Tensor, name: str) -> torch.Tensor:
    """A weight whose rows, one a latent, are contiguous."""
    return weight.T.contiguous().T if name == "W_enc" else weight.contiguous()


def _lay_out_after_loading(sae: SparseTrainingSAEMixin, *_: Any) -> None:
    """A state dict may be assigned, in any layout."""
    sae.lay_out_weights()
