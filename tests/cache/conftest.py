"""Caches of tiny models' activations."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.activations import Models, tiny_models
from tests.support.cache import Caches


@pytest.fixture(scope="session")
def models() -> Models:
    """By their names in `Case`."""
    return tiny_models()


@pytest.fixture
def caches(models: Models, tmp_path: Path) -> Caches:
    return Caches(models, tmp_path)


@pytest.fixture
def other_caches(models: Models, tmp_path: Path) -> Callable[[str], Caches]:
    """In a folder of that name."""

    def make(name: str) -> Caches:
        (tmp_path / name).mkdir()
        return Caches(models, tmp_path / name)

    return make
