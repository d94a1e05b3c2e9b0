"""Activations of a code as PyTorch's compressed tensors, made from the active latents alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from saelens_sparse.codes.code import Code


def compressed(code: Code, shape: torch.Size, layout: torch.layout) -> torch.Tensor:
    """
    What `to_sparse(layout=layout)` of the activations gives, without the dense tensor.

    Zeros are not stored. Indices are int64 and ascend. The stored values are on the graph. Waits
    for the device, because the number of values decides the size of the result.

    Args:
        code: of `n_rows` inputs.
        shape: `[..., d_sae]`, whose leading dimensions hold the `n_rows`.
        layout: `torch.sparse_coo`, or `torch.sparse_csr` for two dimensions or more. All
            dimensions before the last two are batches of CSR.

    Raises:
        RuntimeError: CSR is asked for, and batches differ in their number of values.
    """
    rows, latents, values = code.active()
    check = torch.sparse.check_sparse_tensor_invariants.is_enabled()
    if layout == torch.sparse_coo:
        with _without_advice():
            return torch.sparse_coo_tensor(
                _coordinates(rows, latents, shape), values, shape, is_coalesced=True,
                check_invariants=check,
            )  # fmt: skip
    *batch, n_rows, _ = shape
    boundaries = torch.arange(math.prod(batch) * n_rows + 1, device=rows.device)
    counts = torch.searchsorted(rows, boundaries).diff().view(*batch, n_rows)
    crow_indices = F.pad(counts.cumsum(-1), (1, 0))
    by_batch = (*batch, values.numel() // max(1, math.prod(batch)))
    if batch and (crow_indices[..., -1] != by_batch[-1]).any():
        raise RuntimeError(
            "to_sparse_csr of feature_acts with more than two dimensions needs the same number of "
            "active latents in each batch. Use to_sparse_coo, or encode inputs [n_rows, d_in]."
        )
    with _without_advice():
        return torch.sparse_csr_tensor(
            crow_indices, latents.view(by_batch), values.view(by_batch), shape,
            check_invariants=check,
        )  # fmt: skip


@contextmanager
def _without_advice() -> Generator[None]:
    """Within, PyTorch does not advise on what is right by construction, or on CSR's being in beta.

    Its warnings would point here.
    """
    with warnings.catch_warnings():
        for advice in ("Sparse CSR tensor support is in beta", "Sparse invariant checks are"):
            warnings.filterwarnings("ignore", advice)
        yield


def _coordinates(rows: torch.Tensor, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Where values are in a tensor of this shape, `[len(shape), nnz]` int64."""
    coordinates = [latents]
    for size in reversed(shape[:-1]):
        coordinates.append(rows % size)
        rows = rows // size
    return torch.stack(coordinates[::-1])
