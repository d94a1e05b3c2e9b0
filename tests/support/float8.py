"""The margin of a float8 screen."""

import pytest


def set_deviations(monkeypatch: pytest.MonkeyPatch, deviations: float) -> None:
    """Let bounds of float8 products allow for so many deviations, in whatever precision."""
    monkeypatch.setattr(
        "saelens_sparse.ops.screen.gpu.float8_deviations", lambda _dtype: deviations
    )
