"""
Time what computes a language model's activations at a hook point, per 4,096 tokens.

    python -m benchmarks.model_path [--cases gpt2,gemma2] [--contenders ...] [--tiny]

For each case, models of random weights are made on the device: one of TransformerLens and one of
transformers, up to the hook. SAELens's own path is timed first. The fast path of each model is
timed eagerly, compiled, and as a CUDA graph, after its activations were compared with SAELens's
in float32.
`--tiny` runs the same on a CPU in a minute.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from sae_lens.load_model import HookedProxyLM
from torch import Tensor, nn

from benchmarks.language_models import (
    GEMMA2,
    GPT2,
    LLAMA_8B,
    LLAMA_OF_GEMMA2_SHAPE,
    ModelShape,
    transformer_lens_model,
    transformers_model,
)
from benchmarks.rows import ResultsFile
from saelens_sparse.language_model import ModelPath, choose_model_path
from saelens_sparse.profile.measure import GIB, time_calls
from saelens_sparse.reports.results import environment

TOKENS = 4096
MAX_ERROR_RATIO = 1.2
"""How much farther from float32's activations a path may be than SAELens's in lower precision."""
MAX_FLOAT32_DISTANCE = 1e-4
"""How far a path may be from SAELens's activations in float32, relative norm."""


@dataclass(frozen=True)
class ModelCase:
    """
    A model, and the batch that it gets.

    Attributes:
        shape: the model's. A prompt has its `n_positions`.
        precisions: of the weights' dtype, or "autocast" for float32 weights.
        n_prompts: of a batch.
    """

    shape: ModelShape
    precisions: tuple[str, ...]
    n_prompts: int

    @property
    def tiny(self) -> ModelCase:
        """A case of the same kind for a CPU."""
        return replace(self, shape=self.shape.tiny, n_prompts=2)


CASES = {
    "gpt2": ModelCase(GPT2, ("autocast", "bfloat16", "float32"), 64),
    "llama_of_gemma2_shape": ModelCase(
        LLAMA_OF_GEMMA2_SHAPE, ("autocast", "bfloat16", "float32"), 8
    ),
    "gemma2": ModelCase(GEMMA2, ("autocast", "bfloat16"), 8),
    "llama_8b": ModelCase(LLAMA_8B, ("bfloat16",), 4),
}


def make_model(case: ModelCase, library: str, dtype: torch.dtype, device: str) -> Any:
    """The model of a library. No logits are wanted."""
    if library == "TL":
        return transformer_lens_model(case.shape, dtype, device, unembeds=False)
    return transformers_model(case.shape, dtype, device)


@dataclass(frozen=True)
class Contender:
    """A path and how it runs."""

    name: str
    option: str
    compiled: bool = False
    cuda_graph: bool = False


CONTENDERS = (
    Contender("saelens", "saelens"),
    Contender("eager", "auto"),
    Contender("graph", "auto", cuda_graph=True),
    Contender("compiled", "auto", compiled=True),
    Contender("compiled_graph", "auto", compiled=True, cuda_graph=True),
)


@contextmanager
def no_fallback() -> Generator[None]:
    """Raise where a path, a compiler or a CUDA graph was asked for and not taken."""
    with warnings.catch_warnings():
        for message in ("Activations are computed by SAELens", "The language model runs without"):
            warnings.filterwarnings("error", message)
        yield


def path_of(
    contender: Contender, model: nn.Module, name: str, case: ModelCase, precision: str
) -> ModelPath:
    """The contender's path, which must be the one that it names."""
    with no_fallback():
        return choose_model_path(
            model,
            [name],
            option="saelens" if contender.option == "saelens" else "auto",
            autocast=precision == "autocast",
            n_positions=case.shape.n_positions,
            compiled=contender.compiled,
            cuda_graph=contender.cuda_graph,
        )


def reference(case: ModelCase, precision: str, library: str, model: Any, tokens: Tensor) -> Tensor:
    """SAELens's activations in float32, `[n_prompts, n_positions, d_model]`."""
    wide = model
    if precision == "bfloat16" and library == "TL":
        wide = make_model(case, library, torch.float32, str(tokens.device))
        weights = {
            name: value for name, value in model.state_dict().items() if "rotary" not in name
        }
        wide.load_state_dict(weights, strict=False)
    elif precision == "bfloat16":
        inner = copy.deepcopy(model.model).float()
        for module in inner.modules():
            module._forward_hooks.clear()
        wide = HookedProxyLM(inner, model.tokenizer, hook_names=[case.shape.hook_name(library)])
    name = case.shape.hook_name(library)
    path = path_of(CONTENDERS[0], wide, name, case, "float32")
    return path.activations(tokens)[name]


def measure(
    case: ModelCase, precision: str, library: str, device: str, repeats: int, only: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Rows of one model: stock's, then those of the fast path after a check."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model, name = make_model(case, library, dtype, device), case.shape.hook_name(library)
    generator = torch.Generator().manual_seed(0)
    shape = (case.n_prompts, case.shape.n_positions)
    tokens = torch.randint(case.shape.vocabulary, shape, generator=generator).to(device)
    expected = reference(case, precision, library, model, tokens)
    largest = MAX_FLOAT32_DISTANCE
    for contender in CONTENDERS:
        if contender.name not in ("saelens", *only):
            continue
        path = path_of(contender, model, name, case, precision)
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with no_fallback():
            found = path.activations(tokens)[name].float()
        if device == "cuda":
            torch.cuda.synchronize()
        first_call = time.perf_counter() - start
        error = float((found - expected).norm() / expected.norm())
        if contender.name == "saelens" and precision != "float32":
            largest = MAX_ERROR_RATIO * error
        if not error <= largest:
            raise AssertionError(f"{contender.name} is off by {error:.1e}, allowed: {largest:.1e}")
        timed = time_calls(lambda path=path: path.activations(tokens), device, repeats)
        per_batch = TOKENS / tokens.numel()
        row = timed.to_row()
        yield {
            "library": library,
            "arm": contender.name,
            "ms_per_4096": per_batch * row["ms"],
            "ms_min_per_4096": per_batch * row["ms_min"],
            "first_call_s": first_call,
            "error": error,
            "peak_gib_above": ((timed.peak_bytes or 0) - (timed.before_bytes or 0)) / GIB,
            **row,
        }
        del path, found
        if device == "cuda":
            torch.cuda.empty_cache()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--precisions", help="default: those of the case")
    parser.add_argument("--libraries", default="TL,HF")
    parser.add_argument("--contenders", default=",".join(names), help="besides saelens")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not options.tiny else "cpu"
    results = options.results and ResultsFile(options.results, environment(device, None))
    print(
        f"{'case':24}{'precision':11}{'path':19}{'ms per 4,096':>13}{'first call, s':>14}"
        f"{'error':>12}{'peak, GiB':>10}"
    )
    for name in options.cases.split(","):
        case = CASES[name].tiny if options.tiny else CASES[name]
        precisions = options.precisions.split(",") if options.precisions else case.precisions
        for precision, library in product(precisions, options.libraries.split(",")):
            only = options.contenders.split(",")
            for row in measure(case, precision, library, device, options.repeats, only):
                print(
                    f"{name:24}{precision:11}{library + ' ' + row['arm']:19}"
                    f"{row['ms_per_4096']:13.3f}{row['first_call_s']:14.2f}"
                    f"{row['error']:12.1e}{row['peak_gib_above']:10.2f}",
                    flush=True,
                )
                if results:
                    key = {"case": name, "precision": precision, "n_prompts": case.n_prompts}
                    results.append({**key, **asdict(case.shape), **row})


if __name__ == "__main__":
    main()
