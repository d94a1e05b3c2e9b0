"""A stock and a sparse SAE side by side, after one forward pass."""

from dataclasses import dataclass

import torch
from sae_lens import TopKTrainingSAE
from sae_lens.saes.sae import TrainStepOutput

from saelens_sparse import SparseTopKTrainingSAE

N_ROWS = 10
TENSORS = ("feature_acts", "hidden_pre")


@dataclass
class Pair:
    """A stock and a sparse SAE with the same weights, and one forward pass of each."""

    x: torch.Tensor
    stock: TopKTrainingSAE
    sparse: SparseTopKTrainingSAE
    stock_output: TrainStepOutput
    output: TrainStepOutput
