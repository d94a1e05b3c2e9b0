"""Pre-activations of all latents, a few rows at a time."""

from collections.abc import Iterator

import torch

from saelens_sparse.measured import CPU_CHUNK_BYTES


def pre_act_chunks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, buffer_bytes: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """`x @ weight.T + bias` in chunks of rows, each with the index of its first row.

    The dense encoder's own expression, so that autocast acts on it as it does in stock.

    Args:
        x: `[n_rows, d_in]`; for no rows there is one empty chunk.
        weight: `[d_sae, d_in]`.
        bias: `[d_sae]`.
        buffer_bytes: bound on the size of a chunk, `[rows, d_sae]`; one row at least.
    """
    row_bytes = weight.shape[0] * torch.promote_types(x.dtype, torch.float32).itemsize
    if x.device.type == "cpu":
        buffer_bytes = min(buffer_bytes, CPU_CHUNK_BYTES)
    step = max(1, buffer_bytes // row_bytes)
    for start in range(0, max(1, x.shape[0]), step):
        pre_acts = x[start : start + step] @ weight.T
        yield start, pre_acts.add_(bias) if pre_acts.dtype == bias.dtype else pre_acts + bias
