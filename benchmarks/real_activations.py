"""Activations of SmolLM2-135M on real text, without a network, and what an SAE makes of them there.

The text is Python's documentation, then docstrings of installed packages.
"""

from __future__ import annotations

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import TrainingSAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelens_sparse.compare.embedded_inputs import make_model, make_once

LAYER, CONTEXT = 8, 128
PROMPTS = 32
"""How many are run at once; and how many are kept apart, of which no activation is trained on."""


@dataclass
class RealActivations:
    """
    Activations after a layer, and prompts that are not among them.

    Attributes:
        rows: `[n_tokens, d_in]` float16, in random order, times `scale`.
        prompts: `[PROMPTS, CONTEXT]` tokens.
        scale: what gives rows a mean norm of about the square root of d_in.
    """

    rows: torch.Tensor
    prompts: torch.Tensor
    scale: float


def texts() -> Iterator[str]:
    """Python's documentation, then docstrings of the installed packages."""
    yield from pydoc_data.topics.topics.values()
    for folder in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text())
            except (SyntaxError, ValueError, OSError):
                continue
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            docs = (ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, documented))
            if text := "\n\n".join(filter(None, docs)):
                yield text


def prompts_of(tokenizer: Any) -> Iterator[torch.Tensor]:
    """Tokens `[PROMPTS, CONTEXT]`, as long as there is text for them."""
    tokens: list[int] = []
    size = PROMPTS * CONTEXT
    for text in texts():
        tokens += [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
        while len(tokens) >= size:
            yield torch.tensor(tokens[:size]).view(PROMPTS, CONTEXT)
            tokens = tokens[size:]


@torch.no_grad()
def make_activations(folder: Path, n_tokens: int, device: str) -> RealActivations:
    """
    Run the model on text.

    Args:
        folder: of the model, which is made where there is none.
        n_tokens: number of rows.
        device: of the model.

    Raises:
        ValueError: there is not so much text.
    """
    make_once(folder, make_model)
    model = _model(folder, torch.device(device))
    model.model.layers = model.model.layers[: LAYER + 1]
    model.model.norm = torch.nn.Identity()
    batches = prompts_of(AutoTokenizer.from_pretrained(folder))
    apart, rows, n_rows = next(batches), list[torch.Tensor](), 0
    while n_rows < n_tokens:
        if (prompts := next(batches, None)) is None:
            raise ValueError(f"there is text for {n_rows} tokens only; got --tokens {n_tokens}")
        hidden = model.model(prompts.to(device)).last_hidden_state[:, 1:]  # the first is an outlier
        rows.append(hidden.flatten(0, 1).half().cpu())
        n_rows += rows[-1].shape[0]
    pool = torch.cat(rows)[:n_tokens]
    norm = pool[:: max(1, n_tokens // 10_000)].float().norm(dim=1).mean()
    scale = (pool.shape[1] ** 0.5 / norm).item()
    return RealActivations(pool[torch.randperm(n_tokens)].mul_(scale), apart, scale)


@torch.no_grad()
def loss_recovered(folder: Path, real: RealActivations, sae: TrainingSAE[Any]) -> float:
    """
    Share of the cross-entropy loss that reconstructions recover, of what zeros lose.

    The first position of a prompt stays as it is.

    Args:
        folder: of the model.
        real: has the prompts.
        sae: trained on its rows.
    """
    model = _model(folder, sae.device)

    def reconstruct(hidden: torch.Tensor) -> torch.Tensor:
        return sae.decode(sae.encode(hidden * real.scale)) / real.scale

    prompts = real.prompts.to(sae.device)
    zeroed, patched, clean = (
        _cross_entropy(model, prompts, patch)
        for patch in (torch.zeros_like, reconstruct, torch.clone)
    )
    return (zeroed - patched) / (zeroed - clean)


def _model(folder: Path, device: torch.device) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device)


def _cross_entropy(
    model: Any, prompts: torch.Tensor, patch: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Of next tokens, with the activations patched from the second position on."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, 1:] = patch(hidden[:, 1:])

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    try:
        losses = [
            F.cross_entropy(model(part).logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
            for part in prompts.split(8)
        ]
    finally:
        handle.remove()
    return torch.stack(losses).mean().item()
