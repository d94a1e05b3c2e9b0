"""Models that stores make activations with, and trainings."""

import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse.training.trainer import SparseSAETrainer
from tests.support.activation_runs import Run, Scenario, make_runner
from tests.support.activations import CASES, Event, Models, PlayStock, play, tiny_models
from tests.support.runs import checkpoints


@pytest.fixture(scope="session")
def models() -> Models:
    """By their names in `Case`."""
    return tiny_models()


@pytest.fixture(scope="session")
def play_stock(models: Models, tmp_path_factory: pytest.TempPathFactory) -> PlayStock:
    """What SAELens's store says when it is made, and gives, for a name in `CASES` and actions."""
    played: dict[tuple[str, ...], tuple[list[str], list[Event]]] = {}

    def play_stock(name: str, actions: Sequence[str]) -> tuple[list[str], list[Event]]:
        key = (name, *actions)
        if key not in played:
            case, folder = CASES[name], tmp_path_factory.mktemp("stock") / "store"
            played[key] = play(ActivationsStore, case, actions, models[case.model], folder)
        return played[key]

    return play_stock


@pytest.fixture
def handlers() -> Generator[None]:
    """Those of signals are afterwards what they were before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def train(
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    handlers: None,  # noqa: ARG001
) -> Callable[..., Run]:
    """Trains in a new runner; options are those of `make_runner`."""
    runs: list[Run] = []

    def recording(step: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(self: Any, batch: torch.Tensor) -> Any:
            runs[-1].note(batch)
            return step(self, batch)

        return recorded

    for trainer in (SAETrainer, SparseSAETrainer):
        monkeypatch.setattr(trainer, "step", recording(trainer.step))
    for name in ("init", "finish", "log_artifact"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: None)

    def log(record: dict[str, Any], step: int) -> None:
        runs[-1].log(record, step)

    monkeypatch.setattr(wandb, "log", log)

    def train(scenario: Scenario, seed: int | None = None, **options: Any) -> Run:
        run = Run()
        runs.append(run)
        # Whatever a run that resumes begins with, its random state is that of the checkpoint.
        default = len(runs) if "resume_from_checkpoint" in options else 0
        torch.manual_seed(default if seed is None else seed)
        folder = tmp_path / f"run {len(runs)}"
        runner = make_runner(scenario, models["float32"], folder, **options)
        try:
            trained = runner.run()
        except KeyboardInterrupt as error:
            run.error = error
        else:
            saes = trained if isinstance(trained, dict) else {"sae": trained}
            for name, sae in saes.items():
                run.weights |= {f"{name}.{key}": value for key, value in sae.state_dict().items()}
        if Path(runner.cfg.checkpoint_path).exists():
            run.checkpoints = checkpoints(runner.cfg)
        return run

    return train
