"""Runner configs from files, and the error of a command line that cannot be used."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from saelens_sparse.config.fields import check_fields, check_groups
from saelens_sparse.config.messages import named_values, one_line, shown
from saelens_sparse.config.several import (
    SparseMultiSAETrainingRunnerConfig,
    check_multi_fields,
    with_shared_fields,
)
from saelens_sparse.config.yaml_text import parse_yaml

RunConfig = LanguageModelSAERunnerConfig[Any] | SparseMultiSAETrainingRunnerConfig

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
    A runner config from a file in the form of `LanguageModelSAERunnerConfig.to_dict`.

    Raises:
        UsageError: the file cannot be read, or has a field that does not fit.
    """
    return _one_from(path, read_config(path))


def load_run(path: str | Path, settings: Iterable[str] = ()) -> RunConfig:
    """
    A runner config of one SAE or of several, from a file in the form of `to_dict`.

    Args:
        path: Of the file. Of several SAEs, `sae` may hold fields that all of `saes` share.
        settings: Such as "lr=0.001", "saes.wide.k=64", or "sae.k=64" for all SAEs. A value is
            JSON, or else text.

    Raises:
        UsageError: the file cannot be read, or there is a field that does not fit.
    """
    values = read_values(path)
    prefix = f"the config file {path}: "
    if "saes" not in values:
        with usage_errors(prefix):
            check_groups(values)
        _set(values, settings)
        return _one_from(path, values)
    with usage_errors(prefix):
        values = with_shared_fields(values)
    _set(values, settings)
    with usage_errors(prefix):
        check_multi_fields(values)
        return SparseMultiSAETrainingRunnerConfig.from_dict(values)


def _one_from(path: str | Path, values: dict[str, Any]) -> LanguageModelSAERunnerConfig[Any]:
    with usage_errors(f"the config file {path}: "):
        check_fields(values, [values["sae"]["architecture"]])
        return config_from(values)


def _set(values: dict[str, Any], settings: Iterable[str]) -> None:
    """Change a config that has been read, in place."""
    for setting in settings:
        name, is_given, text = setting.partition("=")
        if not is_given or not name:
            raise UsageError(f"--set takes NAME=VALUE; got {shown(setting)}")
        try:
            value = parse_json(text)
        except ValueError:
            value = text
        group, _, rest = name.partition(".")
        saes: Mapping[str, dict[str, Any]] = values.get("saes", {})
        if name == "sae":
            raise UsageError("--set sae: name one field, such as sae.k=64")
        if group == "saes":
            sae, _, field = rest.rpartition(".")
            if not saes:
                raise UsageError(f"--set {name}: the config is of one SAE; name sae.k, for example")
            if not sae or not field:
                raise UsageError(f"--set {name}: name an SAE and one field, such as saes.NAME.k=64")
            if sae not in saes:
                raise UsageError(f"--set {name}: there is no SAE {shown(sae)}; there are {[*saes]}")
            changed, key = [saes[sae]], field
        elif group == "sae" and rest and saes:
            changed, key = saes.values(), rest
        elif rest and isinstance(values.get(group), dict):
            changed, key = [values[group]], rest
        else:
            changed, key = [values], name
        for one in changed:
            one[key] = value


def read_config(path: str | Path) -> dict[str, Any]:
    """
    What the file of a runner config says, of which "sae" and "logger" are objects.

    Raises:
        UsageError: it is no such file; its fields are not checked.
    """
    values = read_values(path)
    with usage_errors(f"the config file {path}: "):
        check_groups(values)
    return values


def read_values(path: str | Path) -> dict[str, Any]:
    """
    What a file says: YAML if its name ends so, else JSON.

    Raises:
        UsageError: it cannot be read, or is no object with settings.
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
    is_yaml = Path(path).suffix in (".yaml", ".yml")
    parse: Callable[[str], Any] = parse_yaml if is_yaml else parse_json
    language = "YAML" if is_yaml else "JSON"
    with usage_errors(f"the config file {path} is not valid {language}: "):
        values = parse(content.decode())
    with usage_errors(f"the config file {path}: "):
        if not isinstance(values, dict):
            raise ValueError(f"{shown(values)} is not an object with settings")
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
