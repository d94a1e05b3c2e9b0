"""`saelens-sparse compare`: what is asked for, and how what cannot work is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig

from saelens_sparse import cli
from saelens_sparse.architectures.registry import ARCHITECTURES
from saelens_sparse.compare.options import parse_comparison
from saelens_sparse.compare.state import State, first_difference, open_output
from saelens_sparse.config.files import UsageError
from tests.support.compare import make_config

MakeConfig = Callable[..., str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture
def config(inputs: Path) -> MakeConfig:
    return lambda **changes: str(make_config(inputs, **changes))


def test_embedded_default_loads_as_it_stands(tmp_path: Path) -> None:
    for name in ARCHITECTURES:
        comparison = parse_comparison(["--device=cpu", f"--architecture={name}"])
        assert list(comparison.settings.arms) == [name.removesuffix("_sparse"), name]
        assert comparison.n_steps == 160
        for architecture, side in comparison.settings.arms.items():
            loaded = LanguageModelSAERunnerConfig.from_dict(side)
            assert loaded.sae.architecture() == architecture
            assert loaded.total_training_steps == 160
            assert loaded.sae.d_sae == 8192
    moved = parse_comparison(["--device=cpu", f"--cache={tmp_path}", "--text-tokens=512"]).config
    assert moved["model_name"] == str(tmp_path / "smollm2-135m")
    assert moved["cached_activations_path"] == str(tmp_path / "activations-512-tokens")


def test_options_go_into_both_configs(config: MakeConfig) -> None:
    options = ["--d-sae=96", "--k=3", "--steps=7", "--batch-size=64", "--seed=5", "--autocast"]
    options += ["--set=lr=0.5", "--set=logger.run_name=night", "--set=sae.aux_loss_coefficient=0"]
    comparison = parse_comparison([config(), *options])
    assert comparison.n_steps == 7
    for architecture, side in comparison.settings.arms.items():
        assert (side["sae"]["d_sae"], side["sae"]["k"], side["sae"]["aux_loss_coefficient"]) == (
            96,
            3,
            0,
        )
        assert (side["training_tokens"], side["train_batch_size_tokens"]) == (7 * 64, 64)
        assert (side["seed"], side["autocast"], side["lr"]) == (5, True, 0.5)
        assert side["logger"]["run_name"] == f"night-{architecture}"


def test_the_sides_differ_in_what_the_architecture_brings_alone(config: MakeConfig) -> None:
    stock, sparse = parse_comparison([config()]).settings.arms.values()
    own_fields = {"implementation", "screen_buffer_mib", "fused_adam"}
    assert own_fields <= set(sparse["sae"]) - set(stock["sae"])
    sparse["sae"] = {name: sparse["sae"][name] for name in stock["sae"]}
    for side in (stock, sparse):
        side["sae"].pop("architecture")
        side["logger"].pop("run_name")
        assert Path(side.pop("output_path")).name == "sae"
        assert Path(side.pop("checkpoint_path")).name == "checkpoints"
    assert stock == sparse


def test_any_two_registered_architectures(config: MakeConfig) -> None:
    comparison = parse_comparison([config(), "--architectures=jumprelu_sparse,batchtopk"])
    assert list(comparison.settings.arms) == ["jumprelu_sparse", "batchtopk"]
    assert "k" not in comparison.settings.arms["jumprelu_sparse"]["sae"]
    assert comparison.settings.arms["batchtopk"]["sae"]["k"] == 4
    assert not any("Neither architecture" in note for note in comparison.notes)
    notes = parse_comparison([config(), "--architecture=jumprelu"]).notes
    assert "Neither architecture has the config's sae.k." in notes


def test_ghost_gradients_are_of_one_side_alone(config: MakeConfig) -> None:
    ghost = "--set=sae.dead_latent_loss=ghost"
    comparison = parse_comparison([config(), ghost])
    stock, sparse = comparison.settings.arms.values()
    assert "dead_latent_loss" not in stock["sae"]
    assert sparse["sae"]["dead_latent_loss"] == "ghost"
    (note,) = (note for note in comparison.notes if "ghost gradients" in note)
    assert note.startswith("topk_sparse trains its dead latents by ghost gradients, the other")
    for others in ([], [ghost, "--architectures=topk_sparse,batchtopk_sparse"]):
        notes = parse_comparison([config(), *others]).notes
        assert not any("ghost gradients" in note for note in notes)


def test_own_runner_is_for_sparse_architectures(config: MakeConfig) -> None:
    comparison = parse_comparison([config(), "--runner=own"])
    assert comparison.settings.runners == {"topk": "stock", "topk_sparse": "own"}


def test_prefetching_is_turned_off(config: MakeConfig) -> None:
    shared = parse_comparison([config(prefetch_llm_batches=True)]).config
    assert shared["prefetch_llm_batches"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be 1 or more; got 0"),
        (["--d-sae", "many"], "sae.d_sae: 'many' cannot be used; allowed: a valid integer"),
        (["--device", "abacus"], "device: 'abacus' cannot be used here"),
        (
            ["--implementation", "fast"],
            "sae.implementation: 'fast' cannot be used; allowed: 'auto', ",
        ),
        (["--output", __file__], "--output: "),
        (["--l0-coefficient", "2"], "sae.l0_coefficient: there is no such field"),
        (
            ["--architecture=jumprelu_sparse", "--l0-coefficient=-1"],
            "sae.l0_coefficient: -1 cannot be used; allowed: 0 or more",
        ),
        (
            ["--architecture", "jumprelu_sparse", "--k", "3"],
            "sae.k: there is no such field",
        ),
    ],
)
def test_a_bad_option_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "--device=cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_inputs_of_the_embedded_default_do_not_go_with_a_config(config: MakeConfig) -> None:
    with pytest.raises(UsageError, match="--text-tokens, --cache: CONFIG brings its own inputs"):
        parse_comparison([config(), "--text-tokens=5"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k=65"], "sae.k: 65 cannot be used; allowed: at most sae.d_sae, 64"),
        (
            ["--k=65", "--architectures=topk,batchtopk"],
            "sae.k: 65 cannot be used; allowed: at most sae.d_sae, 64",
        ),
        (["--batch-size=1024"], "fewer than train_batch_size_tokens, 1024; allowed: "),
        (["--set=sae.k=many"], "sae.k: 'many' cannot be used; allowed: a valid integer"),
        (["--set=sae.kk=3"], "sae.kk: there is no such field; did you mean sae.k?"),
        (["--set=models=3"], "models: there is no such field"),
        (["--set=logger.wandb=true"], "logger.wandb: there is no such field"),
        (["--set=training.steps=3"], "training.steps: there is no such field"),
        (["--set=lr"], "--set: 'lr' is not FIELD=VALUE"),
        (["--set=lr=0"], "lr: 0 cannot be used; allowed: above 0"),
        (["--set=lr=fast"], "lr: 'fast' cannot be used; allowed: a valid number"),
        (["--set=autocast=1"], "autocast: 1 cannot be used; allowed: a valid boolean"),
        (["--set=seqpos_slice=[1,true]"], "seqpos_slice: [1, True] cannot be used; allowed: each"),
        (["--set=dtype=float31"], "dtype: 'float31' cannot be used; allowed: float32 | "),
        (["--set=lr_scheduler_name=linear"], "lr_scheduler_name: 'linear' cannot be used"),
        (["--set=lr_decay_steps=30"], "lr_warm_up_steps + lr_decay_steps: 0 + 30 leaves nothing"),
        (["--set=training_tokens=5"], "training_tokens: 5 cannot be used; allowed: 128 or more"),
        (["--set=n_checkpoints=-1"], "n_checkpoints: -1 cannot be used; allowed: 0 or more"),
        (["--set=device=abacus"], "device: 'abacus' cannot be used here"),
        (["--set=dataset_path=./nowhere"], "dataset_path: './nowhere' cannot be used"),
        (["--set=from_pretrained_path=nowhere"], "from_pretrained_path: 'nowhere' cannot be used"),
        (["--set=use_cached_activations=true"], "cached_activations_path: 'activations/"),
        (
            ["--set=sae.normalize_activations=loud"],
            "sae.normalize_activations: 'loud' cannot be used",
        ),
        (["--architecture=standard"], "--architecture: 'standard' has no counterpart"),
        (["--architectures=topk"], "--architectures: 'topk' is not two names A,B"),
        (["--architectures=topk,topk"], "--architectures: 'topk,topk' is not two names A,B"),
        (["--architectures=topk,best"], "--architectures: 'best' is not registered"),
        (["--architectures=a,b", "--architecture=topk"], "--architectures: give one of them"),
    ],
)
def test_a_bad_value_names_its_field(
    config: MakeConfig, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        parse_comparison([config(), *arguments])
    assert message in str(error.value)


def test_a_cache_that_stock_cannot_read_is_refused(config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text("{}")
    options = [f"--set=cached_activations_path={tmp_path / 'cache'}"]
    with pytest.raises(UsageError, match=r"^cached_activations_path: .*the stock side cannot read"):
        parse_comparison([config(), "--set=use_cached_activations=true", *options])


def test_an_architecture_without_counterpart_wants_both_names(config: MakeConfig) -> None:
    sae = {"architecture": "standard", "d_in": 16, "d_sae": 64}
    with pytest.raises(UsageError, match=r"sae\.architecture: 'standard' has no counterpart"):
        parse_comparison([config(sae=sae)])
    assert parse_comparison([config(sae=sae), "--architectures=standard,gated"])


def test_embedded_default_exists_for_sparse_architectures() -> None:
    with pytest.raises(UsageError, match="--architecture: 'batchtopk'; without CONFIG it is "):
        parse_comparison(["--device=cpu", "--architecture=batchtopk"])


def test_a_config_file_that_cannot_be_read_is_an_error_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(tmp_path / "none.json")]) == 2
    assert "cannot read the config file" in capsys.readouterr().err


def settle(output: Path, config: str, *options: str) -> tuple[State, str]:
    return open_output(parse_comparison([config, f"--output={output}", *options]))


def pretend_steps(output: Path, n_steps: int) -> None:
    """Steps of both sides, as if they had been taken."""
    step: dict[str, Any] = {
        "step": 1,
        "seconds": 1.0,
        "data_seconds": 0.0,
        "loss": 1.0,
        "losses": {"mse_loss": 1.0},
        "explained_variance": 0.5,
        "l0": 4.0,
        "dead_latents": 0,
        "implementation": None,
        "added_memory_bytes": None,
        "peak_memory_bytes": None,
        "batch_crc32": 7,
    }
    for architecture in ("topk", "topk_sparse"):
        lines = [json.dumps({**step, "step": index + 1}) for index in range(n_steps)]
        (output / architecture / "steps.jsonl").write_text("\n".join(lines) + "\n")


def test_results_of_other_settings_are_kept(tmp_path: Path, config: MakeConfig) -> None:
    settle(tmp_path, config())
    settle(tmp_path, config(), "--k=3")  # nothing was there to be lost
    pretend_steps(tmp_path, 5)
    with pytest.raises(UsageError, match=r"arms\.topk\.sae\.k is 3 there and 2 here"):
        settle(tmp_path, config(), "--k=2")
    assert (tmp_path / "topk" / "steps.jsonl").exists()
    _, message = settle(tmp_path, config(), "--k=2", "--overwrite")
    assert message.startswith("Starting anew: ")
    assert not (tmp_path / "topk" / "steps.jsonl").exists()


def test_without_a_checkpoint_a_training_starts_anew(tmp_path: Path, config: MakeConfig) -> None:
    before, _ = settle(tmp_path, config())
    pretend_steps(tmp_path, 5)
    state, message = settle(tmp_path, config())
    assert message.startswith("Starting anew: an earlier training ended after step 5 without")
    assert state.run != before.run
    assert not (tmp_path / "topk" / "steps.jsonl").exists()


def test_first_difference_names_the_field() -> None:
    before = {"a": {"b": 1, "c": [2]}, "d": 3}
    assert first_difference(before, {"a": {"b": 1, "c": [4]}, "d": 3}) == (
        "a.c is [2] there and [4] here"
    )
    assert first_difference(before, {"a": before["a"]}) == "d is 3 there and null here"
