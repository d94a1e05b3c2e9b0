"""Tiny runs of each kind of data, and what a run was given, has logged and has come to."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, MultiSAETrainingRunner
from sae_lens.config import LoggingConfig

from saelens_sparse import (
    SparseMultiSAETrainingRunner,
    SparseTrainingRunner,
    use_fast_activations_store,
)
from tests.support.activation_data import CONTEXT, DATA, PROMPTS
from tests.support.activations import (
    BATCH,
    BUFFER_PROMPTS,
    D_IN,
    D_MODEL,
    HOOK,
    POST,
)
from tests.support.runs import config_of, multi_config, runner_config

N_STEPS = 24
SETTINGS: dict[str, Any] = {
    "context_size": CONTEXT,
    "store_batch_size_prompts": PROMPTS,
    "train_batch_size_tokens": BATCH,
    "n_batches_in_buffer": BUFFER_PROMPTS,
    "training_tokens": N_STEPS * BATCH,
    "eval_batch_size_prompts": 3,
    "n_eval_batches": 2,
    "feature_sampling_window": 7,
    "logger": LoggingConfig(log_to_wandb=False),
}
EVALS = {"logger": LoggingConfig(wandb_log_frequency=3, eval_every_n_wandb_logs=3)}
NORMALIZED = {"normalize_activations": "expected_average_only_in"}
WHITENED = {"normalize_activations": "covariance_whitening"}


@dataclass(frozen=True)
class Scenario:
    """Data by its name in `DATA`, options of the runner's and of the SAEs' configs, and hooks."""

    data: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    sae: dict[str, Any] = field(default_factory=dict[str, Any])
    hooks: tuple[str, ...] = ()


SCENARIOS = {
    "tokens": Scenario("int64"),
    "a buffer of rows": Scenario("selected"),
    "streaming with evals": Scenario("streaming, shuffled", EVALS),
    "text with evals": Scenario("text", EVALS | {"exclude_special_tokens": True}),
    "text, streaming": Scenario("text, streaming", {"disable_concat_sequences": True}),
    "normalized": Scenario("long rows", EVALS, NORMALIZED),
    "whitened": Scenario("text", {}, WHITENED),
    "no mixing": Scenario("int64", {"activations_mixing_fraction": 0.0}),
    "hooks": Scenario("shuffled", hooks=(HOOK, POST)),
    "hooks with evals": Scenario("text", EVALS, NORMALIZED, hooks=(POST, HOOK)),
}


@dataclass
class Run:
    """What a training was given, has logged, and has come to."""

    batches: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    logged: list[tuple[int, dict[str, Any]]] = field(
        default_factory=list[tuple[int, dict[str, Any]]]
    )
    weights: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    error: BaseException | None = None
    checkpoints: list[Path] = field(default_factory=list[Path])
    _last: torch.Tensor | None = None

    def note(self, batch: torch.Tensor) -> None:
        """Of a trainer's step, and of the step that it calls."""
        if batch is not self._last:
            self.batches.append(batch.clone())
        self._last = batch

    def log(self, record: dict[str, Any], step: int) -> None:
        numbers = {name: value for name, value in record.items() if isinstance(value, float | int)}
        self.logged.append((step, numbers))


def make_config(
    scenario: Scenario, folder: Path, *, architecture: str = "topk_sparse", **options: Any
) -> Any:
    """A runner's config.

    Args:
        scenario: What is trained on what.
        folder: For checkpoints and output.
        architecture: Of all SAEs.
        options: Others of the config.
    """
    options = SETTINGS | scenario.options | options
    fields = {"d_sae": 32, **scenario.sae}
    if architecture == "topk_sparse":
        fields["implementation"] = "torch"
    if not scenario.hooks:
        sae = config_of(architecture, d_in=D_MODEL, **fields)
        return runner_config(sae, folder, **{"hook_name": HOOK, **options})
    saes = {
        hook: config_of(architecture, d_in=D_IN.get(hook, D_MODEL), **fields)
        for hook in scenario.hooks
    }
    return multi_config(saes, folder, **{"hook_names": {hook: hook for hook in saes}, **options})


RUNNERS = {
    "own": (SparseTrainingRunner, SparseMultiSAETrainingRunner),
    "stock": (LanguageModelSAETrainingRunner, MultiSAETrainingRunner),
}


def make_runner(
    scenario: Scenario,
    model: Any,
    folder: Path,
    *,
    kind: str = "own",
    save_buffer: bool = True,
    **options: Any,
) -> Any:
    """A runner of this package ("own"), or SAELens's with its store ("stock") or ours ("swapped").

    Args:
        scenario: What is trained on what.
        model: The language model.
        folder: A new one, for the dataset, checkpoints and output.
        kind: Of runner.
        save_buffer: Whether checkpoints hold the buffer, except SAELens's.
        options: As of `make_config`.
    """
    (folder / "data").mkdir(parents=True)
    single, several = RUNNERS["own" if kind == "own" else "stock"]
    of_runner: dict[str, Any] = {"save_buffer": save_buffer} if kind == "own" else {}
    runner: Any = (several if scenario.hooks else single)(
        make_config(scenario, folder, **options),
        override_model=model,
        override_dataset=DATA[scenario.data](folder / "data"),
        **of_runner,
    )
    if kind == "swapped":
        use_fast_activations_store(runner, save_buffer=save_buffer)
    return runner


def assert_same_run(run: Run, expected: Run, start: int = 0) -> None:
    """Bit for bit, from step `start` on."""
    n_saes = len(expected.batches) // N_STEPS
    assert len(run.batches) == len(expected.batches) - n_saes * start
    for index, (batch, other) in enumerate(
        zip(run.batches, expected.batches[n_saes * start :], strict=True)
    ):
        assert torch.equal(batch, other), f"batch {index} after {start} steps"
    assert repr(run.logged) == repr([entry for entry in expected.logged if entry[0] >= start])
    assert run.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert torch.equal(run.weights[name], weight), name


def n_steps(checkpoint: Path) -> int:
    return int(checkpoint.name) // BATCH
