"""Runner configs from JSON files, and the error of a command line that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig


class UsageError(Exception):
    """The command line or the config file cannot be used; the message says why."""


def load_config(path: str | Path) -> LanguageModelSAERunnerConfig[Any]:
    """A runner config from a JSON file in the form of `LanguageModelSAERunnerConfig.to_dict`."""
    try:
        cfg_dict = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the config file {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the config file {path} is not valid JSON: {error}") from error
    try:
        return LanguageModelSAERunnerConfig.from_dict(cfg_dict)
    except KeyError as error:
        raise UsageError(f"the config file {path} names no known architecture: {error}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"the config file {path} is not a valid runner config: {error}") from error
