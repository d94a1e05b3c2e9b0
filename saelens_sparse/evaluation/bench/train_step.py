"""
Time `SAETrainer.step` of the sparse architectures against SAELens's own.

    saelens-sparse bench step --cases gemma2b,jumprelu_l0_64 --precision float32,autocast

For each case and precision, every arm in turn starts from the same trained-like weights, is
checked to train the same model as stock (see `agreement.py`), is timed, and is freed before the
next. Rows go to `benchmarks/results` as they come; tables are printed last.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from saelens_sparse.evaluation.bench.agreement import Trajectory, rehearse
from saelens_sparse.evaluation.bench.contest import Contest, Heat, run_contest
from saelens_sparse.evaluation.cases import (
    DEFAULT_STEP_CASES,
    SPARSE,
    SPARSE_RUNNER,
    STEP_CASES,
    STOCK,
    STOCK_COMPILE,
    STOCK_TF32,
    Arm,
    Precision,
)
from saelens_sparse.evaluation.measure import measure_steps
from saelens_sparse.evaluation.results import Row
from saelens_sparse.evaluation.training import Trainer, build_trainer


class StepContest(Contest[Trainer]):
    """Whole training steps, as `SAETrainer.fit` takes them."""

    operations = ("step",)
    cases = STEP_CASES
    default_cases = DEFAULT_STEP_CASES
    arms = (STOCK, STOCK_TF32, STOCK_COMPILE, SPARSE, SPARSE_RUNNER)

    @override
    def build(self, arm: Arm, precision: Precision, heat: Heat) -> Trainer:
        return build_trainer(
            arm,
            heat.case,
            precision,
            self.device,
            heat.inputs.batches,
            heat.inputs.weights,
            heat.case.learning_rate,
        )

    @override
    def observe(self, contender: Trainer, heat: Heat) -> Trajectory:
        return rehearse(contender, heat.case, heat.inputs)

    @override
    def measure(self, contender: Trainer, operation: str, heat: Heat) -> Row:
        return measure_steps(contender, heat.inputs, self.steps)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    return run_contest(StepContest, argv)


if __name__ == "__main__":
    main()
