"""Files that are no runner config, and options that cannot be used, get one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from saelens_sparse import cli
from tests.support.configs import assert_one_line, config, work_in


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)


def in_file(content: str | bytes) -> Callable[[], str]:
    """Writes a config file with this content, and gives its name."""

    def write() -> str:
        data = content.encode() if isinstance(content, str) else content
        Path("config.json").write_bytes(data)
        return "config.json"

    return write


def in_config(text: str) -> Callable[[], str]:
    """Writes a config file whose `model_kwargs` are this text."""
    values = json.dumps(config({"model_kwargs": "HERE"}))
    return in_file(values.replace('"HERE"', text))


def a_pipe() -> str:
    os.mkfifo("pipe.json")
    return "pipe.json"


def a_link_to_itself() -> str:
    Path("loop.json").symlink_to("loop.json")
    return "loop.json"


# Files that are no runner config, and what the message says of them.
BAD_FILES: list[tuple[Callable[[], str], str]] = [
    (lambda: "nowhere.json", "cannot read the config file nowhere.json: No such file or directory"),
    (lambda: "model", "cannot read the config file model: it is not a regular file"),
    (lambda: "file/config.json", "cannot read the config file file/config.json: Not a directory"),
    (lambda: "x" * 5000, "xxx... File name too long"),
    (lambda: "x/" * 2500, "x/... File name too long"),
    (lambda: "a\0b", "cannot read the config file 'a\\x00b': embedded null byte"),
    (lambda: "/dev/zero", "cannot read the config file /dev/zero: it is not a regular file"),
    (a_pipe, "cannot read the config file pipe.json: it is not a regular file"),
    (a_link_to_itself, "cannot read the config file loop.json: Too many levels of symbolic links"),
    (in_file(""), "config.json is not valid JSON: Expecting value"),
    (in_file("{"), "config.json is not valid JSON: "),
    (in_file(b"\xff\xfe{}"), "config.json is not valid JSON: 'utf-8' codec can't decode"),
    (in_file("[" * 100_000), "config.json is not valid JSON: it is nested too deeply"),
    (in_file('{"a":' * 100_000), "config.json is not valid JSON: it is nested too deeply"),
    (in_file(" " * 11 * 2**20), "config.json: it has more than 10 MiB"),
    (in_file("[1, 2]"), "config.json: [1, 2] is not an object with settings"),
    (in_file("null"), "config.json: None is not an object with settings"),
    (in_file('{"lr": 1, "lr": 2}'), "config.json is not valid JSON: 'lr' is given twice"),
    (
        in_file('{"architecture": "topk", "d_in": 16, "d_sae": 64}'),
        "it is the config of an SAE",
    ),
    (in_file("{}"), "config.json: sae: missing"),
    (in_config('{"a": ' + "9" * 6000 + "}"), "model_kwargs.a: 99999999"),
    (in_config('{"a": -' + "9" * 6000 + "}"), "model_kwargs.a: -9999999"),
    (in_config('{"a": 1' + "0" * 400 + "}"), "model_kwargs.a: 10000000"),
    (in_config('{"a": 1e999}'), "model_kwargs.a: inf cannot be used; allowed: a finite number"),
    (in_config('{"a": ' + "[" * 500 + "]" * 500 + "}"), "model_kwargs.a: is nested too deeply"),
]


@pytest.mark.parametrize("command", ["train", "compare", "profile"])
@pytest.mark.parametrize(("make", "message"), BAD_FILES, ids=[m for _, m in BAD_FILES])
def test_a_file_that_is_no_runner_config_is_named(
    command: str,
    make: Callable[[], str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = make()
    args = ["--config", name] if command == "train" else [name]
    assert_one_line(cli.main([command, *args]), capsys, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", f"--output={'x' * 5000}"], "--output: 'xxx"),
        (["compare", "--output="], "--output: '' names no folder"),
        (["compare", "--cache=file"], "--cache: 'file' cannot be written to: it is not a folder"),
        (["compare", f"--steps={'9' * 6000}"], "--steps: '999"),
        (["compare", "--steps=99999999999999999999"], "--steps: 99999999999999999999 has more tha"),
        (["compare", "--set=lr=" + "[" * 100_000], "lr: '[[["),
        (["compare", "--set=lr=" + "9" * 6000], "lr: 99999999"),
        (["compare", "--set=lr=NaN"], "lr: nan cannot be used; allowed: a finite number"),
        (["compare", "--set=sae=3"], "sae: 3 is not an object with settings"),
        (["compare", "--set=logger=3"], "logger: 3 is not an object with settings"),
        (
            ["compare", "--set=cached_activations_path=5", "--text-tokens=9"],
            "cached_activations",
        ),
        (["compare", "--set=train_batch_size_tokens=null", "--steps=3"], "train_batch_size_tokens"),
        (["profile", f"--shape={'9' * 6000},2,3,4"], "--shape: '999"),
        (["profile", "--shape=16,64,4,8", "--output=file"], "--output: 'file' cannot be written"),
        (["profile", "--shape=16,64,4,8", f"--output={'x' * 5000}"], "--output: 'xxx"),
        (["profile", "--shape=16,64,4,8", "--output="], "--output: '' names no folder"),
        (["profile", "--shape=16,64,4"], "--shape: '16,64,4' is not D_IN,D_SAE,K,BATCH"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_option_is_named_with_its_value(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_line(cli.main(arguments), capsys, message)


def test_an_unexpected_field_of_a_comparison_is_not_hidden_by_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = in_file(json.dumps(config({"name": "x"})))()
    assert_one_line(cli.main(["compare", name]), capsys, "name: there is no such field")
