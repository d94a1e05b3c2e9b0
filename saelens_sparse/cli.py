"""`saelens-sparse`: one command line for training, comparing, profiling and benchmarking."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import (
    _parse_cfg_args,  # pyright: ignore[reportPrivateUsage]
)

import saelens_sparse
from saelens_sparse.runner_config import UsageError, load_config
from saelens_sparse.runners import SparseTrainingRunner

USAGE = """\
usage: saelens-sparse train --architecture topk_sparse [SAELens's flags ...]
       saelens-sparse train --config FILE.json
       saelens-sparse compare [FILE.json] [options]
       saelens-sparse profile FILE.json | --shape D_IN,D_SAE,K,BATCH [options]
       saelens-sparse bench [options]

train    trains an SAE with SparseTrainingRunner: SAELens's LanguageModelSAETrainingRunner with a
         faster step for sparse architectures. The flags are SAELens's own (`saelens-sparse train
         --help` lists them); FILE.json is what LanguageModelSAERunnerConfig.to_dict() gives.
compare  trains a stock and a sparse SAE from one config, and reports whether they are the same
         and what each costs.
profile  takes one training step of each apart: where its time and memory go.
bench    measures registered problem sizes against stock SAELens.

`saelens-sparse COMMAND --help` lists a command's options.
"""

# Modules with a `main` that takes the arguments and returns the exit status; imported when asked
# for, since they bring what training does not need.
_COMMANDS = {
    "compare": "saelens_sparse.evaluation.compare.command",
    "profile": "saelens_sparse.evaluation.profile.command",
    "bench": "saelens_sparse.evaluation.bench.command",
}


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


def _split_config_flag(args: Sequence[str]) -> tuple[str, list[str]]:
    if args[0].startswith("--config="):
        return args[0].removeprefix("--config="), list(args[1:])
    if len(args) < 2:
        raise UsageError("--config needs a file")
    return args[1], list(args[2:])


def train(args: Sequence[str]) -> int:
    """`saelens-sparse train ARGS`."""
    SparseTrainingRunner(parse_train_args(args)).run()
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name = args[0]
    if name != "train" and name not in _COMMANDS:
        print(f"saelens-sparse: unknown command {name!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    command = train if name == "train" else import_module(_COMMANDS[name]).main
    try:
        return command(args[1:])
    except UsageError as error:
        print(f"saelens-sparse: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
