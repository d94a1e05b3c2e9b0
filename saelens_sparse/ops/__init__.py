"""Sparse operations on latents. Nothing here knows SAELens.

Each public function validates its arguments and picks the PyTorch or the Triton
implementation; the two never import each other.
"""

from saelens_sparse.ops.common.host_copy import HostCopy, HostCount
from saelens_sparse.ops.common.precision import matmul_dtype
from saelens_sparse.ops.encode import decode_selected, encode_selected, keep_topk
from saelens_sparse.ops.encode_dense import (
    FiringCounts,
    Gate,
    at_latents,
    decode_densely,
    encode_gated,
    encode_gated_densely,
)
from saelens_sparse.ops.pairs.order import LatentOrder
from saelens_sparse.ops.pairs.ragged import RaggedRows
from saelens_sparse.ops.rows.block import RowBlock
from saelens_sparse.ops.rows.operations import (
    add_rows,
    gather_dot,
    gather_sum,
    row_combination,
    row_norms,
    segment_sum,
    segment_totals,
)
from saelens_sparse.ops.search.threshold import PendingPattern, start_find_pattern
from saelens_sparse.ops.search.topk import (
    PendingSelection,
    select_topk,
    start_select_topk,
    topk_values,
)
from saelens_sparse.ops.search.types import GatePattern, Selection
from saelens_sparse.ops.update.row_gradient import RowGradient
from saelens_sparse.ops.update.weight_copy import WeightCopy, rounded_dtype

__all__ = [
    "FiringCounts",
    "Gate",
    "GatePattern",
    "HostCopy",
    "HostCount",
    "LatentOrder",
    "PendingPattern",
    "PendingSelection",
    "RaggedRows",
    "RowBlock",
    "RowGradient",
    "Selection",
    "WeightCopy",
    "add_rows",
    "at_latents",
    "decode_densely",
    "decode_selected",
    "encode_gated",
    "encode_gated_densely",
    "encode_selected",
    "gather_dot",
    "gather_sum",
    "keep_topk",
    "matmul_dtype",
    "rounded_dtype",
    "row_combination",
    "row_norms",
    "segment_sum",
    "segment_totals",
    "select_topk",
    "start_find_pattern",
    "start_select_topk",
    "topk_values",
]
