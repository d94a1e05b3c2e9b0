"""Random orders as `torch.randperm` draws them from the generator of the host, drawn in advance."""

from __future__ import annotations

from threading import Thread

import torch
from typing_extensions import override

# From so many elements on, a thread draws. 80k elements take 0.5 ms of one core.
_MIN_ELEMENTS = 16384


class _Drawing(Thread):
    """
    Draws the order of `n` elements, as the generator would that has a state.

    Attributes:
        order: `[n]`, int64, on the host; there when the thread has ended, if nothing went wrong.
        after: the generator's state after it.
    """

    order: torch.Tensor | None = None
    after: torch.Tensor | None = None

    def __init__(self, n: int, before: torch.Tensor, *, pins: bool) -> None:
        super().__init__(name="permutations", daemon=True)
        self.n, self.before, self._pins = n, before, pins

    @override
    def run(self) -> None:
        generator = torch.Generator(device="cpu")
        generator.set_state(self.before)
        order = torch.randperm(self.n, generator=generator, device="cpu")
        self.order = order.pin_memory() if self._pins else order
        self.after = generator.get_state()


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

    def prepare(self, n: int) -> None:
        """Begin to draw the order of `n` elements, which may be asked for next."""
        if n >= _MIN_ELEMENTS and torch.get_default_device().type == "cpu":
            drawing = _Drawing(n, torch.get_rng_state(), pins=self._pins)
            drawing.start()
            self._drawing = drawing

    def draw(self, n: int) -> torch.Tensor:
        """The order of `n` elements, `[n]`, int64, on the host; as `torch.randperm(n)`."""
        drawing, self._drawing = self._drawing, None
        if drawing is None or drawing.n != n:
            return torch.randperm(n)
        drawing.join()  # returns at once in a fork, which has no such thread
        order, after = drawing.order, drawing.after
        if order is None or after is None:
            return torch.randperm(n)
        if not torch.equal(torch.get_rng_state(), drawing.before):
            return torch.randperm(n)
        torch.set_rng_state(after)
        return order
