"""A model, data and a runner in which a run takes a second."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from datasets import Dataset
from sae_lens import (
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
)
from sae_lens.saes.sae import TrainingSAEConfig
from transformer_lens import HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.support.runs import CONTEXT, D_MODEL, VOCABULARY, Run, Train, log_of, runner_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> HookedSAETransformer:
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=D_MODEL,
        n_ctx=CONTEXT,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        act_fn="gelu",
        d_vocab=VOCABULARY,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedSAETransformer(cfg)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Sequences in which a token says something about the next one."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(0, 5, (400, CONTEXT), generator=generator)
    return (steps.cumsum(1) + torch.arange(400).unsqueeze(1)) % VOCABULARY


@pytest.fixture
def dataset(tokens: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.fixture(scope="module")
def hf_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    tokens: torch.Tensor,
) -> Path:
    """A model in Hugging Face's format and a text dataset, as a command line names them."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    with (folder / "data" / "train.jsonl").open("w") as file:
        for row in tokens:
            text = " ".join(f"w{max(2, token)}" for token in row.tolist())
            file.write(json.dumps({"text": text}) + "\n")
    return folder


@pytest.fixture
def run(model: HookedSAETransformer, dataset: Dataset, tmp_path: Path) -> Run:
    """Runs SAELens's stock runner from a fixed seed, and returns it with its trained `sae`."""

    def run(
        sae: TrainingSAEConfig | LanguageModelSAERunnerConfig[Any], **options: Any
    ) -> LanguageModelSAETrainingRunner:
        if isinstance(sae, TrainingSAEConfig):
            folder = tmp_path / f"{sae.architecture()}-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            cfg = runner_config(sae, folder, **options)
        else:
            cfg = sae
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
        runner.run()
        return runner

    return run


@pytest.fixture(scope="session")
def train() -> Generator[Train]:
    """Runs a scenario of `hit_runs`; returns the exit status."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.hit_runs"],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None
        assert stdout.readline() == "ready\n"

        def train(
            folder: Path,
            *hits: tuple[str, int, str],
            architecture: str = "topk_sparse",
            saes: tuple[str, ...] = (),
            **options: Any,
        ) -> int:
            scenario = {
                "folder": str(folder),
                "hits": [{"moment": m, "at": at, "signal": s} for m, at, s in hits],
                "architecture": architecture,
                "saes": saes,
                "options": {"n_checkpoints": 3, **options},
            }
            stdin.write(json.dumps(scenario) + "\n")
            stdin.flush()
            return int(stdout.readline())

        yield train
        stdin.close()


@pytest.fixture(scope="session")
def uninterrupted(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The output of a training that nobody stops."""
    made: dict[str, Path] = {}

    def output(**scenario: Any) -> Path:
        key = json.dumps(scenario)
        if key not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            assert train(folder, **scenario) == 0, log_of(folder)
            made[key] = folder / "output"
        return made[key]

    return output
