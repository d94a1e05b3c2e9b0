"""Settings and fixtures shared by all tests.

Tests of the sparse implementations take the fixtures `backend` and `device`. Together they run
once per place where an implementation works on this machine: PyTorch on the CPU, and the Triton
kernels either on a GPU or, where there is none, in Triton's interpreter (float32, small sizes).
"""

import importlib.util
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when libraries are imported, so set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("SAELENS_SPARSE_NO_TRITON", None)

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tensors are tiny: a second thread mostly waits, a hundredfold where cores are shared. How
# sums are split over threads changes their rounding, which no test may depend on.
THREADS = os.environ.get("SAELENS_SPARSE_TEST_THREADS", "1")
torch.set_num_threads(int(THREADS))
os.environ.setdefault("OMP_NUM_THREADS", THREADS)  # of processes that tests start

import pytest

pytest.register_assert_rewrite(
    *(f"tests.support.{path.stem}" for path in (Path(__file__).parent / "support").glob("*.py"))
)

from tests.support.pairwise import Combination, covering


@dataclass(frozen=True)
class Target:
    """An implementation of the sparse operations and the device that it is tested on."""

    backend: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter: slow, and only right in float32."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def runs_here(self) -> bool:
        has_gpu = torch.cuda.is_available()
        if self.backend == "triton" and importlib.util.find_spec("triton") is None:
            return False
        return not has_gpu if self.interpreted else has_gpu or self.device == "cpu"

    def few_rows(self, n_rows: int) -> int:
        """`n_rows`, or fewer where a kernel runs one program after the other in Python."""
        return min(n_rows, 9) if self.interpreted else n_rows


TARGETS = {
    "torch-cpu": Target("torch", "cpu", (torch.float32, torch.bfloat16, torch.float64)),
    "triton-interpreter": Target("triton", "cpu", (torch.float32,)),
    "torch-cuda": Target("torch", "cuda", (torch.float32, torch.bfloat16, torch.float64)),
    "triton-cuda": Target("triton", "cuda", (torch.float32, torch.bfloat16)),
}


# Parameters that say where a test runs: each place sees every pair of the other options.
PATHS = ("target", "subject")


def marks(target: Target) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if target.device == "cuda" else []


def target_parameters(*, interpreted: bool) -> list[Any]:
    """Each implementation that this machine can run, with or without Triton's interpreter."""
    return [
        pytest.param(target, id=name, marks=marks(target))
        for name, target in TARGETS.items()
        if target.runs_here and (interpreted or not target.interpreted)
    ]


@pytest.fixture(params=target_parameters(interpreted=True))
def target(request: pytest.FixtureRequest) -> Target:
    """Each implementation that this machine can run, with its device."""
    return request.param


@pytest.fixture
def backend(target: Target) -> str:
    """Backend of the sparse operations: "torch" or "triton"."""
    return target.backend


@pytest.fixture
def device(target: Target) -> torch.device:
    """Device that `backend` is tested on."""
    return torch.device(target.device)


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Those of the target; see `pytest_collection_modifyitems`."""
    return request.param


@pytest.fixture(autouse=True)
def fill_uninitialized_memory_with_nan(request: pytest.FixtureRequest) -> Iterator[None]:
    """`torch.empty` and its like give NaN, so that an output nobody wrote shows.

    PyTorch ties this to its deterministic algorithms; the marker `default_algorithms` turns both
    off for a test that needs the operations that users get.
    """
    if request.node.get_closest_marker("default_algorithms") is not None:
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws from the same seed, whichever ran before it."""
    torch.manual_seed(0)


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def combination_of(item: pytest.Item) -> Combination:
    """The options of a test by name, those of a configuration apart."""
    combination: dict[str, str] = {}
    for name, value in parameters_of(item).items():
        if name in PATHS:
            continue
        options: dict[str, Any] = value if isinstance(value, dict) else {name: value}
        combination |= {option: repr(chosen) for option, chosen in options.items()}
    return combination


def leave_the_rest_of_the_product(items: list[pytest.Item]) -> None:
    """Of the tests marked `pairwise`, mark as `exhaustive` what shows no new pair of options."""
    groups: defaultdict[tuple[str, ...], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise") is not None:
            path = (repr(parameters_of(item).get(name)) for name in PATHS)
            groups[item.nodeid.partition("[")[0], *path].append(item)
    for group in groups.values():
        covered = set(covering([combination_of(item) for item in group]))
        for index, item in enumerate(group):
            if index not in covered:
                item.add_marker(pytest.mark.exhaustive)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, and leave out those that no target has: with a
    dtype of another one, or a path of another backend.
    """
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

    def exists(item: pytest.Item) -> bool:
        params = parameters_of(item)
        target = params.get("target")
        if not isinstance(target, Target):
            return True
        if params.get("torch_path", "as it is") != "as it is" and target.backend != "torch":
            return False
        return params.get("dtype", target.dtypes[0]) in target.dtypes

    left_out = [item for item in items if not exists(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if exists(item)]
    leave_the_rest_of_the_product(items)


def pytest_configure(config: pytest.Config) -> None:
    if TARGETS["triton-interpreter"].runs_here:
        from tests.support.interpreter import remember

        remember()
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    for warning_filter in (
        # A warning that points at this package's own lines is a defect.
        r"error:::saelens_sparse(\.|$)",
        # NumPy, on which Triton's interpreter runs, on arithmetic with NaN and infinities.
        "ignore::RuntimeWarning:(triton|numpy)",
        "ignore:.*does not have a deterministic implementation:UserWarning",
        "ignore:Deterministic behavior was enabled:UserWarning",
    ):
        config.addinivalue_line("filterwarnings", warning_filter)
