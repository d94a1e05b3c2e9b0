"""Compiled blocks and CUDA graphs compute what blocks compute; a failing one is left for these."""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from saelens_sparse.language_model import choose_model_path
from saelens_sparse.language_model import compiled as compiled_module
from saelens_sparse.language_model.decoder import Block
from saelens_sparse.language_model.graph import GraphedRun
from tests.support.language_models import (
    DEVICES,
    N_POSITIONS,
    distance,
    hooked_transformer,
    in_dtype,
    prompts,
    proxy,
    stock_activations,
)

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

RESID = "blocks.2.hook_resid_post"


@contextmanager
def no_fallback() -> Generator[None]:
    """Raise where blocks were not compiled, or a graph was not recorded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The language model runs without")
        yield


def check_compiled(model: nn.Module, names: list[str], tokens: torch.Tensor) -> None:
    with no_fallback():
        path = choose_model_path(model, names, n_positions=N_POSITIONS, compiled=True)
        found = path.activations(tokens)
        again = path.activations(tokens)
    stock = stock_activations(model, names, tokens)
    for name in names:
        assert distance(found[name], stock[name].double()) < 2e-6
        assert torch.equal(found[name], again[name])


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "pythia"])
def test_compiled_blocks_agree(family: str) -> None:
    names = ["blocks.1.attn.hook_z", "blocks.2.hook_mlp_out", RESID]
    check_compiled(hooked_transformer(family), names, prompts())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_compiled_blocks_are_as_exact_as_stock(family: str, autocast: bool, device: str) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    model = hooked_transformer(family, dtype).to(device)
    names = ["blocks.1.attn.hook_z", "blocks.2.hook_mlp_out", RESID]
    options: Any = {"n_positions": N_POSITIONS, "autocast": autocast, "compiled": True}
    with no_fallback():
        found = choose_model_path(model, names, **options).activations(prompts())
    stock = stock_activations(model, names, prompts(), autocast)
    exact = stock_activations(in_dtype(model, torch.float64), names, prompts())
    for name in names:
        assert found[name].dtype == stock[name].dtype
        assert distance(found[name], exact[name]) <= 1.2 * distance(stock[name], exact[name])


def test_compiled_blocks_agree_on_padded_prompts() -> None:
    check_compiled(hooked_transformer("llama", pads_left=True), [RESID], prompts(pads=True))


def test_compiled_blocks_of_transformers_agree() -> None:
    check_compiled(proxy("gemma2"), ["model.layers.2", "model.layers.1.mlp"], prompts())


def test_layers_share_their_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph for plain layers, one for the last."""
    counted: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:  # noqa: ARG001
        counted.append(graph)
        return graph.forward

    def compiler() -> Block:
        return torch.compile(compiled_module.own_block(), backend=backend, dynamic=False)

    monkeypatch.setattr(compiled_module, "compile_block", compiler)
    names = ["blocks.3.hook_resid_post"]
    path = choose_model_path(
        hooked_transformer("llama"), names, n_positions=N_POSITIONS, compiled=True
    )
    for _ in range(2):
        path.activations(prompts())
    assert len(counted) == 2


class FailingCompiler:
    """Raises when its block is called, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Any:
        def compiled(*arguments: Any) -> Any:  # noqa: ARG001
            self.calls += 1
            raise RuntimeError("no C++ compiler\nmore lines")

        return compiled


def test_a_failing_compiler_leaves_blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = FailingCompiler()
    monkeypatch.setattr(compiled_module, "compile_block", compiler)
    model = hooked_transformer("gpt2")
    plain = choose_model_path(model, [RESID], n_positions=N_POSITIONS).activations(prompts())
    path = choose_model_path(model, [RESID], n_positions=N_POSITIONS, compiled=True)
    with pytest.warns(
        UserWarning, match="without torch.compile.* RuntimeError: no C\\+\\+ compiler$"
    ):
        found = path.activations(prompts())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = path.activations(prompts())
    assert compiler.calls == 1 and path.choice.path == "fast"
    assert torch.equal(found[RESID], plain[RESID]) and torch.equal(again[RESID], plain[RESID])


def test_what_is_not_the_compilers_fault_is_raised() -> None:
    """Tokens beyond the vocabulary fail with and without a compiler."""
    path = choose_model_path(
        hooked_transformer("gpt2"), [RESID], n_positions=N_POSITIONS, compiled=True
    )
    with no_fallback(), pytest.raises(IndexError):
        path.activations(prompts() + 10_000)


def test_a_graph_is_only_recorded_on_a_cuda_device() -> None:
    calls: list[torch.Tensor] = []

    def count(tokens: torch.Tensor, padding: Any = None) -> dict[Any, Any]:  # noqa: ARG001
        calls.append(tokens)
        return {}

    run = GraphedRun(count, torch.device("cpu"))
    for _ in range(3):
        assert run(prompts()) == {}
    assert len(calls) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda:0", pytest.param("cuda:1", marks=two_gpus)])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_graph_replays_what_was_recorded(
    family: str, compiled: bool, autocast: bool, device: str
) -> None:
    """On the current device, and on another."""
    model = hooked_transformer(family, pads_left=True).to(device)
    names = [RESID, "blocks.1.attn.hook_z"]
    options: Any = {"n_positions": N_POSITIONS, "autocast": autocast, "compiled": compiled}
    with no_fallback():
        path = choose_model_path(model, names, cuda_graph=True, **options)
        path.activations(prompts())
    plain = choose_model_path(model, names, **options)
    for tokens in (prompts(), prompts().flip(0), prompts(pads=True), prompts()[:3]):
        first = path.activations(tokens)
        path.activations(prompts().roll(1, 0))  # must not write into `first`
        for name, expected in plain.activations(tokens).items():
            assert torch.equal(first[name], expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert torch.equal(path.activations(prompts())[RESID], plain.activations(prompts())[RESID])
