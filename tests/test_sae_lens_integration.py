"""`topk_sparse` inside SAELens: its runners, files, hooks and evaluations, on a tiny model."""

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import wandb
from datasets import Dataset
from sae_lens import (
    SAE,
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
)
from sae_lens.config import LoggingConfig
from sae_lens.evals import EvalConfig, get_eval_everything_config, run_evals
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformerConfig
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import saelens_sparse
from saelens_sparse import SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig, cli
from saelens_sparse.lazy import SparseFeatureActs
from saelens_sparse.saes import topk_sparse_sae
from tests.sae_helpers import (
    PRECISIONS,
    compare_steps,
    dead_mask,
    forward_pass,
    make_stock,
    make_trainer,
    on_cpu,
    sparse_like,
    stock_like,
    zipf_inputs,
)

pytestmark = [
    # What SAELens, TransformerLens and datasets say about tiny data and about themselves.
    pytest.mark.filterwarnings("ignore:.*dataset.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*sourceTensor.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*HookedTransformer is deprecated.*"),
]

CONTEXT, VOCABULARY, D_MODEL = 16, 50, 16
D_SAE, K = 128, 4
HOOK = "blocks.0.hook_mlp_out"
N_TOKENS, BATCH = 1280, 64
REPOSITORY = Path(__file__).resolve().parents[1]

Config = type[TrainingSAEConfig]
BOTH: list[Config] = [TopKTrainingSAEConfig, SparseTopKTrainingSAEConfig]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w2"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> HookedSAETransformer:
    cfg = HookedTransformerConfig(
        n_layers=1,
        d_model=D_MODEL,
        n_ctx=CONTEXT,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        act_fn="gelu",
        d_vocab=VOCABULARY,
        seed=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedSAETransformer(cfg)
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """Sequences in which a token says something about the next one."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(0, 5, (400, CONTEXT), generator=generator)
    return (steps.cumsum(1) + torch.arange(400).unsqueeze(1)) % VOCABULARY


@pytest.fixture
def dataset(tokens: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": tokens.tolist()})


@pytest.fixture(scope="module")
def hf_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    tokens: torch.Tensor,
) -> Path:
    """A model in Hugging Face's format and a text dataset, as a command line names them."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=D_MODEL, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(folder / "model")  # fmt: skip
    tokenizer.save_pretrained(folder / "model")
    (folder / "data").mkdir()
    with (folder / "data" / "train.jsonl").open("w") as file:
        for row in tokens:
            text = " ".join(f"w{max(2, token)}" for token in row.tolist())
            file.write(json.dumps({"text": text}) + "\n")
    return folder


def sae_config(config_class: Config = SparseTopKTrainingSAEConfig, **options: Any) -> Any:
    if config_class is SparseTopKTrainingSAEConfig:
        options = {"implementation": "torch", **options}
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "k": K, **options}
    return config_class(**settings)


def jumprelu_config(architecture: str, **options: Any) -> Any:
    """A configuration that goes from half of the latents to few, in float64: no rounding of the
    encoder decides a gate.
    """
    _, config_class = get_sae_training_class(architecture)
    settings: dict[str, Any] = {
        "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float64", "jumprelu_bandwidth": 0.2,
        "l0_coefficient": 0.3, "l0_warm_up_steps": 4, "pre_act_loss_coefficient": 3e-3, **options,
    }  # fmt: skip
    return config_class(**settings)


def runner_config(
    sae: TrainingSAEConfig, folder: Path, **options: Any
) -> LanguageModelSAERunnerConfig[Any]:
    settings: dict[str, Any] = {
        "hook_name": HOOK,
        "dataset_path": "made",
        "context_size": CONTEXT,
        "training_tokens": N_TOKENS,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": BATCH,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 2,
        "dead_feature_window": 5,
        "lr": 3e-3,
        "verbose": False,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    return LanguageModelSAERunnerConfig(sae=sae, **settings)


Run = Callable[..., LanguageModelSAETrainingRunner]


@pytest.fixture
def run(model: HookedSAETransformer, dataset: Dataset, tmp_path: Path) -> Run:
    """Runs SAELens's stock runner from a fixed seed, and returns it with its trained `sae`."""

    def run(
        sae: TrainingSAEConfig | LanguageModelSAERunnerConfig[Any], **options: Any
    ) -> LanguageModelSAETrainingRunner:
        if isinstance(sae, TrainingSAEConfig):
            folder = tmp_path / f"{sae.architecture()}-{len(list(tmp_path.iterdir()))}"
            folder.mkdir()
            cfg = runner_config(sae, folder, **options)
        else:
            cfg = sae
        torch.manual_seed(0)
        runner = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
        runner.run()
        return runner

    return run


def parameters(sae: torch.nn.Module) -> dict[str, torch.Tensor]:
    return on_cpu(dict(sae.named_parameters()))


def assert_same_training(
    actual: torch.nn.Module, expected: torch.nn.Module, tolerance: float = 1e-4
) -> None:
    """Parameters agree up to the rounding that some steps of Adam have grown."""
    expected_parameters = parameters(expected)
    for name, value in parameters(actual).items():
        distance = (value - expected_parameters[name]).norm()
        assert distance <= tolerance * expected_parameters[name].norm() + 1e-9, name


def checkpoints(cfg: LanguageModelSAERunnerConfig[Any]) -> list[Path]:
    assert cfg.checkpoint_path is not None
    return sorted(Path(cfg.checkpoint_path).iterdir(), key=lambda path: path.stat().st_mtime)


class TestConfiguration:
    def test_object(self, run: Run) -> None:
        sparse, stock = (run(sae_config(config_class)).sae for config_class in BOTH[::-1])
        assert type(sparse) is SparseTopKTrainingSAE
        assert_same_training(sparse, stock)

    def test_dict_and_json(self, run: Run, tmp_path: Path) -> None:
        cfg = runner_config(sae_config(k=3, screen_buffer_mib=7), tmp_path)
        runs = [run(cfg).sae]
        for cfg_dict in (cfg.to_dict(), json.loads(json.dumps(cfg.to_dict()))):
            assert cfg_dict["sae"]["architecture"] == "topk_sparse"
            loaded = LanguageModelSAERunnerConfig.from_dict(cfg_dict)
            assert type(loaded.sae) is SparseTopKTrainingSAEConfig
            assert loaded.sae == cfg.sae
            runs.append(run(loaded).sae)
        for other in runs[1:]:
            assert_same_training(other, runs[0], tolerance=0)

    def test_the_one_word_change(self, run: Run, tmp_path: Path) -> None:
        cfg_dict = runner_config(sae_config(TopKTrainingSAEConfig), tmp_path).to_dict()
        cfg_dict["sae"]["architecture"] = "topk_sparse"
        runner = run(LanguageModelSAERunnerConfig.from_dict(cfg_dict))
        assert type(runner.sae) is SparseTopKTrainingSAE
        assert_same_training(runner.sae, run(sae_config(TopKTrainingSAEConfig)).sae)

    def test_fields_and_defaults_of_stock(self) -> None:
        stock = TopKTrainingSAEConfig(d_in=8, d_sae=200)
        sparse = SparseTopKTrainingSAEConfig(d_in=8, d_sae=200)
        for field in fields(stock):
            if field.name != "metadata":
                assert getattr(sparse, field.name) == getattr(stock, field.name), field.name
        new = {field.name for field in fields(sparse)} - {field.name for field in fields(stock)}
        defaults = {field.name for field in fields(sparse) if field.default is not None}
        assert new <= defaults
        assert sparse.implementation == "auto"

    def test_command_line_flags(self) -> None:
        flags = "--architecture topk_sparse --d_in 24 --d_sae 96 --k 7 --lr 0.01"
        flags += " --implementation torch --rescale_acts_by_decoder_norm False"
        flags += " --normalize_activations layer_norm --hook_name blocks.1.hook_resid_post"
        flags += " --training_tokens 5000 --autocast True --log_to_wandb False"
        cfg = cli.parse_train_args(flags.split())
        assert cfg.sae == SparseTopKTrainingSAEConfig(
            d_in=24, d_sae=96, k=7, implementation="torch", rescale_acts_by_decoder_norm=False,
            normalize_activations="layer_norm",
        )  # fmt: skip
        assert (cfg.lr, cfg.training_tokens, cfg.autocast) == (0.01, 5000, True)
        assert cfg.hook_name == "blocks.1.hook_resid_post"
        assert not cfg.logger.log_to_wandb

    def test_command_line_flags_of_other_architectures(self) -> None:
        cfg = cli.parse_train_args(["--architecture", "topk", "--k", "5"])
        assert type(cfg.sae) is TopKTrainingSAEConfig

    @pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]], ids=" ".join)
    def test_command_line_config_file(self, form: list[str], tmp_path: Path) -> None:
        cfg = runner_config(sae_config(), tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(cfg.to_dict()))
        loaded = cli.parse_train_args([part.format(path) for part in form])
        assert loaded.sae == cfg.sae
        assert json.dumps(loaded.to_dict()) == json.dumps(cfg.to_dict())

    def test_command_line_runs(self, hf_folder: Path, tmp_path: Path) -> None:
        """Both forms in processes of their own; they train the same SAE."""
        flags = {
            "architecture": "topk_sparse", "d_in": D_MODEL, "d_sae": D_SAE, "k": K,
            "model_class_name": "AutoModelForCausalLM", "model_name": hf_folder / "model",
            "hook_name": "transformer.h.0", "dataset_path": hf_folder / "data",
            "is_dataset_tokenized": False, "streaming": False, "context_size": CONTEXT,
            "training_tokens": N_TOKENS, "train_batch_size_tokens": BATCH,
            "store_batch_size_prompts": 8, "n_batches_in_buffer": 16, "log_to_wandb": False,
            "activations_mixing_fraction": 0, "checkpoint_path": tmp_path / "checkpoints",
            "output_path": tmp_path / "flags",
        }  # fmt: skip
        args = ["train", *(f"--{name}={value}" for name, value in flags.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
        first = subprocess.Popen(
            [sys.executable, "-m", "saelens_sparse.cli", *args],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        log, _ = first.communicate(timeout=300)
        assert first.returncode == 0, log

        cfg_dict = json.loads((tmp_path / "flags" / "runner_cfg.json").read_text())
        cfg_dict["output_path"] = str(tmp_path / "file")
        path = tmp_path / "config.json"
        path.write_text(json.dumps(cfg_dict))
        assert cli.main(["train", "--config", str(path)]) == 0
        trained = [SAE.load_from_disk(tmp_path / name) for name in ("flags", "file")]
        assert trained[0].cfg.architecture() == "topk"
        assert trained[0].cfg.metadata.training_architecture == "topk_sparse"
        # Their initialisations differ; their shapes and their data do not.
        assert trained[0].W_enc.shape == trained[1].W_enc.shape == (D_MODEL, D_SAE)
        assert all(torch.isfinite(p).all() for sae in trained for p in sae.parameters())

    @pytest.mark.parametrize("args", [[], ["-h"], ["--help"]], ids=str)
    def test_command_line_help(self, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(args) == 0
        assert "usage: saelens-sparse train" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["fit"], "unknown command 'fit'"),
            (["train", "--config"], "--config needs a file"),
            (["train", "--config", "missing.json"], "cannot read the config file missing.json"),
            (["train", "--config", "bad.json"], "bad.json is not valid JSON"),
            (["train", "--config", "list.json"], "list.json"),
            (["train", "--config", "empty.json"], "sae field is required"),
            (["train", "--config", "unknown.json"], "names no known architecture"),
            (["train", "--config", "k.json"], "k must be at most d_sae"),
            (["train", "--config", "field.json"], "no_such_field"),
            (["train", "--config", "empty.json", "--k", "3"], "remove --k 3"),
            (["train", "--k", "3", "--config", "empty.json"], "give it alone"),
            (["train", "--architecture", "topk_sparse", "--k", "0"], "k must be at least 1"),
            (["train", "--architecture", "topk_sparse", "--k", "few"], "--k"),
            (
                ["train", "--architecture", "topk_sparse", "--implementation", "cuda"],
                "--implementation",
            ),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_command_line_errors(
        self,
        args: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        good = runner_config(sae_config(), tmp_path).to_dict()
        files = {
            "bad.json": "{",
            "list.json": "[1, 2]",
            "empty.json": "{}",
            "unknown.json": json.dumps({**good, "sae": {**good["sae"], "architecture": "tokp"}}),
            "k.json": json.dumps({**good, "sae": {**good["sae"], "k": 10_000}}),
            "field.json": json.dumps({**good, "no_such_field": 1}),
        }
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        monkeypatch.chdir(tmp_path)
        assert cli.main(args) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert "Traceback" not in captured.err
        assert captured.out == ""

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"k": 0}, ValueError, "k must be at least 1; got 0"),
            ({"k": -3}, ValueError, "k must be at least 1; got -3"),
            ({"k": D_SAE + 1}, ValueError, f"k must be at most d_sae={D_SAE}; got {D_SAE + 1}"),
            ({"k": 2.5}, TypeError, "k must be an int; got 2.5"),
            ({"k": True}, TypeError, "k must be an int; got True"),
            ({"k": "4"}, TypeError, "k must be an int; got '4'"),
            ({"k": float("nan")}, TypeError, "k must be an int; got nan"),
            ({"d_in": 0}, ValueError, "d_in must be at least 1; got 0"),
            ({"d_in": 3.0}, TypeError, "d_in must be an int; got 3.0"),
            ({"d_sae": -1, "k": 1}, ValueError, "d_sae must be at least 1; got -1"),
            ({"screen_buffer_mib": 0}, ValueError, "screen_buffer_mib must be at least 1; got 0"),
            ({"aux_loss_coefficient": float("nan")}, ValueError, "aux_loss_coefficient must be"),
            ({"aux_loss_coefficient": float("inf")}, ValueError, "aux_loss_coefficient must be"),
            ({"decoder_init_norm": float("nan")}, ValueError, "decoder_init_norm must be"),
            ({"decoder_init_norm": 0.0}, ValueError, "decoder_init_norm must be"),
            ({"implementation": "cuda"}, ValueError, "implementation must be one of auto, triton"),
            ({"normalize_activations": "l2"}, ValueError, "normalize_activations must be"),
        ],
        ids=str,
    )
    def test_bad_values(
        self, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            sae_config(**options)

    def test_use_sparse_activations_warns_once(self) -> None:
        topk_sparse_sae._say_sparse_activations_are_moot.cache_clear()
        with pytest.warns(UserWarning, match="use_sparse_activations=True has nothing left"):
            cfg = sae_config(use_sparse_activations=True)
        assert cfg.use_sparse_activations
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sae = SparseTopKTrainingSAE(sae_config(use_sparse_activations=True))
        output = forward_pass(sae, torch.randn(5, D_MODEL))
        output.loss.backward()
        assert not output.feature_acts.is_sparse

    def test_registration_is_idempotent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for _ in range(2):
            saelens_sparse.register()
        expected = (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig)
        assert get_sae_training_class("topk_sparse") == expected
        monkeypatch.delitem(SAE_TRAINING_CLASS_REGISTRY, "topk_sparse")
        saelens_sparse.register()
        assert get_sae_training_class("topk_sparse") == expected
        monkeypatch.setitem(
            SAE_TRAINING_CLASS_REGISTRY, "topk_sparse", get_sae_training_class("topk")
        )
        with pytest.raises(ValueError, match="topk_sparse already registered"):
            saelens_sparse.register()


class TestInputs:
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (torch.zeros(4, D_MODEL + 1), ValueError, rf"x must have d_in={D_MODEL} .*\[4, 17\]"),
            (torch.zeros(4, 1), ValueError, "x must have d_in"),
            (torch.zeros(()), ValueError, "x must have d_in"),
            (torch.zeros(4, D_MODEL, dtype=torch.int64), TypeError, "x must have a floating"),
            (torch.zeros(4, D_MODEL, dtype=torch.complex64), TypeError, "x must have a floating"),
            (torch.zeros(4, D_MODEL, device="meta"), ValueError, "x must be on the SAE's device"),
            ([[0.0] * D_MODEL], TypeError, "x must be a torch.Tensor; got list"),
        ],
        ids=["width", "width-1", "scalar", "integer", "complex", "device", "list"],
    )
    @pytest.mark.parametrize("implementation", ["torch", "dense"])
    def test_bad_inputs(
        self, x: Any, error: type[Exception], message: str, implementation: str
    ) -> None:
        sae = SparseTopKTrainingSAE(sae_config(implementation=implementation))
        for method in (sae.encode, sae.forward, sae.encode_with_hidden_pre):
            with pytest.raises(error, match=message):
                method(x)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_inputs_of_other_dtypes_as_in_stock(self, dtype: torch.dtype) -> None:
        stock = make_stock()
        x = zipf_inputs(stock, 8).to(dtype)
        sparse = sparse_like(stock)
        torch.testing.assert_close(sparse.encode(x), stock.encode(x))
        torch.testing.assert_close(sparse(x), stock(x))
        expected, actual = (forward_pass(sae, x) for sae in (stock, sparse))
        torch.testing.assert_close(actual.loss, expected.loss)

    def test_triton_is_never_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        sae = SparseTopKTrainingSAE(sae_config(implementation="triton"))
        with pytest.raises(ValueError, match=r"implementation='triton' cannot run here: .*'torch'"):
            sae.encode(torch.zeros(4, D_MODEL))


RUN_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "no rescaling": ({"rescale_acts_by_decoder_norm": False}, {}),
    "no centring": ({"apply_b_dec_to_input": False}, {}),
    "no decoder_init_norm": ({"decoder_init_norm": None}, {}),
    "expected_average_only_in": ({"normalize_activations": "expected_average_only_in"}, {}),
    "covariance_whitening": ({"normalize_activations": "covariance_whitening"}, {}),
    "whitening, nothing else": (
        {
            "normalize_activations": "covariance_whitening",
            "rescale_acts_by_decoder_norm": False,
            "apply_b_dec_to_input": False,
        },
        {},
    ),
    "constant_norm_rescale": (
        {"normalize_activations": "constant_norm_rescale"},
        {"dead_feature_window": 10**6},
    ),
    "layer_norm": ({"normalize_activations": "layer_norm"}, {"dead_feature_window": 10**6}),
    "float64": ({"dtype": "float64"}, {}),
    "prefetch": ({}, {"prefetch_llm_batches": 2}),
    "act_store_device": ({}, {"act_store_device": "with_model"}),
    "exclude_special_tokens": ({}, {"exclude_special_tokens": True}),
    "exclude given tokens": ({}, {"exclude_special_tokens": [3, 4]}),
    "no mixing": ({}, {"activations_mixing_fraction": 0.0}),
    "schedules": ({}, {"lr_warm_up_steps": 3, "lr_decay_steps": 5}),
    "cosine": ({}, {"lr_scheduler_name": "cosineannealing"}),
    "seqpos_slice": ({}, {"seqpos_slice": (2, 14)}),
    "head": ({"d_in": 8}, {"hook_name": "blocks.0.attn.hook_z", "hook_head_index": 1}),
    "all heads": ({"d_in": 16}, {"hook_name": "blocks.0.attn.hook_z"}),
}
JUMPRELU_RUN_OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "step": ({}, {}),
    "tanh": ({"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}, {}),
    "quadratic": ({"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0}, {}),
    "no centring": ({"apply_b_dec_to_input": False}, {}),
    "expected_average_only_in": ({"normalize_activations": "expected_average_only_in"}, {}),
    "covariance_whitening": ({"normalize_activations": "covariance_whitening"}, {}),
    "constant_norm_rescale": ({"normalize_activations": "constant_norm_rescale"}, {}),
    "layer_norm": ({"normalize_activations": "layer_norm"}, {}),
}


class TestRunner:
    @pytest.mark.parametrize("name", RUN_OPTIONS)
    def test_options_train_as_stock(self, run: Run, name: str) -> None:
        sae_options, runner_options = RUN_OPTIONS[name]
        stock, sparse = (
            run(sae_config(config_class, **sae_options), **runner_options).sae
            for config_class in BOTH
        )
        assert type(sparse) is SparseTopKTrainingSAE
        assert_same_training(sparse, stock)
        assert sparse.cfg.normalize_activations == stock.cfg.normalize_activations
        assert sparse.cfg.metadata.l0 == pytest.approx(stock.cfg.metadata.l0)
        assert sparse.cfg.metadata.num_dead_features == stock.cfg.metadata.num_dead_features

    @pytest.mark.parametrize("implementation", ["torch", "auto"])
    @pytest.mark.parametrize("name", JUMPRELU_RUN_OPTIONS)
    def test_jumprelu_options_train_as_stock(
        self, run: Run, name: str, implementation: str
    ) -> None:
        sae_options, runner_options = JUMPRELU_RUN_OPTIONS[name]
        stock = run(jumprelu_config("jumprelu", **sae_options), **runner_options).sae
        cfg = jumprelu_config("jumprelu_sparse", **sae_options, implementation=implementation)
        sparse = run(cfg, **runner_options).sae
        assert type(sparse) is get_sae_training_class("jumprelu_sparse")[0]
        assert_same_training(sparse, stock)
        assert sparse.cfg.normalize_activations == stock.cfg.normalize_activations
        assert sparse.cfg.metadata.l0 == pytest.approx(stock.cfg.metadata.l0)
        assert sparse.cfg.metadata.num_dead_features == stock.cfg.metadata.num_dead_features

    @pytest.mark.parametrize("low_precision", ["bfloat16", "autocast"])
    def test_low_precision(self, run: Run, low_precision: str) -> None:
        options = (
            ({"dtype": "bfloat16"}, {"dtype": "bfloat16"})
            if low_precision == "bfloat16"
            else ({}, {"autocast": True})
        )
        reference = run(sae_config(TopKTrainingSAEConfig, dtype="float64")).sae
        stock, sparse = (
            run(sae_config(config_class, **options[0]), **options[1]).sae for config_class in BOTH
        )
        expected = parameters(reference)
        for name, value in parameters(sparse).items():
            stock_error = (parameters(stock)[name] - expected[name]).norm()
            assert (value - expected[name]).norm() <= 2 * stock_error, name

    def test_compile_sae(self, run: Run) -> None:
        compiled, eager = (
            run(sae_config(), compile_sae=compile_sae, training_tokens=4 * BATCH)
            for compile_sae in (True, False)
        )
        assert "training_forward_pass" in vars(compiled.sae), "nothing was compiled"
        assert_same_training(compiled.sae, eager.sae, tolerance=0)

    def test_default_implementation(self, run: Run) -> None:
        """What a user gets who says nothing but the architecture."""
        cfg = SparseTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=K)
        sae = run(cfg).sae
        assert isinstance(sae, SparseTopKTrainingSAE)
        assert sae.implementation.name == "torch"
        assert_same_training(sae, run(sae_config(TopKTrainingSAEConfig)).sae)

    def test_cached_activations(
        self, hf_folder: Path, dataset: Dataset, run: Run, tmp_path: Path
    ) -> None:
        path = tmp_path / "cached"
        cache = CacheActivationsRunnerConfig(
            dataset_path="made",
            model_name=str(hf_folder / "model"),
            model_class_name="AutoModelForCausalLM",
            model_batch_size=8,
            hook_name="transformer.h.0",
            d_in=D_MODEL,
            training_tokens=N_TOKENS,
            context_size=CONTEXT,
            new_cached_activations_path=str(path),
            device="cpu",
            # Two shards.
            buffer_size_gb=N_TOKENS * D_MODEL * 4 / 2 / 1e9,
        )
        CacheActivationsRunner(cache, override_dataset=dataset).run()
        stock, sparse = (
            run(
                sae_config(config_class),
                hook_name="transformer.h.0",
                use_cached_activations=True,
                cached_activations_path=str(path),
            ).sae
            for config_class in BOTH
        )
        assert_same_training(sparse, stock)

    def test_from_pretrained_path(self, run: Run) -> None:
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

    def test_evaluator_of_the_runner(self, run: Run) -> None:
        """The same trained weights evaluated by both architectures."""
        runner = run(sae_config(), exclude_special_tokens=[3])
        sparse = runner.sae
        assert isinstance(sparse, SparseTopKTrainingSAE)
        stock = stock_like(sparse, torch.float32)
        stock.cfg.metadata = sparse.cfg.metadata
        metrics = []
        for sae in (stock, sparse):
            runner.activations_store.iterable_sequences = (
                runner.activations_store._iterate_tokenized_sequences()
            )
            metrics.append(runner.evaluator(sae, runner.activations_store, ActivationScaler()))
        expected, actual = (flatten(dictionary) for dictionary in metrics)
        assert "model_performance_preservation/ce_loss_score" in expected
        assert actual == pytest.approx(expected, rel=1e-4, nan_ok=True)

    def test_run_evals_computes_everything(self, run: Run, model: HookedSAETransformer) -> None:
        runner = run(sae_config())
        sparse = runner.sae
        assert isinstance(sparse, SparseTopKTrainingSAE)
        stock = stock_like(sparse, torch.float32)
        stock.cfg.metadata = sparse.cfg.metadata
        assert runner.cfg.output_path is not None
        inference = SAE.load_from_disk(runner.cfg.output_path)
        config = get_eval_everything_config(
            batch_size_prompts=4,
            n_eval_reconstruction_batches=2,
            n_eval_sparsity_variance_batches=2,
        )
        assert isinstance(config, EvalConfig)
        results = []
        assert runner.activations_store.dataset is not None
        for sae in (stock, sparse, inference):
            store = ActivationsStore.from_sae(
                model, sae, dataset=runner.activations_store.dataset, context_size=CONTEXT,
                streaming=False,
            )  # fmt: skip
            results.append(run_evals(sae, store, model, ActivationScaler(), config, verbose=False))
        (expected, expected_features), *others = results
        for metrics, features in others:
            assert flatten(metrics) == pytest.approx(flatten(expected), rel=1e-3, nan_ok=True)
            assert features["feature_density"] == pytest.approx(
                expected_features["feature_density"], abs=1e-6
            )


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


class TestWandb:
    @pytest.fixture
    def logged(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What would be sent to wandb."""
        records: list[dict[str, Any]] = []
        monkeypatch.setattr(wandb, "init", lambda **_: None)
        monkeypatch.setattr(wandb, "finish", lambda: None)
        monkeypatch.setattr(wandb, "log", lambda record, **_: records.append(record))
        monkeypatch.setattr(wandb, "log_artifact", lambda *_, **__: None)
        return records

    def test_metrics_of_stock_and_the_recomputed_rows(
        self, run: Run, logged: list[dict[str, Any]]
    ) -> None:
        names, values = [], []
        for config_class in BOTH:
            logged.clear()
            run(
                sae_config(config_class),
                logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2),
                feature_sampling_window=4,
                n_checkpoints=1,
            )
            names.append([tuple(record) for record in logged])
            values.append([record for record in logged if "losses/mse_loss" in record])
        new = "metrics/rows_recomputed"
        assert len(values[0]) == N_TOKENS // BATCH // 2
        assert any(new in record for record in names[1])
        assert [set(record) - {new} for record in names[1]] == [set(r) for r in names[0]]
        for expected, actual in zip(*values, strict=True):
            rows = actual.pop(new)
            assert rows == 0
            assert isinstance(rows, int)
            assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)

    def test_offline_run(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path))
        runner = run(
            sae_config(),
            logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2),
            feature_sampling_window=4,
            n_checkpoints=1,
        )
        assert type(runner.sae) is SparseTopKTrainingSAE
        assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


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
folder, x, out = sys.argv[1:]
sae = SAE.load_from_disk(folder)
architecture = sae.cfg.architecture()
assert type(sae).__module__ == f"sae_lens.saes.{architecture}_sae", type(sae)
assert architecture in ("topk", "jumprelu")
acts = sae.encode(torch.load(x))
torch.save((acts, sae.decode(acts)), out)
"""


class TestFiles:
    @pytest.mark.parametrize("architecture", ["topk_sparse", "jumprelu_sparse"])
    def test_output_opens_where_the_plugin_is_missing(
        self, run: Run, tmp_path: Path, architecture: str
    ) -> None:
        jumprelu = architecture == "jumprelu_sparse"
        runner = run(jumprelu_config(architecture) if jumprelu else sae_config(), autocast=False)
        sae, folder = runner.sae, str(runner.cfg.output_path)
        x = torch.randn(7, D_MODEL)
        torch.save(x, tmp_path / "x.pt")
        (tmp_path / "script.py").write_text(OPEN_WITHOUT_PLUGIN)
        arguments = [folder, tmp_path / "x.pt", tmp_path / "out.pt"]
        process = subprocess.run(
            [sys.executable, tmp_path / "script.py", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        acts, recons = torch.load(tmp_path / "out.pt")
        assert acts.any()
        torch.testing.assert_close(acts, sae.encode(x))
        torch.testing.assert_close(recons, sae(x))

    @pytest.mark.parametrize("rescale", [True, False])
    def test_inference_model(self, rescale: bool, tmp_path: Path) -> None:
        stock = make_stock(rescale_acts_by_decoder_norm=rescale)
        x = zipf_inputs(stock, 9)
        sparse = sparse_like(stock)
        forward_pass(sparse, x)
        before = parameters(sparse)
        assert sparse.W_enc.T.is_contiguous(), "the test is about the transposed layout"
        for folder, sae in (("stock", stock), ("sparse", sparse)):
            sae.save_inference_model(tmp_path / folder)
        for name, value in parameters(sparse).items():
            assert torch.equal(value, before[name]), "saving changed a weight"
        assert sparse.cfg.rescale_acts_by_decoder_norm == rescale
        loaded = [SAE.load_from_disk(tmp_path / folder) for folder in ("stock", "sparse")]
        assert type(loaded[0]) is type(loaded[1])
        for name, value in loaded[0].state_dict().items():
            torch.testing.assert_close(loaded[1].state_dict()[name], value)
        configs = [json.loads((tmp_path / f / "cfg.json").read_text()) for f in ("stock", "sparse")]
        assert configs[0].pop("metadata").keys() == configs[1].pop("metadata").keys()
        assert configs[0] == configs[1]
        torch.testing.assert_close(loaded[1].encode(x), stock.encode(x))
        torch.testing.assert_close(loaded[1](x), stock(x))

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_training_model_round_trip(self, dtype: str, tmp_path: Path) -> None:
        stock = make_stock(dtype=getattr(torch, dtype))
        sparse = sparse_like(stock)
        x = zipf_inputs(stock, 9)
        trainer = make_trainer(sparse)
        trainer.step(x)
        sparse.save_model(tmp_path)
        loaded = TrainingSAE.load_from_disk(tmp_path)
        assert type(loaded) is SparseTopKTrainingSAE
        assert {**loaded.cfg.to_dict(), "metadata": None} == {
            **sparse.cfg.to_dict(),
            "metadata": None,
        }
        for name, value in parameters(sparse).items():
            assert torch.equal(parameters(loaded)[name], value)
        # And it goes on training, in the same layout.
        for sae in (sparse, loaded):
            make_trainer(sae).step(x)
        assert loaded.W_enc.T.is_contiguous()
        assert_same_training(loaded, sparse, tolerance=0)

    def test_state_dict_is_stock_s(self, tmp_path: Path) -> None:
        stock = make_stock()
        sparse = sparse_like(stock)
        forward_pass(sparse, zipf_inputs(stock, 4))
        assert {n: v.shape for n, v in sparse.state_dict().items()} == {
            n: v.shape for n, v in stock.state_dict().items()
        }
        torch.save(sparse.state_dict(), tmp_path / "weights.pt")
        fresh = make_stock()
        fresh.load_state_dict(torch.load(tmp_path / "weights.pt"))
        for name, value in stock.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], value)

    def test_runner_resumes(self, run: Run) -> None:
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

    @pytest.mark.parametrize("resumed_class", BOTH, ids=lambda c: f"as-{c.architecture()}")
    @pytest.mark.parametrize("first_class", BOTH, ids=lambda c: f"from-{c.architecture()}")
    def test_runner_resumes_the_other_architecture(
        self, run: Run, first_class: Config, resumed_class: Config
    ) -> None:
        first = run(sae_config(first_class), n_checkpoints=1)
        checkpoint = str(checkpoints(first.cfg)[0])
        expected = run(sae_config(first_class), resume_from_checkpoint=checkpoint).sae
        actual = run(sae_config(resumed_class), resume_from_checkpoint=checkpoint).sae
        assert actual.cfg.architecture() == resumed_class.architecture()
        assert_same_training(actual, expected, tolerance=1e-4)

    @pytest.mark.parametrize("resumed_as", ["jumprelu", "jumprelu_sparse"])
    @pytest.mark.parametrize("begun_as", ["jumprelu", "jumprelu_sparse"])
    def test_runner_resumes_either_jumprelu(self, run: Run, begun_as: str, resumed_as: str) -> None:
        first = run(jumprelu_config(begun_as), n_checkpoints=1)
        checkpoint = str(checkpoints(first.cfg)[0])
        expected = run(jumprelu_config(begun_as), resume_from_checkpoint=checkpoint).sae
        actual = run(jumprelu_config(resumed_as), resume_from_checkpoint=checkpoint).sae
        assert actual.cfg.architecture() == resumed_as
        assert_same_training(actual, expected, tolerance=1e-4)

    @pytest.mark.parametrize("second", ["topk", "topk_sparse"])
    @pytest.mark.parametrize("first", ["topk", "topk_sparse"])
    def test_checkpoint_continues_bit_for_bit_or_to_rounding(
        self, first: str, second: str, tmp_path: Path
    ) -> None:
        """Five steps, a checkpoint, five more; against ten steps in one go."""
        stock = make_stock()
        batches = [zipf_inputs(stock, 32) for _ in range(10)]
        make = {"topk": lambda: stock_like(stock, torch.float32), "topk_sparse": lambda: sparse_like(stock)}  # fmt: skip  # noqa: E501
        options = {"dead_feature_window": 2, "total_training_samples": 320, "lr_decay_steps": 6}

        whole = make_trainer(make[first](), **options)
        for x in batches:
            whole.step(x)
            whole.n_training_steps += 1

        half = make_trainer(make[first](), **options)
        for x in batches[:5]:
            half.step(x)
            half.n_training_steps += 1
        half.save_checkpoint("half", base_path=tmp_path)

        sae = make[second]()
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.zero_()
        resumed = make_trainer(sae, **options)
        resumed.load_trainer_state(tmp_path / "half")
        sae.load_weights_from_checkpoint(tmp_path / "half")
        for name, value in parameters(half.sae).items():
            assert torch.equal(parameters(sae)[name], value), name
        assert resumed.n_training_steps == 5
        assert torch.equal(resumed.act_freq_scores, half.act_freq_scores)
        for x in batches[5:]:
            resumed.step(x)
            resumed.n_training_steps += 1

        tolerance = 0 if first == second else 1e-5
        assert_same_training(sae, whole.sae, tolerance)
        for name, parameter in sae.named_parameters():
            state = resumed.optimizer.state[parameter]
            expected = whole.optimizer.state[dict(whole.sae.named_parameters())[name]]
            assert state["step"] == expected["step"] == 10
            for moment in ("exp_avg", "exp_avg_sq"):
                distance = (state[moment] - expected[moment]).norm()
                assert distance <= tolerance * expected[moment].norm()
                if second == "topk_sparse":
                    assert state[moment].stride() == parameter.stride(), (name, moment)
        if second == "topk_sparse":
            assert sae.W_enc.T.is_contiguous()
        assert resumed.lr_scheduler.get_last_lr() == whole.lr_scheduler.get_last_lr()

    def test_trainer_state_file_is_as_stock_writes_it(self, tmp_path: Path) -> None:
        stock = make_stock()
        x = zipf_inputs(stock, 8)
        states = []
        for name, sae in {"stock": stock, "sparse": sparse_like(stock)}.items():
            trainer = make_trainer(sae)
            trainer.step(x)
            trainer.save_checkpoint(name, base_path=tmp_path)
            states.append(torch.load(tmp_path / name / "trainer_state.pt"))
        assert {p.name for p in (tmp_path / "stock").iterdir()} == {
            p.name for p in (tmp_path / "sparse").iterdir()
        }
        expected, actual = (state["optimizer"] for state in states)
        assert actual["param_groups"] == expected["param_groups"]
        assert actual["state"].keys() == expected["state"].keys()
        for index, moments in expected["state"].items():
            for name, value in moments.items():
                other = actual["state"][index][name]
                assert (other.shape, other.dtype, other.stride(), other.device) == (
                    value.shape, value.dtype, value.stride(), value.device,
                )  # fmt: skip
                torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-7)

    @pytest.mark.parametrize("config_class", BOTH, ids=lambda c: c.architecture())
    def test_several_saes_resume_after_an_interruption(
        self,
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
        self, model: HookedSAETransformer, dataset: Dataset, tmp_path: Path
    ) -> None:
        """SAELens decides what is written and raised; a regular checkpoint is there to resume."""
        outcomes = []
        for config_class in BOTH:
            folder = tmp_path / config_class.architecture()
            cfg = runner_config(sae_config(config_class), folder, n_checkpoints=3)
            runner = LanguageModelSAETrainingRunner(
                cfg, override_model=model, override_dataset=dataset
            )
            store = runner.activations_store
            n_batches = 0

            def interrupting(
                self: ActivationsStore, original: Any = ActivationsStore.__next__
            ) -> Any:
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


def multi_config(
    saes: Mapping[str, TrainingSAEConfig], folder: Path, **options: Any
) -> MultiSAETrainingRunnerConfig:
    settings: dict[str, Any] = {
        "hook_names": HOOK,
        "dataset_path": "made",
        "context_size": CONTEXT,
        "training_tokens": N_TOKENS,
        "store_batch_size_prompts": 8,
        "train_batch_size_tokens": BATCH,
        "n_batches_in_buffer": 16,
        "n_batches_for_norm_estimate": 4,
        "n_eval_batches": 2,
        "dead_feature_window": 5,
        "lr": 3e-3,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        **options,
    }
    return MultiSAETrainingRunnerConfig(saes=saes, **settings)


def test_several_saes_beside_stock(
    model: HookedSAETransformer,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(wandb, "log", lambda record, **_: records.append(record))
    monkeypatch.setattr(wandb, "log_artifact", lambda *_, **__: None)
    configs = {
        "sparse": sae_config(),
        "stock": sae_config(TopKTrainingSAEConfig),
        "wide": sae_config(d_sae=160, k=3),
        "normalized": sae_config(normalize_activations="expected_average_only_in"),
        "relu": StandardTrainingSAEConfig(d_in=D_MODEL, d_sae=32),
    }
    cfg = multi_config(
        configs,
        tmp_path,
        hook_names={**dict.fromkeys(configs, HOOK), "wide": "blocks.0.hook_resid_post"},
        logger=LoggingConfig(wandb_log_frequency=2, eval_every_n_wandb_logs=2),
        n_checkpoints=1,
        prefetch_llm_batches=True,
    )
    torch.manual_seed(0)
    runner = MultiSAETrainingRunner(cfg, override_model=model, override_dataset=dataset)
    for name in ("W_enc", "W_dec"):
        getattr(runner.saes["sparse"], name).data.copy_(getattr(runner.saes["stock"], name).data)
    saes = runner.run()
    assert_same_training(saes["sparse"], saes["stock"])
    steps = [record for record in records if "sparse/losses/mse_loss" in record]
    assert len(steps) == N_TOKENS // BATCH // 2
    for record in steps:
        for name in ("losses/mse_loss", "metrics/l0", "metrics/explained_variance"):
            assert record[f"sparse/{name}"] == pytest.approx(record[f"stock/{name}"], rel=1e-3)
    loaded = SAE.load_from_disk(tmp_path / "output" / "wide")
    assert loaded.cfg.architecture() == "topk"
    assert loaded.cfg.k == 3


class TestTransformations:
    """What moves, casts or folds weights gives stock's results, before and after training."""

    @pytest.fixture(params=["fresh", "trained"])
    def saes(self, request: pytest.FixtureRequest) -> tuple[TopKTrainingSAE, SparseTopKTrainingSAE]:
        sparse = sparse_like(make_stock())
        if request.param == "trained":
            make_trainer(sparse).step(zipf_inputs(sparse, 16))
        return stock_like(sparse, torch.float32), sparse

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda sae: sae.to(torch.bfloat16), id="to-bfloat16"),
            pytest.param(lambda sae: sae.to(dtype=torch.float64), id="to-float64"),
            pytest.param(lambda sae: sae.to("cpu"), id="to-cpu"),
            pytest.param(lambda sae: sae.fold_W_dec_norm(), id="fold_W_dec_norm"),
            pytest.param(
                lambda sae: sae.fold_activation_norm_scaling_factor(3.0), id="fold_scaling"
            ),
            pytest.param(
                lambda sae: sae.fold_activation_whitening(
                    torch.linspace(-1, 1, sae.cfg.d_in),
                    torch.eye(sae.cfg.d_in) + torch.ones(sae.cfg.d_in, sae.cfg.d_in).tril(),
                    torch.linalg.inv(
                        torch.eye(sae.cfg.d_in) + torch.ones(sae.cfg.d_in, sae.cfg.d_in).tril()
                    ),
                ),
                id="fold_whitening",
            ),
        ],
    )
    def test_change(
        self,
        saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE],
        change: Callable[[TrainingSAE[Any]], Any],
    ) -> None:
        stock, sparse = saes
        for sae in saes:
            change(sae)
        assert sparse.cfg.dtype == stock.cfg.dtype
        assert sparse.cfg.rescale_acts_by_decoder_norm == stock.cfg.rescale_acts_by_decoder_norm
        assert sparse.cfg.normalize_activations == stock.cfg.normalize_activations
        expected = parameters(stock)
        for name, value in parameters(sparse).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        dead = dead_mask(stock, 20)
        x = zipf_inputs(stock, 16, dead)
        assert isinstance(forward_pass(sparse, x).feature_acts, SparseFeatureActs)
        (precision,) = (p for p in PRECISIONS if p.dtype == stock.dtype and not p.autocast)
        compare_steps(stock, sparse, x, dead, precision)

    def test_deepcopy(self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE]) -> None:
        sparse = saes[1]
        copied = copy.deepcopy(sparse)
        x = zipf_inputs(sparse, 16)
        for sae in (sparse, copied):
            make_trainer(sae).step(x)
        assert_same_training(copied, sparse, tolerance=0)
        assert copied.W_enc.data_ptr() != sparse.W_enc.data_ptr()

    def test_folding_needs_rescaling_as_in_stock(self) -> None:
        stock = make_stock(rescale_acts_by_decoder_norm=False)
        for sae in (stock, sparse_like(stock)):
            with pytest.raises(NotImplementedError, match="Folding W_dec_norm is not safe"):
                sae.fold_W_dec_norm()

    def test_load_from_disk_options(self, tmp_path: Path) -> None:
        sparse = sparse_like(make_stock())
        x = zipf_inputs(sparse, 9)
        make_trainer(sparse).step(x)
        sparse.save_model(tmp_path)
        folded = TrainingSAE.load_from_disk(tmp_path, fold_W_dec_norm=True)
        torch.testing.assert_close(folded(x), sparse(x))
        assert TrainingSAE.load_from_disk(tmp_path, dtype="float64")(x).dtype == torch.float64


class TestOptimizer:
    """SAELens's Adam, prepared before each step."""

    def test_adam_is_fused_unless_told_otherwise(self) -> None:
        stock = make_stock()
        for fused_adam in (True, False):
            sparse = sparse_like(stock, fused_adam=fused_adam)
            trainer = make_trainer(sparse)
            trainer.step(zipf_inputs(stock, 9))
            (group,) = trainer.optimizer.param_groups
            assert group["fused"] is (True if fused_adam else None)
            (written,) = trainer.optimizer.state_dict()["param_groups"]
            assert written["fused"] is None

    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}])
    def test_a_choice_is_respected(self, options: dict[str, Any]) -> None:
        sparse = sparse_like(make_stock())
        optimizer = torch.optim.Adam(sparse.parameters(), **options)
        forward_pass(sparse, zipf_inputs(sparse, 9)).loss.backward()
        optimizer.step()
        (group,) = optimizer.param_groups
        assert {name: group[name] for name in options} == options
        assert not group["fused"]

    def test_other_optimizers_are_left_alone(self) -> None:
        layer = torch.nn.Linear(3, 4)
        optimizer = torch.optim.Adam(layer.parameters())
        layer(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["fused"] is None
        assert optimizer.state_dict()["param_groups"][0]["fused"] is None
        stock = make_stock()
        trainer = make_trainer(stock)
        trainer.step(zipf_inputs(stock, 9))
        assert trainer.optimizer.param_groups[0]["fused"] is None

    @pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
    def test_other_optimizers_train(self, optimizer_class: Any) -> None:
        stock = make_stock(dtype=torch.float64)
        sparse = sparse_like(stock)
        batches = [zipf_inputs(stock, 32) for _ in range(3)]
        for sae in (stock, sparse):
            optimizer = optimizer_class(sae.parameters(), lr=1e-3)
            for x in batches:
                optimizer.zero_grad()
                forward_pass(sae, x).loss.backward()
                optimizer.step()
        assert_same_training(sparse, stock, tolerance=1e-10)

    def test_writing_a_checkpoint_leaves_the_moments_in_place(self) -> None:
        sparse = sparse_like(make_stock())
        trainer = make_trainer(sparse)
        trainer.step(zipf_inputs(sparse, 9))
        live = trainer.optimizer.state[sparse.W_enc]
        written = trainer.optimizer.state_dict()["state"][
            [name for name, _ in sparse.named_parameters()].index("W_enc")
        ]
        for name in ("exp_avg", "exp_avg_sq"):
            assert written[name].is_contiguous()
            assert live[name].stride() == sparse.W_enc.stride() != written[name].stride()
            assert torch.equal(live[name], written[name])


class TestHooks:
    NAMES = ("hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")

    @pytest.fixture
    def saes(self) -> tuple[TopKTrainingSAE, SparseTopKTrainingSAE]:
        stock = make_stock(dtype=torch.float64)
        return stock, sparse_like(stock)

    def test_run_with_cache(self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE]) -> None:
        x = zipf_inputs(saes[0], 6).view(2, 3, -1)
        (expected, expected_cache), (actual, cache) = (sae.run_with_cache(x) for sae in saes)
        torch.testing.assert_close(actual, expected)
        assert cache.keys() == expected_cache.keys()
        assert set(self.NAMES) < set(cache.keys())
        for name, value in expected_cache.items():
            assert type(cache[name]) is torch.Tensor
            torch.testing.assert_close(cache[name], value)
        # Afterwards nothing is dense any more.
        assert saes[1].implementation.name == "torch"

    @pytest.mark.parametrize("name", NAMES)
    def test_a_hook_makes_the_call_dense(
        self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE], name: str
    ) -> None:
        x = zipf_inputs(saes[0], 6)
        seen: list[list[torch.Tensor]] = []
        outputs = []
        for sae in saes:
            calls: list[torch.Tensor] = []

            def halve(value: torch.Tensor, hook: Any, calls: Any = calls) -> torch.Tensor:  # noqa: ARG001
                calls.append(value)
                return value * 0.5

            with sae.hooks(fwd_hooks=[(name, halve)]):
                if isinstance(sae, SparseTopKTrainingSAE):
                    assert sae.implementation.name == "dense"
                    assert name in sae.implementation.reason
                outputs.append(forward_pass(sae, x))
                outputs[-1].loss.backward()
            seen.append(calls)
        for expected, actual in zip(*seen, strict=True):
            assert type(actual) is torch.Tensor
            torch.testing.assert_close(actual, expected)
        assert seen[0]
        torch.testing.assert_close(outputs[1].sae_out, outputs[0].sae_out)
        for parameter, expected in saes[0].named_parameters():
            torch.testing.assert_close(getattr(saes[1], parameter).grad, expected.grad)
        assert type(forward_pass(saes[1], x).feature_acts) is SparseFeatureActs

    @pytest.mark.parametrize("name", NAMES)
    def test_backward_hooks(
        self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE], name: str
    ) -> None:
        x = zipf_inputs(saes[0], 6)
        seen = []
        for sae in saes:
            gradients: list[torch.Tensor] = []
            hook = getattr(sae, name)
            hook.add_hook(lambda grad, hook, g=gradients: g.append(grad), dir="bwd")  # noqa: ARG005
            forward_pass(sae, x).loss.backward()
            sae.reset_hooks(including_permanent=True)
            seen.append(gradients)
        assert len(seen[0]) == 1
        torch.testing.assert_close(seen[1], seen[0])

    @pytest.mark.parametrize("name", ["hook_sae_input", "hook_sae_output"])
    def test_hooks_that_stay_sparse(
        self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE], name: str
    ) -> None:
        x = zipf_inputs(saes[0], 6)
        results = []
        for sae in saes:
            with sae.hooks(fwd_hooks=[(name, lambda value, hook: 2 * value)]):  # noqa: ARG005
                if isinstance(sae, SparseTopKTrainingSAE):
                    assert sae.implementation.name == "torch"
                results.append(sae(x))
        torch.testing.assert_close(results[1], results[0])

    def test_error_term(self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE]) -> None:
        """Values, what the hook sees, and the gradient, which does not go through the error."""
        values = []
        for sae in saes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                sae.use_error_term = True
            x = zipf_inputs(saes[0], 6) if not values else values[0][0].detach().clone()
            x.requires_grad_()
            errors: list[torch.Tensor] = []
            with sae.hooks(
                fwd_hooks=[("hook_sae_error", lambda value, hook, e=errors: e.append(value))]  # noqa: ARG005
            ):
                out = sae(x)
            (gradient,) = torch.autograd.grad((out**2).sum(), x)
            values.append((x, out, errors[0], gradient))
            with sae.hooks(fwd_hooks=[("hook_sae_acts_post", lambda v, hook: v * 0)]):  # noqa: ARG005
                values[-1] += (sae(x),)
        torch.testing.assert_close(values[0][1], values[0][0])
        for expected, actual in zip(*values, strict=True):
            torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("use_error_term", [False, True])
    @pytest.mark.parametrize("trained", [False, True])
    def test_spliced_into_a_model(
        self, model: HookedSAETransformer, tokens: torch.Tensor, use_error_term: bool,
        trained: bool,
    ) -> None:  # fmt: skip
        stock = make_stock(d_in=D_MODEL, d_sae=D_SAE, k=K)
        sparse = sparse_like(stock)
        if trained:
            make_trainer(sparse).step(zipf_inputs(sparse, 16))
            stock = stock_like(sparse, torch.float32)
        results = []
        for sae in (stock, sparse):
            sae.cfg.metadata.hook_name = HOOK
            with model.saes(saes=[sae], use_error_term=use_error_term):
                logits, cache = model.run_with_cache(tokens[:3])
                ablated = model.run_with_hooks(
                    tokens[:3],
                    fwd_hooks=[(f"{HOOK}.hook_sae_acts_post", lambda acts, hook: acts * 0)],  # noqa: ARG005
                )
                plain = model(tokens[:3])
                loss = model(tokens[:3], return_type="loss")
                model.zero_grad()
                loss.backward()
            results.append((logits, ablated, plain, loss, model.W_E.grad, dict(cache)))
        *expected, expected_cache = results[0]
        *actual, cache = results[1]
        for left, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(left, right)
        assert cache.keys() == expected_cache.keys()
        assert f"{HOOK}.hook_sae_acts_post" in cache
        assert (f"{HOOK}.hook_sae_error" in cache) == use_error_term
        for name, value in expected_cache.items():
            torch.testing.assert_close(cache[name], value)
        if use_error_term:
            torch.testing.assert_close(expected[2], model(tokens[:3]))

    def test_disabled_hooks(self, saes: tuple[TopKTrainingSAE, SparseTopKTrainingSAE]) -> None:
        from sae_lens.saes.sae import _disable_hooks

        sparse = saes[1]
        sparse.hook_sae_acts_post.add_hook(lambda tensor, *, hook: tensor * 0)  # noqa: ARG005
        assert sparse.implementation.name == "dense"
        with _disable_hooks(sparse):
            assert sparse.implementation.name == "torch"
            acts = sparse.encode(zipf_inputs(sparse, 4))
        assert acts.any()

    def test_head_reshaping(self) -> None:
        stock = make_stock(d_in=12, reshape_activations="hook_z")
        sparse = sparse_like(stock)
        x = zipf_inputs(stock, 6).view(2, 3, 4, 3)
        for sae in (stock, sparse):
            sae.turn_on_forward_pass_hook_z_reshaping()
        torch.testing.assert_close(sparse.encode(x), stock.encode(x))
        torch.testing.assert_close(sparse(x), stock(x))
        assert sparse(x).shape == x.shape
        with pytest.raises(ValueError, match="x must have d_in=12"):
            sparse.encode(torch.zeros(2, 3, 4, 4))
        assert isinstance(stock, TopKTrainingSAE)
