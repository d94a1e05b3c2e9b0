"""Several SAEs trained from a cache, which SAELens cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk

from saelens_sparse import SparseMultiSAETrainingRunner, SparseMultiSAETrainingRunnerConfig
from tests.support.activation_runs import Scenario, make_config
from tests.support.activations import BATCH, D_MODEL, HOOK, POST, cached_activations
from tests.support.cache import Caches
from tests.support.runs import what_libraries_say

pytestmark = [*what_libraries_say, pytest.mark.filterwarnings("ignore:All samples")]
N_CACHED = 160
SCENARIO = Scenario("shuffled", hooks=(HOOK, POST))


class Never(torch.nn.Module):
    """A language model that must not be asked."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tokenizer, self.cfg, self.hook_dict = model.tokenizer, model.cfg, model.hook_dict

    def run_with_cache(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the language model was asked")

    forward = run_with_cache


@pytest.fixture
def train(caches: Caches, tmp_path: Path) -> Callable[..., Any]:
    """Trains from the cache; gives the runner, the SAEs' weights by name, and the config's file."""

    def train(name: str, scenario: Scenario = SCENARIO, **options: Any) -> Any:
        options = {"use_cached_activations": True, **options}
        options.setdefault("cached_activations_path", str(caches.folder / "cache"))
        cfg = make_config(scenario, tmp_path / name, **options)
        torch.manual_seed(7 if "resume_from_checkpoint" not in options else 100)
        runner = SparseMultiSAETrainingRunner(
            cfg, override_dataset=caches.data("hooks"),
            override_model=Never(caches.models["float32"]),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        saes = runner.run()
        weights = {
            f"{sae}.{part}": value for sae in saes for part, value in saes[sae].state_dict().items()
        }
        return runner, weights

    return train


def test_a_run_of_two_hooks_resumes_bit_for_bit(caches: Caches, train: Callable[..., Any]) -> None:
    caches.runner("hooks", tokens=N_CACHED).run()
    runner, expected = train("whole", n_checkpoints=2)
    written = sorted(Path(runner.cfg.checkpoint_path).iterdir(), key=lambda path: int(path.name))
    assert len(written) == 2
    for checkpoint in written:
        _, weights = train(checkpoint.name, resume_from_checkpoint=str(checkpoint))
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(weights[name], value), name
    for path in (written[0], Path(runner.cfg.output_path)):
        values = json.loads((path / "runner_cfg.json").read_text())
        assert values["use_cached_activations"] is True
        loaded = SparseMultiSAETrainingRunnerConfig.from_dict(values)
        assert loaded.cached_activations_path == str(caches.folder / "cache")
        assert json.loads(json.dumps(loaded.to_dict())) == values


def test_a_cache_of_saelens_serves_saes_on_its_hook(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cached_activations(tmp_path / "of SAELens")
    rows = torch.tensor(load_from_disk(path)[:][HOOK]).reshape(-1, D_MODEL)
    served: list[torch.Tensor] = []
    original = SparseMultiSAETrainingRunner.prepare_store

    def recorded(runner: Any) -> None:
        original(runner)
        form = runner.activations_store.hook_batches

        def batches() -> Any:
            for batch in form():
                served.append(batch[HOOK].clone())
                yield batch

        monkeypatch.setattr(runner.activations_store, "hook_batches", batches)

    monkeypatch.setattr(SparseMultiSAETrainingRunner, "prepare_store", recorded)
    scenario = Scenario("shuffled", hooks=(HOOK,))
    runner, expected = train("whole", scenario, cached_activations_path=path, n_checkpoints=1)
    assert served
    for batch in served:
        assert batch.shape == (BATCH, D_MODEL)
        assert (batch[:, None] == rows).all(-1).any(1).all()
    (checkpoint,) = Path(runner.cfg.checkpoint_path).iterdir()
    options = {"cached_activations_path": path, "resume_from_checkpoint": str(checkpoint)}
    _, weights = train("resumed", scenario, **options)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


def test_what_no_cache_can_give_is_refused_before_anything_is_loaded(
    caches: Caches, train: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "of SAELens").mkdir()
    with pytest.raises(ValueError, match=r"is of one hook, and the SAEs are of 2"):
        train("two", cached_activations_path=str(tmp_path / "of SAELens"))
    caches.runner("tokens", tokens=N_CACHED).run()
    with pytest.raises(ValueError, match=r"cached_activations_path: .* cannot be used: "):
        train("of one")
    with pytest.raises(ValueError, match="cached_activations_path: missing"):
        train("nowhere", cached_activations_path=None)
