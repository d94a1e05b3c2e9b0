"""How much of what is active the float8 screen of a training step has found, on a few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sae_lens.saes.sae import TrainStepOutput

from saelens_sparse.codes.step import StepContext
from saelens_sparse.ops.pairs import ActivePairs
from saelens_sparse.ops.search.recall import RowSample
from saelens_sparse.warn import warn_caller

if TYPE_CHECKING:
    from saelens_sparse.architectures.base import SparseTrainingSAEMixin

# A step in so many is measured, on so many rows; so is each step that is logged.
MEASURED_STEPS = 500
ROWS = 32
# Rounding to bfloat16 under autocast alone costs up to a hundredth of a row's top k.
MIN_RECALL = 0.99
_SEEN = "screen_recall"  # of `StepContext.seen`: recall and share of whole rows


@torch.no_grad()
def measure_recall(
    sae: SparseTrainingSAEMixin,
    x: torch.Tensor,
    norms: torch.Tensor | None,
    pairs: ActivePairs,
    step: StepContext,
) -> None:
    """
    Note what a search in full precision finds on some rows beside what was found.

    Args:
        sae: the SAE.
        x: `[n_rows, d_in]`, as the search took it.
        norms: likewise.
        pairs: what it has found.
        step: the step that it is part of.
    """
    sample = RowSample.of(pairs, sae.cfg.d_sae, ROWS)
    own_step = StepContext(step.choice, asks_at_once=True)
    exact = sae.search_sample(x[sample.rows], norms, own_step, int(sample.found.sum()))
    step.seen[_SEEN] = torch.stack(sample.recall(exact.complete().pairs))


def report_recall(
    sae: SparseTrainingSAEMixin, step: StepContext, output: TrainStepOutput | None
) -> None:
    """Put what was measured among the metrics of a step. Warn once an SAE if it is little."""
    if output is None or _SEEN not in step.seen:
        return
    recall, whole_rows = step.seen[_SEEN].tolist()
    output.metrics |= {"screen_recall": recall, "screen_whole_rows": whole_rows}
    if recall < MIN_RECALL and not sae.has_warned_of_recall:
        sae.has_warned_of_recall = True
        warn_caller(
            f"the float8 screen found {recall:.2%} of the active latents of {ROWS} rows in "
            f"training step {step.n_training_steps}; rounding to bfloat16 finds 99% or more. "
            "Columns of large activations that meet large encoder weights are the usual reason. "
            "screen_dtype='auto' finds all."
        )
