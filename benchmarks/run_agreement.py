"""Whether a run's batches are SAELens's where the language model takes another path."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from benchmarks.rows import DisagreementError

MAX_DIFFERENCE = {"float32": 1e-4, "autocast": 0.1, "bfloat16_model": 0.1}
"""
Relative distance of a batch from SAELens's that rounding may cause, by precision. Two passes of 17
random layers in bfloat16 are 0.06 apart. `model_path` compares errors against float32.
"""
MAX_ROW_DIFFERENCE = 0.5
"""Relative distance of a row. Rows of two tokens are about 1.4 apart."""


def require_close_batches(
    expected: Sequence[torch.Tensor], found: Iterable[torch.Tensor], precision: str
) -> float:
    """
    Args:
        expected: SAELens's batches `[batch, d_in]`.
        found: Others', of the same tokens in the same order.
        precision: Name of the run's precision.

    Returns:
        The largest relative distance of a batch.

    Raises:
        DisagreementError: A batch has another dtype or shape, rows of other tokens, or differs by
            more than rounding does.
    """
    largest = 0.0
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True), start=1):
        kinds = [(one.dtype, tuple(one.shape)) for one in (ours, theirs)]
        if kinds[0] != kinds[1]:
            raise DisagreementError(f"batch {number} is {kinds[0]}; SAELens's is {kinds[1]}")
        off, norms = (ours - theirs).norm(dim=-1), theirs.norm(dim=-1)
        others = (~(off <= MAX_ROW_DIFFERENCE * norms)).sum().item()
        if others:
            raise DisagreementError(f"batch {number}: {others} rows are not SAELens's")
        difference = (off.norm() / norms.norm()).item()
        if not difference <= MAX_DIFFERENCE[precision]:
            raise DisagreementError(f"batch {number} differs from SAELens's by {difference:.1e}")
        largest = max(largest, difference)
    return largest
