"""Training from saved weights: what is trained is what the config says, whoever saved them."""

import json
import shutil
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
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file, save_file

from saelens_sparse import SparseTrainingRunner
from saelens_sparse.architectures import ARCHITECTURES
from saelens_sparse.training.pretrained import load_pretrained
from tests.support.runs import (
    BATCH,
    D_MODEL,
    D_SAE,
    checkpoints,
    config_of,
    multi_config,
    runner_config,
    what_libraries_say,
)
from tests.support.saes import assert_same_training

pytestmark = what_libraries_say
FAMILIES = {one.stock: (one.stock, one.name) for one in ARCHITECTURES.values()}
# What a BatchTopK is saved as for inference has a threshold for each latent.
NOT_FROM_OUTPUT = {"batchtopk", "matryoshka_batchtopk"}
SHORT = 6 * BATCH


@pytest.fixture(scope="module")
def saved(
    model: HookedSAETransformer, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """Folders of a checkpoint and of the output, by architecture and kind."""
    folders: dict[tuple[str, str], Path] = {}
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
    for architecture in (name for names in FAMILIES.values() for name in names):
        folder = tmp_path_factory.mktemp(architecture)
        sae = config_of(architecture)
        cfg = runner_config(sae, folder, n_checkpoints=1, training_tokens=SHORT)
        torch.manual_seed(0)
        LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset).run()
        folders[architecture, "checkpoint"] = checkpoints(cfg)[0]
        folders[architecture, "output"] = folder / "output"
    return folders


def trained(
    cfg: Any, model: HookedSAETransformer, dataset: Dataset
) -> tuple[TrainingSAE[Any], dict[str, torch.Tensor]]:
    """What `SparseTrainingRunner` trains, and the weights that it starts from."""
    torch.manual_seed(0)
    runner = SparseTrainingRunner(cfg, override_model=model, override_dataset=dataset)
    start = {name: value.detach().clone() for name, value in runner.sae.state_dict().items()}
    return runner.run(), start


# What is trained, and who has saved which folder. SAELens loads stock's for stock itself, with
# the saved SAE's settings.
FROM = [
    ("sparse", "stock", "checkpoint"),
    ("sparse", "stock", "output"),
    ("sparse", "sparse", "checkpoint"),
    ("sparse", "sparse", "output"),
    ("stock", "sparse", "checkpoint"),
]


@pytest.mark.parametrize(
    ("family", "wanted", "saver", "kind"),
    [
        (family, wanted, saver, kind)
        for family in FAMILIES
        for wanted, saver, kind in FROM
        if kind == "checkpoint" or family not in NOT_FROM_OUTPUT
    ],
)
def test_trains_what_the_config_says(
    saved: dict[tuple[str, str], Path],
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    family: str,
    wanted: str,
    saver: str,
    kind: str,
) -> None:
    stock, sparse = FAMILIES[family]
    names = {"stock": stock, "sparse": sparse}
    path = saved[names[saver], kind]
    sae = config_of(names[wanted])
    field = "jumprelu_bandwidth" if family == "jumprelu" else "aux_loss_coefficient"
    setattr(sae, field, 0.25)
    options: dict[str, Any] = {"training_tokens": SHORT}
    cfg = runner_config(sae, tmp_path, from_pretrained_path=str(path), **options)
    actual, start = trained(cfg, model, dataset)
    assert type(actual) is get_sae_training_class(names[wanted])[0]
    assert getattr(actual.cfg, field) == 0.25
    for name, value in load_file(path / "sae_weights.safetensors").items():
        assert torch.equal(start[name], value.to(start[name])), name

    # The same weights in a stock SAE, trained by SAELens's runner.
    settings = {**config_of(names["stock"]).to_dict(), field: 0.25}
    expected = TrainingSAE.from_dict(settings)
    expected.load_state_dict(start)
    torch.manual_seed(0)
    runner = LanguageModelSAETrainingRunner(
        runner_config(expected.cfg, tmp_path, **options),
        override_model=model, override_dataset=dataset, override_sae=expected,
    )  # fmt: skip
    runner.run()
    assert_same_training(actual, expected)


@pytest.mark.parametrize("family", sorted(NOT_FROM_OUTPUT))
def test_what_is_saved_for_inference_alone_is_refused(
    saved: dict[tuple[str, str], Path], family: str
) -> None:
    sparse = FAMILIES[family][1]
    with pytest.raises(ValueError, match=f"'jumprelu', whose weights do not fit .*'{sparse}'"):
        load_pretrained(saved[sparse, "output"], config_of(sparse))


@pytest.mark.parametrize(
    "architecture", [one.name for one in ARCHITECTURES.values() if one.stock not in NOT_FROM_OUTPUT]
)
def test_starts_as_the_saved_sae_computes(
    saved: dict[tuple[str, str], Path], architecture: str
) -> None:
    path = saved[architecture, "output"]
    sae = load_pretrained(path, config_of(architecture))
    x = torch.randn(50, D_MODEL, dtype=sae.dtype)
    torch.testing.assert_close(sae(x), SAE.load_from_disk(path)(x))


def test_random_numbers_are_those_of_a_run_that_loads_nothing(
    saved: dict[tuple[str, str], Path],
) -> None:
    state = torch.get_rng_state()
    load_pretrained(saved["topk", "output"], config_of("topk_sparse"))
    assert torch.equal(torch.get_rng_state(), state)


def test_saelens_s_own_runners_take_it_as_an_override(
    saved: dict[tuple[str, str], Path],
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
) -> None:
    path, config = saved["topk", "checkpoint"], config_of("topk_sparse")
    sae = load_pretrained(path, config)
    cfg = multi_config({"a": config}, tmp_path, training_tokens=SHORT)
    runner = MultiSAETrainingRunner(
        cfg, override_model=model, override_dataset=dataset, override_saes={"a": sae}
    )
    assert runner.run()["a"] is sae
    assert type(sae) is get_sae_training_class("topk_sparse")[0]


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("jumprelu_sparse", {}, "'topk'.*sae.architecture='jumprelu_sparse'"),
        ("topk_sparse", {"d_sae": D_SAE + 1}, f"d_sae={D_SAE}.*got {D_SAE + 1}"),
        ("topk_sparse", {"d_in": D_MODEL + 1}, f"d_in={D_MODEL}.*got {D_MODEL + 1}"),
        ("topk_sparse", {"apply_b_dec_to_input": False}, "apply_b_dec_to_input=True"),
        ("topk_sparse", {"rescale_acts_by_decoder_norm": False}, "decoder_norm=True"),
        (
            "topk_sparse",
            {"normalize_activations": "expected_average_only_in"},
            "normalize_activations='none'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else str(list(value)),
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(
    saved: dict[tuple[str, str], Path],
    tmp_path: Path,
    architecture: str,
    options: dict[str, Any],
    message: str,
) -> None:
    sae = config_of(architecture)
    for name, value in options.items():
        setattr(sae, name, value)
    for kind in ("checkpoint", "output"):
        cfg = runner_config(
            sae, tmp_path, model_name="none", from_pretrained_path=str(saved["topk", kind])
        )
        with pytest.raises(ValueError, match=message) as raised:
            SparseTrainingRunner(cfg)
        assert "from_pretrained_path" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_another_stock_architecture_is_refused_for_a_sparse_sae(
    saved: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    sae = StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE)
    path = saved["topk_sparse", "checkpoint"]
    cfg = runner_config(sae, tmp_path, model_name="none", from_pretrained_path=str(path))
    with pytest.raises(ValueError, match=r"'topk_sparse'.*sae\.architecture='standard'"):
        SparseTrainingRunner(cfg)


@pytest.mark.parametrize("damage", ["no folder", "no weights", "cut weights", "other weights",
                                    "no config", "list", "unknown"])  # fmt: skip
def test_damaged_files_are_refused(
    saved: dict[tuple[str, str], Path], tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(saved["topk", "output"], tmp_path / "saved"))
    weights, config = folder / "sae_weights.safetensors", folder / "cfg.json"
    if damage == "no folder":
        shutil.rmtree(folder)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif damage == "other weights":
        tensors = load_file(weights)
        save_file({**tensors, "b_enc": tensors["b_enc"][:-1]}, weights)
    elif damage == "no config":
        config.unlink()
    elif damage == "list":
        config.write_text("[]")
    else:
        config.write_text(json.dumps({"architecture": "unknown"}))
    with pytest.raises(ValueError, match="from_pretrained_path") as raised:
        load_pretrained(folder, config_of("topk_sparse"))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
