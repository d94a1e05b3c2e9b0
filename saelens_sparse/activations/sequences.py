"""How a store's rows become sequences of tokens: the options of SAELens's store."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sae_lens.pretokenize_runner import get_special_token_from_cfg
from sae_lens.tokenization_and_batching import tokenize_with_chat_template
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse.activations import checks
from saelens_sparse.activations.epoch import Epoch, PackedEpoch, SlicedEpoch
from saelens_sparse.activations.packing import ConcatenatedRows, SeparateRows, TokenizedRows
from saelens_sparse.activations.rows import Rows, TokenSlices, can_slice

# Options that decide how rows become sequences.
OF_SEQUENCES = (
    "prepend_bos",
    "disable_concat_sequences",
    "sequence_separator_token",
    "use_chat_formatting",
)


def new_epoch(store: ActivationsStore, rows_before: int) -> Epoch:
    """A pass over a store's dataset, with as many rows counted before it as given."""
    column, context_size = store.tokens_column, store.context_size
    dataset: Any = store.dataset
    if store.is_dataset_tokenized and can_slice(dataset, column):
        return SlicedEpoch(partial(TokenSlices, dataset, column, context_size), rows_before)
    if store.is_dataset_tokenized:
        packer, tokenize = TokenizedRows(context_size), partial(_checked_row, context_size)
    else:
        packer = _packer_of_text(store)
        tokenize = partial(_tokens_of_text, store.model, uses_chat=store.use_chat_formatting)
    return PackedEpoch(partial(Rows, dataset, column), tokenize, packer, rows_before)


def _packer_of_text(store: ActivationsStore) -> ConcatenatedRows | SeparateRows:
    tokenizer: Any = getattr(store.model, "tokenizer", None)
    bos = tokenizer.bos_token_id if tokenizer is not None and store.prepend_bos else None
    if store.disable_concat_sequences:
        return SeparateRows(store.context_size, bos)
    separator = None
    if tokenizer is not None:
        separator = get_special_token_from_cfg(store.sequence_separator_token, tokenizer)
    return ConcatenatedRows(store.context_size, bos, separator)


def _checked_row(context_size: int, row: Any) -> torch.Tensor:
    tokens = torch.as_tensor(row, dtype=torch.long, device="cpu")
    checks.check_row(len(tokens), context_size)
    return tokens


def _tokens_of_text(model: Any, row: Any, *, uses_chat: bool) -> torch.Tensor:
    if not uses_chat:
        tokens = model.to_tokens(row, truncate=False, move_to_device=False, prepend_bos=False)
        tokens = tokens.squeeze(0)
    elif getattr(model, "tokenizer", None) is None:
        raise ValueError("use_chat_formatting: True needs a model that has a tokenizer")
    else:
        messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
        tokens = tokenize_with_chat_template(messages, model.tokenizer)
    if tokens.ndim != 1:
        raise ValueError(f"tokens.shape should be 1D but was {tokens.shape}")
    return tokens.long().cpu()
