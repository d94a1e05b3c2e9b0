"""Configs of several SAEs: files, settings on the command line, and the one line of a bad one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens.multi_sae_training_runner
from sae_lens.registry import get_sae_training_class

from saelens_sparse import SparseMultiSAETrainingRunnerConfig, cli
from saelens_sparse.config.files import load_run
from saelens_sparse.config.yaml_text import parse_yaml
from tests.support.configs import ModelIsLoaded, assert_one_line, config, work_in

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
YAML = """
# What all SAEs share.
sae: {architecture: topk_sparse, d_in: 16, d_sae: 64, k: 4}
saes:
  k8: {k: 8}
  wide: {d_sae: 128}
  batch.1: {architecture: batchtopk_sparse, k: 4.5}
hook_names:
  k8: model.layers.0
  wide: model.layers.0
  batch.1: model.layers.1
model_name: ./model
model_class_name: AutoModelForCausalLM
dataset_path: ./text
training_tokens: 100_000
train_batch_size_tokens: 1000
seqpos_slice: [0, 100]
lr: 1e-3
logger:
  log_to_wandb: false
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work_in(tmp_path, monkeypatch)
    Path("run.yaml").write_text(YAML)

    def load_model(*_: Any, **__: Any) -> None:
        raise ModelIsLoaded

    monkeypatch.setattr(sae_lens.multi_sae_training_runner, "load_model", load_model)


def loaded(*settings: str) -> SparseMultiSAETrainingRunnerConfig:
    cfg = load_run("run.yaml", settings)
    assert isinstance(cfg, SparseMultiSAETrainingRunnerConfig)
    return cfg


def fields(cfg: SparseMultiSAETrainingRunnerConfig, name: str) -> dict[str, Any]:
    return {sae: getattr(one, name) for sae, one in cfg.saes.items()}


def test_each_sae_has_what_all_share_and_its_own() -> None:
    cfg = loaded()
    assert fields(cfg, "k") == {"k8": 8, "wide": 4, "batch.1": 4.5}
    assert fields(cfg, "d_sae") == {"k8": 64, "wide": 128, "batch.1": 64}
    architectures = [sae.architecture() for sae in cfg.saes.values()]
    assert architectures == ["topk_sparse", "topk_sparse", "batchtopk_sparse"]
    assert cfg.hook_names_per_sae["batch.1"] == "model.layers.1"
    assert (cfg.lr, cfg.training_tokens, cfg.seqpos_slice) == (1e-3, 100_000, (0, 100))


def test_settings_change_one_sae_or_all_or_the_run() -> None:
    cfg = loaded(
        "saes.k8.k=16", "saes.batch.1.k=3", "sae.d_sae=256", "lr=0.5", "dataset_path=./other",
        "hook_names.k8=model.layers.2", "logger.run_name=sweep", "seqpos_slice=[null]",
    )  # fmt: skip
    assert fields(cfg, "k") == {"k8": 16, "wide": 4, "batch.1": 3}
    assert fields(cfg, "d_sae") == dict.fromkeys(("k8", "wide", "batch.1"), 256)
    assert (cfg.lr, cfg.dataset_path, cfg.logger.run_name) == (0.5, "./other", "sweep")
    assert cfg.hook_names_per_sae["k8"] == "model.layers.2"
    assert cfg.seqpos_slice == (None,)


def test_settings_change_the_config_of_one_sae() -> None:
    Path("config.json").write_text(json.dumps(config({})))
    for form in (["config.json"], ["--config", "config.json"], ["--config=config.json"]):
        cfg: Any = cli.parse_train_args([*form, "--set", "sae.k=7", "--set=lr=0.25"])
        assert (cfg.sae.k, cfg.lr) == (7, 0.25)


def test_a_config_is_what_it_was_written_from() -> None:
    values = json.loads(json.dumps(loaded().to_dict()))
    Path("written.json").write_text(json.dumps(values))
    cfg = load_run("written.json")
    assert json.loads(json.dumps(cfg.to_dict())) == values
    assert cfg.checkpoint_path == values["checkpoint_path"]


def test_all_is_checked_and_then_the_model_is_loaded() -> None:
    with pytest.raises(ModelIsLoaded):
        cli.main(["train", "run.yaml", "--set", "n_batches_in_buffer=64"])


BAD: list[tuple[str, str]] = [
    ("saes.k9.k=1", "--set saes.k9.k: there is no SAE 'k9'; there are ['k8', 'wide', 'batch.1']"),
    ("saes.k8.kk=1", "saes.k8.kk: there is no such field; did you mean saes.k8.k?"),
    ("saes.k8.k=few", "saes.k8.k: 'few' cannot be used; allowed: a valid"),
    ("saes.k8.k=65", "saes.k8: k must be at most d_sae=64; got 65"),
    ("saes.k8.architecture=tokp", "saes.k8.architecture: 'tokp' cannot be used; allowed: standard"),
    ("saes.wide.topk_threshold_lr=1", "saes.wide.topk_threshold_lr: there is no such field"),
    ("saes.k8.d_in=8", "SAEs sharing hook 'model.layers.0' must have the same d_in"),
    ("saes.k8.device=abacus", "saes.k8.device: 'abacus' cannot be used here"),
    ("saes.k8.dtype=float99", "saes.k8: Invalid dtype: float99"),
    ("hook_names.k9=x", "hook_names keys must match saes keys; extra: ['k9']"),
    ("lrr=1", "lrr: there is no such field; did you mean lr?"),
    ("hook_name=x", "hook_name: there is no such field; did you mean hook_names?"),
    ("logger.lr=1", "logger.lr: there is no such field"),
    ("lr=x", "lr: 'x' cannot be used; allowed: a valid number"),
    ("lr", "--set takes NAME=VALUE; got 'lr'"),
    ("sae=1", "--set sae: name one field, such as sae.k=64"),
    ("saes=1", "--set saes: name an SAE and one field, such as saes.NAME.k=64"),
    ("saes.k8=1", "--set saes.k8: name an SAE and one field, such as saes.NAME.k=64"),
    ("saes.k8.=1", "--set saes.k8.: name an SAE and one field, such as saes.NAME.k=64"),
    ("cached_activations_path=", "cached_activations_path: '' cannot be used; allowed: at least 1"),
    ("use_cached_activations=true", "cached_activations_path: missing"),
    ("model_name=./nowhere", "model_name: './nowhere' cannot be used; allowed: a path that exists"),
    ("n_batches_in_buffer=1", "n_batches_in_buffer: 1 prompts of 100 tokens"),
    ("saes.k8.normalize_activations=no", "saes.k8.normalize_activations: 'no' cannot be used"),
]


@pytest.mark.parametrize(("setting", "message"), BAD, ids=[setting for setting, _ in BAD])
def test_a_bad_setting_is_one_line(
    setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["train", "run.yaml", "--set", "n_batches_in_buffer=64", "--set", setting])
    assert_one_line(status, capsys, message)


BAD_TEXTS: list[tuple[str, str]] = [
    ("a: [", "is not valid YAML: "),
    ("- 1", "[1] is not an object with settings"),
    ("lr: 1\nlr: 2", "is not valid YAML: 'lr' is given twice"),
    ("a: &x {b: 1}\nc: *x", "is not valid YAML: it has an alias; what several SAEs share"),
    ("? [a]\n: 1", "is not valid YAML: a field has no name"),
    ("a: !!python/name:os.system x", "is not valid YAML: could not determine a constructor"),
    ("a: !!timestamp x", "is not valid YAML: "),
    ("a: !!bool maybe", "is not valid YAML: 'maybe'"),
    ("[" * 100_000, "is not valid YAML: it is nested too deeply"),
    ("lr: 1", "sae: missing"),
    ("saes: 3", "saes: 3 is not an object with settings"),
    ("saes: {a: 3}", "saes.a: 3 is not an object with settings"),
    ("saes: {a: {k: 3}}\nsae: 4", "sae: 4 is not an object with settings"),
    ("saes: {}\nhook_names: x\nlogger: {}", "saes: there is none"),
    ("saes: {a: {}}\nlogger: {}", "hook_names: missing"),
    ("saes: {a/b: {}}\nhook_names: x\nlogger: {}", "saes: 'a/b' cannot be a name"),
    ("saes: {..: {}}\nhook_names: x\nlogger: {}", "saes: '..' cannot be a name"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS, ids=[text[:30] for text, _ in BAD_TEXTS])
def test_a_bad_file_is_one_line(
    text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.yaml").write_text(text)
    assert_one_line(cli.main(["train", "bad.yaml"]), capsys, message)


@pytest.mark.parametrize("command", ["compare", "profile"])
def test_other_commands_take_one_sae(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_one_line(cli.main([command, "run.yaml"]), capsys, "a run of several SAEs, which this")


def test_yaml_has_the_values_of_json() -> None:
    text = (
        "{a: 1e-4, b: yes, c: 2020-01-01, d: [-3, null, ~, .5, 65_536, 1.5], e: , f: true, 16: x}"
    )
    assert parse_yaml(text) == {
        "a": 1e-4, "b": "yes", "c": "2020-01-01", "d": [-3, None, None, 0.5, 65_536, 1.5],
        "e": None, "f": True, "16": "x",
    }  # fmt: skip
    values = config({"lr": 1e-5})
    assert parse_yaml(json.dumps(values)) == values


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_are_complete(path: Path) -> None:
    """Each field of the run, and for each SAE every one of its architecture."""
    values = parse_yaml(path.read_text())
    cfg = load_run(path)
    assert isinstance(cfg, SparseMultiSAETrainingRunnerConfig)
    omitted = {"metadata", "sae_lens_version", "sae_lens_training_version", "evaluator"}
    of_run = {field.name for field in dataclasses.fields(cfg) if not field.name.startswith("_")}
    assert of_run - omitted == values.keys() - {"sae"}
    names = {"smollm2": 3, "gpt2": 8, "gemma": 8}
    assert len(cfg.saes) == names[path.stem.partition("_")[0]]
    stock = dataclasses.fields(get_sae_training_class("topk")[1])
    shared = {field.name for field in stock} - omitted - {"k", "hook_eval"}
    assert shared | {"architecture", "implementation"} == values["sae"].keys()


def test_every_promised_config_is_there() -> None:
    stems = {"smollm2_demo_several", "gpt2_small_several", "gemma_2_2b_several"}
    assert {path.stem for path in CONFIGS} == stems
