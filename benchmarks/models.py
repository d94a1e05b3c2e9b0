"""What contenders bring to a benchmark: an SAE with the weights of a case, and its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from torch import nn
from typing_extensions import override

from benchmarks.agreement import CHECK_STEPS, Trajectory, sample_latents
from benchmarks.cases import NamedCase
from benchmarks.rows import Row
from saelens_sparse.profile.cases import Precision
from saelens_sparse.profile.measure import time_calls, time_steps
from saelens_sparse.profile.recording import phase_ms
from saelens_sparse.profile.trainers import (
    Inputs,
    build_trainer,
    hold_dead,
    implementation_of,
    take_step,
    train_step,
)
from saelens_sparse.whole_run.clock import Stopwatch

TIMED_SECONDS = 1.5
"""Slow steps are timed for about as long, `LEAST_STEPS` of them at least."""
LEAST_STEPS = 5


class Model(ABC):
    """
    An SAE and its training step.

    Args:
        case: Sizes.
        precision: In which it computes.
        device: "cuda" or "cpu".
        inputs: Batches, and weights that stay as they are.
    """

    note: str | None = None
    """What differs from stock in a training step; recorded with its rows."""
    parameters: dict[str, nn.Parameter]
    """By SAELens's names."""

    def __init__(self, case: NamedCase, precision: Precision, device: str, inputs: Inputs):
        self.case = case
        self.precision = precision
        self.device = device
        self.inputs = inputs

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Any:
        """Activations, in the form that `decode` takes; `x` is `[batch, d_in]`."""

    @abstractmethod
    def decode(self, activations: Any) -> torch.Tensor:
        """The reconstruction `[batch, d_in]`."""

    @abstractmethod
    def step(self) -> object:
        """One training step on the next batch."""

    @abstractmethod
    def rehearse(self) -> Trajectory:
        """Take training steps and record what they did, on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))

    def gradient(self, name: str) -> torch.Tensor:
        """The gradient of SAELens's parameter of that name, at the latents of `sample_latents`."""
        gradient = self.parameters[name].grad
        assert gradient is not None
        return sample_latents(gradient, self.case.d_sae)

    @property
    def implementation(self) -> str | None:
        """What a sparse SAE's next call runs on; None for others."""
        return None

    @property
    def x(self) -> torch.Tensor:
        """A batch `[batch, d_in]` in the precision's dtype."""
        return self.inputs.batches[0].to(self.precision.dtype)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision.autocast)

    def forward_backward(self, x: torch.Tensor) -> None:
        """A forward pass on `x`, and the gradients of its mean squared error."""
        self.forget_gradients()
        with self.autocast():
            loss = nn.functional.mse_loss(self.forward(x), x)
        loss.backward()

    def forget_gradients(self) -> None:
        """Free them."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def time_training(self, steps: int) -> Row:
        """Time whole steps."""
        return time_calls(self.step, self.device, self.affordable(steps)).to_row()

    def affordable(self, steps: int) -> int:
        """How many of `steps` steps to time, by the time of one."""
        watch = Stopwatch(self.device)
        self.step()
        start = watch.mark()
        self.step()
        seconds = watch.milliseconds(start, watch.mark()) / 1e3
        return min(steps, max(LEAST_STEPS, round(TIMED_SECONDS / seconds)))

    def hook_gradients(self, record: Callable[[str], None]) -> list[Any]:
        """Call `record` with a parameter's name once its gradient is whole; gives the hooks."""
        return [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: record(name))
            for name, parameter in self.parameters.items()
        ]


class SAELensModel(Model):
    """
    SAELens's SAE or the sparse one, with its trainer.

    Args:
        case: Sizes.
        precision: In which it computes.
        device: "cuda" or "cpu".
        inputs: Batches, and weights that stay as they are.
        sparse: Whether it is the sparse SAE.
        sparse_runner: Whether its steps are those of `SparseTrainingRunner`.
    """

    def __init__(
        self,
        case: NamedCase,
        precision: Precision,
        device: str,
        inputs: Inputs,
        *,
        sparse: bool,
        sparse_runner: bool,
    ):
        super().__init__(case, precision, device, inputs)
        self.trainer = build_trainer(
            case.architecture if sparse else case.registered.stock,
            case,
            precision,
            device,
            inputs.batches,
            inputs.weights,
            sparse_runner=sparse_runner,
        )
        self.sae: TrainingSAE[Any] = self.trainer.sae
        self.parameters = dict(self.sae.named_parameters())

    @property
    @override
    def implementation(self) -> str | None:
        return implementation_of(self.sae, self.autocast())

    @override
    def encode(self, x: torch.Tensor) -> Any:
        return self.sae.encode_with_hidden_pre(x)[0]

    @override
    def decode(self, activations: Any) -> torch.Tensor:
        return self.sae.decode(activations)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sae(x)

    @override
    def step(self) -> object:
        return take_step(self.trainer, self.inputs)

    @override
    def rehearse(self) -> Trajectory:
        """
        Every loss term by step, the first and the last reconstruction, how often each latent fired,
        each parameter's gradient of the first step and its change by all (see `sample_latents`).
        The later steps are taken as timed ones are: without hooks on parameters, for which
        `SparseSAETrainer` would hold gradients in buffers.
        """
        checked_part = partial(sample_latents, d_sae=self.case.d_sae)
        before = {name: checked_part(value) for name, value in self.parameters.items()}
        trajectory: Trajectory = {}

        def record(name: str) -> None:
            trajectory[f"gradient of {name}"] = self.gradient(name)[None]

        hooks = self.hook_gradients(record)
        losses: dict[str, list[torch.Tensor]] = defaultdict(list)
        for batch in self.inputs.batches[:CHECK_STEPS]:
            hold_dead(self.trainer, self.inputs.dead_latents)
            try:
                output = train_step(self.trainer, batch[: self.case.check_rows])
            finally:  # a parameter's hook holds the model, and no collector sees that
                while hooks:
                    hooks.pop().remove()
            for name, loss in {"loss": output.loss, **output.losses}.items():
                losses[name].append(loss.detach())
            trajectory["reconstruction"] = output.sae_out.detach()
            trajectory.setdefault("reconstruction of the first step", trajectory["reconstruction"])

        trajectory |= {name: torch.stack(values) for name, values in losses.items()}
        trajectory["firing counts"] = self.trainer.act_freq_scores
        for name, parameter in self.parameters.items():
            trajectory[f"change of {name}"] = checked_part(parameter) - before[name]
        return {name: value.cpu() for name, value in trajectory.items()}

    @override
    def time_training(self, steps: int) -> Row:
        """Time whole steps, then the phases of other steps, and say how latents fired."""
        timed = time_steps(self.trainer, self.inputs, self.affordable(steps))
        row, firing = timed.to_row(), timed.firing
        return {
            "implementation": self.implementation,
            **row,
            "tokens_per_second": 1e3 * self.case.batch / row["ms"],
            "metrics": timed.metrics,
            "firing": {
                "l0": firing.sum().item(),
                "max_fraction": firing.max().item(),
                "never": (firing == 0).float().mean().item(),
            },
            "phases_ms": phase_ms(self.trainer, self.inputs),
        }
