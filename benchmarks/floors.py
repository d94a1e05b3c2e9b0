"""The parts of a run, each timed alone: language model, activation store, step of the SAE."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from operator import methodcaller
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.rows import Row
from benchmarks.store import READY_BATCHES, take
from saelens_sparse.activations import FastActivationsStore
from saelens_sparse.profile.trainers import Trainer, train_step
from saelens_sparse.whole_run.clock import PER_TOKENS, now

_RUN_MODEL = "_run_model"


@dataclass(frozen=True)
class ModelTimes:
    """
    Attributes:
        first_model_call_s: seconds of the first call, in which a path is chosen and tried, and on a
            GPU compiled and recorded as a CUDA graph.
        model_ms: milliseconds of a later one by 4,096 tokens.
    """

    first_model_call_s: float
    model_ms: float


@contextmanager
def fresh_compiler_cache(folder: Path) -> Generator[None]:
    """Let `torch.compile` find nothing that was compiled before, and write into the folder."""
    fresh = tempfile.mkdtemp(prefix="compiled_", dir=folder)
    places = {"TORCHINDUCTOR_CACHE_DIR": fresh, "TRITON_CACHE_DIR": str(Path(fresh) / "triton")}
    with patch.dict(os.environ, places):
        yield


def time_model(
    store: FastActivationsStore, vocabulary: int, n_tokens: int, folder: Path, device: str
) -> ModelTimes:
    """
    Time the language model on batches of random tokens from the host.

    Args:
        store: One that has not computed activations.
        vocabulary: Tokens are below it.
        n_tokens: How many are timed, at least.
        folder: Where compiled code goes.
        device: "cuda" or "cpu".
    """
    call = methodcaller(_RUN_MODEL, random_tokens(store, vocabulary))
    begin = now(device)
    with fresh_compiler_cache(folder):
        call(store)
        first = now(device) - begin
    call(store)
    tokens_of_call = store.store_batch_size_prompts * store.context_size
    n_calls = -(-n_tokens // tokens_of_call)
    begin = now(device)
    for _ in range(n_calls):
        call(store)
    seconds = now(device) - begin
    return ModelTimes(first, 1e3 * seconds * PER_TOKENS / (n_calls * tokens_of_call))


def random_tokens(store: FastActivationsStore, vocabulary: int) -> torch.Tensor:
    """A batch of the language model, int64 `[prompts, context_size]` on the host."""
    shape = (store.store_batch_size_prompts, store.context_size)
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


def time_store(store: FastActivationsStore, vocabulary: int, n_batches: int, device: str) -> float:
    """Milliseconds by 4,096 tokens of a store whose language model's activations are there."""
    ready: list[torch.Tensor] = methodcaller(_RUN_MODEL, random_tokens(store, vocabulary))(store)
    with patch.object(store, _RUN_MODEL, lambda _tokens: ready):
        take(store, n_batches, device)
        begin = now(device)
        take(store, n_batches, device)
        seconds = now(device) - begin
    return 1e3 * seconds * PER_TOKENS / (n_batches * store.train_batch_size_tokens)


def time_steps(trainer: Trainer, store: FastActivationsStore, n_steps: int, device: str) -> float:
    """Milliseconds by 4,096 tokens of a trainer's steps on batches that are there."""
    batches = [next(store).clone() for _ in range(READY_BATCHES)]
    for batch in batches:
        train_step(trainer, batch)
    begin = now(device)
    for batch in islice(cycle(batches), n_steps):
        train_step(trainer, batch)
    seconds = now(device) - begin
    return 1e3 * seconds * PER_TOKENS / (n_steps * store.train_batch_size_tokens)


def floor_of(model: ModelTimes, store_ms: float, step_ms: float) -> Row:
    """The keys of a row: each part, and their sum."""
    row: dict[str, Any] = {**asdict(model), "store_ms": store_ms, "step_ms": step_ms}
    return {**row, "floor_ms": model.model_ms + store_ms + step_ms}
