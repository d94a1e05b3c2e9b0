"""Products between rows of a weight matrix and a sparse batch of latents.

For pairs p of a batch, each with a row n(p) and a latent j(p):

- `gather_sum`:  out[n] = sum over the pairs p of row n of coefficients[p] * weight[j(p)]   (decode)
- `gather_dot`:  out[p] = <batch[n(p)], weight[j(p)]>                                (its adjoint)
- `segment_sum`: out[j] = sum over the pairs p of latent j of coefficients[p] * batch[n(p)]
                                                                               (weight gradients)

with `segment_totals`, the last without a batch; `add_rows`, which adds a few dense rows to such a
gradient; `row_combination` and `row_norms` of a weight.

All sums run in float32 or better and in a fixed order.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F

from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.ops.pairs import LatentOrder, Rows

# Gathered rows per chunk in the PyTorch path: small enough to stay in a CPU's cache.
_CHUNK_BYTES = 16 * 2**20
_MIN_LONG_SEGMENT = 128


def gather_sum(
    coefficients: torch.Tensor,
    latents: torch.Tensor,
    rows: Rows,
    weight: torch.Tensor,
    backend: Backend,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sum of each row's weight rows, plus a bias if there is one.

    Args:
        coefficients: `[n_pairs]` floating point.
        latents: `[n_pairs]` int64, each in `[0, d_sae)`.
        rows: the rows of the pairs.
        weight: `[d_sae, d]`, contiguous rows.
        backend: `"triton"` or `"torch"`.
        bias: `[d]` or None.

    Returns:
        `[n_rows, d]` in the dtype of `weight`, with a bias in what that and its dtype promote to.
    """
    if bias is not None and list(bias.shape) != [weight.shape[1]]:
        raise ValueError(f"bias must have shape {[weight.shape[1]]}; got {list(bias.shape)}")
    if bias is not None and (backend != "triton" or bias.dtype != weight.dtype):
        return gather_sum(coefficients, latents, rows, weight, backend) + bias
    _check_pairs(latents, rows, weight, coefficients=coefficients)
    if backend == "triton":
        from saelens_sparse.ops.rows import kernels

        return kernels.gather_sum(coefficients, latents, rows, weight, bias)
    if weight.dtype in (torch.float32, torch.float64) and _has_embedding_bag(weight):
        in_rows = slice(rows.count())
        return F.embedding_bag(
            latents[in_rows],
            weight,
            rows.starts(weight.device),
            per_sample_weights=coefficients[in_rows].to(weight.dtype),
            mode="sum",
            include_last_offset=True,
        )
    if rows.k is None:
        out = weight.new_zeros(rows.n_rows, weight.shape[1], dtype=_sum_dtype(weight))
        for pairs in _pair_chunks(rows.count(), weight):
            gathered = F.embedding(latents[pairs], weight).to(out.dtype)
            _add_to_rows(out, rows, pairs, gathered, coefficients[pairs].to(out.dtype))
        return out.to(weight.dtype)
    out = weight.new_empty(rows.n_rows, weight.shape[1])
    latents, coefficients = (part.view(rows.n_rows, rows.k) for part in (latents, coefficients))
    with _full_precision(weight):
        for chunk in _row_chunks(latents, weight):
            gathered = F.embedding(latents[chunk], weight).float()
            out[chunk] = torch.bmm(coefficients[chunk].float().unsqueeze(1), gathered).squeeze(1)
    return out


def _add_to_rows(
    out: torch.Tensor,
    rows: Rows,
    pairs: slice,
    gathered: torch.Tensor,
    coefficients: torch.Tensor,
) -> None:
    """Add coefficient times gathered row of a range of pairs to the rows `[n_rows, d]` they are on.

    The order of additions is fixed, which on a GPU `index_add_` does not see to.
    """
    assert rows.of_pairs is not None and rows.offsets is not None
    row = rows.of_pairs[pairs].long()
    if not _has_embedding_bag(out):
        out.index_add_(0, row, gathered * coefficients.unsqueeze(1))
        return
    first, last = int(row[0]), int(row[-1])
    offsets = rows.offsets[first : last + 2].clamp(pairs.start, pairs.stop) - pairs.start
    out[first : last + 1] += F.embedding_bag(
        torch.arange(row.numel(), device=out.device),
        gathered,
        offsets,
        per_sample_weights=coefficients,
        mode="sum",
        include_last_offset=True,
    )


def gather_dot(
    batch: torch.Tensor,
    latents: torch.Tensor,
    rows: Rows,
    weight: torch.Tensor,
    backend: Backend,
) -> torch.Tensor:
    """Dot product of the batch row and the weight row of each pair.

    Args:
        batch: `[n_rows, d]` floating point.
        latents: `[n_pairs]` int64, each in `[0, d_sae)`.
        rows: the rows of the pairs.
        weight: `[d_sae, d]`, contiguous rows.
        backend: `"triton"` or `"torch"`.

    Returns:
        `[n_pairs]`, float32 (float64 for a float64 weight); zero beyond the last row.
    """
    _check_pairs(latents, rows, weight, batch=batch)
    if backend == "triton":
        from saelens_sparse.ops.rows import kernels

        return kernels.gather_dot(batch, latents, rows, weight)
    sum_dtype = _sum_dtype(weight)
    if weight.device.type == "cpu" and weight.dtype == batch.dtype == sum_dtype:
        return _sampled_product(batch, latents, rows, weight)
    if rows.k is None:
        assert rows.of_pairs is not None
        out = weight.new_zeros(latents.shape, dtype=sum_dtype)
        for pairs in _pair_chunks(rows.count(), weight):
            gathered = F.embedding(latents[pairs], weight).to(sum_dtype)
            out[pairs] = (gathered * F.embedding(rows.of_pairs[pairs], batch)).sum(1)
        return out
    latents = latents.view(rows.n_rows, rows.k)
    out = weight.new_empty(latents.shape, dtype=sum_dtype)
    with _full_precision(weight):
        for chunk in _row_chunks(latents, weight):
            gathered = F.embedding(latents[chunk], weight).to(sum_dtype)
            out[chunk] = torch.bmm(gathered, batch[chunk].to(sum_dtype).unsqueeze(2)).squeeze(2)
    return out.view(-1)


def _sampled_product(
    batch: torch.Tensor, latents: torch.Tensor, rows: Rows, weight: torch.Tensor
) -> torch.Tensor:
    """`batch @ weight.T` at the pairs alone, which is faster than gathering rows."""
    _expect_sparse_csr()
    out = weight.new_zeros(latents.shape)
    in_rows = slice(rows.count())
    pattern = torch.sparse_csr_tensor(
        rows.starts(weight.device),
        latents[in_rows],
        out[in_rows],
        (rows.n_rows, weight.shape[0]),
        device=weight.device,
        check_invariants=False,
    )
    with _full_precision(weight):
        out[in_rows] = torch.sparse.sampled_addmm(pattern, batch, weight.T).values()
    return out


@cache
def _expect_sparse_csr() -> None:
    """PyTorch warns once of the layout's beta state: let it do so here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1, device="cpu").to_sparse_csr()


def segment_sum(
    order: LatentOrder,
    coefficients: torch.Tensor,
    batch: torch.Tensor,
    dtype: torch.dtype,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over each latent's active rows: the gradient of a weight row.

    Args:
        order: the active pairs by latent.
        coefficients: `[n_pairs]` floating point, in the pairs' order by row.
        batch: `[n_rows, d]` floating point.
        dtype: dtype of the result.
        backend: `"triton"` or `"torch"`.

    Returns:
        `[d_sae, d]`, every row written (zero where a latent is inactive), and the sums of
        the coefficients alone, `[d_sae]`; both in `dtype`.
    """
    _check_values(order, coefficients, "coefficients")
    if batch.shape[0] != order.rows.n_rows:
        raise ValueError(f"batch must have {order.rows.n_rows} rows; got {list(batch.shape)}")
    if backend == "triton":
        from saelens_sparse.ops.rows import segment_kernels

        return segment_kernels.segment_sum(order, coefficients, batch, dtype)
    sum_dtype = _sum_dtype(batch)
    pairs = order.pairs[: int(order.offsets[-1])]
    latents = order.keys[: pairs.numel()].long()
    weights = coefficients[pairs].to(sum_dtype)
    rows, values = order.rows.of(pairs), batch.to(sum_dtype)

    # Latents active on many rows are few: a dense product does not add their rows one by one.
    is_long = order.counts > max(_MIN_LONG_SEGMENT, batch.shape[0] // 8)
    long = is_long.nonzero().squeeze(1)
    short_pair = ~is_long[latents]
    sums, totals = _sum_short_segments(
        latents[short_pair], weights[short_pair], rows[short_pair], values, order.d_sae
    )
    if long.numel() > 0:
        place = is_long.cumsum(0) - 1
        code = values.new_zeros(long.numel(), batch.shape[0])
        where = (place[latents[~short_pair]], rows[~short_pair])
        code.index_put_(where, weights[~short_pair], accumulate=True)
        with _full_precision(values):
            sums[long], totals[long] = code @ values, code.sum(1)
    return sums.to(dtype), totals.to(dtype)


def _sum_short_segments(
    latents: torch.Tensor,
    weights: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    d_sae: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over sorted `latents`, each with a weight and a row of `values`."""
    if latents.numel() > 0 and _has_embedding_bag(values):
        offsets = torch.searchsorted(latents, torch.arange(d_sae + 1, device=latents.device))
        sums = F.embedding_bag(
            rows, values, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True
        )
        return sums, _bag_totals(weights, offsets)
    sums, totals = values.new_zeros(d_sae, values.shape[1]), values.new_zeros(d_sae)
    for part in _pair_chunks(latents.numel(), values):
        sums.index_add_(0, latents[part], values[rows[part]] * weights[part].unsqueeze(1))
    return sums, totals.index_add_(0, latents, weights)


def segment_totals(order: LatentOrder, values: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Sum of `values` over each latent's active rows.

    Args:
        order: the active pairs by latent.
        values: `[n_pairs]`, in the pairs' order by row.
        backend: `"triton"` or `"torch"`.

    Returns:
        `[d_sae]`, float32 (float64 for float64 values).
    """
    _check_values(order, values, "values")
    if backend == "triton":
        from saelens_sparse.ops.rows import segment_kernels

        return segment_kernels.segment_totals(order, values)
    pairs = order.pairs[: int(order.offsets[-1])]
    sorted_values = values[pairs].to(_sum_dtype(values))
    if _has_embedding_bag(values):
        return _bag_totals(sorted_values, order.offsets)
    totals = sorted_values.new_zeros(order.d_sae)
    return totals.index_add_(0, order.keys[: pairs.numel()].long(), sorted_values)


def _bag_totals(values: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Sums of `values` between neighbouring `offsets`."""
    positions = torch.arange(values.numel(), device=values.device)
    return F.embedding_bag(
        positions, values.unsqueeze(1), offsets, mode="sum", include_last_offset=True
    ).squeeze(1)


def row_combination(
    coefficients: torch.Tensor,
    weight: torch.Tensor,
    backend: Backend,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`coefficients @ weight`, reading no row whose coefficient is zero.

    Args:
        coefficients: `[d_sae]`.
        weight: `[d_sae, d]`, contiguous.
        backend: `"triton"` or `"torch"`.
        dtype: to which rows are rounded first, that of `weight` or bfloat16; None for the former.

    Returns:
        `[d]` in the dtype of `coefficients`.
    """
    dtype = dtype or weight.dtype
    if coefficients.shape != weight.shape[:1]:
        raise ValueError(
            f"coefficients must have shape {[weight.shape[0]]}; got {list(coefficients.shape)}"
        )
    if backend == "triton":
        from saelens_sparse.ops.rows import kernels

        return kernels.row_combination(coefficients, weight, dtype)
    with _full_precision(weight):
        return coefficients @ weight.to(dtype).to(coefficients.dtype)


@torch.no_grad()
def row_norms(weight: torch.Tensor, backend: Backend) -> torch.Tensor:
    """Euclidean norms of rows `[d_sae, d]`, `[d_sae]`.

    By kernels they are float32 and the same, bit for bit, as those that an update writes.
    """
    if backend == "triton":
        from saelens_sparse.ops.rows import kernels

        return kernels.row_norms(weight)
    return weight.norm(dim=-1)


def add_rows(
    weight: torch.Tensor, rows: torch.Tensor, values: torch.Tensor, backend: Backend
) -> None:
    """`weight[rows] += values` in place, for distinct rows.

    Args:
        weight: `[d_sae, d]`, contiguous.
        rows: `[n]` int64, distinct.
        values: `[n, d]`.
        backend: `"triton"` or `"torch"`.
    """
    if values.shape != (rows.numel(), weight.shape[1]):
        raise ValueError(
            f"values must have shape {[rows.numel(), weight.shape[1]]}; got {list(values.shape)}"
        )
    if backend == "triton":
        from saelens_sparse.ops.rows import kernels

        kernels.add_rows(weight, rows, values)
    else:
        weight.index_add_(0, rows, values.to(weight.dtype))


def _check_pairs(
    latents: torch.Tensor, rows: Rows, weight: torch.Tensor, **others: torch.Tensor
) -> None:
    if latents.ndim != 1 or weight.ndim != 2:
        raise ValueError(
            "latents must have one dimension and weight two; "
            f"got shapes {list(latents.shape)} and {list(weight.shape)}"
        )
    if rows.k is not None and latents.numel() != rows.n_rows * rows.k:
        raise ValueError(
            f"latents must have {rows.n_rows} x {rows.k} elements; got {latents.numel()}"
        )
    expected = {"coefficients": list(latents.shape), "batch": [rows.n_rows, weight.shape[1]]}
    for name, tensor in others.items():
        if list(tensor.shape) != expected[name]:
            raise ValueError(f"{name} must have shape {expected[name]}; got {list(tensor.shape)}")


def _check_values(order: LatentOrder, values: torch.Tensor, name: str) -> None:
    if values.shape != order.pairs.shape:
        raise ValueError(
            f"{name} must have shape {list(order.pairs.shape)}; got {list(values.shape)}"
        )


def _has_embedding_bag(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cpu", "cuda")


def _full_precision(tensor: torch.Tensor) -> torch.autocast:
    """Sums here are float32 or better, also where a caller runs backward under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _row_chunks(latents: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    row_bytes = max(1, latents.shape[1] * weight.shape[1] * 4)
    step = max(1, _CHUNK_BYTES // row_bytes)
    return [slice(start, start + step) for start in range(0, latents.shape[0], step)]


def _pair_chunks(n_pairs: int, weight: torch.Tensor) -> list[slice]:
    step = max(1, _CHUNK_BYTES // max(1, weight.shape[1] * 4))
    return [slice(start, min(start + step, n_pairs)) for start in range(0, n_pairs, step)]
