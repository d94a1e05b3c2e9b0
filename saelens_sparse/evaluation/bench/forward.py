"""
Time the parts of a sparse SAE that published kernels report, against SAELens's own.

    python -m saelens_sparse.evaluation.bench.forward --cases flash_sae

`decode` is `sae.decode(feature_acts)` on activations encoded beforehand, `forward` is `sae(x)`,
both without gradients; `forward_backward` adds the backward of a mean squared error, and no
optimizer. Arms are checked, timed and recorded as in `saelens_sparse.evaluation.bench.train_step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from sae_lens.saes.sae import TrainingSAE
from typing_extensions import override

from saelens_sparse.evaluation.bench.agreement import Trajectory, sample_latents
from saelens_sparse.evaluation.bench.contest import Contest, Heat, run_contest
from saelens_sparse.evaluation.cases import (
    DEFAULT_FORWARD_CASES,
    FORWARD_CASES,
    SPARSE,
    STOCK,
    STOCK_TF32,
    Arm,
    Precision,
)
from saelens_sparse.evaluation.measure import measure_calls
from saelens_sparse.evaluation.results import Row
from saelens_sparse.evaluation.training import build_sae, implementation_of


@dataclass
class Pass:
    """An SAE, a batch for it and the autocast that they run under."""

    sae: TrainingSAE[Any]
    x: torch.Tensor
    autocast: torch.autocast

    @torch.no_grad()
    def encode(self) -> torch.Tensor:
        with self.autocast:
            return self.sae.encode_with_hidden_pre(self.x)[0]

    @torch.no_grad()
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        with self.autocast:
            return self.sae.decode(feature_acts)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        with self.autocast:
            return self.sae(self.x)

    def forward_backward(self) -> None:
        self.sae.zero_grad()
        with self.autocast:
            loss = torch.nn.functional.mse_loss(self.sae(self.x), self.x)
        loss.backward()


class ForwardContest(Contest[Pass]):
    """Decode, forward, and forward with backward."""

    operations = ("decode", "forward", "forward_backward")
    cases = FORWARD_CASES
    default_cases = DEFAULT_FORWARD_CASES
    arms = (STOCK, STOCK_TF32, SPARSE)

    @override
    def build(self, arm: Arm, precision: Precision, heat: Heat) -> Pass:
        return Pass(
            sae=build_sae(arm, heat.case, precision, self.device, heat.inputs.weights),
            x=heat.inputs.batches[0].to(precision.dtype),
            autocast=torch.autocast(self.device, torch.bfloat16, enabled=precision.autocast),
        )

    @override
    def observe(self, contender: Pass, heat: Heat) -> Trajectory:
        contender.forward_backward()
        gradients = {
            f"gradient of {name}": sample_latents(parameter.grad, heat.case.d_sae)
            for name, parameter in contender.sae.named_parameters()
            if parameter.grad is not None
        }
        trajectory = {
            "decoded": contender.decode(contender.encode()),
            "reconstruction": contender.forward(),
            **gradients,
        }
        return {name: value.cpu() for name, value in trajectory.items()}

    @override
    def measure(self, contender: Pass, operation: str, heat: Heat) -> Row:
        contender.sae.zero_grad()
        feature_acts = contender.encode() if operation == "decode" else torch.empty(0)
        calls = {
            "decode": partial(contender.decode, feature_acts),
            "forward": contender.forward,
            "forward_backward": contender.forward_backward,
        }
        measured = measure_calls(calls[operation], self.device, self.steps)
        return {"implementation": implementation_of(contender.sae), **measured}


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run_contest(ForwardContest, argv)


if __name__ == "__main__":
    main()
