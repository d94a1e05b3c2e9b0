"""What a training run wants of a language model: the path, and whether compiling it pays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens import logger
from torch import Tensor

from saelens_sparse.language_model.path import Option, PathChoice, choose_model_path
from saelens_sparse.private_names import input_token_device


class RunningModel:
    """
    A run's language model: the path is chosen at the first batch, and logged once.

    Whether blocks are compiled depends on the device and the length of the run only. A resumed run
    thus computes the same bits.

    Args:
        model: as for `choose_model_path`, and so are all others but the last.
        hook_names: names of the hook points.
        option: "auto" or "saelens".
        autocast: SAELens's `autocast_lm`.
        model_kwargs: SAELens's `model_kwargs`.
        n_positions: the longest prompt expected, in tokens.
        training_tokens: tokens of the whole run.
    """

    def __init__(
        self,
        model: Any,
        hook_names: Sequence[str],
        option: Option,
        *,
        autocast: bool,
        model_kwargs: Mapping[str, Any],
        n_positions: int,
        training_tokens: int,
    ) -> None:
        on_gpu = torch.device(input_token_device(model)).type == "cuda"
        start = time.perf_counter()
        self._path = choose_model_path(
            model,
            hook_names,
            option=option,
            autocast=autocast,
            model_kwargs=model_kwargs,
            n_positions=n_positions,
            n_tokens=training_tokens,
            # SAELens's `compile_llm` has replaced it by a compiled one: so be it.
            compiled=True if "run_with_cache" in vars(model) else None,
            cuda_graph=on_gpu,
        )
        self._preparing: float | None = time.perf_counter() - start

    @property
    def choice(self) -> PathChoice:
        """What computes the activations, and why."""
        return self._path.choice

    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """As `ModelPath.activations`."""
        if self._preparing is None:
            return self._path.activations(tokens)
        start = time.perf_counter()
        found = self._path.activations(tokens)
        seconds = self._preparing + time.perf_counter() - start
        self._preparing = None
        logger.info(
            "language model: %s (%s); %.1f s until its first batch",
            self._path.description,
            self._path.choice.reason,
            seconds,
        )
        return found
