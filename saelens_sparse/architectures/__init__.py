"""Sparse counterparts of SAELens's training SAEs, one file each."""

from saelens_sparse.architectures import batchtopk, jumprelu, matryoshka, topk
from saelens_sparse.architectures.registry import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "Architecture", "batchtopk", "jumprelu", "matryoshka", "topk"]
