"""
Top-K SAEs of other libraries, with the weights of a case and trained by their own recipes.

Both select latents by their pre-activations alone and keep decoder rows at norm one, where SAELens
selects by pre-activation times decoder norm. They are given `W_dec` divided by its norms, `W_enc`
and `b_enc` times them: then they select the same latents and reconstruct the same, and their
gradients are SAELens's up to these norms.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
from abc import abstractmethod
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from benchmarks.agreement import Trajectory, sample_latents
from benchmarks.cases import NamedCase
from benchmarks.models import Model
from saelens_sparse.profile.cases import Precision
from saelens_sparse.profile.trainers import Inputs

AUXK_COEFFICIENT = 1 / 32
"""dictionary_learning's default. sparsify's is to leave AuxK out, which SAELens never does."""


class Peer(Model):
    """A Top-K SAE of another library and its training step."""

    architecture = "topk"
    """SAELens's name of what it trains."""
    distribution: ClassVar[str]
    """Where it is from, as `pip` names it."""
    names: ClassVar[dict[str, tuple[str, bool]]]
    """By SAELens's name of a parameter, the peer's, and whether that one is transposed."""

    def __init__(self, case: NamedCase, precision: Precision, device: str, inputs: Inputs):
        super().__init__(case, precision, device, inputs)
        self.batches = itertools.cycle(inputs.batches)
        parameters = dict(self.make_sae().named_parameters())
        self.parameters = {name: parameters[peers] for name, (peers, _) in self.names.items()}
        weights = {name: value.to(device, copy=True) for name, value in inputs.weights.items()}
        self.norms = weights["W_dec"].norm(dim=-1)
        weights["W_dec"] /= self.norms[:, None]
        weights["W_enc"] *= self.norms
        weights["b_enc"] *= self.norms
        for name, parameter in self.parameters.items():
            value = weights[name].T if self.names[name][1] else weights[name]
            parameter.detach().copy_(value)

    @classmethod
    @abstractmethod
    def load(cls, device: str) -> Any:
        """The peer's class or module that `make_sae` needs; imports it."""

    @classmethod
    def trains_in(cls, precision: Precision, device: str) -> bool:
        """Whether a training step can be had in that precision."""
        del precision, device
        return True

    @abstractmethod
    def make_sae(self) -> nn.Module:
        """The SAE, in the precision's dtype; made together with what trains it."""

    @abstractmethod
    def train_step(self, x: torch.Tensor) -> torch.Tensor:
        """One step of the peer's trainer on `x`, `[batch, d_in]`; gives its loss."""

    @abstractmethod
    def hold_dead(self, latents: torch.Tensor) -> None:
        """Make the trainer see these latents as dead in the next step."""

    def loss_scale(self, x: torch.Tensor) -> torch.Tensor | float:
        """What its loss on `x`, AuxK aside, is to be multiplied by to be SAELens's `mse_loss`."""
        del x
        return 1.0

    @override
    def step(self) -> object:
        if self.inputs.dead_latents is not None:
            self.hold_dead(self.inputs.dead_latents)
        return self.train_step(next(self.batches))

    @override
    def rehearse(self) -> Trajectory:
        """
        What the first step computes before it updates, in the form of `agreement.first_step`;
        without gradients where AuxK, which each library does differently, would be part of them.
        """
        x = self.inputs.batches[0][: self.case.check_rows]
        scale = self.loss_scale(x)
        trajectory: Trajectory = {}
        with torch.no_grad(), self.autocast():
            trajectory["reconstruction"] = self.forward(x)

        def record(name: str) -> None:
            trajectory[f"gradient of {name}"] = scale * self.gradient(name)[None]

        hooks = self.hook_gradients(record) if self.inputs.dead_latents is None else []
        trajectory["mse_loss"] = scale * self.train_step(x)[None]
        for hook in hooks:
            hook.remove()
        return {name: value.detach().cpu() for name, value in trajectory.items()}

    @override
    def gradient(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        assert parameter.grad is not None
        gradient = parameter.grad.T if self.names[name][1] else parameter.grad
        if name == "W_dec":
            gradient = gradient / self.norms[:, None]
        elif name != "b_dec":
            gradient = gradient * self.norms
        return sample_latents(gradient, self.case.d_sae)

    @classmethod
    def problem(cls, device: str) -> str | None:
        """Why the peer cannot take part here at all, or None where it can."""
        try:
            importlib.metadata.version(cls.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{cls.distribution} is not installed"
        try:
            cls.load(device)
        except Exception as error:
            return f"{cls.distribution} cannot be imported ({type(error).__name__}: {error})"
        return None

    @classmethod
    def version(cls) -> str:
        """The installed peer and its version, as a row records it."""
        return f"{cls.distribution} {importlib.metadata.version(cls.distribution)}"


class Sparsify(Peer):
    """`SparseCoder` of eai-sparsify, and the step of its `Trainer.fit` with Adam."""

    distribution = "eai-sparsify"
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
    def make_sae(self) -> nn.Module:
        case, sparsify = self.case, self.load(self.device)
        config = sparsify.SparseCoderConfig(num_latents=case.d_sae, k=int(case.sparsity))
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
    def hold_dead(self, latents: torch.Tensor) -> None:
        self.tokens_since_fired[latents] = self.dead_threshold + 1

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

    distribution = "dictionary-learning"
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
        return import_module("dictionary_learning.trainers.top_k").TopKTrainer

    @override
    def make_sae(self) -> nn.Module:
        case = self.case
        with torch.device(self.device):
            self.trainer = self.load(self.device)(
                steps=1_000_000,
                activation_dim=case.d_in,
                dict_size=case.d_sae,
                k=int(case.sparsity),
                layer=0,
                lm_name="",
                auxk_alpha=AUXK_COEFFICIENT,
                device=self.device,
            )
        self.n_steps = 0
        return self.trainer.ae.to(self.precision.dtype)

    @override
    def encode(self, x: torch.Tensor) -> Any:
        return self.trainer.ae.encode(x)

    @override
    def decode(self, activations: Any) -> torch.Tensor:
        return self.trainer.ae.decode(activations)

    @override
    def hold_dead(self, latents: torch.Tensor) -> None:
        self.trainer.num_tokens_since_fired[latents] = self.trainer.dead_feature_threshold

    @override
    def train_step(self, x: torch.Tensor) -> torch.Tensor:
        self.n_steps += 1  # not from 0, where it would start b_dec anew
        with self.autocast():
            return torch.tensor(self.trainer.update(self.n_steps, x))
