"""Runs take activations from the fast path, say so once, and compile where it pays."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import LanguageModelSAETrainingRunner
from transformer_lens import HookedTransformer

from saelens_sparse import SparseTrainingRunner, cli, use_fast_activations_store
from saelens_sparse.language_model import hooked_transformer as reader
from saelens_sparse.language_model.path import Settings
from tests.support.language_models import (
    D_MODEL,
    N_LAYERS,
    VOCABULARY,
    distance,
    hooked_transformer,
)
from tests.support.runs import CONTEXT, runner_config, sae_config, what_libraries_say

pytestmark = [*what_libraries_say, pytest.mark.filterwarnings("error:Activations are computed")]
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return hooked_transformer("gpt2", d_vocab=VOCABULARY)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (256, CONTEXT), generator=generator)
    return Dataset.from_dict({"tokens": tokens.tolist()})


def config(folder: Path) -> Any:
    return runner_config(sae_config(d_in=D_MODEL), folder, hook_name=HOOK)


def make(model: HookedTransformer, dataset: Dataset, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return SparseTrainingRunner(
        config(folder), override_model=model, override_dataset=dataset, **options
    )


def test_batches_are_those_of_saelens_up_to_rounding(
    model: HookedTransformer, dataset: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    stock = LanguageModelSAETrainingRunner(
        config(tmp_path), override_model=model, override_dataset=dataset
    ).activations_store
    torch.manual_seed(0)
    expected = [next(stock) for _ in range(6)]
    for option, bound in (("auto", 1e-6), ("saelens", 0.0)):
        store = make(model, dataset, tmp_path, language_model=option).activations_store
        torch.manual_seed(0)
        batches = [next(store) for _ in range(6)]
        differences = [distance(*pair) for pair in zip(batches, expected, strict=True)]
        assert max(differences) <= bound
        assert (max(differences) > 0) == (option == "auto")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the fast path, not compiled (HookedTransformer has an exact equivalent)"),
        ({"language_model": "saelens"}, "SAELens's own path (the option says so)"),
    ],
    ids=str,
)
def test_a_run_says_once_what_computes_its_activations(
    options: dict[str, str],
    said: str,
    model: HookedTransformer,
    dataset: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="sae_lens")
    make(model, dataset, tmp_path, **options).run()
    (message,) = [text for text in caplog.messages if text.startswith("language model:")]
    assert message.startswith(f"language model: {said}; ")
    assert message.endswith(" s until its first batch")


def test_runs_repeat_bit_for_bit(
    model: HookedTransformer, dataset: Dataset, tmp_path: Path
) -> None:
    first, second = (make(model, dataset, tmp_path / name).run() for name in "ab")
    assert torch.equal(first.W_enc, second.W_enc)


def test_an_unknown_option_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="language_model must be 'auto' or 'saelens', got 'fast'"):
        SparseTrainingRunner(config(tmp_path), language_model=cast_option("fast"))


def test_saelens_runner_takes_the_option(
    model: HookedTransformer, dataset: Dataset, tmp_path: Path
) -> None:
    def runner() -> Any:
        return LanguageModelSAETrainingRunner(
            config(tmp_path), override_model=model, override_dataset=dataset
        )

    assert use_fast_activations_store(runner()).language_model == "auto"
    store = use_fast_activations_store(runner(), language_model="saelens")
    assert store.language_model == "saelens"
    with pytest.raises(ValueError, match="language_model must be"):
        use_fast_activations_store(runner(), language_model=cast_option("fast"))


def cast_option(option: str) -> Any:
    """What a type checker would not let pass."""
    return option


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "auto"),
        (["--language-model", "saelens"], "saelens"),
        (["--language-model=saelens"], "saelens"),
        (["--language-model", "auto", "--no-save-buffer"], "auto"),
    ],
    ids=str,
)
def test_command_line(flags: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Runner:
        def __init__(self, cfg: Any, **options: Any) -> None:  # noqa: ARG002
            given.append(options)

        def run(self) -> None: ...

    monkeypatch.setattr(cli, "SparseTrainingRunner", Runner)
    monkeypatch.setattr(cli, "check_training", lambda cfg: None)  # noqa: ARG005
    monkeypatch.setattr(cli, "checked", lambda cfg, **_: cfg)
    args = ["train", "--architecture", "topk_sparse", *flags]
    assert cli.main(args) == 0
    assert given == [{"save_buffer": "--no-save-buffer" not in flags, "language_model": expected}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--language-model"], "--language-model needs a value: auto or saelens"),
        (["--language-model", "fast"], "--language-model must be 'auto' or 'saelens', got 'fast'"),
    ],
    ids=str,
)
def test_command_line_errors(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--architecture", "topk_sparse", *flags]) == 2
    assert said in capsys.readouterr().err


def test_compiling_depends_on_the_work_and_the_device_only() -> None:
    decoders = {
        family: reader.read(hooked_transformer(family), N_LAYERS, CONTEXT)
        for family in ("llama", "gemma2")
    }
    n_tokens = round(1e16 / decoders["llama"].n_parameters)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")

    def compiles(family: str, tokens: int, device: torch.device, asked: bool | None = None) -> bool:
        settings = Settings(False, {}, asked, True, CONTEXT, tokens)
        return settings.compiles(decoders[family], device)

    assert compiles("llama", 3 * n_tokens, cuda) and not compiles("llama", n_tokens, cuda)
    assert compiles("gemma2", n_tokens, cuda) and not compiles("gemma2", n_tokens // 2, cuda)
    assert not compiles("llama", 3 * n_tokens, cpu)
    assert compiles("llama", 0, cpu, asked=True) and not compiles(
        "llama", 3 * n_tokens, cuda, False
    )
