"""Data sets of random numbers on disk, in the formats that SAELens reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Array2D, Dataset, Features, Value, load_from_disk
from datasets import List as ListOf


def token_dataset(folder: Path, prompts: int, context: int, vocabulary: int) -> Any:
    """
    A pre-tokenised data set in Arrow files, written into `folder` unless it is there.

    Returns:
        A `datasets.Dataset` with the column "input_ids": `prompts` lists of `context` tokens, which
        are drawn uniformly below `vocabulary`.
    """

    def make() -> Dataset:
        tokens = np.random.default_rng(0).integers(vocabulary, size=(prompts, context))
        return Dataset.from_dict({"input_ids": tokens})

    path = folder / f"tokens_{prompts}_x_{context}_of_{vocabulary}"
    return load_from_disk(_written(path, make))


def cached_activations(
    folder: Path, prompts: int, context: int, d_in: int, vocabulary: int, hook_name: str
) -> Path:
    """
    Activations in the format of SAELens's `CacheActivationsRunner`, written unless they are there.

    Returns:
        Folder of a `datasets.Dataset` with the columns `hook_name`, float32
        `[prompts, context, d_in]`, and "token_ids", int32 `[prompts, context]`.
    """

    def make() -> Dataset:
        generator = np.random.default_rng(0)
        shape = (prompts, context, d_in)
        columns = {
            hook_name: generator.standard_normal(shape, dtype=np.float32),
            "token_ids": generator.integers(vocabulary, size=shape[:2], dtype=np.int32),
        }
        features = {
            hook_name: Array2D(shape=(context, d_in), dtype="float32"),
            "token_ids": ListOf(Value("int32"), length=context),
        }
        return Dataset.from_dict(columns, features=Features(features))

    return _written(folder / f"activations_{prompts}_x_{context}_x_{d_in}", make)


def _written(path: Path, make: Callable[[], Dataset]) -> Path:
    """The path, once the data set is there as a whole."""
    if not path.exists():
        unfinished = path.with_name(f"{path.name}.part")
        make().save_to_disk(unfinished)
        unfinished.rename(path)
    return path
