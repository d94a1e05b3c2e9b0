"""Runs whose dead latents are trained by ghost gradients, with either runner."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse import SparseTrainingRunner, cli
from saelens_sparse.architectures import ARCHITECTURES, Architecture
from saelens_sparse.training.trainer import SparseSAETrainer
from tests.support.runs import (
    BATCH,
    N_TOKENS,
    Run,
    checkpoints,
    config_of,
    runner_config,
    sae_config,
    what_libraries_say,
)
from tests.support.saes import assert_same_training

pytestmark = what_libraries_say
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
LOSS = "losses/ghost_grad_loss"


def config(architecture: Architecture, **options: Any) -> Any:
    return config_of(architecture.name, dead_latent_loss="ghost", **options)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What SAELens would log of each step."""
    records: list[dict[str, float]] = []
    for trainer in (SAETrainer, SparseSAETrainer):
        original = trainer.step

        def step(self: Any, batch: torch.Tensor, original: Any = original) -> Any:
            output = original(self, batch)
            records.append(self.build_train_step_log_dict(output, self.n_training_samples))
            return output

        monkeypatch.setattr(trainer, "step", step)
    return records


@architectures
def test_both_runners_train_the_same(
    architecture: Architecture,
    run: Run,
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    logged: list[dict[str, float]],
) -> None:
    theirs = run(config(architecture), dead_feature_window=1).sae
    of_theirs = [*logged]
    logged.clear()
    cfg = runner_config(config(architecture), tmp_path / "own", dead_feature_window=1)
    torch.manual_seed(0)
    runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
    own: Any = runner.run()
    assert_same_training(own, theirs)
    assert len(of_theirs) == N_TOKENS // BATCH
    with_dead = [record for record in of_theirs if record[LOSS] > 0]
    assert with_dead
    for record, of_own in zip(of_theirs, logged, strict=True):
        assert "losses/auxiliary_reconstruction_loss" not in record
        assert of_own[LOSS] == pytest.approx(record[LOSS], rel=1e-3, abs=1e-7)
    saved = json.loads((tmp_path / "own" / "output" / "cfg.json").read_text())
    assert "dead_latent_loss" not in saved
    assert saved["architecture"] == architecture.inference_config.architecture()
    loaded = SAE.load_from_disk(tmp_path / "own" / "output")
    assert type(loaded) is architecture.inference_sae


@architectures
def test_a_run_resumes_bit_for_bit(
    architecture: Architecture, model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    def train(name: str, **options: Any) -> Any:
        cfg = runner_config(config(architecture), tmp_path / name, **options)
        torch.manual_seed(0)
        runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
        return cfg, runner.run()

    cfg, whole = train("whole", n_checkpoints=1)
    _, resumed = train("resumed", resume_from_checkpoint=str(checkpoints(cfg)[0]))
    for name, value in whole.named_parameters():
        assert torch.equal(value, resumed.get_parameter(name)), name


@architectures
def test_checkpoints_of_stock_are_gone_on_with(
    architecture: Architecture,
    run: Run,
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    logged: list[dict[str, float]],
) -> None:
    # A JumpReLU so that some latents are dead.
    fields = {} if architecture.sparsity_field else {"jumprelu_init_threshold": 1.0}
    begun = run(config_of(architecture.stock, **fields), n_checkpoints=1)
    checkpoint = str(checkpoints(begun.cfg)[0])
    for start in ("resume_from_checkpoint", "from_pretrained_path"):
        logged.clear()
        options: dict[str, Any] = {start: checkpoint, "dead_feature_window": 0}
        cfg = runner_config(config(architecture), tmp_path / start, **options)
        runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
        assert runner.run().cfg.dead_latent_loss == "ghost"
        assert any(record[LOSS] > 0 for record in logged)


def test_checkpoints_go_on_in_stock(run: Run) -> None:
    topk = ARCHITECTURES["topk_sparse"]
    begun = run(config(topk), n_checkpoints=1)
    checkpoint = str(checkpoints(begun.cfg)[0])
    sae = run(config_of(topk.stock), resume_from_checkpoint=checkpoint).sae
    assert type(sae) is topk.stock_sae


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
@architectures
def test_low_precision(architecture: Architecture, dtype: str, run: Run) -> None:
    fields = {"dtype": "float32" if dtype == "autocast" else dtype}
    sae = run(config(architecture, **fields), autocast=dtype == "autocast").sae
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


def test_compile_sae(run: Run) -> None:
    for implementation in ("torch", "dense"):
        compiled, eager = (
            run(
                sae_config(implementation=implementation, dead_latent_loss="ghost"),
                compile_sae=compile_sae,
                training_tokens=10 * BATCH,
            ).sae
            for compile_sae in (True, False)
        )
        assert "training_forward_pass" in vars(compiled), "nothing was compiled"
        assert_same_training(compiled, eager, tolerance=1e-4 if implementation == "dense" else 0)


class TestCommandLine:
    def test_flags(self) -> None:
        for name in ARCHITECTURES:
            flags = ["--architecture", name, "--dead_latent_loss", "ghost"]
            cfg: Any = cli.parse_train_args([*flags, "--aux_loss_coefficient", "0.5"])
            assert (cfg.sae.dead_latent_loss, cfg.sae.aux_loss_coefficient) == ("ghost", 0.5)

    def test_settings(self, tmp_path: Path) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(runner_config(sae_config(), tmp_path).to_dict()))
        cfg: Any = cli.parse_train_args([str(path), "--set", "sae.dead_latent_loss=ghost"])
        assert cfg.sae.dead_latent_loss == "ghost"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["sae.dead_latent_loss=ghosts"], "sae.dead_latent_loss: 'ghosts' cannot be used"),
            (["sae.dead_latent_loss=null"], "sae.dead_latent_loss: None cannot be used"),
            (
                ["sae.dead_latent_loss=ghost", "sae.normalize_activations=layer_norm"],
                "covariance_whitening with dead_latent_loss='ghost'; got 'layer_norm'",
            ),
        ],
    )
    def test_refusals(
        self, settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(runner_config(sae_config(), tmp_path).to_dict()))
        options = [part for setting in settings for part in ("--set", setting)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cli.main(["train", str(path), *options]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
