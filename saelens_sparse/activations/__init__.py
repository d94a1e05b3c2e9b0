"""From text to training batches, at the pace of a sparse step."""

from saelens_sparse.activations.store import FastActivationsStore

__all__ = ["FastActivationsStore"]
