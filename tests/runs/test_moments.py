"""Runs with moments in bfloat16: resumed bit for bit, opened by stock, refused elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer, LanguageModelSAETrainingRunner
from sae_lens.training.sae_trainer import SAETrainer

from saelens_sparse import SparseMultiSAETrainingRunner, SparseTrainingRunner
from saelens_sparse.training.optimizer import ClippingAdam
from tests.support.runs import (
    N_TOKENS,
    assert_same_output,
    checkpoints,
    config_of,
    multi_config,
    runner_config,
    sae_config,
    what_libraries_say,
)

pytestmark = what_libraries_say


def one(folder: Path, **options: Any) -> Any:
    return runner_config(sae_config(moments="bfloat16"), folder, **options)


def several(folder: Path, **options: Any) -> Any:
    saes = {
        "light": config_of("topk_sparse", moments="bfloat16"),
        "matryoshka": config_of("matryoshka_batchtopk_sparse", moments="bfloat16"),
        "not": config_of("batchtopk_sparse"),
        "stock": config_of("topk"),
    }
    return multi_config(saes, folder, **options)


@pytest.fixture(params=["one", "several"])
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    kinds = {
        "one": (one, SparseTrainingRunner),
        "several": (several, SparseMultiSAETrainingRunner),
    }
    return kinds[request.param]


def test_a_resumed_run_goes_on_bit_for_bit(
    kind: tuple[Any, Any],
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_config, runner_class = kind
    torch.manual_seed(0)
    cfg = make_config(tmp_path / "whole", n_checkpoints=1)
    runner_class(cfg, override_model=model, override_dataset=dataset).run()
    (checkpoint,) = checkpoints(cfg)
    loaded_by: list[type] = []
    original = SAETrainer.load_trainer_state

    def load(self: Any, path: Any) -> None:
        if getattr(self.sae.cfg, "moments", None) is not None:
            loaded_by.append(type(self.optimizer))
        original(self, path)

    monkeypatch.setattr(SAETrainer, "load_trainer_state", load)
    resumed = make_config(
        tmp_path / "resumed", resume_from_checkpoint=str(checkpoint), save_final_checkpoint=True
    )
    torch.manual_seed(1)
    runner = runner_class(resumed, override_model=model, override_dataset=dataset)
    runner.run()
    assert runner.trainer.n_training_samples == N_TOKENS
    assert_same_output(tmp_path / "resumed" / "output", tmp_path / "whole" / "output")
    # SAELens's Adam would have held the moments in float32.
    assert set(loaded_by) == {ClippingAdam}
    written = [*(tmp_path / "resumed" / "checkpoints").rglob("runner_cfg.json")]
    assert written
    for path in written:
        assert json.loads(path.read_text())["resume_from_checkpoint"] == str(checkpoint)
    assert runner.cfg.resume_from_checkpoint == str(checkpoint)


def test_a_checkpoint_resumes_as_stock_and_stock_s_as_light(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    light = one(tmp_path / "light", n_checkpoints=1)
    SparseTrainingRunner(light, override_model=model, override_dataset=dataset).run()
    (checkpoint,) = checkpoints(light)
    stock = runner_config(
        config_of("topk"), tmp_path / "stock", n_checkpoints=2,
        resume_from_checkpoint=str(checkpoint),
    )  # fmt: skip
    runner = LanguageModelSAETrainingRunner(stock, override_model=model, override_dataset=dataset)
    runner.run()
    checkpoint = checkpoints(stock)[-1]
    states = torch.load(checkpoint / "trainer_state.pt")["optimizer"]["state"].values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    again = one(tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    back = SparseTrainingRunner(again, override_model=model, override_dataset=dataset)
    back.run()
    assert back.trainer is not None
    assert back.trainer.n_training_samples == N_TOKENS
    for name, parameter in back.sae.named_parameters():
        dtype = torch.bfloat16 if name in ("W_enc", "W_dec") else torch.float32
        assert back.trainer.optimizer.state[parameter]["exp_avg_sq"].dtype == dtype


def test_saelens_s_runner_refuses(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    runner = LanguageModelSAETrainingRunner(
        one(tmp_path), override_model=model, override_dataset=dataset
    )
    before = runner.sae.W_dec.detach().clone()
    with pytest.raises(ValueError, match=r"moments='bfloat16' .* SparseTrainingRunner"):
        runner.run()
    assert torch.equal(runner.sae.W_dec, before)
