"""`saelens-sparse train`: SAELens's training command line, with the sparse architectures."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import (
    _parse_cfg_args,  # pyright: ignore[reportPrivateUsage]
)

import saelens_sparse
from saelens_sparse.training import SparseTrainingRunner

USAGE = """\
usage: saelens-sparse train --architecture topk_sparse [SAELens's flags ...]
       saelens-sparse train --config FILE.json

Trains an SAE with SparseTrainingRunner: SAELens's LanguageModelSAETrainingRunner with a faster
step for sparse architectures. The flags are SAELens's own
(`saelens-sparse train --help` lists them); FILE.json is what
LanguageModelSAERunnerConfig.to_dict() gives.
"""


class UsageError(Exception):
    """The command line or the config file cannot be used; the message says why."""


def parse_train_args(args: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """The runner config that `saelens-sparse train ARGS` asks for."""
    saelens_sparse.register()
    if args and (args[0] == "--config" or args[0].startswith("--config=")):
        path, rest = _split_config_flag(args)
        if rest:
            raise UsageError(
                f"--config takes every setting from its file; remove {' '.join(rest)} "
                "or put it into the file"
            )
        return load_config(path)
    if any(arg == "--config" or arg.startswith("--config=") for arg in args):
        raise UsageError("--config takes every setting from its file; give it alone")
    try:
        return _parse_cfg_args(args)
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(f"these settings cannot be used: {error}") from error


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


def _split_config_flag(args: Sequence[str]) -> tuple[str, list[str]]:
    if args[0].startswith("--config="):
        return args[0].removeprefix("--config="), list(args[1:])
    if len(args) < 2:
        raise UsageError("--config needs a file")
    return args[1], list(args[2:])


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] != "train":
        print(f"saelens-sparse: unknown command {args[0]!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    try:
        cfg = parse_train_args(args[1:])
    except UsageError as error:
        print(f"saelens-sparse: {error}", file=sys.stderr)
        return 2
    SparseTrainingRunner(cfg).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
