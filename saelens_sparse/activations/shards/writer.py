"""Writes shards while the language model computes what follows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

import torch
import xxhash

from saelens_sparse.activations.shards.check import fingerprint_of, read_verified, write_verified
from saelens_sparse.activations.shards.manifest import (
    HEADER_BYTES,
    Column,
    Manifest,
    Shard,
    ShardFile,
)
from saelens_sparse.ops.common.host_copy import HostCopy
from saelens_sparse.whole_files import sync

PARTIAL = ".partial"
# Batches that may wait for the disk.
_N_SLOTS = 3


@dataclass
class _Slot:
    """
    Memory of the host for one batch.

    Attributes:
        memory: of each column, bytes; pinned where batches come from a GPU.
        rows: of the batch that is there.
        copied: passes when it is there.
        overflowed: whether a value was lost, and None where none can be.
    """

    memory: list[torch.Tensor]
    rows: int = 0
    copied: torch.cuda.Event | None = None
    overflowed: HostCopy | None = None

    def bytes_of(self, index: int, column: Column) -> memoryview:
        return self.memory[index].numpy().data[: self.rows * column.row_bytes]

    def place(self, index: int, column: Column) -> torch.Tensor:
        """Of the batch's rows of a column."""
        n_bytes = self.rows * column.row_bytes
        return self.memory[index][:n_bytes].view(column.dtype).view(column.shape(self.rows))


@dataclass
class OpenFile:
    """A file of the shard that is being written."""

    path: Path
    file: BinaryIO
    hash: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def write(self, content: memoryview, hashing: ThreadPoolExecutor) -> None:
        hashed = hashing.submit(self.hash.update, content)
        try:
            while len(content):
                content = content[self.file.write(content) :]
        finally:
            hashed.result()


class ShardWriter:
    """
    Writes rows of activations and token ids to the shards of a cache.

    Rows are copied to the host on a stream of their own, and a thread writes and hashes them. A
    shard gets its name when all of it is on the disk, and enters the manifest then. Another thread
    waits for that, while the next shard is written.

    Args:
        folder: Of the cache. What another writer has left unfinished there is removed.
        manifest: Says what is written already.

    Attributes:
        manifest: of what is whole on the disk.
        rows_added: all rows of the cache so far.
        rows_of_shard: those of them that are of the open shard.

    Every method but `abandon` raises what writing has raised: OSError if there is no room, or
    ValueError if float16 cannot hold a value.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.rows_added, self.rows_of_shard = manifest.rows_written, 0
        self._columns = manifest.columns
        self._verified = read_verified(folder)
        self._error: BaseException | None = None
        self._open: list[OpenFile] = []
        self._rows_open = 0
        self._n_shards = len(manifest.shards)
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        self._full: SimpleQueue[_Slot | str | None] = SimpleQueue()
        self._n_slots = 0
        self._stream: torch.cuda.Stream | None = None
        self._hashing = ThreadPoolExecutor(1, "cache hash")
        self._syncing = ThreadPoolExecutor(1, "cache sync")
        self._finishing: Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_unlisted()
        self._thread = threading.Thread(target=self._work, name="cache writer", daemon=True)
        self._thread.start()

    @torch.no_grad()
    def add(self, parts: Sequence[torch.Tensor], tokens: torch.Tensor) -> None:
        """
        Take rows.

        Args:
            parts: `[n, d_in]` for each hook of the manifest, on any device.
            tokens: `[n]`, their token ids, on the host.
        """
        slot = self._slot(len(tokens), parts[0].device)
        slot.place(0, self._columns[0]).copy_(tokens)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(parts[0].device))
        with torch.cuda.stream(self._stream):  # None: nothing
            lost: list[torch.Tensor] = []
            for index, part in enumerate(parts, start=1):
                column = self._columns[index]
                narrow = part.to(column.dtype)
                slot.place(index, column).copy_(narrow, non_blocking=True)
                if column.dtype == torch.float16 and part.dtype != torch.float16:
                    lost.append((narrow.isinf() & part.isfinite()).any())
                if self._stream is not None:
                    part.record_stream(self._stream)
            slot.overflowed = HostCopy(torch.stack(lost).any()) if lost else None
            if self._stream is not None:
                slot.copied = torch.cuda.Event()
                slot.copied.record(self._stream)
        self._full.put(slot)
        self.rows_added += len(tokens)
        self.rows_of_shard += len(tokens)

    def end_shard(self, resume: str) -> None:
        """Give the shard that is open its name, once all of it is on the disk.

        Args:
            resume: Where the source of activations stands.
        """
        self._full.put(resume)
        self.rows_of_shard = 0
        self._raise()

    def complete(self) -> Manifest:
        """Wait for the disk, and say that this is all."""
        self._full.put(None)
        self._thread.join()
        self._close()
        self._raise()
        self.manifest = self.manifest.completed()
        self.manifest.write(self.folder)
        return self.manifest

    def abandon(self) -> Manifest:
        """Remove the shard that is open; gives the manifest of what is whole."""
        self._full.put(None)
        self._thread.join()
        self._close()
        with suppress(OSError):
            self._remove_unlisted()
        return self.manifest

    def _slot(self, rows: int, device: torch.device) -> _Slot:
        self._raise()
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        if self._n_slots < _N_SLOTS:
            self._n_slots += 1
            self._free.put(_Slot([]))
        slot = self._free.get()
        self._raise()
        sizes = [rows * column.row_bytes for column in self._columns]
        if not slot.memory or len(slot.memory[0]) < sizes[0]:
            pins = device.type == "cuda"
            slot.memory = [
                torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pins)
                for size in sizes
            ]
        slot.rows = rows
        return slot

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _close(self) -> None:
        self._hashing.shutdown()
        self._syncing.shutdown()
        for each in self._open:
            each.file.close()
        self._open = []

    # In the thread that writes

    def _work(self) -> None:
        while (job := self._full.get()) is not None:
            if self._error is None:
                try:
                    self._write(job) if isinstance(job, _Slot) else self._end(job)
                except BaseException as error:
                    self._error = error
            if isinstance(job, _Slot):
                self._free.put(job)
        try:
            if self._finishing is not None:
                self._finishing.result()
        except BaseException as error:
            self._error = self._error or error

    def _write(self, slot: _Slot) -> None:
        if slot.copied is not None:
            slot.copied.synchronize()
        if slot.overflowed is not None and slot.overflowed.values():
            raise ValueError(
                "dtype: float16 cannot hold these activations, some are above 65,504; allowed: "
                "bfloat16 or float32"
            )
        if not self._open:
            self._open = [self._opened(column) for column in self._columns]
        for index, (column, each) in enumerate(zip(self._columns, self._open, strict=True)):
            each.write(slot.bytes_of(index, column), self._hashing)
        self._rows_open += slot.rows

    def _opened(self, column: Column) -> OpenFile:
        name = f"{self._n_shards:05d}.{column.label}.safetensors"
        path = self.folder / f"{name}{PARTIAL}"
        file = path.open("wb", buffering=0)
        file.write(bytes(HEADER_BYTES))
        return OpenFile(path, file)

    def _end(self, resume: str) -> None:
        if self._finishing is not None:
            self._finishing.result()  # of the shard before
        files, rows = self._open, self._rows_open
        self._open, self._rows_open = [], 0
        self._n_shards += 1
        self._finishing = self._syncing.submit(self._finish, files, rows, resume)

    # In the thread that waits for the disk

    def _finish(self, files: Sequence[OpenFile], rows: int, resume: str) -> None:
        listed: list[ShardFile] = []
        try:
            for column, each in zip(self._columns, files, strict=True):
                each.file.seek(0)
                each.file.write(column.header(rows))
        finally:
            for each in files:
                each.file.close()
        for each in files:
            sync(each.path)
        for each in files:
            path = each.path.with_name(each.path.name.removesuffix(PARTIAL))
            each.path.rename(path)
            self._verified[path.name] = fingerprint_of(path)
            listed.append(ShardFile(path.name, path.stat().st_size, each.hash.hexdigest()))
        sync(self.folder)  # or a power cut could leave a manifest that lists what is not there
        manifest = self.manifest.with_shard(Shard(rows, tuple(listed)), resume)
        manifest.write(self.folder)
        self.manifest = manifest
        write_verified(self.folder, self._verified)

    def _remove_unlisted(self) -> None:
        for path in unlisted_files(self.folder, self.manifest):
            path.unlink()


def unlisted_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Files of shards that a writer has left unfinished in a cache's folder."""
    listed = {file.name for shard in manifest.shards for file in shard.files}
    return [path for path in folder.glob("*.safetensors*") if path.name not in listed]
