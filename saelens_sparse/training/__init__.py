"""Training with SAELens's trainers and runners, a step at a time."""

from saelens_sparse.training.multi_trainer import SparseMultiSAETrainer
from saelens_sparse.training.trainer import SparseSAETrainer

__all__ = ["SparseMultiSAETrainer", "SparseSAETrainer"]
