"""Chunks of a cache that threads read while the program does something else."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue

import torch
from typing_extensions import override

# Reads a chunk by its number, into memory of its own, and gives its tensors on the host. They are
# valid until the next call.
Reader = Callable[[int], list[torch.Tensor]]
# Gives the indices of the rows that are wanted, `[n_kept]`, for their token ids, `[n]`, both on the
# host.
Kept = Callable[[torch.Tensor], torch.Tensor]


def not_among(excluded: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Indices of the tokens that are not excluded; a `Kept` with the first argument given."""
    return torch.isin(tokens, excluded, invert=True).nonzero().squeeze(1)


# What a thread that is to end may take for its last chunk.
_MAX_SECONDS = 10
# Memory of the host, and as much of the device, that chunks may take.
_MAX_BYTES = 2**29


def n_threads(chunk_bytes: int) -> int:
    """How many threads read chunks of that size: 2 at least, so that one can be ahead."""
    return max(2, min(4, (os.cpu_count() or 1) // 2, _MAX_BYTES // chunk_bytes))


class ReadAhead:
    """
    Gives chunk after chunk, each read before it is asked for.

    Each reader has a thread, and the threads take turns. On a GPU a thread also copies its chunk to
    the device, from the reader's pinned memory and on a stream of its own. What a reader raises,
    `next` raises when it is that chunk's turn.

    A signal may end a call of `next` anywhere. The next call gives the same chunk then.

    Args:
        readers: One for each thread.
        first: Number of the first chunk.
        device: Where chunks go.

    Attributes:
        at: Number of the next chunk.
    """

    def __init__(self, readers: Sequence[Reader], first: int, device: torch.device) -> None:
        self.at = self._first = first
        self._threads = [
            _ReaderThread(reader, first + index, len(readers), device)
            for index, reader in enumerate(readers)
        ]
        self._finalizer = weakref.finalize(self, _stop, self._threads)
        for thread in self._threads:
            thread.start()

    def next(self) -> list[torch.Tensor]:
        """The next chunk's tensors, on the device. They are valid until the next call."""
        if self.at > self._first:
            self._reader_of(self.at - 1).take_back(self.at - 1)
        chunk = self._reader_of(self.at).chunk(self.at)
        self.at += 1
        return chunk

    def close(self) -> None:
        """Stop the threads."""
        self._finalizer()

    def _reader_of(self, number: int) -> _ReaderThread:
        return self._threads[(number - self._first) % len(self._threads)]


def _stop(threads: Sequence[_ReaderThread]) -> None:
    for thread in threads:
        thread.wanted.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=_MAX_SECONDS)


class _ReaderThread(threading.Thread):
    """
    Reads every `stride`-th chunk from a number on, each after the last one was taken back.

    Attributes:
        wanted: Numbers of chunks to read; None for the end. What was read is passed over.
    """

    def __init__(self, reader: Reader, first: int, stride: int, device: torch.device) -> None:
        super().__init__(name="cache reader", daemon=True)
        self.wanted: SimpleQueue[int | None] = SimpleQueue()
        self.wanted.put(first)
        self._reader, self._stride, self._device = reader, stride, device
        # The chunk that was read last, and its number. Who waits is told that there is another.
        self._found: tuple[int, list[torch.Tensor] | BaseException] = (first - 1, [])
        self._news: SimpleQueue[None] = SimpleQueue()
        self._on_device: list[torch.Tensor] = []
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if is_cuda else None
        self._copied = torch.cuda.Event() if is_cuda else None
        self._used = torch.cuda.Event() if is_cuda else None

    @override
    def run(self) -> None:
        while (number := self.wanted.get()) is not None:
            if number <= self._found[0]:
                continue
            try:
                found = self._copied_to_device(self._reader(number))
            except BaseException as error:
                found = error
            self._found = number, found
            self._news.put(None)
            if isinstance(found, BaseException):
                return

    def chunk(self, number: int) -> list[torch.Tensor]:
        """What was read, when the current stream gets there."""
        while self._found[0] != number:
            self._news.get()
        found = self._found[1]
        if isinstance(found, BaseException):
            raise found
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
        return found

    def take_back(self, number: int) -> None:
        """Nobody uses that chunk after what is in the current stream's queue."""
        if self._used is not None:
            self._used.record(torch.cuda.current_stream(self._device))
        self.wanted.put(number + self._stride)

    def _copied_to_device(self, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        if self._stream is None:
            return parts
        assert self._used is not None
        assert self._copied is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used)  # no wait before the first record
            lengths = [len(place) for place in self._on_device] or [-1]
            if any(n < len(part) for n, part in zip(lengths, parts, strict=False)):
                self._on_device = [torch.empty_like(part, device=self._device) for part in parts]
            copies: list[torch.Tensor] = []
            for part, place in zip(parts, self._on_device, strict=True):
                copies.append(place[: len(part)].copy_(part, non_blocking=True))
            self._copied.record(self._stream)
        self._copied.synchronize()  # the reader's memory is free again
        return copies
