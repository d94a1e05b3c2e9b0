"""Names the parts of a training step in a profiler's trace, from outside."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.profiler import record_function

from saelens_sparse.architectures.base import SparseTrainingSAEMixin
from saelens_sparse.profile.trainers import Trainer

PREFIX = "saelens_sparse::"
STEP = "step"

# What SAELens's forward pass calls on the SAE, in this order. The forward pass itself stays as it
# is: its owner may replay it as a CUDA graph only as long as nobody has replaced it.
_METHODS = {
    "encode_with_hidden_pre": "encode",
    "decode": "decode",
    "mse_loss_fn": "loss",
    "calculate_aux_loss": "loss",
}


@contextmanager
def named_parts(trainer: Trainer) -> Generator[None]:
    """
    Within it, the parts of the trainer's forward pass are ranges of a trace: `encode`, for a
    stock Top-K in it `select`, `decode`, and `loss` (twice).

    The backward pass and the optimizer need none: PyTorch names their operations.
    """
    sae: Any = trainer.sae
    own = {name: vars(sae)[name] for name in _METHODS if name in vars(sae)}
    hooks: list[Any] = []
    if not isinstance(sae, SparseTrainingSAEMixin) and hasattr(sae.activation_fn, "k"):
        hooks = _range_of_module(sae.activation_fn, "select")
    try:
        for name, part in _METHODS.items():
            setattr(sae, name, _as_range(getattr(sae, name), part))
        yield
    finally:
        for name in _METHODS:
            if name in own:
                setattr(sae, name, own[name])
            elif name in vars(sae):
                delattr(sae, name)
        for hook in hooks:
            hook.remove()


@contextmanager
def named_step() -> Generator[None]:
    """The range of one training step."""
    with record_function(PREFIX + STEP):
        yield


def _as_range(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*args, **kwargs)

    return call


def _range_of_module(module: Any, part: str) -> list[Any]:
    entered: list[Any] = []

    def enter(*_: Any) -> None:
        entered.append(record_function(PREFIX + part))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    return [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
