"""Activation stores that tell a clock when the language model and the buffer are at work."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.training.activations_store import ActivationsStore
from typing_extensions import override

from saelens_sparse.activations.batches import ModelBatch
from saelens_sparse.activations.store import FastActivationsStore
from saelens_sparse.language_model import PathChoice
from saelens_sparse.private_names import input_token_device
from saelens_sparse.whole_run.clock import PER_TOKENS, now
from saelens_sparse.whole_run.windows import MODEL, STORE, Windows


class _TimedBatches(ActivationsStore):
    """A store whose batches are timed. `windows` must be set before the first batch."""

    windows: Windows

    @override
    def __next__(self) -> torch.Tensor:
        with self.windows.clock.part(STORE):
            self.windows.before_batch()
            batch = super().__next__()
            self.windows.after_batch(batch)
            return batch


class TimedStore(_TimedBatches):
    """SAELens's store."""

    @override
    def get_activations(self, batch_tokens: torch.Tensor) -> torch.Tensor:
        with self.windows.clock.part(MODEL):
            return super().get_activations(batch_tokens)

    @override
    def get_filtered_llm_batch(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.windows.before_source_batch()
        return super().get_filtered_llm_batch(*args, **kwargs)


class TimedFastStore(_TimedBatches, FastActivationsStore):
    """This package's store."""

    @property
    def model_choice(self) -> PathChoice | None:
        """What computes the activations, and why; None before the first batch of the model."""
        return None if self._language_model is None else self._language_model.choice

    def time_model(self, prompts: int, *, autocast: bool, calls: int = 2) -> float:
        """Milliseconds of the language model alone by 4,096 tokens, after a call that warms it up.

        Args:
            prompts: How many it gets at once.
            autocast: SAELens's `autocast_lm`.
            calls: How many are timed.
        """
        before = self.autocast_lm, self._language_model
        tokens = self.get_batch_tokens(prompts, move_to_model_device=False).cpu()
        device = str(input_token_device(self.model))
        try:
            if autocast != self.autocast_lm:
                self.autocast_lm, self._language_model = autocast, None
            super()._run_model(tokens)
            begin = now(device)
            for _ in range(calls):
                super()._run_model(tokens)
            return 1e3 * (now(device) - begin) * PER_TOKENS / (calls * tokens.numel())
        finally:
            self.autocast_lm, self._language_model = before

    @override
    def model_batch(self) -> ModelBatch:
        self.windows.before_source_batch()
        return super().model_batch()

    @override
    def model_batch_of_epoch(self) -> ModelBatch | None:
        self.windows.before_source_batch()
        return super().model_batch_of_epoch()

    @override
    def _run_model(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        with self.windows.clock.part(MODEL):
            return super()._run_model(tokens)
