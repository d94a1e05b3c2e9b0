"""
Time the parts of a sparse SAE that published kernels report, against SAELens's own.

    saelens-sparse bench forward --cases flash_sae

`decode` is `sae.decode(feature_acts)` on activations encoded beforehand, `forward` is `sae(x)`,
both without gradients; `forward_backward` adds the backward of a mean squared error, and no
optimizer. Arms are checked, timed and recorded as by `saelens-sparse bench step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from benchmarks.agreement import Trajectory, sample_latents
from benchmarks.contest import Contest, Heat
from benchmarks.peers import Peer
from benchmarks.session import main_of
from saelens_sparse.profile.cases import (
    DICTIONARY_LEARNING,
    FORWARD_CASES,
    FORWARD_GROUPS,
    SPARSE,
    SPARSIFY,
    STOCK,
    STOCK_TF32,
    Arm,
    Precision,
)
from saelens_sparse.profile.measure import measure_calls
from saelens_sparse.profile.trainers import build_sae, implementation_of
from saelens_sparse.reports.results import Row


@dataclass
class Pass:
    """An SAE, a batch for it and the autocast that they run under."""

    sae: TrainingSAE[Any]
    x: torch.Tensor
    autocast: torch.autocast

    @property
    def implementation(self) -> str | None:
        return implementation_of(self.sae, self.autocast)

    @torch.no_grad()
    def encode(self) -> Any:
        with self.autocast:
            return self.sae.encode_with_hidden_pre(self.x)[0]

    @torch.no_grad()
    def decode(self, activations: Any) -> torch.Tensor:
        with self.autocast:
            return self.sae.decode(activations)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        with self.autocast:
            return self.sae(self.x)

    def forward_backward(self) -> None:
        self.sae.zero_grad()
        with self.autocast:
            loss = torch.nn.functional.mse_loss(self.sae(self.x), self.x)
        loss.backward()

    def forget_gradients(self) -> None:
        self.sae.zero_grad()

    def gradients(self, d_sae: int) -> Trajectory:
        return {
            name: sample_latents(parameter.grad, d_sae)
            for name, parameter in self.sae.named_parameters()
            if parameter.grad is not None
        }


@dataclass
class PeerPass:
    """A `Pass` of another library's SAE."""

    peer: Peer
    x: torch.Tensor
    implementation = None

    @torch.no_grad()
    def encode(self) -> Any:
        with self.peer.autocast():
            return self.peer.encode(self.x)

    @torch.no_grad()
    def decode(self, activations: Any) -> torch.Tensor:
        with self.peer.autocast():
            return self.peer.decode(activations)

    def forward(self) -> torch.Tensor:
        return self.decode(self.encode())

    def forward_backward(self) -> None:
        self.forget_gradients()
        with self.peer.autocast():
            recons = self.peer.decode(self.peer.encode(self.x))
            loss = torch.nn.functional.mse_loss(recons, self.x)
        loss.backward()

    def forget_gradients(self) -> None:
        self.peer.module.zero_grad()

    def gradients(self, d_sae: int) -> Trajectory:
        assert d_sae == self.peer.case.d_sae
        parameters = self.peer.parameters.items()
        return {name: self.peer.stock_gradient(name, parameter) for name, parameter in parameters}


class ForwardContest(Contest[Pass | PeerPass]):
    """Decode, forward, and forward with backward."""

    operations = ("decode", "forward", "forward_backward")
    cases = FORWARD_CASES
    groups = FORWARD_GROUPS
    arms = (STOCK, STOCK_TF32, SPARSE, SPARSIFY, DICTIONARY_LEARNING)

    @override
    def build(self, arm: Arm, precision: Precision, heat: Heat) -> Pass:
        return Pass(
            sae=build_sae(arm, heat.case, precision, self.device, heat.inputs.weights),
            x=heat.inputs.batches[0].to(precision.dtype),
            autocast=torch.autocast(self.device, torch.bfloat16, enabled=precision.autocast),
        )

    @override
    def build_peer(self, peer: Peer, heat: Heat) -> PeerPass:
        return PeerPass(peer, heat.inputs.batches[0])

    @override
    def observe(self, contender: Pass | PeerPass, heat: Heat) -> Trajectory:
        contender.forward_backward()
        gradients = contender.gradients(heat.case.d_sae)
        trajectory = {
            "decoded": contender.decode(contender.encode()),
            "reconstruction": contender.forward(),
            **{f"gradient of {name}": gradient for name, gradient in gradients.items()},
        }
        return {name: value.cpu() for name, value in trajectory.items()}

    @override
    def measure(self, contender: Pass | PeerPass, operation: str, heat: Heat) -> Row:
        contender.forget_gradients()
        activations = contender.encode() if operation == "decode" else None
        calls = {
            "decode": partial(contender.decode, activations),
            "forward": contender.forward,
            "forward_backward": contender.forward_backward,
        }
        measured = measure_calls(calls[operation], self.device, self.steps)
        return {"implementation": contender.implementation, **measured}


def main(argv: Sequence[str]) -> int:
    return main_of("forward", ForwardContest, argv)
