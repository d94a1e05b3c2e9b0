"""`saelens-sparse profile`: its settings, and the command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

import saelens_sparse
from saelens_sparse.cli import main as cli_main
from saelens_sparse.ops.common.ranges import profiler_range, with_work
from saelens_sparse.profile import ceilings, command, report
from saelens_sparse.profile.cases import AUTOCAST, BFLOAT16, FLOAT32, Case
from saelens_sparse.profile.measure import time_steps
from saelens_sparse.profile.recording import phase_ms
from saelens_sparse.profile.tables import kernel_table, quantity, tables_of
from saelens_sparse.profile.trace import PHASES, StepTrace
from saelens_sparse.profile.trainers import build_trainer, prepare_inputs

saelens_sparse.register()
PUBLISHED = Path("benchmarks/results/profile_gemma2b_float32/results.json")
# With hardware counters, which an earlier version read.
COUNTED = Path("benchmarks/results/profile_gemma2b_float32_counters/results.json")


@pytest.fixture(autouse=True, scope="module")
def small_and_fast() -> Iterator[None]:
    """So small a problem runs faster on one thread, and needs no exact ceilings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings.SQUARE, "cpu", 64)
        patch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
        yield
    torch.set_num_threads(threads)


def case_of(*arguments: str) -> Case:
    return command.case_of(command._parser().parse_args(arguments))


def test_a_shape_gives_the_case():
    case = case_of("--shape", "32,256,4,64", "--dead-fraction", "0.25")
    assert (case.architecture, case.d_in, case.d_sae, case.batch) == ("topk_sparse", 32, 256, 64)
    assert (case.label, case.dead_fraction, case.precisions) == ("k 4", 0.25, (FLOAT32,))
    assert case.sae_options == {"k": 4} and case.features_per_row == 4


def test_a_shape_of_an_architecture_without_k_names_its_l0():
    shape = ("--shape", "32,256,4,64", "--architecture", "jumprelu")
    case = case_of(*shape)
    assert (case.label, case.architecture) == ("L0 4", "jumprelu_sparse")
    assert case_of(*shape, "--l0", "100").label == "L0 100"
    assert case.sae_options["l0_coefficient"] < 0.01 and case.learning_rate < 1e-5


def config_file(tmp_path: Path, **changes: Any) -> Path:
    values = json.loads(Path("configs/gpt2_small_topk.json").read_text())
    sae = changes.pop("sae", {})
    values |= {"device": "cpu", **changes}
    values["sae"] |= {"d_in": 32, "d_sae": 256, "k": 4, "device": "cpu", **sae}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_a_config_gives_sizes_settings_and_precision(tmp_path: Path):
    sae = {"aux_loss_coefficient": 0.5}
    path = config_file(tmp_path, train_batch_size_tokens=128, autocast=True, sae=sae)
    case = case_of(str(path))
    assert (case.d_in, case.d_sae, case.label, case.batch) == (32, 256, "k 4", 128)
    assert (case.name, case.architecture, case.precisions) == ("config", "topk_sparse", (AUTOCAST,))
    # Fields that only the sparse architecture has would be refused by stock.
    assert not {"implementation", "fused_adam", "d_in", "dtype", "k"} & case.options.keys()
    for architecture in ("topk", "topk_sparse"):
        trainer = build_trainer(architecture, case, FLOAT32, "cpu", ())
        assert trainer.sae.cfg.aux_loss_coefficient == 0.5
    path = config_file(
        tmp_path, sae={**sae, "architecture": "topk_sparse", "dead_latent_loss": "ghost"}
    )
    case = case_of(str(path))
    assert (
        build_trainer("topk_sparse", case, FLOAT32, "cpu", ()).sae.cfg.dead_latent_loss == "ghost"
    )
    assert build_trainer("topk", case, FLOAT32, "cpu", ()).sae.cfg.aux_loss_coefficient == 0.5
    path = config_file(tmp_path, sae={"dtype": "bfloat16"})
    assert case_of(str(path)).precisions == (BFLOAT16,)
    assert case_of(str(path), "--precision", "float32").precisions == (FLOAT32,)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--shape"),
        (["--shape", "32,256,4"], "--shape: '32,256,4'"),
        (["--shape", "32,256,4,x"], "--shape"),
        (["--shape", "0,256,4,64"], "d_in must be at least 1; got 0"),
        (["--shape", "32,256,300,64"], "k must be at most d_sae=256; got 300"),
        (["--shape", "32,256,4,64", "--l0", "8"], "--l0"),
        (["--shape", "32,256,4,64", "--architecture", "gated"], "--architecture: 'gated'"),
        (
            ["--shape", "32,256,4,64", "--architecture", "jumprelu_sparse", "--l0", "300"],
            "--l0: must be above 0 and at most d_sae=256; got 300",
        ),
        (["--shape", "32,256,4,64", "--dead-fraction", "1"], "--dead-fraction"),
        (["--shape", "32,256,4,64", "--steps", "0"], "--steps: must be 1 or more; got 0"),
        (["--shape", "32,256,4,64", "--arms", "stock,fast"], "--arms: unknown fast"),
        (["missing.json"], "missing.json"),
        (["missing.json", "--shape", "32,256,4,64"], "either a config file or --shape"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    output = tmp_path / "out"
    assert cli_main(["profile", *arguments, "--output", str(output)]) == 2
    assert named in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli_main(["profile", "--shape", "32,256,4,64", "--device", "cuda"]) == 2
    assert "--device: 'cuda'" in capsys.readouterr().err


def test_dtypes_that_are_not_measured_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli_main(["profile", str(config_file(tmp_path, sae={"dtype": "float64"}))]) == 2
    assert "sae.dtype: 'float64'" in capsys.readouterr().err


def test_ranges_and_work_are_in_a_trace_and_cost_nothing_without_one():
    tensors = {"x": torch.zeros(8, dtype=torch.float16), "out": torch.zeros(2, 4)}

    def launch(x: torch.Tensor, n: int, out: torch.Tensor) -> None:
        out.fill_(x[0] + n)

    assert with_work(launch, ("x", "n", "out"), None) is launch
    assert profiler_range("saelens_sparse::encode") is profiler_range("saelens_sparse::decode")
    with profile() as profiler, profiler_range("saelens_sparse::encode"):
        with_work(launch, ("x", "n", "out"), None)(tensors["x"], 5, out=tensors["out"])
        work = with_work(launch, ("x", "n", "out"), lambda a: (a["x"].nbytes, 3 * a["n"]))
        work(tensors["x"], n=7, out=tensors["out"])
    names = [event.key for event in profiler.key_averages()]
    expected = {"saelens_sparse::encode", "saelens_sparse::work 48 0", "saelens_sparse::work 16 21"}
    assert expected <= {*names}
    assert (tensors["out"] == 7).all()


@pytest.mark.parametrize("contender", ["stock", "sparse", "sparse_runner"])
def test_recording_leaves_the_sae_as_it_was(contender: str):
    case = Case("tiny", "topk_sparse", 32, 256, 4, 64, dead_fraction=0.3)
    inputs = prepare_inputs(case, FLOAT32, "cpu", 2)
    architecture = "topk" if contender == "stock" else "topk_sparse"
    own = contender == "sparse_runner"
    batches, weights = inputs.batches, inputs.weights
    trainer = build_trainer(architecture, case, FLOAT32, "cpu", batches, weights, sparse_runner=own)
    sae, settings = trainer.sae, trainer.sae.cfg.to_dict()
    replaced = {name for name, value in vars(sae).items() if callable(value)}
    phases = phase_ms(trainer, inputs, steps=1)
    assert [*phases] == [*PHASES] and phases["backward"] > 0
    assert {name for name, value in vars(sae).items() if callable(value)} == replaced
    assert sae.cfg.to_dict() == settings
    assert not any(module._forward_pre_hooks for module in sae.modules())


def test_steps_are_timed_with_what_fired():
    case = Case("tiny", "topk_sparse", 32, 256, 4, 64, dead_fraction=0.3)
    inputs = prepare_inputs(case, FLOAT32, "cpu", 2)
    trainer = build_trainer("topk_sparse", case, FLOAT32, "cpu", inputs.batches, inputs.weights)
    timed = time_steps(trainer, inputs, 3)
    assert len(timed.ms) == 3
    assert timed.firing.sum() == pytest.approx(4, rel=0.1)
    assert timed.peak_bytes is None and timed.metrics


TINY = ["--device", "cpu", "--steps", "2", "--warmup-train", "2"]


def profile_tiny(output: Path, *more: str) -> dict[str, Any]:
    shape = ["--shape", "32,512,4,64"]
    assert cli_main(["profile", *shape, *TINY, "--output", str(output), *more]) == 0
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("architecture", ["topk_sparse", "batchtopk_sparse", "jumprelu_sparse"])
def test_the_command_profiles_all_arms(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    dead = ("--dead-fraction", "0.3") if architecture != "jumprelu_sparse" else ()
    results = profile_tiny(output, "--architecture", architecture, *dead)
    assert list(results["arms"]) == ["stock", "sparse", "sparse_runner"]
    for name, arm in results["arms"].items():
        assert arm["status"] == "ok", arm
        assert arm["ms_min"] <= arm["ms"] <= arm["ms_max"]
        phases, parts = arm["phases_ms"], arm["backward_ms"]
        assert sum(phases.values()) == pytest.approx(arm["busy_ms"])
        assert arm["busy_ms"] + arm["idle_ms"] == pytest.approx(arm["divided_ms"])
        for phase in PHASES:
            assert phases[phase] > 0, (name, phase)
        assert sum(parts.values()) == pytest.approx(phases["backward"])
        for phase in ("encode", "decode", "losses"):
            assert parts[phase] > 0, (name, phase)
        memory = arm["memory"]
        weights = 4 * (2 * 32 * 512 + 512 + 32)
        assert memory["parts_bytes"]["parameters"] >= weights
        assert memory["parts_bytes"]["optimizer's moments"] >= 2 * weights
        assert sum(memory["parts_bytes"].values()) == pytest.approx(memory["traced_peak_bytes"])
        assert arm["l0"] == pytest.approx(4, rel=0.3)
        products = [row for row in arm["kernels"] if row["name"] == "mm"]
        assert products and products[0]["flops"] >= 2 * 64 * 32 * 512
        assert arm["waiting_calls"] == {}
        trace = StepTrace.load(output / arm["trace"])
        assert trace.n_steps == 2 and (trace.items.phase == "other").mean() < 0.1
    assert results["floor_ms"]["total"] == pytest.approx(
        sum(results["floor_ms"][part] for part in ("encoder product", "update"))
    )

    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page and "Not measurable on a CPU" in page
    printed = capsys.readouterr().out
    assert "step over floor" in printed and "sparse runner" in printed


def test_published_results_are_readable(tmp_path: Path):
    recent = {
        row[0].strip(): row[1]
        for row in tables_of(json.loads(PUBLISHED.read_text()), kernels=3)[""][1:]
    }
    assert (recent["step, ms"], recent["step over floor"]) == ("177.1", "44.67x")
    results = json.loads(COUNTED.read_text())
    text = report.terminal_text(results)
    assert "topk, 2304 -> 65,536, k 64, batch 4096, float32, on NVIDIA H100" in text
    summary = {row[0].strip(): row[1] for row in tables_of(results, kernels=3)[""][1:]}
    assert (summary["step, ms"], summary["step over floor"]) == ("178.3", "45.04x")
    assert (summary["SM occupancy, counted"], summary["DRAM traffic"]) == ("22%", "111 GB")
    assert summary["peak memory, GiB"] == "13.41" and summary["waits of the host, ms"] == "167.9"
    header, *rows = kernel_table(results, results["arms"]["sparse_runner"], 3)
    assert {"occupancy", "DRAM of copy", "bytes asked"} <= {*header} and len(rows) == 4
    assert rows[-1][0].endswith("more") and all(len(row) == len(header) for row in rows)
    report.write_report(results, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "cudaStreamSynchronize" in page


def test_quantities_have_prefixes():
    texts = [quantity(value, "B") for value in (None, 0.0, 999.0, 1234.0, 4.31e12, 999.9e6)]
    assert texts == ["-", "0 B", "999 B", "1.23 kB", "4.31 TB", "1 GB"]


def test_without_matplotlib_there_are_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report.pictures.reports, "can_draw", lambda: False)
    report.write_report(json.loads(PUBLISHED.read_text()), tmp_path)
    assert "data:image" not in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.png"))


def test_what_fails_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    measure = command.measure_contender

    def without_memory_at_sparse(name: str, *rest: Any) -> dict[str, Any]:
        if name == "sparse":
            raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB. GPU 0 has ...")
        return measure(name, *rest)

    monkeypatch.setattr(command, "measure_contender", without_memory_at_sparse)
    path = config_file(tmp_path, train_batch_size_tokens=64)
    arguments = ["profile", str(path), *TINY, "--only=step", "--arms=sparse,stock"]
    arguments += ["--output", str(output)]
    assert cli_main(arguments) == 1
    results = json.loads((output / "results.json").read_text())
    settings = results["settings"]
    assert (settings["d_sae"], settings["batch"], settings["precision"]) == (256, 64, "float32")
    statuses = {name: arm["status"] for name, arm in results["arms"].items()}
    assert statuses == {"stock": "ok", "sparse": "out of memory"}
    assert "sparse: out of memory: CUDA out of memory" in capsys.readouterr().out

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure_contender", interrupted)
    assert cli_main(arguments) == 130
    monkeypatch.setattr(command, "measure_contender", measure)
    assert cli_main([*arguments, "--arms", "sparse"]) == 0  # into the same folder
    assert list(json.loads((output / "results.json").read_text())["arms"]) == ["sparse"]


def test_without_known_work_there_is_no_roofline(tmp_path: Path):
    results = json.loads(PUBLISHED.read_text())
    for arm in results["arms"].values():
        arm["kernels"] = [{**row, "flops": None} for row in arm["kernels"]]
    report.write_report(results, tmp_path)
    assert (tmp_path / "report.html").read_text().count("data:image") == 1
