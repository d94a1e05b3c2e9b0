"""`saelens-sparse profile`: its settings, and the command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import LanguageModelSAERunnerConfig

import saelens_sparse
from saelens_sparse.cli import main as cli_main
from saelens_sparse.config.files import UsageError, load_config
from saelens_sparse.profile import ceilings, command
from saelens_sparse.profile.cases import AUTOCAST, BFLOAT16, FLOAT32, SPARSE, STOCK, Case
from saelens_sparse.profile.measure import time_steps
from saelens_sparse.profile.ranges import named_parts
from saelens_sparse.profile.settings import (
    ARMS,
    Settings,
    case_of_config,
    case_of_shape,
    parse_arms,
    precision_of_config,
)
from saelens_sparse.profile.steps import count_waits
from saelens_sparse.profile.trace import Trace
from saelens_sparse.profile.trainers import build_trainer, prepare_inputs
from saelens_sparse.reports.command_line import parse_shape

saelens_sparse.register()


@pytest.fixture(autouse=True, scope="module")
def small_and_fast() -> Iterator[None]:
    """So small a problem runs faster on one thread, and needs no exact ceilings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ceilings._SQUARE, "cpu", 64)
        patch.setitem(ceilings._COPY_BYTES, "cpu", 2**16)
        yield
    torch.set_num_threads(threads)


def test_settings_survive_json():
    case = case_of_shape([32, 256, 4, 64], "jumprelu_sparse", 6.0, 0.25)
    settings = Settings(case, AUTOCAST, "cpu", 3, 5, counters=False)
    again = Settings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again.to_json() == settings.to_json()
    assert again.describe() == ("jumprelu, 32 -> 256, mean L0 6, batch 64, 25% dead, autocast")


def test_a_shape_of_an_architecture_without_k_names_its_l0():
    case = case_of_shape([32, 256, 4, 64], "jumprelu", None, 0.0)
    assert (case.k, case.l0, case.architecture) == (None, 4.0, "jumprelu")
    assert case_of_shape([32, 256, 4, 64], "jumprelu", 9.0, 0.0).l0 == 9.0


def config_file(tmp_path: Path, **changes: Any) -> Path:
    values = json.loads(Path("configs/gpt2_small_topk.json").read_text())
    sae = changes.pop("sae", {})
    values |= {"device": "cpu", **changes}
    values["sae"] |= {"d_in": 32, "d_sae": 256, "k": 4, "device": "cpu", **sae}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    return path


def config(tmp_path: Path, **changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    return load_config(config_file(tmp_path, **changes))


def test_a_config_gives_sizes_settings_and_precision(tmp_path: Path):
    cfg = config(
        tmp_path, train_batch_size_tokens=128, autocast=True, sae={"aux_loss_coefficient": 0.5}
    )
    case = case_of_config(cfg, None, None, 0.0)
    assert (case.d_in, case.d_sae, case.k, case.batch) == (32, 256, 4, 128)
    assert case.architecture == "topk" and case.l0 is None
    assert case.options["aux_loss_coefficient"] == 0.5
    # Fields that only the sparse architecture has would be refused by stock.
    assert not {"implementation", "fused_adam", "d_in", "dtype"} & case.options.keys()
    assert precision_of_config(cfg) == AUTOCAST
    assert precision_of_config(config(tmp_path, sae={"dtype": "bfloat16"})) == BFLOAT16
    for arm in (STOCK, SPARSE):
        trainer = build_trainer(arm, case, FLOAT32, "cpu", ())
        assert trainer.sae.cfg.aux_loss_coefficient == 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--shape"),
        (["--shape", "32,256,4"], "--shape: '32,256,4'"),
        (["--shape", "32,256,4,x"], "--shape"),
        (["--shape", "0,256,4,64"], "d_in must be 1 or more; got 0"),
        (["--shape", "32,256,300,64"], "k must be from 1 to d_sae=256; got 300"),
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


def test_dtypes_that_are_not_measured_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"sae\.dtype: 'float64'"):
        precision_of_config(config(tmp_path, sae={"dtype": "float64"}))


def test_arms_and_shapes_are_parsed():
    assert [arm.name for arm in parse_arms("sparse, stock")] == ["stock", "sparse"]
    assert parse_shape("768,24576,32,4096") == [768, 24576, 32, 4096]


@pytest.mark.parametrize("arm", ARMS.values(), ids=ARMS)
def test_naming_parts_leaves_the_sae_as_it_was(arm: Any):
    case = case_of_shape([32, 256, 4, 64], "topk_sparse", None, 0.0)
    trainer = build_trainer(arm, case, FLOAT32, "cpu", ())
    before = dict(vars(trainer.sae))
    with named_parts(trainer):
        inside = vars(trainer.sae).keys() - before.keys()
        assert inside == {"encode_with_hidden_pre", "decode", "calculate_aux_loss"}
        hooked = [module for module in trainer.sae.modules() if module._forward_hooks]
        # A CUDA graph is replayed only while nobody hooks into a sparse SAE.
        assert bool(hooked) == (arm == STOCK)
    assert vars(trainer.sae) == before
    assert not any(module._forward_hooks for module in trainer.sae.modules())


def test_steps_are_timed_with_what_fired():
    case = Case("tiny", 32, 256, 4, 64, (FLOAT32,), dead_fraction=0.3)
    inputs = prepare_inputs(case, FLOAT32, "cpu", 2)
    trainer = build_trainer(SPARSE, case, FLOAT32, "cpu", inputs.batches, inputs.weights)
    done: list[int] = []
    timed = time_steps(trainer, inputs, 3, lambda: done.append(1))
    assert len(timed.ms) == len(done) == 3
    assert timed.firing.sum() == pytest.approx(4, rel=0.1)
    assert timed.peak_bytes is None and count_waits(trainer, inputs) is None


TINY = ["--device", "cpu", "--steps", "2", "--warmup-train", "2"]


def profile_tiny(output: Path, *more: str) -> dict[str, Any]:
    shape = ["--shape", "32,512,4,64"]
    assert cli_main(["profile", *shape, *TINY, "--output", str(output), *more]) == 0
    return json.loads((output / "results.json").read_text())


@pytest.mark.parametrize("architecture", ["topk_sparse", "jumprelu_sparse"])
def test_the_command_profiles_all_arms(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    dead = ("--dead-fraction", "0.3") if architecture == "topk_sparse" else ()
    results = profile_tiny(output, "--architecture", architecture, *dead)
    assert list(results["arms"]) == ["stock", "sparse", "sparse_runner"]
    for name, arm in results["arms"].items():
        assert arm["status"] == "ok", arm
        assert arm["ms_min"] <= arm["ms"] <= arm["ms_max"]
        assert sum(arm["phases_ms"].values()) == pytest.approx(arm["busy_ms"])
        assert arm["busy_ms"] + arm["idle_ms"] == pytest.approx(arm["divided_ms"])
        for phase in ("encode", "select", "decode", "loss", "statistics", "backward", "clip"):
            assert arm["phases_ms"][phase] > 0, (name, phase)
        assert arm["phases_ms"]["optimizer"] > 0
        assert sum(arm["backward_ms"].values()) == pytest.approx(arm["phases_ms"]["backward"])
        for part in ("W_enc", "W_dec", "activations"):
            assert arm["backward_ms"][part] > 0, (name, part)
        if architecture == "jumprelu_sparse":
            assert arm["backward_ms"]["threshold"] > 0
        memory = arm["memory"]
        weights = 4 * (2 * 32 * 512 + 512 + 32)
        assert memory["parts_bytes"]["parameters"] >= weights
        assert memory["parts_bytes"]["optimizer's moments"] >= 2 * weights
        assert sum(memory["parts_bytes"].values()) == pytest.approx(memory["traced_peak_bytes"])
        assert arm["l0"] == pytest.approx(4, rel=0.3)
        products = [row for row in arm["kernels"] if row["name"] == "mm"]
        assert products and products[0]["flops"] >= 2 * 64 * 32 * 512
        assert arm["waits"] is None and arm["counters"]["reason"]
        assert Trace.load(output / arm["trace"]).host
    assert "mul" in {row["name"] for row in results["arms"]["stock"]["kernels"]}

    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert 'src="http' not in page and "Not measurable on a CPU" in page
    printed = capsys.readouterr().out
    assert "step over floor" in printed and "sparse, own runner" in printed
    assert not list(output.glob("memory_trace_*"))


def test_without_matplotlib_there_are_tables_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from saelens_sparse.profile import pictures

    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    output = tmp_path / "out"
    profile_tiny(output, "--arms", "sparse")
    assert "data:image" not in (output / "report.html").read_text()
    assert not list(output.glob("*.png"))


@pytest.fixture(scope="module")
def record_of_an_arm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("profile")
    return profile_tiny(folder, "--arms", "sparse")["arms"]["sparse"]


@pytest.fixture
def measured_arms(monkeypatch: pytest.MonkeyPatch, record_of_an_arm: dict[str, Any]) -> list[str]:
    """Replaces the measuring of an arm by a record made once; names the arms asked for."""
    asked: list[str] = []

    def measure(arm: Any, *_: Any) -> dict[str, Any]:
        asked.append(arm.name)
        return record_of_an_arm

    monkeypatch.setattr(command, "measure_arm", measure)
    return asked


def test_what_is_measured_is_kept_and_the_rest_added(
    measured_arms: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    output = tmp_path / "out"
    arguments = ["--shape", "32,512,4,64", *TINY, "--output", str(output)]
    measure = command.measure_arm

    def interrupted_at_sparse(arm: Any, *rest: Any) -> dict[str, Any]:
        if arm == SPARSE:
            raise KeyboardInterrupt
        return measure(arm, *rest)

    monkeypatch.setattr(command, "measure_arm", interrupted_at_sparse)
    assert cli_main(["profile", *arguments]) == 130
    assert list(json.loads((output / "results.json").read_text())["arms"]) == ["stock"]
    assert (output / "report.html").exists()
    assert "Interrupted" in capsys.readouterr().err

    def without_memory_at_sparse(arm: Any, *rest: Any) -> dict[str, Any]:
        if arm == SPARSE:
            raise RuntimeError("CUDA out of memory. Tried to allocate 4 GiB. GPU 0 has ...")
        return measure(arm, *rest)

    monkeypatch.setattr(command, "measure_arm", without_memory_at_sparse)
    measured_arms.clear()
    assert cli_main(["profile", *arguments]) == 1
    assert measured_arms == ["sparse_runner"]
    arms = json.loads((output / "results.json").read_text())["arms"]
    assert arms["sparse"]["status"] == "out of memory"
    assert "out of memory" in capsys.readouterr().out

    monkeypatch.setattr(command, "measure_arm", measure)
    measured_arms.clear()
    assert cli_main(["profile", *arguments]) == 0
    assert measured_arms == ["sparse"]
    measured_arms.clear()
    assert cli_main(["profile", *arguments]) == 0
    assert measured_arms == []


def test_results_of_other_settings_are_measured_again(
    measured_arms: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    profile_tiny(output, "--arms", "stock,sparse")
    measured_arms.clear()
    profile_tiny(output, "--arms", "stock", "--steps", "3")
    assert measured_arms == ["stock"]
    assert "other settings (steps)" in capsys.readouterr().out
    assert list(json.loads((output / "results.json").read_text())["arms"]) == ["stock"]


def test_a_config_can_be_profiled(measured_arms: list[str], tmp_path: Path):
    path = config_file(tmp_path, train_batch_size_tokens=64)
    output = tmp_path / "out"
    arguments = [str(path), *TINY, "--arms", "sparse", "--output", str(output)]
    assert cli_main(["profile", *arguments]) == 0
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert (settings["d_sae"], settings["batch"], settings["precision"]) == (256, 64, "float32")
    assert measured_arms == ["sparse"]
