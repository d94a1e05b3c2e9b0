import importlib.util
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from saelens_sparse.choice import availability as implementation
from saelens_sparse.choice.availability import (
    IMPLEMENTATIONS,
    MAX_SPARSE_DENSITY,
    NO_TRITON_ENV,
    Choice,
    choose_implementation,
    triton_problem,
)
from tests.support.kernel_compilation import CARDS

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
SPARSE = 64 / 65_536
INSTALLATION = "_triton_installation_problem"


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing warned about or found out yet, and Triton not turned off."""
    monkeypatch.delenv(NO_TRITON_ENV, raising=False)
    implementation._triton_installation_problem.cache_clear()
    implementation._warn_once.cache_clear()
    yield
    monkeypatch.undo()
    implementation._triton_installation_problem.cache_clear()
    implementation._warn_once.cache_clear()


@pytest.fixture
def working_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a kernel compiles and runs."""
    monkeypatch.setattr(implementation, INSTALLATION, lambda _: None)


@pytest.fixture
def broken_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which no kernel compiles."""
    monkeypatch.setattr(implementation, INSTALLATION, lambda _: "there is no C compiler")


def pretend_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with this GPU, on which the first kernel runs."""
    row_ops_triton = import_module("saelens_sparse.ops.rows.kernels")
    monkeypatch.setattr(row_ops_triton, "launch_probe", lambda _: None)
    if name.startswith("sm_"):
        capability = divmod(int(name.removeprefix("sm_")), 10)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    else:
        properties = SimpleNamespace(gcnArchName=f"{name}:sramecc+:xnack-")
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_takes_triton_on_cuda(dtype: torch.dtype) -> None:
    choice = choose_implementation("auto", CUDA, dtype, SPARSE)
    assert choice == Choice("triton", "CUDA device with a working Triton", "triton")
    assert choice.backend == "triton"


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize("device", [CPU, MPS])
def test_auto_takes_torch_where_there_is_no_cuda_and_does_not_warn(device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose_implementation("auto", device, torch.float32, SPARSE)
    assert choice.name == choice.backend == "torch"
    assert choice.reason == f"Triton kernels need a CUDA device, not {device.type!r}"


@pytest.mark.usefixtures("working_triton")
def test_auto_takes_torch_on_a_cpu_even_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is for tests, which ask for it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_implementation("auto", CPU, torch.float32, SPARSE).name == "torch"
    assert choose_implementation("triton", CPU, torch.float32, SPARSE).name == "triton"


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(
    ("full_precision", "reason"),
    [
        (True, "13.5% of the latents are active; above 12.5%"),
        (False, "3.5% of the latents are active; above 2.5%"),
    ],
)
def test_auto_takes_dense_above_a_density(
    device: torch.device, full_precision: bool, reason: str
) -> None:
    limit = MAX_SPARSE_DENSITY[full_precision]
    below = choose_implementation("auto", device, torch.float32, limit, full_precision)
    above = choose_implementation("auto", device, torch.float32, limit + 0.01, full_precision)
    assert below.name != "dense"
    assert above.name == "dense"
    assert reason in above.reason


@pytest.mark.usefixtures("broken_triton")
def test_auto_takes_torch_where_triton_is_broken_and_warns_once() -> None:
    with pytest.warns(UserWarning, match="slower PyTorch path on this GPU: there is no C compiler"):
        choice = choose_implementation("auto", CUDA, torch.float32, SPARSE)
    assert choice == Choice("torch", "there is no C compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_implementation("auto", CUDA, torch.float32, SPARSE) == choice


@pytest.mark.usefixtures("working_triton")
def test_auto_takes_torch_for_a_dtype_that_the_kernels_do_not_take() -> None:
    with pytest.warns(UserWarning, match=r"float32 and bfloat16, not torch\.float64"):
        choice = choose_implementation("auto", CUDA, torch.float64, SPARSE)
    assert choice.name == "torch"
    assert "not torch.float64" in choice.reason


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_the_environment_switch_turns_triton_off(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At call time, so that it also works after the import."""
    assert choose_implementation("auto", CUDA, torch.float32, SPARSE).name == "triton"
    monkeypatch.setenv(NO_TRITON_ENV, value)
    with pytest.warns(UserWarning, match=NO_TRITON_ENV):
        choice = choose_implementation("auto", CUDA, torch.float32, SPARSE)
    assert choice == Choice("torch", f"Triton is turned off by {NO_TRITON_ENV}")
    with pytest.raises(ValueError, match=f"turned off by {NO_TRITON_ENV}"):
        choose_implementation("triton", CUDA, torch.float32, SPARSE)


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize("value", ["", "0"])
def test_the_environment_switch_can_say_no(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NO_TRITON_ENV, value)
    assert choose_implementation("auto", CUDA, torch.float32, SPARSE).name == "triton"


@pytest.mark.usefixtures("broken_triton")
@pytest.mark.parametrize("name", ["torch", "dense"])
@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
@pytest.mark.parametrize("density", [SPARSE, 0.9])
def test_a_request_is_obeyed(name: str, device: torch.device, density: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choice = choose_implementation(name, device, torch.float32, density)
    assert choice == Choice(choice.name, f"implementation={name!r} was requested")
    assert choice.name == name


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize("density", [SPARSE, 0.9])
def test_a_request_for_triton_is_obeyed(density: float) -> None:
    choice = choose_implementation("triton", CUDA, torch.bfloat16, density)
    assert choice == Choice("triton", "implementation='triton' was requested", "triton")


@pytest.mark.usefixtures("broken_triton")
def test_a_request_for_a_broken_triton_raises() -> None:
    with pytest.raises(ValueError, match=r"cannot run here: there is no C compiler\. Use 'auto'"):
        choose_implementation("triton", CUDA, torch.float32, SPARSE)


@pytest.mark.usefixtures("working_triton")
@pytest.mark.parametrize(
    ("device", "dtype", "problem"),
    [
        (CPU, torch.float32, r"only in Triton's interpreter \(TRITON_INTERPRET=1\)"),
        (MPS, torch.float32, "need a CUDA device, not 'mps'"),
        (CUDA, torch.float64, r"not torch\.float64"),
        (CUDA, torch.float16, r"not torch\.float16"),
    ],
)
def test_a_request_for_triton_raises_where_it_cannot_run(
    device: torch.device, dtype: torch.dtype, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"implementation='triton' cannot run here: .*{problem}"):
        choose_implementation("triton", device, dtype, SPARSE)


@pytest.mark.parametrize("name", ["", "Triton", "cuda", "sparse"])
def test_an_unknown_implementation_is_named_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=f"one of auto, triton, torch, dense; got {name!r}"):
        choose_implementation(name, CPU, torch.float32, SPARSE)
    assert name not in IMPLEMENTATIONS


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        assert name == "triton"

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert triton_problem(CUDA, torch.float32) == "the package triton is not installed"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_a_kernel_that_does_not_run_is_a_reason_found_out_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row_ops_triton = pytest.importorskip("saelens_sparse.ops.rows.kernels")
    launches: list[torch.device] = []

    def launch_probe(device: torch.device) -> None:
        launches.append(device)
        raise RuntimeError("no driver\n`ptxas` stderr:\n/tmp/kernel.ptx, line 9")

    pretend_gpu("sm_90", monkeypatch)
    monkeypatch.setattr(row_ops_triton, "launch_probe", launch_probe)
    for _ in range(3):
        problem = triton_problem(CUDA, torch.float32)
        assert problem == "Triton could not compile and run a kernel (RuntimeError: no driver)"
    assert launches == [CUDA]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_the_interpreter_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_problem(CPU, torch.float32) is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert triton_problem(CPU, torch.float32) is not None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", [*CARDS, "sm_103", "sm_121"])
def test_triton_is_chosen_on_gpus_that_the_kernels_are_compiled_for_and_on_newer_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(name, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_implementation("auto", CUDA, torch.float32, SPARSE).name == "triton"
    assert choose_implementation("triton", CUDA, torch.bfloat16, SPARSE).name == "triton"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("sm_70", r"need compute capability 7\.5 or higher; this GPU has 7\.0"),
        ("sm_61", r"need compute capability 7\.5 or higher; this GPU has 6\.1"),
        ("gfx90a", "known to fit gfx942, gfx1100; this is gfx90a"),
        ("gfx1030", "known to fit gfx942, gfx1100; this is gfx1030"),
    ],
)
def test_auto_takes_torch_on_other_gpus_and_says_so_once_and_a_request_for_triton_raises(
    name: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(name, monkeypatch)
    with pytest.warns(UserWarning, match=f"slower PyTorch path on this GPU: .*{problem}"):
        choice = choose_implementation("auto", CUDA, torch.float32, SPARSE)
    assert choice.name == choice.backend == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_implementation("auto", CUDA, torch.float32, SPARSE) == choice
    with pytest.raises(ValueError, match=f"cannot run here: .*{problem}") as raised:
        choose_implementation("triton", CUDA, torch.float32, SPARSE)
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
def test_triton_is_chosen_on_this_gpu() -> None:
    assert triton_problem(CUDA, torch.float32) is None
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_implementation("auto", CUDA, dtype, SPARSE).name == "triton"
