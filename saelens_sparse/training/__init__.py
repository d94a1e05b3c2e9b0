"""Training with SAELens's trainers and runners, a step at a time."""

from saelens_sparse.training.trainer import SparseMultiSAETrainer, SparseSAETrainer

__all__ = ["SparseMultiSAETrainer", "SparseSAETrainer"]
