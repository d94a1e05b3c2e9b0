"""What an activation store needs, asked as early as it can be known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from saelens_sparse.config.messages import shown, suggestion


def check_dataset_size(n_rows: int, n_batches_in_buffer: int, name: str) -> None:
    """
    Check that a dataset fills the buffer once.

    Args:
        n_rows: Its prompts.
        n_batches_in_buffer: Prompts that the buffer holds.
        name: What the dataset is called in the message.

    Raises:
        ValueError: it does not.
    """
    if n_rows < n_batches_in_buffer:
        raise ValueError(
            f"{name}: {n_rows} prompts are too few to fill the activation buffer once; allowed: "
            f"{n_batches_in_buffer} or more, or a smaller n_batches_in_buffer"
        )


def check_cache_size(n_rows: int, store_batch_size_prompts: int) -> None:
    """
    Check that a cache of activations has enough rows to be read.

    It may have fewer than the buffer holds: it is read again then, as in SAELens.

    Raises:
        ValueError: it has not as many as are read at a time.
    """
    if n_rows < store_batch_size_prompts:
        raise ValueError(
            f"cached_activations_path: its {n_rows} prompts are fewer than "
            f"store_batch_size_prompts, {store_batch_size_prompts}"
        )


def check_row(n_tokens: int, context_size: int) -> None:
    """
    Check that a row of a tokenized dataset has enough tokens.

    Raises:
        ValueError: it has not.
    """
    if n_tokens < context_size:
        raise ValueError(
            f"a row of the dataset has {n_tokens} tokens, fewer than context_size, {context_size}"
        )


def check_width(hook_name: str, width: int, d_in: int) -> None:
    """
    Check that activations are as wide as the SAE's input.

    Raises:
        ValueError: they are not.
    """
    if width != d_in:
        raise ValueError(
            f"sae.d_in: {d_in} is not the width of the activations at {shown(hook_name)}, {width}"
        )


def check_cached(n_values: int, n_expected: int, n_rows: int) -> None:
    """
    Check that cached activations are as many as they should be.

    Raises:
        ValueError: they are not.
    """
    if n_values != n_expected:
        raise ValueError(
            f"cached_activations_path: {n_rows} rows were to hold {n_expected} values, "
            f"context_size x d_in each, and {n_values} were found; store_batch_size_prompts may be "
            "more than there are rows"
        )


def check_hooks(hook_names: Iterable[str], known: Mapping[str, Any] | Iterable[str]) -> None:
    """
    Check that a model has the hooks whose activations are wanted.

    Raises:
        ValueError: it has not; the message says which one, and what it may have meant.
    """
    known = set(known)
    for name in hook_names:
        if name not in known:
            raise ValueError(
                f"hook_name: the model has no hook {shown(name)}{suggestion(name, known)}"
            )
