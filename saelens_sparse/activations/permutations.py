"""Random orders as `torch.randperm` draws them from the generator of the host, drawn in advance."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

# From so many elements on, a thread draws. 80k elements take 0.5 ms of one core.
_MIN_ELEMENTS = 16384


class _Drawing(NamedTuple):
    n: int
    before: torch.Tensor  # state of the generator
    result: Future[tuple[torch.Tensor, torch.Tensor]]  # the order, and the state after it


class Permutations:
    """
    Draws from a copy of PyTorch's generator of the host while the program does something else.

    An order counts when it is asked for. If somebody has drawn from the generator since, it is
    drawn again, so that all draws are as without this class.

    Args:
        device: Where the orders go. For a GPU they are in pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._pins = device.type == "cuda"
        self._drawing: _Drawing | None = None
        self._thread = ThreadPoolExecutor(1, "permutations")

    def prepare(self, n: int) -> None:
        """Begin to draw the order of `n` elements, which may be asked for next."""
        if n >= _MIN_ELEMENTS and torch.get_default_device().type == "cpu":
            before = torch.get_rng_state()
            self._drawing = _Drawing(n, before, self._thread.submit(self._draw, n, before))

    def draw(self, n: int) -> torch.Tensor:
        """The order of `n` elements, `[n]`, int64, on the host; as `torch.randperm(n)`."""
        drawing, self._drawing = self._drawing, None
        if drawing is None or drawing.n != n:
            return torch.randperm(n)
        order, after = drawing.result.result()
        if not torch.equal(torch.get_rng_state(), drawing.before):
            return torch.randperm(n)
        torch.set_rng_state(after)
        return order

    def _draw(self, n: int, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator()
        generator.set_state(before)
        order = torch.randperm(n, generator=generator)
        return order.pin_memory() if self._pins else order, generator.get_state()
