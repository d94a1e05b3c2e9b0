"""
Chooses what computes a language model's activations at hook points, and runs it.

SAELens computes them with `model.run_with_cache`. `Decoder` computes the same values up to rounding
with fewer and larger operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from sae_lens.load_model import HookedProxyLM
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from saelens_sparse.language_model import hooked_transformer, transformers_model
from saelens_sparse.language_model.compiled import CompiledBlock
from saelens_sparse.language_model.decoder import Block, Decoder, Padding, Point, block
from saelens_sparse.language_model.graph import GraphedRun
from saelens_sparse.language_model.watch import Watch, placement
from saelens_sparse.warn import warn_caller

Option = Literal["auto", "saelens"]

MAX_PROBE_ERRORS = {torch.float64: 1e-9, torch.float32: 1e-3}
MAX_COARSE_PROBE_ERROR = 0.1
"""Relative errors beyond which values are not the same up to rounding: of products in full
precision, by dtype, and of all others (autocast, bfloat16, float16, TensorFloat-32)."""

MAX_PROBE_POSITIONS = 32


@dataclass(frozen=True)
class PathChoice:
    """
    What computes the activations.

    Attributes:
        path: "fast" for `Decoder`, "saelens" for `model.run_with_cache`.
        reason: why, for a reader.
    """

    path: Literal["fast", "saelens"]
    reason: str


@dataclass(frozen=True)
class Settings:
    """
    How activations are computed.

    Attributes:
        autocast: whether products run in bfloat16 by autocast, as with SAELens's `autocast_lm`.
        model_kwargs: what SAELens passes to the model's forward.
        compiled: whether blocks are compiled.
        cuda_graph: whether a batch of a known shape is replayed as a CUDA graph.
        n_positions: the longest prompt that has come or is expected, in tokens.
    """

    autocast: bool
    model_kwargs: Mapping[str, Any]
    compiled: bool
    cuda_graph: bool
    n_positions: int


class Reader(Protocol):
    """How a kind of model becomes a `Decoder`: a module of functions."""

    def modules_of(self, model: Any, /) -> list[nn.Module]: ...
    def point_of(self, model: Any, hook_name: str, /) -> Point | None: ...
    def why_not(self, model: Any, hook_names: Sequence[str], /) -> str | None: ...
    def padding_of(self, model: Any, tokens: Tensor, /) -> Padding | None: ...
    def read(self, model: Any, n_layers: int, n_positions: int, /) -> Decoder: ...


class ModelPath:
    """
    Computes activations at hook points, by the path that `choice` names.

    A model that is edited, hooked or moved afterwards is noticed at the next batch, and the choice
    is made again.
    """

    choice: PathChoice

    def __init__(
        self, model: nn.Module, hook_names: Sequence[str], option: Option, settings: Settings
    ) -> None:
        self._model: Any = model
        self._hook_names = list(dict.fromkeys(hook_names))
        self._option = option
        self._settings = settings
        self._warned: set[str] = set()
        self._compiled = CompiledBlock()
        self._choose()

    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """
        The activations at every hook point, as in SAELens's cache: same shapes, same dtypes.

        Args:
            tokens: `[n_prompts, n_positions]` int64, on the host or on the model's device. For a
                model whose tokenizer pads left, tokens on the host save a wait for the device.

        Returns:
            By hook name, tensors on the model's device that no later call changes.
        """
        is_longer = tokens.shape[1] > self._settings.n_positions
        if is_longer:
            self._settings = replace(self._settings, n_positions=tokens.shape[1])
        if is_longer or self._watch.has_changed:
            self._choose()
        if self._run is None:
            return self._saelens(tokens, self._model.run_with_cache)
        return self._run(tokens)

    def _saelens(self, tokens: Tensor, run_with_cache: Callable[..., Any]) -> dict[str, Tensor]:
        stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in self._hook_names]
        known = [stop for stop in stops if stop is not None]
        with torch.no_grad(), self._autocast():
            cache = run_with_cache(
                tokens.to(self._device),
                names_filter=self._hook_names,
                stop_at_layer=max(known, default=None),
                prepend_bos=False,
                **self._settings.model_kwargs,
            )[1]
        return {name: cache[name] for name in self._hook_names}

    def _on_device(self, tokens: Tensor, padding: Padding | None) -> tuple[Tensor, Padding | None]:
        if padding is not None:
            padding = Padding(*(part.to(self._device, non_blocking=True) for part in padding))
        return tokens.to(self._device, non_blocking=True), padding

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, self._settings.autocast)

    def _choose(self) -> None:
        self._device = next(self._model.parameters()).device
        self._run: Callable[[Tensor], dict[str, Tensor]] | None = None
        reader = reader_of(self._model)
        why_not = "the option says so" if self._option == "saelens" else self._try_fast(reader)
        if why_not is None:
            self.choice = PathChoice(
                "fast", f"{type(self._model).__name__} has an exact equivalent"
            )
        else:
            self.choice = PathChoice("saelens", why_not)
            if self._option != "saelens" and why_not not in self._warned:
                self._warned.add(why_not)
                warn_caller(f"Activations are computed by SAELens's own path: {why_not}.")
        modules = self._model.modules() if reader is None else reader.modules_of(self._model)
        self._watch = Watch(modules)

    def _try_fast(self, reader: Reader | None) -> str | None:
        """Set up the fast path. Gives a reason if it cannot be, None if it is."""
        settings, model = self._settings, self._model
        if reader is None:
            return f"the model is a {type(model).__qualname__}"
        if settings.model_kwargs:
            return f"model_kwargs={dict(settings.model_kwargs)!r} are set"
        why_not = placement(model) or reader.why_not(model, self._hook_names)
        if why_not is not None:
            return f"there is no exact equivalent of this model: {why_not}"
        places = {name: reader.point_of(model, name) for name in self._hook_names}
        points = {name: point for name, point in places.items() if point is not None}
        layers = [point.layer for point in points.values() if point.layer is not None]
        decoder = reader.read(model, max(layers, default=-1) + 1, settings.n_positions)
        tokens = probe_tokens(decoder, settings.n_positions).to(self._device)
        # Not the instance's own, which SAELens's `compile_llm` replaces by a compiled one.
        expected = self._saelens(tokens, partial(type(model).run_with_cache, model))
        fast = FastRun(
            decoder,
            {points[name]: value.dtype for name, value in expected.items()},
            self._device,
            settings.autocast,
        )
        found = fast(*self._on_device(tokens, reader.padding_of(model, tokens)))
        limit = max_probe_error(decoder.embedding.dtype, settings.autocast)
        why_not = difference({name: found[points[name]] for name in points}, expected, limit)
        if why_not is not None:
            return why_not
        if settings.compiled:
            fast.block = self._compiled
        run_batch = GraphedRun(fast, self._device) if settings.cuda_graph else fast

        def run(tokens: Tensor) -> dict[str, Tensor]:
            found = run_batch(*self._on_device(tokens, reader.padding_of(model, tokens)))
            return {name: found[point] for name, point in points.items()}

        self._run = run
        return None


class FastRun:
    """
    A decoder's pass to the wanted points.

    Args:
        decoder: the model.
        wanted: the points, and the dtypes of their values.
        device: the model's.
        autocast: whether products run in bfloat16.
    """

    def __init__(
        self,
        decoder: Decoder,
        wanted: Mapping[Point, torch.dtype],
        device: torch.device,
        autocast: bool,
    ) -> None:
        self.block: Block = block
        self._decoder = decoder
        self._wanted = dict(wanted)
        self._device = device
        self._autocast = autocast

    def __call__(self, tokens: Tensor, padding: Padding | None = None) -> dict[Point, Tensor]:
        """Values at the points, of tokens `[n_prompts, n_positions]` on the device."""
        # Each weight is read once a pass: keeping its rounded copy until the end saves nothing.
        autocast = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=False
        )
        with torch.no_grad(), autocast:
            return self._decoder.run(tokens, padding, self._wanted, self.block)


def reader_of(model: nn.Module) -> Reader | None:
    """What reads this kind of model; None where nothing does."""
    if type(model) is HookedTransformer:
        return hooked_transformer
    return transformers_model if type(model) is HookedProxyLM else None


def probe_tokens(decoder: Decoder, n_positions: int) -> Tensor:
    """A few tokens of many different values, `[2, 32 or fewer]` int64 on the host."""
    n_positions = min(n_positions, MAX_PROBE_POSITIONS)
    spread = torch.arange(2 * n_positions) * 7919 + 1
    return (spread % decoder.embedding.shape[0]).view(2, n_positions)


def max_probe_error(dtype: torch.dtype, autocast: bool) -> float:
    """The relative error that rounding may cause, of a model of this dtype."""
    is_full = torch.get_float32_matmul_precision() == "highest" and not autocast
    return (
        MAX_PROBE_ERRORS.get(dtype, MAX_COARSE_PROBE_ERROR) if is_full else MAX_COARSE_PROBE_ERROR
    )


def difference(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float
) -> str | None:
    """Which value is not the expected one up to rounding, in words; None if all are."""
    for name, value in expected.items():
        if found[name].shape != value.shape:
            return f"{name!r} has shape {list(value.shape)}, not {list(found[name].shape)}"
        error = (found[name].double() - value.double()).norm() / value.double().norm()
        if not error <= limit:
            return f"{name!r} differs from SAELens's by {float(error):.1e}, {limit:.0e} is allowed"
    return None


def choose_model_path(
    model: nn.Module,
    hook_names: Sequence[str],
    *,
    option: Option = "auto",
    autocast: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    n_positions: int,
    compiled: bool = False,
    cuda_graph: bool = False,
) -> ModelPath:
    """
    Choose what computes activations at hook points of a model that SAELens loaded.

    A model, hook point or setting without an exact equivalent is computed as SAELens does, with one
    warning that says why. The fast path is tried on a few tokens first, and taken only if it gives
    SAELens's values.

    Args:
        model: as SAELens's `load_model` gives it, or the user's `override_model`. Weights are
            never copied: some of a `HookedTransformer`'s become views of larger matrices.
        hook_names: names of the hook points, as in SAELens's config.
        option: "auto" takes the fast path where there is one; "saelens" takes SAELens's.
        autocast: SAELens's `autocast_lm`.
        model_kwargs: SAELens's `model_kwargs`.
        n_positions: the longest prompt expected, in tokens; a longer one costs a new choice.
        compiled: whether blocks of the fast path are compiled by `torch.compile`.
        cuda_graph: whether the fast path is replayed as a CUDA graph, on a CUDA device.

    Raises:
        ValueError: `option` is not one of "auto" and "saelens".
    """
    if option not in ("auto", "saelens"):
        raise ValueError(f"option must be 'auto' or 'saelens', got {option!r}")
    settings = Settings(autocast, dict(model_kwargs or {}), compiled, cuda_graph, n_positions)
    return ModelPath(model, hook_names, option, settings)
