"""
Top-K SAEs of other libraries, with the weights of a case and trained by their own recipes.

Both select latents by their pre-activations alone and keep decoder rows at norm one, where SAELens
selects by pre-activation times decoder norm. They are given `W_dec` divided by its norms, `W_enc`
and `b_enc` times them: then they select the same latents and reconstruct the same, and their
gradients are SAELens's up to these norms.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch
from typing_extensions import override

from benchmarks.agreement import Trajectory, sample_latents
from saelens_sparse.profile.cases import (
    DICTIONARY_LEARNING,
    SPARSIFY,
    Arm,
    Case,
    Precision,
)
from saelens_sparse.profile.trainers import Inputs

AUXK_COEFFICIENT = 1 / 32
"""dictionary_learning's default. sparsify's is to leave AuxK out, which SAELens never does."""


class Peer(ABC):
    """
    A Top-K SAE of another library and its training step.

    Args:
        case: Sizes.
        precision: Weights and inputs have its dtype.
        device: "cuda" or "cpu".
        inputs: Its weights are stock's.
    """

    names: ClassVar[dict[str, tuple[str, bool]]]
    """By SAELens's name of a parameter, the peer's, and whether that one is transposed."""
    note: ClassVar[str]
    """What differs from stock in a training step; recorded with its rows."""
    module: torch.nn.Module

    def __init__(self, case: Case, precision: Precision, device: str, inputs: Inputs):
        self.case = case
        self.precision = precision
        self.device = device
        self.dead_latents = inputs.dead_latents
        self.module = self.build()
        parameters = dict(self.module.named_parameters())
        self.parameters = {name: parameters[peers] for name, (peers, _) in self.names.items()}

        weights = {name: value.to(device, copy=True) for name, value in inputs.weights.items()}
        self.norms = weights["W_dec"].norm(dim=-1)
        weights["W_dec"] /= self.norms[:, None]
        weights["W_enc"] *= self.norms
        weights["b_enc"] *= self.norms
        for name, parameter in self.parameters.items():
            self._in_stock_layout(name, parameter.detach()).copy_(weights[name])

    @classmethod
    @abstractmethod
    def load(cls, device: str) -> Any:
        """The peer's class or module that `build` needs; imports it."""

    @classmethod
    def trains_in(cls, precision: Precision, device: str) -> bool:
        """Whether a training step can be had in that precision."""
        del precision, device
        return True

    @abstractmethod
    def build(self) -> torch.nn.Module:
        """The SAE, in the precision's dtype; made together with what trains it."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Any:
        """Activations, in the form that `decode` takes."""

    @abstractmethod
    def decode(self, activations: Any) -> torch.Tensor:
        """The reconstruction `[batch, d_in]`."""

    @abstractmethod
    def train_step(self, x: torch.Tensor) -> torch.Tensor:
        """One step of the peer's trainer on `x`, `[batch, d_in]`; gives its loss."""

    @abstractmethod
    def hold_dead(self) -> None:
        """Make the trainer see the case's dead latents, if any, as dead in the next step."""

    def loss_scale(self, x: torch.Tensor) -> torch.Tensor | float:
        """What its loss on `x`, AuxK aside, is to be multiplied by to be SAELens's `mse_loss`."""
        del x
        return 1.0

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision.autocast)

    def rehearse(self, x: torch.Tensor) -> Trajectory:
        """
        What the first step on `x` computes before it updates, in the form of
        `agreement.first_step`; without gradients where AuxK, which each library does differently,
        would be part of them.
        """
        with torch.no_grad(), self.autocast():
            trajectory = {"reconstruction": self.decode(self.encode(x))}
        gradients: Trajectory = {}

        def record(name: str, parameter: torch.nn.Parameter) -> None:
            gradients[name] = self.stock_gradient(name, parameter)

        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(record, name))
            for name, parameter in self.parameters.items()
        ]
        scale = self.loss_scale(x)
        trajectory["mse_loss"] = scale * self.train_step(x)[None]
        for hook in hooks:
            hook.remove()
        if self.dead_latents is None:
            trajectory |= {f"gradient of {n}": scale * g[None] for n, g in gradients.items()}
        return {name: value.detach().cpu() for name, value in trajectory.items()}

    def stock_gradient(self, name: str, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of SAELens's parameter of that name, at the latents of `sample_latents`."""
        assert parameter.grad is not None
        gradient = self._in_stock_layout(name, parameter.grad)
        if name == "W_dec":
            gradient = gradient / self.norms[:, None]
        elif name != "b_dec":
            gradient = gradient * self.norms
        return sample_latents(gradient, self.case.d_sae)

    def _in_stock_layout(self, name: str, value: torch.Tensor) -> torch.Tensor:
        return value.T if self.names[name][1] else value


class Sparsify(Peer):
    """`SparseCoder` of eai-sparsify, and the step of its `Trainer.fit` with Adam."""

    names: ClassVar[dict[str, tuple[str, bool]]] = {
        "W_enc": ("encoder.weight", True),
        "b_enc": ("encoder.bias", False),
        "W_dec": ("W_dec", False),
        "b_dec": ("b_dec", False),
    }
    note = (
        "its own recipe: fraction of variance unexplained, decoder norms of one, "
        "no clipping, foreach Adam; AuxK trains nothing in its encoder"
    )
    dead_threshold = 10_000_000

    @override
    @classmethod
    def load(cls, device: str) -> Any:
        if device == "cpu":
            os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # read at import
        return import_module("sparsify")

    @override
    @classmethod
    def trains_in(cls, precision: Precision, device: str) -> bool:
        # Its forward pass turns autocast on by itself wherever there is a GPU.
        return device == "cpu" or precision.autocast

    @override
    def build(self) -> torch.nn.Module:
        case, sparsify = self.case, self.load(self.device)
        config = sparsify.SparseCoderConfig(num_latents=case.d_sae, k=case.k)
        self.sae = sparsify.SparseCoder(case.d_in, config, self.device, self.precision.dtype)
        lr = 2e-4 / (case.d_sae / 2**14) ** 0.5
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=lr)
        since_fired = torch.zeros(case.d_sae, device=self.device, dtype=torch.long)
        self.tokens_since_fired = since_fired
        self.did_fire = torch.zeros_like(since_fired, dtype=torch.bool)
        self.average_fvu = 0.0
        return self.sae

    @override
    def encode(self, x: torch.Tensor) -> Any:
        return self.sae.encode(x)

    @override
    def decode(self, activations: Any) -> torch.Tensor:
        return self.sae.decode(activations.top_acts, activations.top_indices)

    @override
    def loss_scale(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(0)).pow(2).sum() / len(x)

    @override
    def hold_dead(self) -> None:
        if self.dead_latents is not None:
            self.tokens_since_fired[self.dead_latents] = self.dead_threshold + 1

    @override
    def train_step(self, x: torch.Tensor) -> torch.Tensor:
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(
            x,
            dead_mask=self.tokens_since_fired > self.dead_threshold,
            total_variance=(x - x.mean(0)).pow(2).sum(),
        )
        self.did_fire[out.latent_indices.flatten()] = True
        self.average_fvu += float(out.fvu.detach())
        loss = out.fvu + AUXK_COEFFICIENT * out.auxk_loss
        loss.backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[self.did_fire] = 0
        self.did_fire.zero_()
        return loss.detach()


class DictionaryLearning(Peer):
    """`AutoEncoderTopK` of dictionary-learning, and its `TopKTrainer.update`."""

    names: ClassVar[dict[str, tuple[str, bool]]] = {
        "W_enc": ("encoder.weight", True),
        "b_enc": ("encoder.bias", False),
        "W_dec": ("decoder.weight", True),
        "b_dec": ("b_dec", False),
    }
    note = "its own recipe: decoder norms of one, AuxK after the ReLU and on its own scale"

    @override
    @classmethod
    def load(cls, device: str) -> Any:
        del device
        name = "dictionary_learning"
        try:
            trainers = import_module(f"{name}.trainers.top_k")
        except ModuleNotFoundError:
            # The package's own __init__ wants nnsight, which reads activations from language models
            # and which none of its trainers uses: enter the package without it.
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise
            sys.modules[name] = importlib.util.module_from_spec(spec)
            trainers = import_module(f"{name}.trainers.top_k")
        return trainers.TopKTrainer

    @override
    def build(self) -> torch.nn.Module:
        case = self.case
        with torch.device(self.device):
            self.trainer = self.load(self.device)(
                steps=1_000_000,
                activation_dim=case.d_in,
                dict_size=case.d_sae,
                k=case.k,
                layer=0,
                lm_name="",
                auxk_alpha=AUXK_COEFFICIENT,
                device=self.device,
            )
        self.step = 0
        return self.trainer.ae.to(self.precision.dtype)

    @override
    def encode(self, x: torch.Tensor) -> Any:
        return self.trainer.ae.encode(x)

    @override
    def decode(self, activations: Any) -> torch.Tensor:
        return self.trainer.ae.decode(activations)

    @override
    def hold_dead(self) -> None:
        if self.dead_latents is not None:
            threshold = self.trainer.dead_feature_threshold
            self.trainer.num_tokens_since_fired[self.dead_latents] = threshold

    @override
    def train_step(self, x: torch.Tensor) -> torch.Tensor:
        self.step += 1  # not from 0, where it would start b_dec anew
        with self.autocast():
            return torch.tensor(self.trainer.update(self.step, x))


PEERS: dict[str, type[Peer]] = {
    SPARSIFY.name: Sparsify,
    DICTIONARY_LEARNING.name: DictionaryLearning,
}


def build_peer(arm: Arm, case: Case, precision: Precision, device: str, inputs: Inputs) -> Peer:
    """The peer that the arm stands for."""
    return PEERS[arm.name](case, precision, device, inputs)


def peer_problem(arm: Arm, device: str) -> str | None:
    """Why a peer cannot take part here at all, or None where it can."""
    assert arm.peer is not None
    try:
        importlib.metadata.version(arm.peer)
    except importlib.metadata.PackageNotFoundError:
        return f"{arm.peer} is not installed"
    try:
        PEERS[arm.name].load(device)
    except Exception as error:
        return f"{arm.peer} cannot be imported ({type(error).__name__}: {error})"
    return None


def peer_version(arm: Arm) -> str:
    """The installed peer and its version, as a row records it."""
    assert arm.peer is not None
    return f"{arm.peer} {importlib.metadata.version(arm.peer)}"
