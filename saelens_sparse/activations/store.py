"""SAELens's activation store at the pace of a sparse training step, with a state that is whole.

Tokens, their order, the order of activations and the options are SAELens's. Its own methods stay
for whoever calls them; the stream of batches takes another way to the same values.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import GEN_CREATED, getgeneratorstate, isgenerator
from typing import Any

import torch
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from typing_extensions import override

from saelens_sparse.activations import checks
from saelens_sparse.activations.batches import BUFFER, GENERATOR, Batches, ModelBatch
from saelens_sparse.activations.before_loading import hooks_of
from saelens_sparse.activations.cached import CachedActivations
from saelens_sparse.activations.computed import PROCESSED, ComputingStore
from saelens_sparse.activations.epoch import as_tensor, as_value, part_of
from saelens_sparse.activations.mixing import EMPTY, MixingBuffer
from saelens_sparse.activations.read_ahead import Kept, not_among
from saelens_sparse.activations.sequences import OF_SEQUENCES
from saelens_sparse.activations.sharded import NEW_EPOCH, ShardedActivations
from saelens_sparse.activations.shards.manifest import is_sharded
from saelens_sparse.config.checks import check_buffer
from saelens_sparse.ops.common.host_copy import to_device
from saelens_sparse.private_names import input_token_device
from saelens_sparse.warn import warn_caller

# Names in its state.
_SETTINGS, _CACHED_ROW = "settings", "cached_row"


class FastActivationsStore(ComputingStore):
    """
    SAELens's `ActivationsStore`, whose batches cost little more than the language model.

    It takes the same arguments and gives the same batches bit for bit, given the same activations.
    What differs:

    - Tokens of a tokenized dataset are read in slices. Tokens stay on the host until the language
      model wants them.
    - The buffer is allocated once. Its rows stay where they are, and only their order is shuffled.
    - Nothing waits for a GPU.
    - Its state holds the tokens' position, the buffer and the state of PyTorch's generator of the
      host, so that a resumed run gets the batches that it would have got.

    Attributes:
        language_model: What computes the activations: "saelens" gives SAELens's bits, "auto" its
            activations up to rounding, faster. See `choose_model_path`.
        saves_buffer: Whether the buffer belongs to the state. Without it, a resumed run begins with
            an empty buffer and the tokens that follow.
        reads_ahead: Whether activations for the next shuffle are computed while batches are left of
            the last one. On a GPU of its own, the language model is never idle then.
            `SparseTrainingRunner` sets it during a run, for `prefetch_llm_batches`. A thread that
            prefetches has nothing to do then: SAELens's runners get empty iterators for it.
    """

    saves_buffer: bool = True
    reads_ahead: bool = False
    _batches: Batches | None
    _buffer_state: dict[str, torch.Tensor] | None  # loaded, for batches that are yet to come

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    @override
    def load_cached_activation_dataset(self) -> Dataset | None:
        if is_sharded(self.cached_activations_path):
            return None  # not SAELens's format
        return super().load_cached_activation_dataset()

    @classmethod
    def taking_over(
        cls, store: ActivationsStore, shards: str | None = None
    ) -> FastActivationsStore:
        """
        A store in the place of one of SAELens's that nobody has read from.

        Args:
            store: SAELens's.
            shards: Folder of a cache of this package's, whose activations replace those of the
                language model.

        Raises:
            ValueError: somebody has, or the cache's manifest cannot be read.
        """
        if isinstance(store, cls):
            return store
        own = cls.__new__(cls)
        own.__dict__ = vars(store).copy()
        sequences = getattr(store, "iterable_sequences", None)
        if (
            own._dataloader is not None
            or (isgenerator(sequences) and getgeneratorstate(sequences) != GEN_CREATED)
            or getattr(store, "current_row_idx", 0) > 0
        ):
            raise ValueError("the activation store cannot be replaced once it has been read from")
        if shards is not None:
            own.cached_activations_path = shards
        own._prepare()
        return own

    @override
    def _prepare(self) -> None:
        super()._prepare()
        self._lock = threading.RLock()
        self._batches = self._buffer_state = None
        cached = self.cached_activation_dataset
        self._cached = None
        if cached is not None:
            self._cached = CachedActivations(
                cached,
                self.hook_name,
                context_size=self.context_size,
                d_in=self.d_in,
                dtype=self.dtype,
                device=self.device,
                kept=self._kept_of_cache(),
            )
        path = self.cached_activations_path
        self._shards = ShardedActivations(path) if path and is_sharded(path) else None

    def check(self) -> None:
        """
        Check that the stream of batches can begin.

        Raises:
            ValueError: the model has no such hook, the buffer is too small, or the dataset is.
        """
        prompts = self.n_batches_in_buffer
        check_buffer(prompts, self.training_context_size, self.train_batch_size_tokens)
        if self._cached is not None:
            checks.check_cache_size(len(self._cached), self.store_batch_size_prompts)
            return
        if self._shards is not None:
            self._shards.manifest.positions_of(self.hooks)
            return
        known = hooks_of(self.model)
        if known is not None:
            checks.check_hooks(self._hook_names or [self.hook_name], known)
        if self.is_dataset_tokenized and isinstance(self.dataset, Dataset):
            checks.check_dataset_size(len(self.dataset), prompts, "the dataset")

    @property
    def reads_early(self) -> bool:
        """Whether activations for the next shuffle are taken as places become free."""
        return self.reads_ahead or self._cached is not None or self._shards is not None

    # Tokens

    @override
    def get_batch_tokens(
        self,
        batch_size: int | None = None,
        raise_at_epoch_end: bool = False,
        move_to_model_device: bool = True,
    ) -> torch.Tensor:
        with self._lock:
            if self._batches is not None:
                self._batches.give_back()
            n = batch_size or self.store_batch_size_prompts
            tokens = self._take(n, raise_at_epoch_end).tokens
        return to_device(
            tokens, input_token_device(self.model) if move_to_model_device else self.device
        )

    # Activations

    @override
    def get_raw_llm_batch(
        self, raise_on_epoch_end: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self._lock:
            if self._cached is not None and self._batches is not None:
                self._batches.give_back()
            return super().get_raw_llm_batch(raise_on_epoch_end)

    @override
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(()) if self.reads_ahead else self

    @override
    def get_data_loader(self) -> Iterator[torch.Tensor]:
        is_cached = self._cached is not None
        dtype = None if is_cached else torch.get_default_dtype()
        return self._new_batches(dtype, lambda parts: parts[0])

    @override
    def get_multi_hook_data_loader(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(()) if self.reads_ahead else self.hook_batches()

    def hook_batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of activations at each hook, `[batch_size, width]`, of the same tokens."""
        if self._hook_names is None:
            return super().get_multi_hook_data_loader()  # which says what is wrong
        names = self._hook_names
        return self._new_batches(None, lambda parts: dict(zip(names, parts, strict=True)))

    def _new_batches(
        self, dtype: torch.dtype | None, form: Callable[[list[torch.Tensor]], Any]
    ) -> Batches:
        self.check()
        batch_size, shards = self.train_batch_size_tokens, self._shards
        context_size = self.training_context_size if self._cached is None else self.context_size
        n_at_once = self.store_batch_size_prompts * context_size
        if shards is not None:
            n_at_once = shards.open(self.hooks, batch_size, self.device, self._kept_of_cache())
            dtype = self.dtype
        buffer = MixingBuffer(
            size=self.n_batches_in_buffer * self.training_context_size,
            n_at_once=n_at_once,
            batch_size=batch_size,
            mix_fraction=self.activations_mixing_fraction,
            device=self.device,
            dtype=dtype,
        )
        self._batches = Batches(buffer, self, form, self._lock)
        if self._buffer_state is not None:
            self._batches.load(self._buffer_state)
            self._buffer_state = None
        return self._batches

    def model_batch(self) -> ModelBatch:
        """Activations of the next batch of the language model, for the buffer.

        Raises:
            ValueError: there are too few tokens to fill the buffer once.
        """
        if self._shards is not None:
            return self._shards.model_batch()
        next_batch = self._cached_batch if self._cached is not None else self.computed_batch
        epoch = None if self.dataset is None else self.iterable_sequences
        try:
            return next_batch(True)
        except StopIteration:
            if self._cached is None and epoch is not None:
                checks.check_dataset_size(epoch.n_taken, self.n_batches_in_buffer, "the dataset")
            warnings.warn(NEW_EPOCH, stacklevel=2)
        try:
            return next_batch(False)
        except StopIteration as error:
            raise ValueError(
                "Unable to fill buffer after starting new epoch. Dataset may be too small."
            ) from error

    def model_batch_of_epoch(self) -> ModelBatch | None:
        """The same, if this epoch has as many tokens left as the language model gets at once."""
        if self._shards is not None:
            return self._shards.model_batch_of_epoch()
        if self._cached is not None:
            ends = self.current_row_idx > len(self._cached) - self.store_batch_size_prompts
            return None if ends else self._cached_batch(False)
        return self.computed_batch_of_epoch()

    def put_back(self, batch: ModelBatch) -> None:
        """Take back the tokens, or the cache's rows, of what was given last."""
        if self._shards is not None:
            self._shards.put_back(batch)
            return
        if batch.sequences is None:
            self.current_row_idx = batch.rows_read
            return
        self.put_tokens_back(batch.sequences, batch.rows_read)

    def _kept_of_cache(self) -> Kept | None:
        return None if self._excluded is None else partial(not_among, self._excluded)

    def _cached_batch(self, raises_at_end: bool) -> ModelBatch:
        """As SAELens's `_load_raw_llm_batch_from_cached`."""
        assert self._cached is not None
        n = self.store_batch_size_prompts
        if self.current_row_idx > len(self._cached) - n:
            self.current_row_idx = 0
            if raises_at_end:
                raise StopIteration
        start = self.current_row_idx
        rows = self._cached.read(start, n)
        self.current_row_idx = start + n
        return ModelBatch([rows], None, start)

    # State

    @override
    def state_dict(self) -> dict[str, torch.Tensor]:
        """
        What another store of the same settings needs to go on with the same batches.

        Returns:
            SAELens's `n_dataset_processed` and, under names of their own, the position in the
            dataset, the buffer's rows (`[n, width]` for each hook, on the host) and the state of
            PyTorch's generator of the host.
        """
        with self._lock:
            state = {_SETTINGS: as_tensor(self._settings())}
            if self._batches is not None:
                return state | self._batches.state(with_buffer=self.saves_buffer)
            if self.saves_buffer:
                buffer = self._buffer_state or EMPTY
                state |= {BUFFER + name: part for name, part in buffer.items()}
            return state | self.position() | {GENERATOR: torch.get_rng_state()}

    @override
    def position(self) -> dict[str, torch.Tensor]:
        state = super().position()
        if self._cached is not None:
            state[_CACHED_ROW] = torch.tensor(self.current_row_idx)
        if self._shards is not None:
            state |= self._shards.position()
        return state

    @override
    def go_to(self, position: Mapping[str, torch.Tensor]) -> None:
        super().go_to(position)
        if self._cached is not None and _CACHED_ROW in position:
            self.current_row_idx = int(position[_CACHED_ROW])
        if self._shards is not None:
            self._shards.go_to(position)

    @override
    def load(self, file_path: str) -> None:
        """
        Go on where the store stood whose state the file holds: this class's, or SAELens's.

        SAELens's holds the number of rows alone. The buffer begins empty then, and a warning says
        so.
        """
        state = load_file(file_path)
        settings = as_value(state[_SETTINGS]) if _SETTINGS in state else {}
        with self._lock:
            if self._batches is not None:
                self._batches.give_back()
            if GENERATOR in state:
                torch.set_rng_state(state[GENERATOR])
            if settings.get("position") == self._settings()["position"]:
                self.go_to(state)
            elif self.dataset is not None:
                self._fast_forward(int(state.get(PROCESSED, torch.tensor(0))))
            self._load_buffer(part_of(state, BUFFER), settings)

    def _load_buffer(self, buffer: dict[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
        own = self._settings()["buffer"]
        of_state = settings.get("buffer", own)
        differing = [
            f"{name} ({of_state.get(name)!r})" for name in own if of_state.get(name) != own[name]
        ]
        if not buffer or differing:
            why = f"has another {', '.join(differing)}" if buffer else "holds no activations"
            warn_caller(
                f"the state of the activation store {why}: the buffer starts empty, and is filled "
                "from the tokens that follow"
            )
            buffer = EMPTY
        if self._batches is None:
            self._buffer_state = buffer
        else:
            self._batches.load(buffer)

    def _settings(self) -> dict[str, dict[str, Any]]:
        """What must be the same for a position, and for rows of a buffer, to have their meaning."""
        excluded, shards = self._excluded, self._shards
        return {
            "position": {
                "context_size": self.context_size,
                "is_cached": self._cached is not None,
                "cache": None if self._shards is None else self._shards.manifest.identity,
                "epoch": None if self.dataset is None else type(self.iterable_sequences).__name__,
                **{name: getattr(self, name) for name in OF_SEQUENCES},
            },
            "buffer": {
                "n_batches_in_buffer": self.n_batches_in_buffer,
                "positions": [*range(self.context_size)[slice(*self.seqpos_slice)]],
                "train_batch_size_tokens": self.train_batch_size_tokens,
                "activations_mixing_fraction": self.activations_mixing_fraction,
                "hooks": [[*hook] for hook in self.hooks],
                "cache": None if shards is None else shards.manifest.identity,
                "exclude_special_tokens": None if excluded is None else excluded.tolist(),
            },
        }
