"""Checks of single configuration values."""

from __future__ import annotations

import math

from saelens_sparse.config.messages import shown


def require_number(name: str, value: object) -> None:
    """Raise unless a configuration value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")


def require_int(name: str, value: object, minimum: int) -> None:
    """Raise unless a configuration value is an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")


def require_ints(name: str, value: object) -> None:
    """Raise unless a configuration value is a list of ints."""
    if not isinstance(value, list):
        raise TypeError(f"{name} must be a list of ints; got {value!r}")
    for element in value:
        if isinstance(element, bool) or not isinstance(element, int):
            raise TypeError(f"{name} must be a list of ints; got {value!r}")


def require_bool(name: str, value: object) -> None:
    """Raise unless a configuration value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {value!r}")


def require_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless a configuration value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def require_allowed(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise unless a condition holds; the message says what would be allowed."""
    if not condition:
        raise ValueError(f"{name}: {shown(value)} cannot be used; allowed: {allowed}")
