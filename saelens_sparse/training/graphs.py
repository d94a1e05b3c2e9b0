"""A Top-K training step as CUDA graphs: the forward and backward pass, and what follows them.

At small sizes a GPU is faster than the host that launches its kernels. A graph is launched as one.
It repeats the recorded kernels on the recorded memory, so it stands for a step only as long as
that is the same work: same weights in the same place, same batch size, no dead latents (their
number sets shapes), nobody who hooks into the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import nn
from torch.autograd.graph import increment_version

from saelens_sparse.architectures.base import Pending, any_hooks
from saelens_sparse.architectures.topk import SparseTopKTrainingSAE
from saelens_sparse.codes.code import SelectedCode
from saelens_sparse.codes.on_demand import DeferredPreActs, SparseFeatureActs
from saelens_sparse.ops import PendingSelection, RowGradient
from saelens_sparse.warn import warn_caller

_T = TypeVar("_T")

# Weights up to this size are small: see "CUDA graph" in docs/performance.md.
MAX_WEIGHT_ELEMENTS = 2**26
# Steps taken without a graph first, in which kernels are compiled and memory is reserved.
STEPS_BEFORE = 3


def conditions(sae: SparseTopKTrainingSAE, sae_in: torch.Tensor) -> object:
    """What a recording depends on, besides what `can_record` asks for; to be compared."""
    cfg = sae.cfg
    settings = (
        cfg.gradient_buffers,
        cfg.apply_b_dec_to_input,
        cfg.rescale_acts_by_decoder_norm,
        cfg.screen_buffer_mib,
        getattr(sae.activation_fn, "k", None),
    )
    functions = {name: id(value) for name, value in vars(sae).items() if callable(value)}
    copies = {
        name: copy.values.data_ptr() for name, copy in (sae.copies or {}).items() if copy.is_current
    }
    weights = [parameter.data_ptr() for parameter in sae.parameters()]
    return sae_in.shape, sae_in.dtype, settings, functions, weights, copies


def gains(sae: Any) -> bool:
    """Whether steps of this SAE are shorter as a graph."""
    return (
        type(sae) is SparseTopKTrainingSAE
        and sae.cfg.cuda_graph
        and sae.W_enc.is_cuda
        and sae.W_enc.numel() <= MAX_WEIGHT_ELEMENTS
    )


def can_record(sae: SparseTopKTrainingSAE, sae_in: torch.Tensor) -> bool:
    """Whether a step of this SAE, without dead latents, can be a graph."""
    return (
        not sae_in.requires_grad
        and sae.implementation.name == "triton"
        and not any_hooks(sae)
        and all(parameter.requires_grad for parameter in sae.parameters())
        and not any(_is_foreign(sae, name, value) for name, value in vars(sae).items())
    )


def _is_foreign(sae: SparseTopKTrainingSAE, name: str, value: object) -> bool:
    """Whether somebody has put something of their own in the place of a method or a function."""
    if callable(getattr(type(sae), name, None)):
        return True
    package = str(getattr(value, "__module__", None)).partition(".")[0]
    return callable(value) and package not in ("sae_lens", "saelens_sparse")


class GraphedPass:
    """A recorded forward and backward pass.

    Args:
        sae: `can_record` must hold for it.
        sae_in: a batch as it will be replayed with.
        autocast: entered around the forward pass.
    """

    def __init__(
        self,
        sae: SparseTopKTrainingSAE,
        sae_in: torch.Tensor,
        autocast: AbstractContextManager[Any],
    ) -> None:
        self.conditions = conditions(sae, sae_in)
        self._sae, self._autocast = sae, autocast
        self._sae_in = sae_in.detach().clone()
        self._device = sae_in.device
        stream = torch.cuda.Stream(self._device)
        # PyTorch asks for a pass on a side stream first.
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph, recorded = record(self._run, stream)
        self._output, self._pending, self.row_gradients, self._gradients, self._losses = recorded
        self.rest = GraphedCalls(stream, self._graph.pool())

    def _run(
        self,
    ) -> tuple[
        TrainStepOutput,
        list[PendingSelection],
        dict[str, list[RowGradient]],
        tuple[torch.Tensor | None, ...],
        torch.Tensor,
    ]:
        sae = self._sae
        step_input = TrainStepInput(
            sae_in=self._sae_in,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
        sae.row_gradients = None if sae.cfg.gradient_buffers else {}
        try:
            with _fresh_parameters(sae) as parameters, self._autocast:
                output, pending = sae.start_training_forward_pass(step_input)
            gradients = torch.autograd.grad(output.loss, parameters, allow_unused=True)
            row_gradients = sae.row_gradients or {}
        finally:
            sae.row_gradients = None
        assert isinstance(output.feature_acts, SparseFeatureActs)
        output.feature_acts.code.latent_counts()  # made here, or it would be made once for all
        selections = [part for part in pending if isinstance(part, PendingSelection)]
        losses = torch.stack([output.loss, *output.losses.values()]).detach()
        return output, selections, row_gradients, gradients, losses

    def replay(self, sae_in: torch.Tensor) -> tuple[TrainStepOutput, list[Pending]]:
        """
        The pass on another batch, with the parameters' `.grad` set.

        Returns:
            The output, of which `feature_acts` can be read until the next replay, and what it
            relies on. See `start_training_forward_pass`.
        """
        self._sae_in.copy_(sae_in)
        with torch.cuda.device(self._device):
            self._graph.replay()
        recorded = self._output
        assert isinstance(recorded.feature_acts, SparseFeatureActs)
        code = recorded.feature_acts.code
        assert isinstance(code, SelectedCode)
        increment_version([code.acts])
        code = replace(code)
        sae = self._sae
        weights = (sae.W_enc, sae.b_enc, sae.W_dec)
        shape = sae_in.shape[:-1]
        loss, *losses = self._losses.clone().unbind()
        output = TrainStepOutput(
            sae_in=sae_in,
            sae_out=recorded.sae_out.detach().clone(),
            feature_acts=SparseFeatureActs(code, shape),
            hidden_pre=DeferredPreActs(code, shape, sae.dense_pre_acts, weights),
            loss=loss,
            losses=dict(zip(recorded.losses, losses, strict=True)),
            metrics=dict(recorded.metrics),
        )
        for parameter, gradient in zip(sae.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return output, [pending.again() for pending in self._pending]


@contextmanager
def _fresh_parameters(sae: SparseTopKTrainingSAE) -> Generator[list[nn.Parameter]]:
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
        stream: to record on.
        pool: memory pool of a graph that is always replayed before them.

    Attributes:
        depends_on: what the recordings depend on, for whoever makes them to compare.
    """

    def __init__(self, stream: torch.cuda.Stream, pool: Any) -> None:
        self.depends_on: object = None
        self._stream, self._pool = stream, pool
        self._recorded: dict[str, torch.cuda.CUDAGraph | None] = {}

    @property
    def are_recorded(self) -> bool:
        return bool(self._recorded)

    def run(self, name: str, call: Callable[[], None]) -> bool:
        """
        Make a call, or replay what it queued when it was made first.

        Returns:
            Whether it was replayed only, so that nothing of it happened on the host.
        """
        with torch.cuda.device(self._stream.device):
            is_first = name not in self._recorded
            if is_first:
                try:
                    self._recorded[name], _ = record(call, self._stream, self._pool)
                except RuntimeError as error:
                    _give_up(self._stream.device, error)
                    self._recorded[name] = None
            graph = self._recorded[name]
            if graph is None:  # could not be recorded
                call()
                return False
            graph.replay()
            return not is_first


def record(
    call: Callable[[], _T], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, _T]:
    """Record what a call queues on a side stream, without its being done."""
    graph = torch.cuda.CUDAGraph()
    # Other threads, which may be preparing activations, go on as they like.
    with (
        torch.cuda.device(stream.device),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        return graph, call()


def try_to_record(
    sae: SparseTopKTrainingSAE, sae_in: torch.Tensor, autocast: AbstractContextManager[Any]
) -> GraphedPass | None:
    """A recording; None, and a warning, if PyTorch cannot make one here."""
    try:
        return GraphedPass(sae, sae_in, autocast)
    except RuntimeError as error:
        _give_up(sae_in.device, error)
        return None


def _give_up(device: torch.device, error: RuntimeError) -> None:
    # PyTorch's generator believes that the recording goes on.
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())
    _warn_once(str(error).split("\n")[0])


@cache
def _warn_once(reason: str) -> None:
    warn_caller(f"a training step runs without a CUDA graph, which could not be recorded: {reason}")
