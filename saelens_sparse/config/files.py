"""Runner configs from JSON files, and the error of a command line that cannot be used."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from saelens_sparse.config.checks import check_fields, check_groups, named_values
from saelens_sparse.config.messages import one_line, shown

MAX_CONFIG_BYTES = 10 * 2**20
# An integer of more digits is out of range whatever they are, and Python reads only 4,300.
_MAX_DIGITS = 1000


class UsageError(Exception):
    """The command line or the config file cannot be used; the message says why, in one line."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


@contextmanager
def usage_errors(prefix: str = "") -> Generator[None]:
    """Turns what checks raise into a `UsageError`."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise UsageError(f"{prefix}{error}") from error


def load_config(path: str | Path) -> LanguageModelSAERunnerConfig[Any]:
    """
    A runner config from a JSON file in the form of `LanguageModelSAERunnerConfig.to_dict`.

    Raises:
        UsageError: the file cannot be read, or has a field that does not fit.
    """
    values = read_config(path)
    with usage_errors(f"the config file {path}: "):
        check_fields(values, [values["sae"]["architecture"]])
        return config_from(values)


def read_config(path: str | Path) -> dict[str, Any]:
    """
    What the JSON file of a runner config says, of which "sae" and "logger" are objects.

    Raises:
        UsageError: it is no such file; its fields are not checked.
    """
    try:
        # A pipe would be waited for, and a device may have no end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UsageError(f"cannot read the config file {path}: it is not a regular file")
        with Path(path).open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    except ValueError as error:  # a null character
        raise UsageError(f"cannot read the config file {shown(str(path))}: {error}") from error
    if len(content) > MAX_CONFIG_BYTES:
        limit = MAX_CONFIG_BYTES // 2**20
        raise UsageError(f"cannot read the config file {path}: it has more than {limit} MiB")
    with usage_errors(f"the config file {path} is not valid JSON: "):
        values = parse_json(content.decode())
    with usage_errors(f"the config file {path}: "):
        if not isinstance(values, dict):
            raise ValueError(f"{shown(values)} is not an object with settings")
        check_groups(values)
    return values


def config_from(values: dict[str, Any]) -> LanguageModelSAERunnerConfig[Any]:
    """
    `LanguageModelSAERunnerConfig.from_dict`, whose errors then say what the values are.

    Raises:
        ValueError: SAELens does not take the values.
    """
    try:
        return LanguageModelSAERunnerConfig.from_dict(values)
    except (ArithmeticError, TypeError, ValueError) as error:
        named = named_values(error, {**values, **values["sae"]})
        raise ValueError(f"{error}{named}") from error


def parse_json(text: str) -> Any:
    """
    The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply for Python, or names a field twice.
    """
    try:
        return json.loads(
            text,
            parse_int=lambda digits: int(digits[:_MAX_DIGITS]),
            object_pairs_hook=_without_repeats,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(repeated, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(repeated)} is given twice")
    return values
