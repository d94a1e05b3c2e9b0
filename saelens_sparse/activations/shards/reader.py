"""Reads blocks of rows from all shards of a cache, in a random order."""

from __future__ import annotations

import os
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path

import torch

from saelens_sparse.activations.read_ahead import Kept
from saelens_sparse.activations.shards.manifest import (
    HEADER_BYTES,
    Column,
    Manifest,
)
from saelens_sparse.config.messages import shown

# Rows that are read together. With 64, a read is 288 KiB at 2,304 values of 16 bits.
MAX_BLOCK_ROWS = 64
# Files of a cache that stay open. On a local disk, opening one for a read takes 1 us.
MAX_KEPT_OPEN = 128


class BlockOrder:
    """
    Which blocks of rows make a chunk, for chunk after chunk and epoch after epoch.

    A block is some rows of one shard that follow each other. In an epoch each block comes once. The
    seed and the epoch's number give the order.

    Args:
        rows: of each shard.
        batch_size: rows of a training batch. A chunk has at least as many, from 64 blocks or more.
        seed: of the order.
    """

    def __init__(self, rows: Sequence[int], batch_size: int, seed: int) -> None:
        self.block_rows = max(1, min(MAX_BLOCK_ROWS, batch_size // MAX_BLOCK_ROWS))
        self.blocks_per_chunk = -(-batch_size // self.block_rows)
        self.seed = seed
        self._rows = torch.tensor(rows)
        blocks = -(-self._rows // self.block_rows)
        self._ends = blocks.cumsum(0)
        self.n_blocks = int(self._ends[-1])
        self.chunks_per_epoch = -(-self.n_blocks // self.blocks_per_chunk)
        self._order = lru_cache(2)(self._drawn)

    @property
    def chunk_rows(self) -> int:
        """The most rows of a chunk."""
        return self.blocks_per_chunk * self.block_rows

    def chunk(self, number: int) -> list[tuple[int, int, int]]:
        """The blocks of a chunk: each block's shard, first row and number of rows."""
        epoch, index = divmod(number, self.chunks_per_epoch)
        start = index * self.blocks_per_chunk
        blocks = self._order(epoch)[start : start + self.blocks_per_chunk]
        shards = torch.searchsorted(self._ends, blocks, right=True)
        before = torch.cat([self._ends.new_zeros(1), self._ends])[shards]
        first = (blocks - before) * self.block_rows
        rows = (self._rows[shards] - first).clamp(max=self.block_rows)
        return list(zip(shards.tolist(), first.tolist(), rows.tolist(), strict=True))

    def _drawn(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator(device="cpu").manual_seed((self.seed + epoch) % 2**63)
        return torch.randperm(self.n_blocks, generator=generator, device="cpu")


class OpenShards:
    """
    The files of some columns of a cache, for any thread.

    The first `MAX_KEPT_OPEN` stay open. The others are opened for each read: a system allows a
    process 256 to 1,024 open files unless told otherwise.

    Args:
        folder: of the cache.
        manifest: its manifest.
        columns: which of the manifest's columns.
    """

    def __init__(self, folder: Path, manifest: Manifest, columns: Sequence[int]) -> None:
        self.columns = [manifest.columns[index] for index in columns]
        self._paths = [
            [folder / shard.files[index].name for index in columns] for shard in manifest.shards
        ]
        self._kept: dict[Path, int] = {}
        self._finalizer = weakref.finalize(self, _close, self._kept)
        for path in islice(chain.from_iterable(self._paths), MAX_KEPT_OPEN):
            self._kept[path] = os.open(path, os.O_RDONLY)

    def expect(self, blocks: Sequence[tuple[int, int, int]]) -> None:
        """Let the disk begin to read blocks, where the system can be told."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard, first, rows in blocks:
            for column, path in zip(self.columns, self._paths[shard], strict=True):
                start, n_bytes = _span(column, first, rows)
                with self._opened(path) as descriptor:
                    os.posix_fadvise(descriptor, start, n_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, shard: int, first: int, rows: int, places: Sequence[memoryview]) -> None:
        """
        Read a block of each column.

        Raises:
            ValueError: the file has become shorter since it was checked.
            OSError: it cannot be opened or read.
        """
        for column, path, place in zip(self.columns, self._paths[shard], places, strict=True):
            start, n_bytes = _span(column, first, rows)
            done = 0
            with self._opened(path) as descriptor:
                while done < n_bytes:
                    n = os.preadv(descriptor, [place[done:n_bytes]], start + done)
                    if n == 0:
                        raise ValueError(
                            f"cached_activations_path: {shown(path.name)} was cut off while it "
                            "was read"
                        )
                    done += n

    @contextmanager
    def _opened(self, path: Path) -> Generator[int]:
        """Within, the file's descriptor."""
        if path in self._kept:
            yield self._kept[path]
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


class ChunkReader:
    """
    Reads chunks into memory of its own.

    Called with a chunk's number, it gives the rows of each hook, `[n, d_in]`. If only some are
    wanted, their indices come last. All are valid until the next call.

    Args:
        shards: what to read from; token ids are their last column if only some rows are wanted.
        order: which blocks make a chunk.
        kept: tells which rows are wanted.
        pins: whether the memory is pinned.
    """

    def __init__(
        self, shards: OpenShards, order: BlockOrder, kept: Kept | None, *, pins: bool
    ) -> None:
        self._shards, self._order, self._kept = shards, order, kept
        self._memory = [
            torch.empty(
                order.chunk_rows * column.row_bytes,
                dtype=torch.uint8,
                device="cpu",
                pin_memory=pins,
            )
            for column in shards.columns
        ]
        self._views = [memory.numpy().data for memory in self._memory]

    def __call__(self, number: int) -> list[torch.Tensor]:
        blocks = self._order.chunk(number)
        self._shards.expect(blocks)
        starts = [0, *accumulate(rows for _, _, rows in blocks)]
        columns = self._shards.columns
        for (shard, first, rows), start in zip(blocks, starts, strict=False):
            places = [
                view[start * column.row_bytes : (start + rows) * column.row_bytes]
                for view, column in zip(self._views, columns, strict=True)
            ]
            self._shards.read(shard, first, rows, places)
        n = starts[-1]
        parts = [
            memory[: n * column.row_bytes].view(column.dtype).view(column.shape(n))
            for memory, column in zip(self._memory, columns, strict=True)
        ]
        return parts if self._kept is None else [*parts[:-1], self._kept(parts[-1])]


def _span(column: Column, first: int, rows: int) -> tuple[int, int]:
    return HEADER_BYTES + first * column.row_bytes, rows * column.row_bytes


def _close(kept: dict[Path, int]) -> None:
    for descriptor in kept.values():
        os.close(descriptor)
