"""A training step as CUDA graphs: the forward pass, the backward pass, and what follows them.

A GPU may be faster than the host that launches its kernels. A graph is launched as one.
It repeats the recorded kernels on the recorded memory, so it stands for a step only as long as
that is the same work: same weights in the same place, same batch size, no dead latents (their
number sets shapes), nobody who hooks into the pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import nn
from torch.autograd.graph import increment_version

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.architectures.hooks import any_hooks
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.codes.code import PairCode
from saelens_sparse.codes.on_demand import DeferredPreActs, SparseFeatureActs, code_of
from saelens_sparse.codes.step import Offer, RowGradients, StepContext, offered
from saelens_sparse.measured import MAX_GRAPH_ELEMENTS
from saelens_sparse.ops.update.weight_cache import WeightCache
from saelens_sparse.training.graph_memory import GraphMemory
from saelens_sparse.warn import warn_caller

_T = TypeVar("_T")

# Steps taken without a graph first, in which kernels are compiled and memory is reserved.
STEPS_BEFORE = 3


@dataclass
class TakenPass:
    """A forward and backward pass that has been taken, eagerly or as a graph.

    Attributes:
        output: SAELens's output of the forward pass.
        row_gradients: the gradients that no parameter holds.
        step: the step that it is of, to be committed; None if that is done.
        graph: what was replayed; None if it was taken eagerly.
        replays_followups: whether what follows can be graphs too.
    """

    output: TrainStepOutput
    row_gradients: RowGradients | None
    step: StepContext | None
    graph: GraphedPass | None = None
    replays_followups: bool = False


def is_faster_as_graph(sae: Any) -> bool:
    """Whether steps of this SAE are shorter as a graph."""
    return (
        any(type(sae) is architecture.sae for architecture in ARCHITECTURES.values())
        and sae.cfg.cuda_graph
        and sae.W_enc.is_cuda
        and sae.W_enc.numel() <= MAX_GRAPH_ELEMENTS
        and sae.graph_key() is not None
    )


def can_record(sae: SparseTrainingSAEMixin, sae_in: torch.Tensor) -> bool:
    """Whether a step of this SAE, without dead latents, can be a graph."""
    return (
        not sae_in.requires_grad
        and sae.implementation.name == "triton"
        and not any_hooks(sae)
        and all(parameter.requires_grad for parameter in sae.parameters())
        and not any(_is_foreign(sae, name, value) for name, value in vars(sae).items())
    )


def _is_foreign(sae: SparseTrainingSAEMixin, name: str, value: object) -> bool:
    """Whether somebody has put something of their own in the place of a method or a function."""
    if callable(getattr(type(sae), name, None)):
        return True
    package = str(getattr(value, "__module__", None)).partition(".")[0]
    return callable(value) and package not in ("sae_lens", "saelens_sparse")


def _recording_key(
    sae: SparseTrainingSAEMixin, sae_in: torch.Tensor, weights: WeightCache
) -> object:
    """What a recording depends on, besides what `can_record` asks for; to be compared."""
    functions = {name: id(value) for name, value in vars(sae).items() if callable(value)}
    addresses = [parameter.data_ptr() for parameter in sae.parameters()]
    cfg = sae.cfg
    settings = (
        cfg.gradient_buffers, cfg.apply_b_dec_to_input, cfg.screen_buffer_mib, cfg.screen_dtype,
        cfg.moments, cfg.fused_adam,  # which a pass that is taken tells the optimizer
    )  # fmt: skip
    return (
        sae_in.shape, sae_in.dtype, settings, sae.graph_key(), functions, addresses,
        weights.addresses(),
    )  # fmt: skip


class StepGraphs:
    """The graphs of one SAE's steps: recorded when they can be, given up when they no longer fit.

    Args:
        memory: where they are recorded.

    Attributes:
        current: the recorded pass, if there is one.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self.current: GraphedPass | None = None
        self._memory = memory
        self._steps_before = STEPS_BEFORE

    def usable(
        self,
        sae: SparseTrainingSAEMixin,
        sae_in: torch.Tensor,
        autocast: AbstractContextManager[Any],
        weights: WeightCache,
        none_is_dead: Callable[[], bool],
    ) -> GraphedPass | None:
        """The step's passes as a graph, recorded where there is none yet; None if they are not one.

        Args:
            sae: the SAE, whose training forward pass is this package's.
            sae_in: the batch.
            autocast: entered around the forward pass.
            weights: what the last update has written.
            none_is_dead: whether no latent is known to be dead. It may wait for the device.
        """
        if sae.asks_at_once or not is_faster_as_graph(sae):
            return None
        with autocast:  # what runs depends on it
            recordable = can_record(sae, sae_in)
        if not recordable or not none_is_dead():
            return None
        key = _recording_key(sae, sae_in, weights)
        if self.current is None or self.current.key != key:
            self.current = None
            if self._steps_before > 0:
                self._steps_before -= 1
                return None
            self.current = _try_to_record(sae, sae_in, autocast, weights, key, self._memory)
            self._steps_before = STEPS_BEFORE if self.current is not None else sys.maxsize
        return self.current

    def can_replay_followups(self, taken: TakenPass, depends_on: Callable[[], object]) -> bool:
        """
        Whether what follows the passes can be graphs in this step, as the passes were.

        That is recorded once an eager step has left everything where it was: the optimizer puts
        state that was loaded in order at its next step. If something takes another place in memory
        later, all that was recorded is given up, and made anew after eager steps.
        """
        if taken.graph is None:
            return False
        followups, found = taken.graph.followups, depends_on()
        if found is None:
            return False
        if followups.depends_on == found:
            return True
        followups.depends_on = found
        if followups.are_recorded:
            self.current = None
        return False


class _Maker(Protocol):
    """Makes a call, and gives what that gives."""

    def __call__(self, call: Callable[[], _T], /) -> _T: ...


class _Recorded(NamedTuple):
    """What recorded passes have written into their memory."""

    output: TrainStepOutput
    step: StepContext
    row_gradients: RowGradients | None
    gradients: tuple[torch.Tensor | None, ...]
    losses: torch.Tensor


class GraphedPass:
    """A recorded forward pass and a recorded backward pass.

    The host learns between them whether the forward pass was complete, while the device goes on.

    Args:
        sae: `can_record` must hold for it.
        sae_in: a batch as it will be replayed with.
        autocast: entered around the forward pass.
        weights: what the last update has written.
        key: what the recording depends on.
        memory: where it is recorded.

    Attributes:
        key: likewise.
        followups: calls that follow a replay, recorded too.
    """

    def __init__(
        self,
        sae: SparseTrainingSAEMixin,
        sae_in: torch.Tensor,
        autocast: AbstractContextManager[Any],
        weights: WeightCache,
        key: object,
        memory: GraphMemory,
    ) -> None:
        self.key = key
        self._sae, self._autocast, self._weights = sae, autocast, weights
        self._sae_in = sae_in.detach().clone()
        self._device = sae_in.device
        stream = memory.stream(self._device)
        # PyTorch asks for a pass on a side stream first.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._run(lambda call: call())
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graphs: list[torch.cuda.CUDAGraph] = []

        def record(call: Callable[[], _T]) -> _T:
            graph, result = memory.record(call, self._device)
            graphs.append(graph)
            return result

        self._recorded = self._run(record)
        self._forward, self._backward = graphs
        self.followups = GraphedCalls(memory, self._device)

    def _run(self, make: _Maker) -> _Recorded:
        """Both passes, each by a call that `make` makes."""
        sae = self._sae
        step_input = TrainStepInput(
            sae_in=self._sae_in,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=1,  # a step that measures nothing
            is_logging_step=False,
        )
        offer = Offer(None if sae.cfg.gradient_buffers else RowGradients(), self._weights)

        def forward() -> tuple[TrainStepOutput, StepContext]:
            with self._autocast:
                step = sae.start_step(step_input)
                return sae.propose(step_input, step), step

        def backward() -> tuple[tuple[torch.Tensor | None, ...], torch.Tensor]:
            gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
            code = code_of(output.feature_acts)
            assert code is not None
            code.latent_counts()  # made here, or it would be made once for all
            return gradients, torch.stack([output.loss, *output.losses.values()]).detach()

        with _fresh_parameters(sae) as parameters, offered(sae, offer):
            output, step = make(forward)
            gradients, losses = make(backward)
        return _Recorded(output, step, offer.row_gradients, gradients, losses)

    def replay(self, sae_in: torch.Tensor, n_training_steps: int) -> TakenPass:
        """
        The pass on another batch, with the parameters' `.grad` set.

        Of its output, `feature_acts` can be read until the next replay.
        """
        self._sae_in.copy_(sae_in)
        sae, recorded = self._sae, self._recorded
        with torch.cuda.device(self._device):
            self._forward.replay()
            checks = [check.renewed() for check in recorded.step.checks]
            self._backward.replay()
        step = StepContext(
            recorded.step.choice,
            asks_at_once=False,
            n_training_steps=n_training_steps,
            checks=checks,
            seen=recorded.step.seen,
        )
        code = code_of(recorded.output.feature_acts)
        assert isinstance(code, PairCode)
        increment_version([code.acts])
        code = replace(code, step=step)
        weights = (sae.W_enc, sae.b_enc, sae.W_dec)
        shape = sae_in.shape[:-1]
        loss, *losses = recorded.losses.clone().unbind()
        output = TrainStepOutput(
            sae_in=sae_in,
            sae_out=recorded.output.sae_out.detach().clone(),
            feature_acts=SparseFeatureActs(code, shape),
            hidden_pre=DeferredPreActs(code, shape, sae.dense_pre_acts, weights),
            loss=loss,
            losses=dict(zip(recorded.output.losses, losses, strict=True)),
            metrics=dict(recorded.output.metrics),
        )
        for parameter, gradient in zip(sae.parameters(), recorded.gradients, strict=True):
            parameter.grad = gradient
        return TakenPass(output, recorded.row_gradients, step, self)


@contextmanager
def _fresh_parameters(sae: SparseTrainingSAEMixin) -> Generator[list[nn.Parameter]]:
    """Parameters that share the memory of those of the SAE and nothing else.

    Autograd's nodes for the SAE's own may live on from an earlier step and run on its stream.
    """
    own = dict(sae.named_parameters(recurse=False))
    try:
        for name, parameter in own.items():
            setattr(sae, name, nn.Parameter(parameter.detach()))
        yield [getattr(sae, name) for name in own]
    finally:
        for name, parameter in own.items():
            setattr(sae, name, parameter)


class GraphedCalls:
    """Calls that are recorded once, and replayed from then on.

    Args:
        memory: where they are recorded.
        device: where they run.

    Attributes:
        depends_on: what the recordings depend on, for whoever makes them to compare.
    """

    def __init__(self, memory: GraphMemory, device: torch.device) -> None:
        self.depends_on: object = None
        self._memory, self._device = memory, device
        self._recorded: dict[str, tuple[torch.cuda.CUDAGraph, Any] | None] = {}

    @property
    def are_recorded(self) -> bool:
        return bool(self._recorded)

    def run(self, name: str, call: Callable[[], _T]) -> tuple[_T, bool]:
        """
        Make a call, or replay what it queued when it was made first.

        Returns:
            What the call gave when it was made. Its tensors are those that a replay writes anew.
            And whether it was replayed only, so that nothing of it happened on the host.
        """
        with torch.cuda.device(self._device):
            is_first = name not in self._recorded
            if is_first:
                try:
                    self._recorded[name] = self._memory.record(call, self._device)
                except RuntimeError as error:
                    _warn_once(_first_line(error))
                    self._recorded[name] = None
            recorded = self._recorded[name]
            if recorded is None:  # could not be recorded
                return call(), False
            graph, result = recorded
            graph.replay()
            return result, not is_first


def _try_to_record(
    sae: SparseTrainingSAEMixin,
    sae_in: torch.Tensor,
    autocast: AbstractContextManager[Any],
    weights: WeightCache,
    key: object,
    memory: GraphMemory,
) -> GraphedPass | None:
    """A recording; None, and a warning, if PyTorch cannot make one here."""
    try:
        return GraphedPass(sae, sae_in, autocast, weights, key, memory)
    except RuntimeError as error:
        _warn_once(_first_line(error))
        return None


def _first_line(error: RuntimeError) -> str:
    return str(error).split("\n")[0]


@cache
def _warn_once(reason: str) -> None:
    warn_caller(f"a training step runs without a CUDA graph, which could not be recorded: {reason}")
