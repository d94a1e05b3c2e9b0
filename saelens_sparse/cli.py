"""`saelens-sparse`: one command line for training, comparing and profiling."""

from __future__ import annotations

import io
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from itertools import pairwise
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, MultiSAETrainingRunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

import saelens_sparse
from saelens_sparse.config.checks import check_training
from saelens_sparse.config.fields import check_field, check_fields, field_hints
from saelens_sparse.config.files import RunConfig, UsageError, load_run, usage_errors
from saelens_sparse.config.messages import suggestion
from saelens_sparse.language_model import OPTIONS, check_option
from saelens_sparse.private_names import parse_cfg_args
from saelens_sparse.training.runners import (
    SparseMultiSAETrainingRunner,
    SparseTrainingRunner,
    checked,
    checked_multi,
)

USAGE = """\
usage: saelens-sparse train --architecture topk_sparse [SAELens's flags ...] [own flags]
       saelens-sparse train FILE [--set NAME=VALUE ...] [own flags]
       saelens-sparse cache FILE [--set NAME=VALUE ...] [options]
       saelens-sparse compare [FILE.json] [options]
       saelens-sparse profile FILE.json | --shape D_IN,D_SAE,K,BATCH [options]

train    trains an SAE with SparseTrainingRunner: SAELens's LanguageModelSAETrainingRunner with a
         faster step for sparse architectures. The flags are SAELens's own (`saelens-sparse train
         --help` lists them). FILE is JSON or YAML of what LanguageModelSAERunnerConfig.to_dict()
         gives, or MultiSAETrainingRunnerConfig.to_dict() for several SAEs. --config FILE is the
         same. --set changes a field: lr=0.001, sae.k=64, or saes.NAME.k=64 for one of several.
         Own flags: --no-save-buffer leaves the shuffled activations out of checkpoints.
         --language-model saelens computes activations as SAELens does, bit for bit.
cache    writes the activations of a run once; runs with use_cached_activations train from them.
compare  trains a stock and a sparse SAE from one config, and reports whether they are the same
         and what each costs: the whole run, with the language model, and its parts.
profile  takes the run of FILE.json apart, and says what to change in it to gain most. Then it takes
         one training step of both apart: where its time and memory go.

`saelens-sparse COMMAND --help` lists a command's options.
"""

NO_SAVE_BUFFER = "--no-save-buffer"
LANGUAGE_MODEL = "--language-model"
# Modules with a `main` that takes the arguments and returns the exit status; imported when asked
# for, since they bring what training does not need.
_COMMANDS = {
    "cache": "saelens_sparse.cache.command",
    "compare": "saelens_sparse.compare.command",
    "profile": "saelens_sparse.profile.command",
}


def parse_train_args(args: Sequence[str]) -> RunConfig:
    """
    The runner config that `saelens-sparse train ARGS` asks for.

    Raises:
        UsageError: an argument or a field of the config file does not fit.
        SystemExit: with status 0, after help was printed.
    """
    saelens_sparse.register()
    if args and (_is_config_flag(args[0]) or not args[0].startswith("-")):
        path, rest = _split_config(args)
        return load_run(path, _settings(rest))
    if any(map(_is_config_flag, args)):
        raise UsageError("--config takes every setting from its file; give it first")
    cfg = _parse_flags(args)
    with usage_errors():
        check_fields(cfg.to_dict(), [cfg.sae.architecture()])
    return cfg


def _is_config_flag(arg: str) -> bool:
    return arg == "--config" or arg.startswith("--config=")


def _split_config(args: Sequence[str]) -> tuple[str, list[str]]:
    if args[0] != "--config":
        return args[0].removeprefix("--config="), list(args[1:])
    if len(args) < 2:
        raise UsageError("--config needs a file")
    return args[1], list(args[2:])


def _settings(args: Sequence[str]) -> list[str]:
    """What `--set` is given; there must be nothing else."""
    settings: list[str] = []
    left = iter(args)
    for arg in left:
        if arg.startswith("--set="):
            settings.append(arg.removeprefix("--set="))
        elif arg == "--set":
            settings.append(next(left, ""))
        else:
            others = " ".join([arg, *left])
            raise UsageError(
                f"a config file takes every setting from the file or from --set NAME=VALUE; "
                f"remove {others}"
            )
    return settings


def _parse_flags(args: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    """What SAELens makes of its flags; what it says is shown where it succeeds."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            cfg = parse_cfg_args(args)
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(_complaint(said.getvalue())) from end
    except ArithmeticError as error:
        # SAELens computes with some of the numbers before they can be checked.
        hints = field_hints(SAE_TRAINING_CLASS_REGISTRY)
        with usage_errors():
            for name, value in _whole_numbers(args, hints):
                check_field(name, value, hints)
        raise UsageError(f"these settings cannot be used: {error}") from error
    except RecursionError as error:
        raise UsageError(
            "--model_kwargs, --model_from_pretrained_kwargs: nested too deeply"
        ) from error
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(f"these settings cannot be used: {error}") from error
    print(said.getvalue(), file=sys.stderr, end="")
    return cfg


def _complaint(said: str) -> str:
    """The last thing that argparse said, with a suggestion for a flag that does not exist."""
    complaint = said.rpartition("error: ")[2].strip()
    unknown = complaint.removeprefix("unrecognized arguments: ")
    if unknown == complaint:
        return complaint
    flag = unknown.split()[0].partition("=")[0]
    fields = field_hints(SAE_TRAINING_CLASS_REGISTRY)
    names = {f"--{name.rpartition('.')[2]}" for name in fields}
    return f"{flag}: there is no such flag{suggestion(flag, names)}"


def _whole_numbers(args: Sequence[str], fields: Iterable[str]) -> Iterator[tuple[str, int]]:
    """The fields that flags give whole numbers to, and these."""
    words = [word for arg in args for word in arg.split("=", 1)]
    of_leaf = {name.rpartition(".")[2]: name for name in fields}
    for flag, text in pairwise(words):
        name = of_leaf.get(flag.removeprefix("--"))
        if name is not None and text.removeprefix("-").isdecimal():
            yield name, int(text)


def train(args: Sequence[str]) -> int:
    """`saelens-sparse train ARGS`."""
    args, language_model = _without_language_model(args)
    save_buffer = NO_SAVE_BUFFER not in args
    cfg = parse_train_args([arg for arg in args if arg != NO_SAVE_BUFFER])
    options: dict[str, Any] = {"save_buffer": save_buffer, "language_model": language_model}
    with usage_errors():
        check_option(language_model, LANGUAGE_MODEL)
        check_training(cfg)
    if isinstance(cfg, MultiSAETrainingRunnerConfig):
        with usage_errors():
            cfg = checked_multi(cfg, save_buffer=save_buffer)
        SparseMultiSAETrainingRunner(cfg, **options).run()
    else:
        with usage_errors():
            cfg = checked(cfg, save_buffer=save_buffer)
        SparseTrainingRunner(cfg, **options).run()
    return 0


def _without_language_model(args: Sequence[str]) -> tuple[list[str], str]:
    """The other arguments, and the value of `--language-model`."""
    rest, value = list(args), "auto"
    for index, arg in enumerate(args):
        if arg == LANGUAGE_MODEL:
            if index + 1 == len(args):
                raise UsageError(f"{LANGUAGE_MODEL} needs a value: {' or '.join(OPTIONS)}")
            rest[index : index + 2], value = [], args[index + 1]
            break
        if arg.startswith(f"{LANGUAGE_MODEL}="):
            rest[index : index + 1], value = [], arg.partition("=")[2]
            break
    return rest, value


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name = args[0]
    if name == "bench":
        moved = "benchmarks are run from a checkout of this project: python -m benchmarks"
        print(f"saelens-sparse bench: {moved}", file=sys.stderr)
        return 2
    if name != "train" and name not in _COMMANDS:
        print(f"saelens-sparse: unknown command {name!r}\n{USAGE}", file=sys.stderr, end="")
        return 2
    command = train if name == "train" else import_module(_COMMANDS[name]).main
    try:
        return command(args[1:])
    except UsageError as error:
        print(f"saelens-sparse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # by Ctrl-C or SIGTERM, and already said
        return 130


if __name__ == "__main__":
    sys.exit(main())
