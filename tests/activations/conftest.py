"""Models that stores make activations with."""

import pytest

from tests.support.activations import Models, tiny_models


@pytest.fixture(scope="session")
def models() -> Models:
    """By their names in `Case`."""
    return tiny_models()
