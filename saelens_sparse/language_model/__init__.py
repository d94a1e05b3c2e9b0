"""A language model's activations at hook points, computed faster than by SAELens."""

from saelens_sparse.language_model.path import (
    OPTIONS,
    ModelPath,
    Option,
    PathChoice,
    check_option,
    choose_model_path,
)
from saelens_sparse.language_model.run import RunningModel

__all__ = [
    "OPTIONS",
    "ModelPath",
    "Option",
    "PathChoice",
    "RunningModel",
    "check_option",
    "choose_model_path",
]
