"""What a run writes: it opens without the plugin, and resumes as either architecture."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
)
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activations_store import ActivationsStore

from saelens_sparse import SparseTopKTrainingSAE
from saelens_sparse.architectures import ARCHITECTURES, Architecture
from tests.support.architectures import SUBJECTS
from tests.support.runs import (
    BATCH,
    BOTH,
    D_MODEL,
    N_TOKENS,
    Config,
    K,
    Run,
    checkpoints,
    config_of,
    multi_config,
    runner_config,
    sae_config,
    what_libraries_say,
)
from tests.support.saes import assert_same_training

pytestmark = what_libraries_say


OPEN_WITHOUT_PLUGIN = """\
import sys


class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "saelens_sparse":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Block())

import torch
from sae_lens import SAE

try:
    import saelens_sparse
except ImportError:
    pass
else:
    raise SystemExit("the plugin was imported")
x, *folders = sys.argv[1:]
for folder in folders:
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(torch.load(x))
    torch.save((type(sae).__name__, acts, sae.decode(acts)), folder + "/out.pt")
"""


def test_output_opens_where_the_plugin_is_missing(run: Run, tmp_path: Path) -> None:
    x = torch.randn(7, D_MODEL)
    torch.save(x, tmp_path / "x.pt")
    (tmp_path / "script.py").write_text(OPEN_WITHOUT_PLUGIN)
    runs = {name: run(config_of(name), autocast=False) for name in ARCHITECTURES}
    folders = [str(runner.cfg.output_path) for runner in runs.values()]
    process = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "x.pt", *folders],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for (name, runner), folder in zip(runs.items(), folders, strict=True):
        kind, acts, recons = torch.load(Path(folder) / "out.pt")
        assert kind == ARCHITECTURES[name].inference_sae.__name__
        assert acts.any()
        sae = runner.sae if SUBJECTS[name].infers_as_it_trains else SAE.load_from_disk(folder)
        torch.testing.assert_close(acts, sae.encode(x))
        torch.testing.assert_close(recons, sae(x))


def test_runner_resumes(run: Run) -> None:
    resumed = []
    for config_class in BOTH:
        first = run(sae_config(config_class), n_checkpoints=1)
        checkpoint = checkpoints(first.cfg)[0]
        steps: list[int] = []
        original = get_sae_training_class(config_class.architecture())[0]
        forward = original.training_forward_pass

        def counting(
            self: Any, step_input: Any, forward: Any = forward, steps: list[int] = steps
        ) -> Any:
            steps.append(step_input.n_training_steps)
            return forward(self, step_input)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(original, "training_forward_pass", counting)
            runner = run(sae_config(config_class), resume_from_checkpoint=str(checkpoint))
        n_done = int(checkpoint.name) // BATCH
        assert steps[0] > 0
        assert len(steps) == N_TOKENS // BATCH - n_done
        resumed.append(runner.sae)
    assert_same_training(resumed[1], resumed[0])


@pytest.mark.parametrize("resumed", ["stock", "sparse"], ids="as-{}".format)
@pytest.mark.parametrize("begun", ["stock", "sparse"], ids="from-{}".format)
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_runner_resumes_either_architecture(
    run: Run, architecture: Architecture, begun: str, resumed: str
) -> None:
    names = {"stock": architecture.stock, "sparse": architecture.name}
    first = run(config_of(names[begun]), n_checkpoints=1)
    checkpoint = str(checkpoints(first.cfg)[0])
    expected = run(config_of(names[begun]), resume_from_checkpoint=checkpoint).sae
    actual = run(config_of(names[resumed]), resume_from_checkpoint=checkpoint).sae
    assert actual.cfg.architecture() == names[resumed]
    assert_same_training(actual, expected, tolerance=1e-4)


def test_from_pretrained_path(run: Run) -> None:
    saved = {}
    for config_class in BOTH:
        runner = run(sae_config(config_class), n_checkpoints=1)
        saved[config_class] = checkpoints(runner.cfg)[0]
    stock, sparse = (
        run(sae_config(config_class), from_pretrained_path=str(saved[config_class])).sae
        for config_class in BOTH
    )
    assert type(sparse) is SparseTopKTrainingSAE
    assert_same_training(sparse, stock)


@pytest.mark.parametrize("config_class", BOTH, ids=lambda c: c.architecture())
def test_several_saes_resume_after_an_interruption(
    config_class: Config,
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = multi_config({"a": sae_config(config_class)}, tmp_path)
    torch.manual_seed(0)
    runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    loader = runner.activations_store.get_multi_hook_data_loader()

    def interrupted() -> Iterator[Any]:
        for _ in range(5):
            yield next(loader)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.activations_store, "get_multi_hook_data_loader", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    assert checkpoint.name == str(5 * BATCH)
    again = multi_config(
        {"a": sae_config(config_class)}, tmp_path, resume_from_checkpoint=str(checkpoint)
    )
    resumed = MultiSAETrainingRunner(again, override_model=model, override_dataset=dataset)
    saes = resumed.run()
    assert saes["a"].cfg.metadata.l0 == pytest.approx(K)


def test_interruption_of_the_runner_is_as_in_stock(
    model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
) -> None:
    """SAELens decides what is written and raised; a regular checkpoint is there to resume."""
    outcomes = []
    for config_class in BOTH:
        folder = tmp_path / config_class.architecture()
        cfg = runner_config(sae_config(config_class), folder, n_checkpoints=3)
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
        store = runner.activations_store
        n_batches = 0

        def interrupting(self: ActivationsStore, original: Any = ActivationsStore.__next__) -> Any:
            nonlocal n_batches
            n_batches += 1
            if n_batches == 9:
                raise KeyboardInterrupt
            return original(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(store), "__next__", interrupting)
            with pytest.raises(BaseException) as raised:  # noqa: PT011
                runner.run()
        root = Path(cfg.checkpoint_path or "")
        files = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
        outcomes.append((type(raised.value), files))
        resumed = LanguageModelSAETrainingRunner(
            runner_config(
                sae_config(config_class),
                folder / "again",
                resume_from_checkpoint=str(checkpoints(cfg)[0]),
            ),
            override_model=model,
            override_dataset=dataset,
        )
        assert type(resumed.run()) is type(runner.sae)
    assert outcomes[0] == outcomes[1]
