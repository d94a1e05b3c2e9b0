"""Sparse operations on latents. Nothing here knows SAELens.

Each public function validates its arguments and picks the PyTorch or the Triton
implementation; the two never import each other.
"""

from saelens_sparse.ops.autograd import (
    RowBlock,
    decode_selected,
    encode_selected,
    keep_topk,
)
from saelens_sparse.ops.host_count import HostCount
from saelens_sparse.ops.latent_order import LatentOrder
from saelens_sparse.ops.row_ops import add_rows, gather_dot, gather_sum, segment_sum
from saelens_sparse.ops.select import Selection, select_topk, start_select_topk, topk_values

__all__ = [
    "HostCount",
    "LatentOrder",
    "RowBlock",
    "Selection",
    "add_rows",
    "decode_selected",
    "encode_selected",
    "gather_dot",
    "gather_sum",
    "keep_topk",
    "segment_sum",
    "select_topk",
    "start_select_topk",
    "topk_values",
]
