"""Warnings that point at the code of whoever called this package."""

import inspect
import warnings


def warn_caller(message: str) -> None:
    """Warn with the first line on the stack that is not of this package or of PyTorch."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_inside(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in ("saelens_sparse", "sae_lens", "torch")
