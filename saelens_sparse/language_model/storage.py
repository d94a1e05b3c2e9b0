"""Weights in the order that one matrix product reads, without a second copy of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def adjoin(
    parameters: Sequence[Tensor],
    as_rows: Callable[[Tensor], Tensor] = lambda parameter: parameter,
    as_stored: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Tensor:
    """
    One tensor whose rows are those of all parameters, which become views of it.

    The parameters keep their identity, shapes and values; only their strides and their memory
    change. Memory that is already laid out so is used as it is.

    Args:
        parameters: at least one, of one dtype and device.
        as_rows: a view of a parameter's shape as rows, the first dimension being what is joined.
        as_stored: the inverse of `as_rows`, for one parameter's rows.
    """
    rows = [as_rows(parameter.data) for parameter in parameters]
    joined = _already_joined(parameters, rows)
    if joined is not None:
        return joined
    joined = torch.cat(rows)
    parts = joined.split([part.shape[0] for part in rows])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = as_stored(part).view(parameter.shape)
    return joined


def _already_joined(parameters: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor | None:
    first, end = rows[0], rows[0].storage_offset()
    memory = parameters[0].untyped_storage().data_ptr()
    for parameter, part in zip(parameters, rows, strict=True):
        is_view = part.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        same_memory = is_view and parameter.untyped_storage().data_ptr() == memory
        if not (part.is_contiguous() and same_memory and part.storage_offset() == end):
            return None
        end += part.numel()
    n_rows = sum(part.shape[0] for part in rows)
    return first.as_strided((n_rows, *first.shape[1:]), first.stride())
