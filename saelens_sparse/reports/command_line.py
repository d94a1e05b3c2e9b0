"""What the command lines of compare, profile and the benchmarks have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from typing_extensions import override

from saelens_sparse.config.checks import device_problem
from saelens_sparse.config.files import UsageError
from saelens_sparse.config.messages import shown
from saelens_sparse.config.outputs import check_writable

MAX_WHOLE_NUMBER = 2**63 - 1
DEFAULT_STEPS = {"cuda": 20, "cpu": 5}
DEFAULT_WINDOWS = {"cuda": 2, "cpu": 1}
"""Of a timed run."""


class Parser(argparse.ArgumentParser):
    """
    Options of a command of `saelens-sparse`; what cannot be parsed is a `UsageError`.

    Args:
        command: Its name, as it is typed after `saelens-sparse`.
        description: Shown with its line breaks.
        allow_abbrev: Whether options may be shortened. Where others' options may follow, not.
    """

    def __init__(self, command: str, description: str | None, *, allow_abbrev: bool = True) -> None:
        super().__init__(
            prog=f"saelens-sparse {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=allow_abbrev,
        )

    @override
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def whole_number(least: int) -> Callable[[str], int]:
    """argparse type: a whole number from `least` up."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more; got {shown(value)}")
        if value > MAX_WHOLE_NUMBER:
            raise argparse.ArgumentTypeError(f"{shown(value)} has more than 64 bits")
        return value

    return parse


def writable_folder(text: str) -> Path:
    """argparse type: a folder that exists or can be made, and can be written to."""
    if not text:
        raise argparse.ArgumentTypeError("'' names no folder")
    try:
        check_writable("folder", text, 0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("folder: ")) from None
    return Path(text)


def parse_shape(text: str) -> list[int]:
    """argparse type: the sizes d_in, d_sae, k and batch."""
    try:
        d_in, d_sae, k, batch = (whole_number(0)(part) for part in text.split(","))
    except (argparse.ArgumentTypeError, ValueError):
        example = "four whole numbers, such as 768,24576,32,4096"
        message = f"{shown(text)} is not D_IN,D_SAE,K,BATCH: {example}"
        raise argparse.ArgumentTypeError(message) from None
    return [d_in, d_sae, k, batch]


def device_name(text: str) -> str:
    """argparse type: a device on which this PyTorch can put a tensor."""
    if (problem := device_problem(text)) is not None:
        raise argparse.ArgumentTypeError(problem)
    return text


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def add_measuring_options(parser: Parser, *, training: bool = True) -> None:
    """The options of all commands that time steps, with those of a training where there is one."""
    add = parser.add_argument
    add(
        "--device",
        type=device_name,
        choices=tuple(DEFAULT_STEPS),
        default=default_device(),
        help="by default the GPU if there is one",
    )
    add(
        "--steps",
        type=whole_number(1),
        help="timed steps or calls, at most; by default {cuda}, on a CPU {cpu}".format_map(
            DEFAULT_STEPS
        ),
    )
    if training:
        add(
            "--warmup-train",
            type=whole_number(0),
            default=30,
            metavar="STEPS",
            help="training steps that lead from planted features to the weights used; by default "
            "%(default)s",
        )
