"""`SparseMultiSAETrainingRunner` beside SAELens's runner of several SAEs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from sae_lens import HookedSAETransformer, MultiSAETrainingRunner
from sae_lens.config import LoggingConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse import SparseMultiSAETrainingRunner
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.support.runs import BATCH, HOOK, N_TOKENS, config_of, multi_config, what_libraries_say
from tests.support.saes import assert_same_training

pytestmark = what_libraries_say
NORMALIZED = {"normalize_activations": "expected_average_only_in"}
OTHER_HOOK = "blocks.0.hook_resid_post"
ARCHITECTURES = {
    "sparse": "topk_sparse",
    "stock": "topk",
    "batch": "batchtopk_sparse",
    "jump": "jumprelu",
    "other hook": "topk_sparse",
    "jump on the other hook": "jumprelu_sparse",
}
HOOKS = {name: OTHER_HOOK if "other" in name else HOOK for name in ARCHITECTURES}


class Recorded:
    """What trainers were given and what was logged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[torch.Tensor] = []
        self.logged: list[dict[str, Any]] = []

        def recording(step: Any) -> Any:
            def recorded(trainer: Any, batch: torch.Tensor) -> Any:
                if not self.batches or batch is not self.batches[-1]:
                    self.batches.append(batch)
                return step(trainer, batch)

            return recorded

        for trainer in (SAETrainer, SparseSAETrainer):
            monkeypatch.setattr(trainer, "step", recording(trainer.step))
        for name in ("init", "finish", "log_artifact"):
            monkeypatch.setattr(wandb, name, lambda *_, **__: None)
        monkeypatch.setattr(
            wandb, "log", lambda record, step: self.logged.append({"": step} | record)
        )

    def taken(self) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        found = self.batches, self.logged
        self.batches, self.logged = [], []
        return found


def run(
    runner_class: type[MultiSAETrainingRunner], cfg: Any, model: Any, dataset: Dataset
) -> MultiSAETrainingRunner:
    torch.manual_seed(0)
    own = runner_class is SparseMultiSAETrainingRunner
    options: dict[str, Any] = {"language_model": "saelens"} if own else {}
    runner = runner_class(cfg, override_model=model, override_dataset=dataset, **options)
    runner.run()
    return runner


def test_it_trains_as_saelens_does(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several architectures on one hook, others on a second."""
    recorded = Recorded(monkeypatch)
    found: dict[str, Any] = {}
    for kind in (MultiSAETrainingRunner, SparseMultiSAETrainingRunner):
        cfg = multi_config(
            {name: config_of(one) for name, one in ARCHITECTURES.items()},
            tmp_path / kind.__name__,
            hook_names=HOOKS,
            logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=3),
        )
        runner = run(kind, cfg, model, dataset)
        found[kind.__name__] = runner.saes, *recorded.taken()
    saes, batches, logged = found["MultiSAETrainingRunner"]
    own_saes, own_batches, own_logged = found["SparseMultiSAETrainingRunner"]
    assert len(batches) == len(own_batches)
    assert all(map(torch.equal, own_batches, batches))
    for name, sae in saes.items():
        assert_same_training(own_saes[name], sae)
    assert [list(record) for record in own_logged] == [list(record) for record in logged]
    for own, record in zip(own_logged, logged, strict=True):
        for name, value in record.items():
            if isinstance(value, int | float):
                assert type(own[name]) is type(value), name
                assert own[name] == pytest.approx(value, rel=2e-3, abs=1e-5, nan_ok=True), name


def test_a_batch_is_made_once_for_all(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass of the model, and one batch for all eight SAEs, moved and scaled once."""
    recorded = Recorded(monkeypatch)
    n_passes, inputs = 0, list[torch.Tensor]()
    original, take = model.run_with_cache, SparseSAETrainer._take_passes

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_passes
        n_passes += 1
        return original(*args, **kwargs)

    def noted(trainer: Any, sae: Any, sae_in: torch.Tensor) -> Any:
        inputs.append(sae_in)
        return take(trainer, sae, sae_in)

    monkeypatch.setattr(SparseSAETrainer, "_take_passes", noted)
    passes: dict[int, int] = {}
    for n in (1, 8):
        n_passes = 0
        with monkeypatch.context() as patch:
            patch.setattr(model, "run_with_cache", counted)
            saes = {f"{i}": config_of("topk_sparse", k=i + 1, **NORMALIZED) for i in range(n)}
            cfg = multi_config(saes, tmp_path / f"{n}", checkpoint_path=None, output_path=None)
            run(SparseMultiSAETrainingRunner, cfg, model, dataset)
        passes[n] = n_passes
    assert passes[1] == passes[8] > 0
    n_steps = N_TOKENS // BATCH
    assert len(recorded.batches) == 2 * n_steps
    steps = [inputs[n_steps + 8 * step :][:8] for step in range(n_steps)]
    assert all(one is step[0] for step in steps for one in step)
    assert len({id(step[0]) for step in steps}) == n_steps


@pytest.mark.parametrize("kind", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("hooks", [HOOK, {"a": HOOK, "b": OTHER_HOOK, "c": HOOK}], ids=["1", "2"])
def test_scaling_is_estimated_as_in_saelens(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path, kind: str, hooks: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also what remains of the stream; on one hook once, whoever needs it."""
    calls: list[str] = []
    for name in ("estimate_scaling_factor", "estimate_whitening"):
        original = getattr(ActivationScaler, name)

        def counted(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            calls.append("")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(ActivationScaler, name, counted)
    weights: list[dict[str, Any]] = []
    n_calls: list[int] = []
    for runner_class in (MultiSAETrainingRunner, SparseMultiSAETrainingRunner):
        calls.clear()
        saes = {
            name: config_of("topk", normalize_activations=kind if name != "c" else "none")
            for name in "abc"
        }
        cfg = multi_config(
            saes, tmp_path / runner_class.__name__, hook_names=hooks, checkpoint_path=None
        )
        runner = run(runner_class, cfg, model, dataset)
        weights.append({name: sae.state_dict() for name, sae in runner.saes.items()})
        n_calls.append(len(calls))
    assert n_calls == [2, 1 if hooks == HOOK else 2]
    for name, expected in weights[0].items():
        for part, value in expected.items():
            assert torch.equal(weights[1][name][part], value), (name, part)
