"""Activations from the shards of a cache, as a source of batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from saelens_sparse.activations.batches import ModelBatch
from saelens_sparse.activations.epoch import as_tensor, as_value
from saelens_sparse.activations.read_ahead import Kept, ReadAhead, n_threads
from saelens_sparse.activations.shards.manifest import TOKEN_COLUMN, Hook, read_manifest
from saelens_sparse.activations.shards.reader import BlockOrder, ChunkReader, OpenShards
from saelens_sparse.warn import warn_caller

POSITION = "shards"
# As SAELens says it.
NEW_EPOCH = "All samples in the training dataset have been exhausted, beginning new epoch."


class ShardedActivations:
    """
    What a store takes batches from: rows of all shards, block by block in a random order.

    PyTorch's generator of the host gives the order's seed when the first rows are asked for. Each
    epoch has another order.

    Args:
        folder: Of the cache.

    Attributes:
        manifest: Of the cache.

    Raises:
        ValueError: the manifest cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._seed: int | None = None
        self._at = 0  # number of the next chunk
        self._order: BlockOrder | None = None
        self._shards: OpenShards | None = None
        self._ahead: ReadAhead | None = None

    def open(
        self,
        hooks: Sequence[Hook],
        batch_size: int,
        device: torch.device,
        kept: Kept | None = None,
    ) -> int:
        """
        Prepare to read.

        Args:
            hooks: Whose activations are read, in this order.
            batch_size: Rows of a training batch.
            device: Where they go.
            kept: Tells which rows are wanted, by their token ids; without it, all are.

        Returns:
            The most rows that come at a time.

        Raises:
            ValueError: there is no such hook.
            OSError: files cannot be opened.
        """
        columns = self.manifest.positions_of(hooks)
        self._columns = columns if kept is None else [*columns, TOKEN_COLUMN]
        self._batch_size, self._device, self._kept = batch_size, device, kept
        self._rows = [shard.rows for shard in self.manifest.shards]
        return BlockOrder(self._rows, batch_size, seed=0).chunk_rows

    def model_batch(self) -> ModelBatch:
        """The next rows, of another epoch if this one has ended."""
        if self._at and self._at % self._opened().chunks_per_epoch == 0:
            warn_caller(NEW_EPOCH)
        return self._next()

    def model_batch_of_epoch(self) -> ModelBatch | None:
        """The next rows; None if this epoch has none left."""
        if self._at and self._at % self._opened().chunks_per_epoch == 0:
            return None
        return self._next()

    def put_back(self, batch: ModelBatch) -> None:
        """Give again what was given last."""
        self._at = batch.rows_read

    def position(self) -> dict[str, torch.Tensor]:
        """Where it stands, in a form that can be saved."""
        return {POSITION: as_tensor([self._seed, self._at])}

    def go_to(self, position: Mapping[str, torch.Tensor]) -> None:
        """Stand where it stood."""
        self._close()
        self._seed, self._at = as_value(position[POSITION])

    def _next(self) -> ModelBatch:
        order = self._opened()
        if self._ahead is None or self._ahead.at != self._at:
            self._close()
            self._ahead = self._new_read_ahead(order)
        parts = self._ahead.next()
        if self._kept is not None:
            *parts, kept = parts
            parts = [part.index_select(0, kept) for part in parts]
        batch = ModelBatch(parts, None, self._at)
        self._at += 1
        return batch

    def _opened(self) -> BlockOrder:
        if self._order is None or self._order.seed != self._seed:
            if self._seed is None:
                self._seed = int(torch.randint(2**62, (), device="cpu"))
            self._order = BlockOrder(self._rows, self._batch_size, self._seed)
        return self._order

    def _new_read_ahead(self, order: BlockOrder) -> ReadAhead:
        if self._shards is None:
            self._shards = OpenShards(self.folder, self.manifest, self._columns)
        pins = self._device.type == "cuda"
        n_bytes = order.chunk_rows * sum(column.row_bytes for column in self._shards.columns)
        readers = [
            ChunkReader(self._shards, order, self._kept, pins=pins)
            for _ in range(n_threads(n_bytes))
        ]
        return ReadAhead(readers, self._at, self._device)

    def _close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None
