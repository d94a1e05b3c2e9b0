"""A buffer in which activations are shuffled, in the order of SAELens's `mixing_buffer`.

SAELens copies its buffer for every batch of the language model, and once more to shuffle it. Here a
row stays where it was written. What is shuffled is a list of places, and a batch is gathered when
it is asked for. Its place is free for a new row then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saelens_sparse.activations.permutations import Permutations
from saelens_sparse.ops.common.host_copy import HostCopy, to_device

# What widens to float32 without a change of value, so that the buffer may hold it as it is.
_NARROW = (torch.bfloat16, torch.float16)
# Rows that are copied to the host at a time: they need memory on the device as well.
_ROWS_OF_COPY = 8192
# The state of a buffer without rows.
EMPTY = {"n_to_serve": torch.tensor(0)}


class MixingBuffer:
    """
    Takes rows of activations as they come, and gives batches of them in a shuffled order.

    Rows may have several parts, such as the activations at several hooks, that stay together. The
    shuffle draws from PyTorch's generator of the host, one permutation each time that the buffer
    is full, as `sae_lens.training.mixing_buffer.mixing_buffer` does.

    Args:
        size: Rows from which on it is full.
        n_at_once: Most rows that are added at a time. More than these make it allocate anew.
        batch_size: Rows of a batch.
        mix_fraction: Share of `size` that is kept for the next shuffle. 0 means no shuffle.
        device: Where the rows are.
        dtype: Of the batches; None for that of the rows. Rows of 16 bits are kept as they are.

    What a method changes, it changes at its end and at once, so that an exception from a signal's
    handler leaves the buffer as it was.

    Raises:
        ValueError: `size` is below `batch_size`, or `mix_fraction` is not a fraction.
    """

    def __init__(
        self,
        size: int,
        n_at_once: int,
        batch_size: int,
        mix_fraction: float,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        if size < batch_size:
            raise ValueError(f"the buffer's size, {size}, is below batch_size, {batch_size}")
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"mix_fraction: {mix_fraction} is not between 0 and 1")
        self.size, self.batch_size, self.mix_fraction = size, batch_size, mix_fraction
        self.device, self.dtype = device, dtype
        self._n_at_once = n_at_once
        self._orders = Permutations(device)
        self._n_left = int(size * mix_fraction)  # rows that a shuffle leaves for the next one
        # It leaves less than a batch more than that, and rows are added while it is not full.
        self._capacity = max(size, self._n_left + batch_size) + n_at_once
        self._rows: list[torch.Tensor] = []  # each [capacity, width]
        places = torch.empty(0, dtype=torch.long, device=device)
        self._free = self._serving = places
        # Places in the order of rows: what the last shuffle has left, and what was added since.
        self._kept: tuple[torch.Tensor, ...] = (places,)
        self._arriving: tuple[torch.Tensor, list[HostCopy]] | None = None

    @property
    def n_kept(self) -> int:
        """Rows that wait for the next shuffle."""
        return sum(map(len, self._kept))

    @property
    def n_to_serve(self) -> int:
        """Rows of the batches that are left of the last shuffle."""
        return len(self._serving)

    @property
    def n_added(self) -> int:
        """How often rows were added since the last shuffle."""
        return len(self._kept) - 1

    @property
    def is_full(self) -> bool:
        """Whether it is time to shuffle."""
        return self.n_kept >= self.size

    @property
    def has_room(self) -> bool:
        """Whether rows can be added although batches are left of the last shuffle."""
        return len(self._free) >= self._n_at_once

    @torch.no_grad()
    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Take rows, `[n, width]` for each part, from any device."""
        self._settle()
        n = len(parts[0])
        if not self._rows or len(self._free) < n:
            self._grow(n, parts)
        self._rows = [_widened(*pair) for pair in zip(self._rows, parts, strict=True)]
        places, free = self._free[:n], self._free[n:]
        kept = *self._kept, places
        if parts[0].is_cuda and self.device.type == "cpu":
            self._arriving = places, [HostCopy(part) for part in parts]
        else:
            is_async = self.device.type == "cuda"
            self._write(places, [part.to(self.device, non_blocking=is_async) for part in parts])
        self._free, self._kept = free, kept

    @torch.no_grad()
    def drop(self, n_added: int) -> None:
        """Forget what was added last, until `n_added` is as given."""
        self._settle()
        kept, dropped = self._kept[: n_added + 1], self._kept[n_added + 1 :]
        free = torch.cat([*dropped, self._free])
        self._free, self._kept = free, kept

    def shuffle(self) -> None:
        """Draw an order, and begin to serve."""
        self._settle()
        places = torch.cat(self._kept)
        if self.mix_fraction > 0:
            places = places[to_device(self._orders.draw(len(places)), self.device)]
        n_batches = max(1, (len(places) - self._n_left) // self.batch_size)
        n_served = n_batches * self.batch_size
        serving, left = places[:n_served], places[n_served:]
        self._serving, self._kept = serving, (left,)

    def prepare_shuffle(self) -> None:
        """Begin to draw the next order, of as many rows as there will be if none is excluded."""
        if self.mix_fraction > 0:
            n_adds = max(1, -(-(self.size - self.n_kept) // self._n_at_once))
            self._orders.prepare(self.n_kept + n_adds * self._n_at_once)

    def next_batch(self) -> list[torch.Tensor]:
        """The next batch, `[batch_size, width]` for each part, on the buffer's device."""
        places, serving = self._serving[: self.batch_size], self._serving[self.batch_size :]
        batch = [self._gathered(rows, places) for rows in self._rows]
        free = torch.cat([self._free, places])
        self._free, self._serving = free, serving
        return batch

    @torch.no_grad()
    def state(self, n_added: int) -> dict[str, torch.Tensor]:
        """
        Its rows on the host, in their order: those to serve first, then those that are kept.

        Args:
            n_added: Rows that were added later than so often are left out.
        """
        self._settle()
        places = torch.cat([self._serving, *self._kept[: n_added + 1]])
        copies = {}
        for i, rows in enumerate(self._rows):
            copy = torch.empty(len(places), rows.shape[1], dtype=rows.dtype, device="cpu")
            for start in range(0, len(places), _ROWS_OF_COPY):
                part = places[start : start + _ROWS_OF_COPY]
                copy[start : start + len(part)] = rows.index_select(0, part)
            copies[f"rows.{i}"] = copy
        return {"n_to_serve": torch.tensor(self.n_to_serve), **copies}

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where a buffer with that state stood."""
        parts = [state[f"rows.{i}"] for i in range(len(state) - 1)]
        n_to_serve = int(state["n_to_serve"])
        nothing = self._free[:0]
        self._rows, self._arriving = [], None
        self._free = self._serving = nothing
        self._kept = (nothing,)
        if not parts:
            return
        self.add(parts)
        places = torch.cat(self._kept)
        self._serving, self._kept = places[:n_to_serve], (places[n_to_serve:],)

    def _grow(self, n: int, parts: Sequence[torch.Tensor]) -> None:
        """Make room for `n` more rows like these."""
        capacity = max(self._capacity, self.n_kept + self.n_to_serve + n)
        grown: list[torch.Tensor] = []
        for i, part in enumerate(parts):
            dtype = part.dtype if self.dtype is None or part.dtype in _NARROW else self.dtype
            rows = torch.empty(capacity, part.shape[1], dtype=dtype, device=self.device)
            if self._rows:
                rows[: len(self._rows[i])] = self._rows[i]
            grown.append(rows)
        n_old = len(self._rows[0]) if self._rows else 0
        new = torch.arange(n_old, capacity, device=self.device)
        free = torch.cat([self._free, new])
        self._rows, self._free = grown, free

    def _write(self, places: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        for rows, part in zip(self._rows, parts, strict=True):
            rows.index_copy_(0, places, part.to(rows.dtype))

    def _settle(self) -> None:
        """Write rows that were on their way from a GPU to the host."""
        if self._arriving is not None:
            places, copies = self._arriving
            self._write(places, [copy.values() for copy in copies])
            self._arriving = None

    def _gathered(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        if rows.is_cuda or not torch.cuda.is_available():
            batch = rows.index_select(0, places)
        else:  # from pinned memory, the copy to a GPU is faster and nobody waits for it
            shape = len(places), rows.shape[1]
            batch = torch.empty(shape, dtype=rows.dtype, device="cpu", pin_memory=True)
            torch.index_select(rows, 0, places, out=batch)
        return batch if self.dtype is None else batch.to(self.dtype)


def _widened(rows: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Rows that can hold a part: a run may resume with a model of another dtype."""
    is_narrow = rows.dtype in _NARROW
    return rows.to(torch.promote_types(rows.dtype, part.dtype)) if is_narrow else rows
