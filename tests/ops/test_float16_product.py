"""Products of float16 matrices have float32 sums, and no switch of the process is written."""

import ast
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import saelens_sparse
from saelens_sparse.choice.availability import Backend
from saelens_sparse.ops.screen import float16_product
from saelens_sparse.ops.screen.float16_product import multiply_float16, rounds_parts
from saelens_sparse.ops.search.threshold import search_above_threshold
from saelens_sparse.ops.search.topk import search_topk
from tests.support.ops import cublas_switch

Multiply = Callable[..., torch.Tensor]
ACCUMULATION, REDUCTION = "allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction"
SWITCHES = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Nothing tried and nothing warned about yet."""
    float16_product._rounds_parts.clear()
    float16_product._warn_of_float16_sums.cache_clear()
    yield
    float16_product._rounds_parts.clear()
    float16_product._warn_of_float16_sums.cache_clear()


def operands(
    n_rows: int, d_in: int, d_sae: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a weight with rows of norm 64 or so, and room for their product."""
    x, weight = (torch.randn(n, d_in, device=device) for n in (n_rows, d_sae))
    x, weight = (64 * rows / rows.norm(dim=1, keepdim=True) for rows in (x, weight))
    out = torch.empty(n_rows, d_sae, dtype=torch.float16, device=device)
    return x.half(), weight.half(), out


def in_parts(n_parts: int, *, interleaved: bool = False, in_place: bool = False) -> Multiply:
    """A product that adds parts of its sums in float16.

    Args:
        n_parts: how many.
        interleaved: whether a part is every n-th run of eight columns, and not n-th of them all.
        in_place: whether each part is added to the rounded sum of those before it.
    """

    def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(a.shape[1])
        part = columns // 8 % n_parts if interleaved else columns * n_parts // a.shape[1]
        out.zero_()
        for n in range(n_parts):
            mine = part == n
            partial = a[:, mine].float() @ b[mine].float()
            out += partial if in_place else partial.half()
        return out

    return multiply


def in_float16(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """A product whose sums are float16 throughout."""
    return in_parts(a.shape[1], in_place=True)(a, b, out)


def in_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(a.float() @ b.float())


@pytest.mark.parametrize("d_in", [64, 765, 2304])
@pytest.mark.parametrize("multiply", [torch.mm, in_float32])
def test_float32_sums_are_known_as_such(multiply: Multiply, d_in: int) -> None:
    _, weight, out = operands(128, d_in, 300)
    assert not rounds_parts(multiply, weight, out)


@pytest.mark.parametrize("d_in", [64, 765, 2304])
@pytest.mark.parametrize(
    "multiply",
    [
        in_parts(2),
        in_parts(2, in_place=True),
        in_parts(2, interleaved=True),
        in_parts(3),
        in_parts(8, interleaved=True, in_place=True),
        in_parts(32),
        in_float16,
    ],
)
def test_rounded_parts_are_noticed(multiply: Multiply, d_in: int) -> None:
    _, weight, out = operands(128, d_in, 100)
    assert rounds_parts(multiply, weight, out)


@pytest.mark.parametrize("spoil", ["dead latents", "huge columns", "not finite"])
def test_weights_that_tell_nothing_do_not_hide_rounded_parts(spoil: str) -> None:
    _, weight, out = operands(200, 256, 100)
    if spoil == "dead latents":
        weight[:40] = 0
    elif spoil == "huge columns":
        weight[:, :4] *= 200
    else:
        weight[7], weight[8] = torch.nan, torch.inf
    assert rounds_parts(in_parts(2), weight, out)
    assert not rounds_parts(in_float32, weight, out)


@pytest.mark.parametrize("weight_value", [0.0, torch.nan])
def test_a_trial_that_tells_nothing_counts_as_rounded(weight_value: float) -> None:
    _, weight, out = operands(128, 64, 100)
    assert rounds_parts(torch.mm, weight.fill_(weight_value), out)


@pytest.mark.parametrize("multiply", [in_parts(2), in_float16, torch.mm])
@pytest.mark.parametrize(("n_rows", "d_in"), [(1, 64), (127, 64), (128, 64), (128, 1), (300, 765)])
def test_a_product_has_float32_sums_however_the_library_adds(
    n_rows: int, d_in: int, multiply: Multiply, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, out = operands(n_rows, d_in, 100)
    monkeypatch.setattr(torch, "mm", multiply)
    multiply_float16(x, weight, out)
    exact = x.double() @ weight.double().T
    sizes = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    error = (out - exact).abs()
    # Half a unit in the last place of the result, and what float32 sums are off by.
    assert (error <= 2.0**-11 * exact.abs() + 2.0**-25 + d_in * 2.0**-24 * sizes).all()


def test_a_shape_is_tried_once_and_again_when_a_switch_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    products: list[int] = []
    original = torch.mm

    def spy(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        products.append(a.shape[0])
        return original(a, b, **kwargs)

    monkeypatch.setattr(torch, "mm", spy)
    x, weight, out = operands(128, 64, 100)
    for value in (False, True, False):
        with cublas_switch(REDUCTION, value):
            multiply_float16(x, weight, out)
            multiply_float16(x, weight, out)
    assert len(products) == 3 + 3 + 2


def test_threads_multiply_at_once_without_a_switch_being_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[str] = []
    set_switch = type(SWITCHES).__setattr__

    def watch(switches: object, name: str, value: object) -> None:
        written.append(name)
        set_switch(switches, name, value)  # pyright: ignore[reportArgumentType]

    problems = [operands(n_rows, 256, 300) for n_rows in (128, 200)]
    alone = [x @ weight.T for x, weight, _ in problems]
    monkeypatch.setattr(type(SWITCHES), "__setattr__", watch)

    def multiply(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        for _ in range(20):
            multiply_float16(x, weight, out.fill_(torch.nan))

    threads = [threading.Thread(target=multiply, args=problem) for problem in problems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written == []
    for expected, (_, _, out) in zip(alone, problems, strict=True):
        assert torch.equal(out, expected)


def test_training_writes_no_switch_of_the_process() -> None:
    """Nothing but the commands, which have a process of their own, assigns or calls a setter."""
    package = Path(saelens_sparse.__path__[0])
    written: list[str] = []
    for file in package.rglob("*.py"):
        if file.parent in (package / "compare", package / "profile"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                is_switch = node.attr.startswith("allow_") or node.attr == "fp32_precision"
            elif isinstance(node, ast.Attribute):
                path = ast.unparse(node)
                setter = path.startswith(("torch.set_", "torch.use_deterministic"))
                # The store draws from the process's generator, as SAELens does.
                is_switch = setter and path not in ("torch.set_grad_enabled", "torch.set_rng_state")
            else:
                is_switch = False
            if is_switch:
                written.append(f"{file.relative_to(package)}: {ast.unparse(node)}")
    assert written == []


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_nothing_is_screened_while_sums_may_be_float16_and_it_is_said_once(
    backend: Backend, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    screened: list[object] = []
    screen = importlib.import_module("saelens_sparse.ops.screen.gpu").Screen
    original = screen.of

    def spy(*args: Any, **kwargs: Any) -> Any:
        screened.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(screen, "of", spy)
    x, weight, bias = (torch.randn(*shape, device=device) for shape in [(3, 16), (200, 16), (200,)])

    def search() -> tuple[torch.Tensor, torch.Tensor]:
        topk = search_topk(x, weight, bias, None, 2, backend, 2**20).complete().pairs
        threshold = torch.full_like(bias, 8.0)
        found = search_above_threshold(x, weight, bias, threshold, 0.1, 99, backend, 2**20)
        row_counts = found.complete().pairs.row_counts
        assert row_counts is not None
        return topk.latents.view(3, 2).sort().values, row_counts

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="saelens_sparse")
        expected = search()
    assert len(screened) == (2 if backend == "triton" else 0)
    screened.clear()
    with (
        cublas_switch(ACCUMULATION, True),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            assert all(map(torch.equal, search(), expected))
        assert screened == []
        # A screen in bfloat16 has float32 sums whatever this switch says.
        assert float16_product.has_float32_sums(x.bfloat16())
    said = [warning for warning in caught if ACCUMULATION in str(warning.message)]
    assert len(said) == (1 if backend == "triton" else 0)
    package = saelens_sparse.__path__[0]
    assert not any(Path(warning.filename).is_relative_to(package) for warning in said)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae"), [(4096, 2304, 65_536), (4096, 768, 24_576), (128, 16_384, 4096)]
)
def test_trials_on_a_gpu_tell_what_the_switches_say(n_rows: int, d_in: int, d_sae: int) -> None:
    _, weight, out = operands(n_rows, d_in, d_sae, "cuda")
    with cublas_switch(REDUCTION, False):
        assert not rounds_parts(torch.mm, weight, out)
        with cublas_switch(ACCUMULATION, True):
            assert rounds_parts(torch.mm, weight, out)


@pytest.mark.gpu
@pytest.mark.parametrize("may_round_parts", [False, True])
@pytest.mark.parametrize(
    ("n_rows", "d_in", "d_sae"),
    [(1, 2304, 4096), (64, 16_384, 4096), (128, 16_384, 1024), (1000, 765, 24_575)],
)
def test_products_on_a_gpu_have_float32_sums_in_either_state_of_the_switch(
    n_rows: int,
    d_in: int,
    d_sae: int,
    may_round_parts: bool,
) -> None:
    x, weight, out = operands(n_rows, d_in, d_sae, "cuda")
    # Large parts that cancel.
    x[:, : d_in // 2] *= 30
    weight[:, d_in // 2 :] *= 30
    x[:, 0], x[:, -1], weight[:, 0], weight[:, -1] = 60.0, -60.0, 60.3, 60.3
    with cublas_switch(REDUCTION, may_round_parts):
        multiply_float16(x, weight, out)
    exact = x.double() @ weight.double().T
    sizes = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    error = (out - exact).abs()
    inside = exact.abs() < 60_000
    bound = 4.887e-4 * exact.abs() + (d_in / 8 + 16) * 2.0**-22 * sizes
    assert inside.any() and (error <= bound)[inside].all()
