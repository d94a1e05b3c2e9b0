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
from saelens_sparse.language_model.decoder import (
    Block,
    Decoder,
    Padding,
    Point,
    block,
    precise_block,
    wider,
)
from saelens_sparse.language_model.graph import GraphedRun
from saelens_sparse.language_model.watch import Watch, placement
from saelens_sparse.measured import MIN_COMPILED_WORK
from saelens_sparse.ops.common.host_copy import to_device
from saelens_sparse.private_names import input_token_device
from saelens_sparse.warn import warn_caller

Option = Literal["auto", "saelens"]
OPTIONS: tuple[Option, ...] = ("auto", "saelens")

MAX_NOISE_RATIO = 6
"""How much farther than the fast path's values SAELens's may be from those in a wider dtype. The
ratio is 0.8 to 2.6 in the families that are tested."""
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
        compiled: whether blocks are compiled; None where it pays for `n_tokens`.
        cuda_graph: whether a batch of a known shape is replayed as a CUDA graph.
        n_positions: the longest prompt that has come or is expected, in tokens.
        n_tokens: how many tokens the model will see.
    """

    autocast: bool
    model_kwargs: Mapping[str, Any]
    compiled: bool | None
    cuda_graph: bool
    n_positions: int
    n_tokens: int

    def compiles(self, decoder: Decoder, device: torch.device) -> bool:
        """
        Whether blocks are compiled.

        Compiled blocks round differently, so this must not depend on anything measured: a run that
        is resumed computes the same bits.
        """
        if self.compiled is not None:
            return self.compiled
        is_capped = any(shape.soft_cap is not None for _, shape in decoder.blocks)
        work = decoder.n_parameters * self.n_tokens
        return device.type == "cuda" and work >= MIN_COMPILED_WORK[is_capped]


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
        self._compiles = False
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

    @property
    def description(self) -> str:
        """What runs, in words."""
        if self.choice.path == "saelens":
            return "SAELens's own path"
        compiled = self._compiles and self._compiled.is_compiled
        graph = self._settings.cuda_graph and self._device.type == "cuda"
        return (
            f"the fast path, {'compiled' if compiled else 'not compiled'}"
            f"{', as a CUDA graph' if graph else ''}"
        )

    def _saelens(self, tokens: Tensor, run_with_cache: Callable[..., Any]) -> dict[str, Tensor]:
        stops = [extract_stop_at_layer_from_tlens_hook_name(name) for name in self._hook_names]
        known = [stop for stop in stops if stop is not None]
        with torch.no_grad(), self._autocast():
            cache = run_with_cache(
                to_device(tokens, self._device),
                names_filter=self._hook_names,
                stop_at_layer=max(known) if len(known) == len(stops) else None,
                prepend_bos=False,
                **self._settings.model_kwargs,
            )[1]
        return {name: cache[name] for name in self._hook_names}

    def _on_device(self, tokens: Tensor, padding: Padding | None) -> tuple[Tensor, Padding | None]:
        if padding is not None:
            padding = Padding(*(to_device(part, self._device) for part in padding))
        return to_device(tokens, self._device), padding

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, self._settings.autocast)

    def _choose(self) -> None:
        self._device = torch.device(input_token_device(self._model))
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
        is_fixed = self._option == "saelens"
        self._watch = Watch([] if reader is None or is_fixed else reader.modules_of(self._model))

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
        batch = self._on_device(tokens, reader.padding_of(model, tokens))
        found, precise = fast(*batch), fast.precise(*batch)
        for name, point in points.items():
            if (why_not := difference(found[point], expected[name], precise[point])) is not None:
                return f"{name!r} {why_not}"
        self._compiles = settings.compiles(decoder, self._device)
        if self._compiles:
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
        return self._run(tokens, padding, self._wanted, self.block, self._autocast)

    def precise(self, tokens: Tensor, padding: Padding | None) -> dict[Point, Tensor]:
        """The values of the same model with its weights in the next wider dtype."""
        narrow = torch.bfloat16 if self._autocast else self._decoder.embedding.dtype
        dtype = wider(narrow)
        run = precise_block if dtype != self._decoder.embedding.dtype else block
        return self._run(tokens, padding, dict.fromkeys(self._wanted, dtype), run, autocast=False)

    def _run(
        self,
        tokens: Tensor,
        padding: Padding | None,
        wanted: dict[Point, torch.dtype],
        block: Block,
        autocast: bool,
    ) -> dict[Point, Tensor]:
        # Each weight is read once a pass: keeping its rounded copy until the end saves nothing.
        casts = torch.autocast(
            self._device.type, torch.bfloat16, enabled=autocast, cache_enabled=False
        )
        with torch.no_grad(), casts:
            return self._decoder.run(tokens, padding, wanted, block)


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


def difference(found: Tensor, expected: Tensor, precise: Tensor) -> str | None:
    """
    What two values differ by that rounding does not explain, in words; None if nothing.

    Args:
        found: the fast path's.
        expected: SAELens's.
        precise: the fast path's in a wider dtype.
    """
    if found.shape != expected.shape:
        return f"has shape {list(expected.shape)} in SAELens, not {list(found.shape)}"
    exact = precise.double()
    noise, distance = ((value.double() - exact).norm() for value in (found, expected))
    floor = 1e3 * torch.finfo(precise.dtype).eps * exact.norm()
    if distance <= MAX_NOISE_RATIO * noise + floor:
        return None
    distance, noise = (float(norm / exact.norm()) for norm in (distance, noise))
    return f"differs from SAELens's by {distance:.1e}, and rounding makes {noise:.1e}"


def check_option(option: str, name: str) -> None:
    """
    Check what is to compute activations.

    Raises:
        ValueError: it is not one of `OPTIONS`; says so with the argument's name.
    """
    if option not in OPTIONS:
        raise ValueError(f"{name} must be 'auto' or 'saelens', got {option!r}")


def choose_model_path(
    model: nn.Module,
    hook_names: Sequence[str],
    *,
    option: Option = "auto",
    autocast: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    n_positions: int,
    n_tokens: int = 0,
    compiled: bool | None = None,
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
        n_tokens: how many tokens the model will see, for `compiled`.
        compiled: whether blocks of the fast path are compiled by `torch.compile`. By default, they
            are on a GPU, if that saves more time over `n_tokens` than it takes.
        cuda_graph: whether the fast path is replayed as a CUDA graph, on a CUDA device.

    Raises:
        ValueError: `option` is not one of "auto" and "saelens".
    """
    check_option(option, "option")
    kwargs = dict(model_kwargs or {})
    settings = Settings(autocast, kwargs, compiled, cuda_graph, n_positions, n_tokens)
    return ModelPath(model, hook_names, option, settings)
