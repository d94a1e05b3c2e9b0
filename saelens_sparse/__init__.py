"""saelens_sparse: sparse-autoencoder training in SAELens that computes only what is active.

Importing the package registers its architectures in SAELens's training registry, so that
`architecture="topk_sparse"`, `"batchtopk_sparse"`, `"matryoshka_batchtopk_sparse"` and
`"jumprelu_sparse"` work wherever SAELens takes an architecture.
"""

from saelens_sparse.activations.store import FastActivationsStore
from saelens_sparse.activations.swap import use_fast_activations_store
from saelens_sparse.architectures import ARCHITECTURES
from saelens_sparse.architectures.batchtopk import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
)
from saelens_sparse.architectures.jumprelu import (
    SparseJumpReLUTrainingSAE,
    SparseJumpReLUTrainingSAEConfig,
)
from saelens_sparse.architectures.matryoshka import (
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
)
from saelens_sparse.architectures.registry import add
from saelens_sparse.architectures.topk import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig
from saelens_sparse.config.several import SparseMultiSAETrainingRunnerConfig
from saelens_sparse.sharing import upload_saes_to_huggingface
from saelens_sparse.training.optimizer import prepare_optimizers
from saelens_sparse.training.pretrained import load_pretrained
from saelens_sparse.training.runners import SparseMultiSAETrainingRunner, SparseTrainingRunner

__version__ = "0.1.0"

__all__ = [
    "FastActivationsStore",
    "SparseBatchTopKTrainingSAE",
    "SparseBatchTopKTrainingSAEConfig",
    "SparseJumpReLUTrainingSAE",
    "SparseJumpReLUTrainingSAEConfig",
    "SparseMatryoshkaBatchTopKTrainingSAE",
    "SparseMatryoshkaBatchTopKTrainingSAEConfig",
    "SparseMultiSAETrainingRunner",
    "SparseMultiSAETrainingRunnerConfig",
    "SparseTopKTrainingSAE",
    "SparseTopKTrainingSAEConfig",
    "SparseTrainingRunner",
    "load_pretrained",
    "register",
    "upload_saes_to_huggingface",
    "use_fast_activations_store",
]


def register() -> None:
    """Register the sparse architectures with SAELens. Calling it again changes nothing.

    For inference their names stand for SAELens's own classes, so that `SAE.load_from_disk` opens a
    training checkpoint, where it opens those of the stock architecture.

    Raises:
        ValueError: another package has registered one of the names.
    """
    for architecture in ARCHITECTURES.values():
        add(architecture)
    prepare_optimizers()


register()
