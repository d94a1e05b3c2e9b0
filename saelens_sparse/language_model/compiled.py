"""A block of the decoder, compiled."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from saelens_sparse.language_model.decoder import Block, BlockShape, BlockWeights, Padding, block
from saelens_sparse.language_model.recorder import Wanted
from saelens_sparse.warn import warn_caller

_numbers = itertools.count()


def own_block() -> Block:
    """
    A copy of `block` for a compiler.

    PyTorch limits how often one function is compiled anew. Functions of their own have their own
    limits.
    """
    code = block.__code__.replace(co_name=f"block_{next(_numbers)}")
    return types.FunctionType(code, block.__globals__, code.co_name, block.__defaults__)


def compile_block() -> Block:
    """
    `block` through `torch.compile`, for static shapes.

    Nothing is tuned by timing it, so that a resumed run computes the same bits.
    """
    return torch.compile(
        own_block(), fullgraph=True, dynamic=False, options={"deterministic": True}
    )


class CompiledBlock:
    """
    A compiled block that becomes `block` itself, with one warning, where the compiler fails.

    Blocks of one kind share compiled code: same shapes, same wanted values.

    Args:
        compiler: makes a compiled block, `compile_block` by default. It may raise, and so may what
            it makes.
    """

    def __init__(self, compiler: Callable[[], Block] | None = None) -> None:
        self._compiler = compiler or compile_block
        self._compiled: dict[tuple[Hashable, ...], Block] = {}
        self.is_compiled = True
        """Whether blocks run compiled, or will."""

    def __call__(
        self,
        resid: Tensor,
        weights: BlockWeights,
        shape: BlockShape,
        padding: Padding | None,
        wanted: Wanted,
        stops: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `block` computes."""
        arguments = (resid, weights, shape, padding, wanted, stops)
        if not self.is_compiled:
            return block(*arguments)
        kind = (resid.shape, shape, padding is None, wanted, stops)
        try:
            if kind not in self._compiled:
                self._compiled[kind] = self._compiler()
            return self._compiled[kind](*arguments)
        except Exception as error:
            outputs = block(*arguments)  # raises again what is not the compiler's fault
            self.is_compiled = False
            cause = (str(error).strip() or "no message").splitlines()[0]
            warn_caller(
                f"The language model runs without torch.compile, which failed with "
                f"{type(error).__name__}: {cause}"
            )
            return outputs
