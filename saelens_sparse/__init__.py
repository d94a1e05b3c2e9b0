"""saelens_sparse: sparse-autoencoder training in SAELens that computes only what is active.

Importing the package registers its architectures in SAELens's training registry, so that
`architecture="topk_sparse"` and `"jumprelu_sparse"` work wherever SAELens takes an architecture.
"""

from sae_lens import register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from saelens_sparse.optim import prepare_optimizers
from saelens_sparse.runners import SparseMultiSAETrainingRunner, SparseTrainingRunner
from saelens_sparse.saes.jumprelu_sparse_sae import (
    SparseJumpReLUTrainingSAE,
    SparseJumpReLUTrainingSAEConfig,
)
from saelens_sparse.saes.topk_sparse_sae import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig

__version__ = "0.1.0"

__all__ = [
    "SparseJumpReLUTrainingSAE",
    "SparseJumpReLUTrainingSAEConfig",
    "SparseMultiSAETrainingRunner",
    "SparseTopKTrainingSAE",
    "SparseTopKTrainingSAEConfig",
    "SparseTrainingRunner",
    "register",
]


def register() -> None:
    """Register the sparse architectures with SAELens. Calling it again changes nothing.

    Raises:
        ValueError: another package has registered one of the names.
    """
    for sae_class, config_class in (
        (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
        (SparseJumpReLUTrainingSAE, SparseJumpReLUTrainingSAEConfig),
    ):
        name = config_class.architecture()
        if SAE_TRAINING_CLASS_REGISTRY.get(name) != (sae_class, config_class):
            register_sae_training_class(name, sae_class, config_class)
    prepare_optimizers()


register()
