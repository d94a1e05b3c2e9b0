"""A language model's activations at hook points, computed faster than by SAELens."""

from saelens_sparse.language_model.path import (
    ModelPath,
    Option,
    PathChoice,
    choose_model_path,
)

__all__ = ["ModelPath", "Option", "PathChoice", "choose_model_path"]
