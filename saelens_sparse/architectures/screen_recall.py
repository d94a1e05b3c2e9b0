"""How much of what is active the float8 screen of a training step has found, on a few rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from sae_lens.saes.sae import TrainStepOutput

from saelens_sparse.codes.step import StepContext
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.search.found import FoundPairs
from saelens_sparse.ops.search.recall import RowSample
from saelens_sparse.warn import warn_caller

# A step in so many is measured, on so many rows; so is each step that is logged. It takes one read
# of W_enc, and waits for the device.
MEASURED_STEPS = 500
ROWS = 32
# Rounding to bfloat16 under autocast alone costs up to a hundredth of a row's top k.
MIN_RECALL = 0.99
_SEEN = "screen_recall"  # of `StepContext.seen`: recall and share of whole rows

SampleSearch = Callable[[torch.Tensor, torch.Tensor | None, StepContext, int], FoundPairs]


@torch.no_grad()
def measure_recall(
    search: SampleSearch,
    x: torch.Tensor,
    norms: torch.Tensor | None,
    pairs: ActivePairs,
    step: StepContext,
    d_sae: int,
) -> None:
    """
    Note what a search in full precision finds on some rows beside what was found.

    Args:
        search: an SAE's `search_sample`.
        x: `[n_rows, d_in]`, as the step's search took it.
        norms: likewise.
        pairs: what it has found.
        step: the step.
        d_sae: number of latents.
    """
    sample = RowSample.of(pairs, d_sae, ROWS)
    # Without kernels, which would round all of W_enc anew.
    own_step = StepContext(replace(step.choice, backend="torch"), asks_at_once=True)
    with torch.autocast(x.device.type, enabled=False):
        exact = search(x[sample.rows], norms, own_step, int(sample.found.sum()))
    step.seen[_SEEN] = torch.stack(sample.recall(exact.complete().pairs))


def report_recall(step: StepContext, output: TrainStepOutput) -> float | None:
    """Put what was measured among the metrics of a step; gives the recall, if there is one."""
    if _SEEN not in step.seen:
        return None
    recall, whole_rows = step.seen[_SEEN].tolist()
    output.metrics |= {"screen_recall": recall, "screen_whole_rows": whole_rows}
    return recall


def warns_of(recall: float, step: StepContext, has_warned: bool) -> bool:
    """Warn of a low recall, unless that was done before; returns whether it did."""
    if recall >= MIN_RECALL or has_warned:
        return False
    warn_caller(
        f"the float8 screen found {recall:.2%} of the active latents of some rows in "
        f"training step {step.n_training_steps}; rounding to bfloat16 finds 99% or more. "
        "Columns of large activations that meet large encoder weights are the usual reason. "
        "screen_dtype='auto' finds all."
    )
    return True
