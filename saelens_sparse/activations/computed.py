"""Activations that the language model computes of a dataset's tokens."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from sae_lens.training.activations_store import ActivationsStore
from tqdm.auto import tqdm
from typing_extensions import override

from saelens_sparse.activations import checks
from saelens_sparse.activations.batches import ModelBatch
from saelens_sparse.activations.epoch import Epoch, Sequences, part_of
from saelens_sparse.activations.sequences import new_epoch
from saelens_sparse.activations.shards.manifest import Hook
from saelens_sparse.language_model import Option, RunningModel
from saelens_sparse.ops.common.host_copy import to_device

# Names in its state; the first is SAELens's.
PROCESSED, _TOKENS = "n_dataset_processed", "tokens."


class ComputingStore(ActivationsStore):
    """
    SAELens's store, whose tokens come in slices, and whose language model takes a path that is
    chosen.

    Attributes:
        language_model: What computes the activations.
        iterable_sequences: One pass over the dataset.
    """

    language_model: Option = "saelens"
    iterable_sequences: Epoch
    _language_model: RunningModel | None

    def _prepare(self) -> None:
        self._language_model = None
        excluded = self.exclude_special_tokens
        self._excluded = None if excluded is None else excluded.cpu()
        if self.dataset is not None:
            self.iterable_sequences = self._new_epoch()

    @property
    def hooks(self) -> list[Hook]:
        """Whose activations it gives, in order."""
        names = self._hook_names or [self.hook_name]
        return [Hook(name, self._head(name), self._width(name)) for name in names]

    # Tokens

    @override
    def shuffle_input_dataset(self, seed: int, buffer_size: int = 1) -> None:
        super().shuffle_input_dataset(seed, buffer_size)
        if self.iterable_sequences.rows_read == 0:
            self.iterable_sequences = self._new_epoch()

    def _take(self, n: int, raises_at_end: bool) -> Sequences:
        """The next `n` sequences of tokens.

        Raises:
            StopIteration: the epoch has ended before and `raises_at_end`, or there are none.
        """
        taken = self.iterable_sequences.read(n)
        while len(taken) < n:
            self.n_dataset_processed = self.iterable_sequences.n_processed
            self.iterable_sequences = self._new_epoch()
            more = self.iterable_sequences.read(0 if raises_at_end else n - len(taken))
            if not len(more):
                n = self.n_dataset_processed
                raise StopIteration(f"Ran out of tokens in dataset after {n} samples.")
            taken = taken.joined(more)
        self.n_dataset_processed = self.iterable_sequences.n_processed
        return taken

    def _new_epoch(self) -> Epoch:
        return new_epoch(self, self.n_dataset_processed)

    def _fast_forward(self, n_processed: int) -> None:
        """Read and drop sequences, as SAELens does, until so many rows count as processed."""
        done = self.n_dataset_processed
        title = "Fast-forwarding through dataset"
        with tqdm(desc=title, initial=done, total=n_processed, leave=False) as bar:
            while self.n_dataset_processed < n_processed:
                before = self.n_dataset_processed
                self.iterable_sequences.pass_over(n_processed)
                self.n_dataset_processed = self.iterable_sequences.n_processed
                if self.iterable_sequences.has_ended:
                    self.iterable_sequences = self._new_epoch()
                bar.update(self.n_dataset_processed - before)

    # Activations

    def computed_batch(self, raises_at_end: bool) -> ModelBatch:
        """Activations of the next batch of the language model.

        Raises:
            StopIteration: as `_take`.
        """
        rows_read = self.iterable_sequences.rows_read
        taken = self._take(self.store_batch_size_prompts, raises_at_end)
        return ModelBatch(self._activations(taken.tokens), taken, rows_read)

    def computed_batch_of_epoch(self) -> ModelBatch | None:
        """The same, if this epoch has as many tokens left as the language model gets at once."""
        rows_read = self.iterable_sequences.rows_read
        taken = self.iterable_sequences.read(self.store_batch_size_prompts)
        if len(taken) < self.store_batch_size_prompts:
            self.put_tokens_back(taken, rows_read)
            return None
        self.n_dataset_processed = self.iterable_sequences.n_processed
        return ModelBatch(self._activations(taken.tokens), taken, rows_read)

    def put_tokens_back(self, sequences: Sequences, rows_read: int) -> None:
        """Take back what was given last, before which `rows_read` of the epoch was as given."""
        self.iterable_sequences.put_back(sequences, rows_read)
        self.n_dataset_processed = self.iterable_sequences.n_processed

    @torch.no_grad()
    def _activations(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Activations at each hook, `[n, width]`, without those of excluded tokens.

        Args:
            tokens: `[prompts, context_size]`, on the host.
        """
        parts = [part.flatten(0, 1) for part in self._run_model(tokens)]
        kept = self._kept(tokens[:, slice(*self.seqpos_slice)])
        if kept is not None:
            parts = [part.index_select(0, to_device(kept, part.device)) for part in parts]
        dtypes = [part.dtype for part in parts]
        if len(set(dtypes)) > 1:
            widest = functools.reduce(torch.promote_types, dtypes)
            parts = [part.to(widest) for part in parts]
        return parts

    def _run_model(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Activations at each hook, `[prompts, positions, width]`, of tokens on the host."""
        names = self._hook_names or [self.hook_name]
        if self._language_model is None:
            self._language_model = RunningModel(
                self.model,
                names,
                self.language_model,
                autocast=self.autocast_lm,
                model_kwargs=self.model_kwargs,
                n_positions=self.context_size,
                training_tokens=self.total_training_tokens,
            )
        found = self._language_model.activations(tokens)
        parts: list[torch.Tensor] = []
        for name in names:
            part = found[name][:, slice(*self.seqpos_slice)]
            head = self._head(name)
            part = part.flatten(2) if head is None else part[:, :, head]
            checks.check_width(name, part.shape[-1], self._width(name))
            parts.append(part)
        return parts

    def _head(self, hook_name: str) -> int | None:
        is_single = self._hook_names is None
        return self.hook_head_index if is_single else self._hook_head_indices.get(hook_name)

    def _width(self, hook_name: str) -> int:
        return self.d_in if self._hook_d_ins is None else self._hook_d_ins[hook_name]

    def _kept(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Indices of tokens that are not excluded, counted row by row; None if none is."""
        if self._excluded is None:
            return None
        is_kept = torch.isin(tokens.reshape(-1), self._excluded, invert=True)
        return None if is_kept.all() else is_kept.nonzero().squeeze(1)

    # State

    def position(self) -> dict[str, torch.Tensor]:
        """Where it stands in the dataset, in a form that can be saved."""
        state = super().state_dict()
        if self.dataset is not None:
            epoch = self.iterable_sequences.state()
            state |= {_TOKENS + name: part.clone() for name, part in epoch.items()}
        return state

    def go_to(self, position: Mapping[str, torch.Tensor]) -> None:
        """Stand where it stood."""
        self.n_dataset_processed = int(position[PROCESSED])
        if self.dataset is not None:
            self.iterable_sequences = self._new_epoch()
            self.iterable_sequences.load(part_of(position, _TOKENS))
